"""The harness of all benchmarks: ours and a peer in turn, on the same work, in the same process.

A benchmark is `python -m benchmarks.<name> [--quick] [--record]`. It prints a table and, as the last line of
stdout, one JSON object `{case: {"ours", "peer", "ratio", "unit", "goal"}}`. Figures are rates, so that more
is better, and a ratio above 1 means that ours is the faster.

What else runs on the machine does not hit both sides alike (PyTorch's threads wait for one another by
spinning and were seen to lose ten times more than ours), so each round notes how many cores other processes
used, and the rounds in which that was little are the ones that count, where there are enough of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results"
QUIET = 0.15  # cores used by others, below which a round counts as undisturbed
ENOUGH = 3  # undisturbed rounds that suffice for a median of their own


class Round(NamedTuple):
    """One call of each side: seconds, and the cores that other processes used meanwhile."""

    ours: float
    peer: float
    others: float


@dataclasses.dataclass(frozen=True)
class Case:
    """What was measured. `work` is what one call does, in `unit` times seconds (images for images/s)."""

    name: str
    work: float
    unit: str
    goal: float | None
    rounds: Sequence[Round]
    first_ours: float  # seconds of the first call, with compilation
    first_peer: float

    @property
    def counted(self) -> list[Round]:
        """The undisturbed rounds, or all of them where those are too few."""
        quiet = [r for r in self.rounds if r.others < QUIET]
        return quiet if len(quiet) >= ENOUGH else list(self.rounds)

    @property
    def others(self) -> float:
        """The median number of cores that other processes used in the rounds that count."""
        return statistics.median(r.others for r in self.counted)

    def summary(self) -> dict[str, Any]:
        """Rates by the median time; the ratio is the median of the rounds' ratios, which cancels drift."""
        return {
            "ours": _round(self.work / statistics.median(r.ours for r in self.counted)),
            "peer": _round(self.work / statistics.median(r.peer for r in self.counted)),
            "ratio": _round(statistics.median(r.peer / r.ours for r in self.counted)),
            "unit": self.unit,
            "goal": self.goal,
        }


def compare(
    name: str,
    ours: Callable[[], object],
    peer: Callable[[], object],
    *,
    work: float,
    unit: str,
    goal: float | None = None,
    rounds: int = 15,
    seconds: float = 60.0,
) -> Case:
    """Time `ours` and `peer` in turn; each does `work` and returns when it is done (blocks on its results).

    Stops after `rounds` undisturbed rounds or when `seconds` are over, but never before `ENOUGH` rounds.
    Which side goes first changes every round. The first call of each, which compiles, and one more do not
    count.
    """
    first_ours, first_peer = _seconds(ours), _seconds(peer)
    ours(), peer()
    done: list[Round] = []
    start = time.perf_counter()
    while len(done) < ENOUGH or (
        sum(r.others < QUIET for r in done) < rounds and time.perf_counter() - start < seconds
    ):
        before = _other_processes()
        began = time.perf_counter()
        if len(done) % 2:
            peer_seconds, ours_seconds = _seconds(peer), _seconds(ours)
        else:
            ours_seconds, peer_seconds = _seconds(ours), _seconds(peer)
        others = (_other_processes() - before) / (time.perf_counter() - began)
        done.append(Round(ours_seconds, peer_seconds, max(others, 0.0)))
    return Case(name, work, unit, goal, done, first_ours, first_peer)


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with the flags that all benchmarks share, to which one may add its own."""
    flags = argparse.ArgumentParser(description=description)
    flags.add_argument("--quick", action="store_true", help="fewer rounds: at most 5 minutes on 2 cores")
    flags.add_argument("--record", action="store_true", help=f"write the figures to {RESULTS.name}/")
    return flags


def table(cases: Sequence[Case]) -> str:
    """The cases as lines of text."""
    figures = f"{'ours':>10s} {'peer':>10s} {'ratio':>7s} {'goal':>6s}  unit      "
    lines = [f"{'case':38s} {figures}  first call, rounds that count"]
    for case in cases:
        s = case.summary()
        goal = "" if s["goal"] is None else f"{s['goal']:g}"
        figures = f"{s['ours']:10.4g} {s['peer']:10.4g} {s['ratio']:7.2f} {goal:>6s}  {s['unit']:10s}"
        first = f"{case.first_ours:.1f} s against {case.first_peer:.1f} s"
        disturbed = f", DISTURBED: others used {case.others:.1f} cores" if case.others >= QUIET else ""
        counts = f"{len(case.counted)} of {len(case.rounds)}{disturbed}"
        lines.append(f"{case.name:38s} {figures}  {first}, {counts}")
    return "\n".join(lines)


def report(name: str, cases: Sequence[Case], peers: Sequence[str], record: bool, notes: Any = None) -> None:
    """Print the table and the JSON line; with `record`, write both to results/<name>.json.

    Args:
        name: of the benchmark.
        cases: what `compare` returned.
        peers: distributions whose versions belong to the record, besides our own stack.
        record: whether to write.
        notes: anything else worth keeping, such as the share of the peak.
    """
    print(table(cases))
    summary = {case.name: case.summary() for case in cases}
    if record:
        contents = {
            "cases": summary,
            "others": {case.name: _round(case.others) for case in cases},
            "notes": notes,
            "hardware": hardware(),
            "versions": {d: _version(d) for d in ("jaxgen", "jax", "jaxlib", "flax", "optax", *peers)}
            | {"python": platform.python_version()},
        }
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{name}.json"
        path.write_text(json.dumps(contents, indent=1) + "\n")
        print(f"recorded in {path}")
    print(json.dumps(summary), flush=True)


def hardware() -> dict[str, Any]:
    """The device, the processor and the cores that this process may use."""
    import jax

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
        ]
        model = names[0] if names else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "device": jax.devices()[0].device_kind,
        "processor": model,
        "cores": cores,
        "system": platform.system(),
    }


def require(*modules: str) -> None:
    """End with one sentence and status 2 where one of the peers' `modules` is not installed."""
    for module in modules:
        try:
            __import__(module)
        except ImportError:
            message = f'this benchmark compares with {module}, which is missing: pip install "jaxgen[bench]".'
            print(message, file=sys.stderr)
            raise SystemExit(2) from None


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _other_processes() -> float:
    """CPU seconds that all but this process have used since boot; 0 where the system does not tell."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return busy - time.process_time()


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _round(value: float) -> float:
    return float(f"{value:.4g}")
