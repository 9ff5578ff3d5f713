"""The Huffman tree of a vocabulary: short paths for frequent words (Huffman 1952; Mikolov et al. 2013b)."""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np

from jaxgen.types import UserError


class Paths(NamedTuple):
    """Each word's way from the root of the tree.

    nodes: int32 [V, L], the inner nodes on the way, numbered from 0 to V - 2; 0 beyond its end
    turns: float32 [V, L], 1 left, -1 right, 0 beyond its end
    """

    nodes: np.ndarray
    turns: np.ndarray


def huffman_paths(counts: np.ndarray) -> Paths:
    """The paths of least mean length sum_w count(w) length(w) / sum_w count(w).

    counts: [V], at least two words. Equal counts are merged in the order of their numbers, words before inner
    nodes, so that the tree is a function of the counts alone.
    """
    size = len(counts)
    if size < 2:
        raise UserError("hierarchical softmax needs a vocabulary of at least two words.")
    heap = [(int(count), word) for word, count in enumerate(counts)]
    heapq.heapify(heap)
    children: list[tuple[int, int]] = []
    while len(heap) > 1:
        first, left = heapq.heappop(heap)
        second, right = heapq.heappop(heap)
        heapq.heappush(heap, (first + second, size + len(children)))
        children.append((left, right))
    ways: dict[int, list[tuple[int, float]]] = {size + len(children) - 1: []}
    for node in range(len(children) - 1, -1, -1):  # a node is made after its children
        way = ways.pop(size + node)
        for child, turn in zip(children[node], (1.0, -1.0), strict=True):
            ways[child] = [*way, (node, turn)]
    longest = max(map(len, ways.values()))
    nodes, turns = np.zeros((size, longest), np.int32), np.zeros((size, longest), np.float32)
    for word, way in ways.items():
        nodes[word, : len(way)] = [node for node, _ in way]
        turns[word, : len(way)] = [turn for _, turn in way]
    return Paths(nodes, turns)
