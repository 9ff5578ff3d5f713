"""Refuses programs that XLA on CPUs computes wrongly, whenever a test compiles one.

jaxlib 0.10.2 to 0.12.0 (at least) hand a reduction and what leads to it to YNNPACK as one fusion. A product
of matrices in it, one of whose factors is a single number repeated (zeros(...), a broadcast scalar), reads
memory that nobody wrote: the result is right, garbage or NaN, from one compilation to the next.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from jax._src import compiler

_COMPUTATION = re.compile(r"^%(\S+) \(.*?\) -> .*? \{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
_YNNPACK_FUSION = re.compile(r" fusion\(.* calls=%([^\s,]+).*__ynn_fusion")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%(\S+) = \S+ ([\w-]+)\((.*?)\)(.*)$", re.MULTILINE)


class Miscompiled(AssertionError):
    """A program that may compute garbage on CPU."""


def products_with_a_repeated_number(hlo: str) -> Iterator[str]:
    """The names of such products in the text of an optimised program."""
    bodies = dict(_COMPUTATION.findall(hlo))
    for fusion in _YNNPACK_FUSION.findall(hlo):
        instructions = {name: rest for name, *rest in _INSTRUCTION.findall(bodies[fusion])}

        def is_repeated(name: str) -> bool:
            operation, operands, attributes = instructions[name]
            if operation == "bitcast":
                return is_repeated(operands.removeprefix("%"))
            return operation == "broadcast" and "dimensions={}" in attributes

        for name, (operation, operands, _) in instructions.items():
            if operation == "dot" and any(map(is_repeated, re.findall(r"%([^\s,]+)", operands))):
                yield name


def refuse() -> None:
    """From here on, compiling such a program raises `Miscompiled`."""
    compile_or_get_cached = compiler.compile_or_get_cached

    def checked(*args, **kwargs):
        executable = compile_or_get_cached(*args, **kwargs)
        for module in executable.hlo_modules():
            text = module.to_string()
            if "__ynn_fusion" in text and (found := list(products_with_a_repeated_number(text))):
                raise Miscompiled(
                    f"{module.name} multiplies by a matrix of one repeated number in {', '.join(found)},"
                    " which XLA on CPU may compute wrongly: leave the product out, or let the matrix be an"
                    " argument or a loop's carry."
                )
        return executable

    compiler.compile_or_get_cached = checked
