"""What a run would cost on chips that are not here: step time, efficiency and memory, from its own program.

The update is compiled for a few CPU devices laid out like the chips, and never run. XLA's analyses of it say
what a chip computes, moves and holds; the collectives are read from the compiled text. A roofline turns that
into time (docs/SCALING.md has the formulas and what they leave out).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal
from unittest import mock

import jax
from jax.extend import core
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxgen import cli, loop, session, sharding
from jaxgen.recorded import table
from jaxgen.types import Experiment, PyTree, UserError, unknown

CHIP_COUNTS = (1, 8, 64, 512)


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip as its maker describes it; every figure is of one chip, in bytes, bytes/s and FLOP/s.

    peak: by compute dtype, without sparsity. float32 is what JAX's default precision makes of it: TF32 on
        H100, bfloat16 passes on TPUs.
    inner: what one direction of the chip's links carries to the others of its domain
    domain: how many chips these links connect
    outer: the chip's share of the network between domains, one direction
    """

    name: str
    peak: dict[str, float]
    memory: float
    bandwidth: float
    inner: float
    domain: int
    outer: float
    source: str


CHIPS = {
    "h100": Chip(
        "NVIDIA H100 SXM5 80 GB",
        {"bfloat16": 989.4e12, "float32": 494.7e12},
        80e9,
        3.35e12,
        450e9,  # NVLink 4: 900 GB/s both ways
        8,
        50e9,  # one 400 Gb/s ConnectX-7 a GPU in a DGX H100
        "NVIDIA H100 Tensor Core GPU data sheet (half of its figures with sparsity); DGX H100 data sheet",
    ),
    "v5e": Chip(
        "Cloud TPU v5e",
        {"bfloat16": 197e12, "float32": 197e12},
        16e9,
        819e9,
        200e9,  # ICI: 400 GB/s both ways
        256,
        3.125e9,  # 2 x 100 Gb/s a host of 8 chips
        "Google Cloud documentation, TPU v5e: key chip and pod specifications",
    ),
    "v5p": Chip(
        "Cloud TPU v5p",
        {"bfloat16": 459e12, "float32": 459e12},
        95 * 2**30,
        2765e9,
        600e9,  # ICI: 1200 GB/s both ways
        6144,  # the largest slice
        6.25e9,  # 50 Gb/s a chip
        "Google Cloud documentation, TPU v5p: key specifications",
    ),
}


def chip_named(name: str) -> Chip:
    """The chip of that name; UserError with a suggestion where there is none."""
    if name not in CHIPS:
        raise unknown("chip", name, tuple(CHIPS))
    return CHIPS[name]


# ---- what an update costs a chip


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation of an update.

    size: the bytes of the whole array, which an all-gather makes and an all-reduce or reduce-scatter adds up
    group: which chips take part: all of them, or those along one axis of the mesh
    """

    kind: str
    size: float
    group: Literal["all", "data", "model"]


@dataclasses.dataclass(frozen=True)
class Cost:
    """An update's costs for each chip: FLOPs, bytes to and from memory, bytes held, and the collectives."""

    flops: float
    traffic: float
    memory: float
    collectives: tuple[Collective, ...] = ()

    def at(self, rows: float, other: Cost, other_rows: float, wanted: float) -> Cost:
        """The cost of `wanted` rows on the line through this one, of `rows`, and `other`, of `other_rows`."""
        share = (wanted - rows) / (other_rows - rows)
        between = lambda a, b: a + share * (b - a)
        return Cost(
            between(self.flops, other.flops),
            between(self.traffic, other.traffic),
            between(self.memory, other.memory),
            self.collectives,  # see `Plan.talk`
        )


@contextlib.contextmanager
def written_for_accelerators() -> Iterator[None]:
    """What is traced inside is what an accelerator would run, where our code has another way on CPUs."""

    def default_way(*args: Any, default: Callable[..., Any], **of_platforms: Callable[..., Any]) -> Any:
        return default(*args)

    with (
        mock.patch.object(jax.lax, "platform_dependent", default_way),
        mock.patch.object(jax, "default_backend", return_value="gpu"),
    ):
        yield


def count_flops(function: Callable[..., Any], *args: PyTree) -> float:
    """The FLOPs of function(*args) on one device, by XLA's analysis of the program before it is optimised.

    XLA counts the body of a loop once; here each `lax.scan` counts as often as it runs. (After optimisation
    some of the CPU's products are calls of libraries, whose FLOPs the analysis does not see.)
    """
    return _count("flops", jax.make_jaxpr(function)(*args))


def _count(what: str, program: core.ClosedJaxpr) -> float:
    """What XLA counts of the program before it is optimised, with every scan as often as it runs."""
    total = _count_once(what, program)
    for length, body in _scans(program.jaxpr):
        total += length * _count(what, body) - _count_once(what, body)
    return total


def _count_once(what: str, program: core.ClosedJaxpr) -> float:
    shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in program.in_avals]
    analysis = jax.jit(core.jaxpr_as_fun(program)).lower(*shapes).cost_analysis()
    return float((analysis or {}).get(what, 0.0))


def _scans(jaxpr: core.Jaxpr) -> Iterator[tuple[int, core.ClosedJaxpr]]:
    """(length, body) of the scans that are in no other scan."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield equation.params["length"], equation.params["jaxpr"]
            continue
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if isinstance(inner, core.ClosedJaxpr):
                    yield from _scans(inner.jaxpr)
                elif isinstance(inner, core.Jaxpr):
                    yield from _scans(inner)


_COLLECTIVE = re.compile(
    r"= (?P<shape>\(.*?\)|\S+) "
    r"(?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?P<start>-start)?\("
)


def _shape_bytes(text: str) -> list[float]:
    """The bytes of each array in an HLO shape such as (f32[3,4]{1,0}, bf16[])."""
    return [
        _dtype_bytes(dtype) * math.prod(int(size) for size in sizes.split(",") if size)
        for dtype, sizes in re.findall(r"([a-z]\w*)\[([\d,]*)\]", text)
    ]


def _dtype_bytes(dtype: str) -> float:
    bits = re.search(r"\d+", dtype)  # bf16, f8e4m3fn, s32
    return int(bits[0]) / 8 if bits else float(dtype == "pred")


def read_collectives(hlo: str, *, data: int, model: int) -> tuple[Collective, ...]:
    """The collectives of a compiled program for a mesh of `data` times `model` devices, data != model.

    One in a loop counts as often as the loop is known to run.
    """
    found = []
    times = _times_run(hlo)
    for name, lines in _computations(hlo):
        for line in lines:
            match = _COLLECTIVE.search(line)
            if not match:
                continue
            sizes = _shape_bytes(match["shape"])
            if match["start"] and match["kind"] != "all-reduce":
                sizes = sizes[len(sizes) // 2 :]  # (what goes in, what comes out)
            members = _group_size(line, data * model)
            size = sum(sizes) * (members if match["kind"] == "reduce-scatter" else 1)
            group: Literal["all", "data", "model"] = (
                "all" if members == data * model else "model" if members == model else "data"
            )
            found += [Collective(match["kind"], size, group)] * times.get(name, 1)
    return tuple(found)


def _group_size(line: str, devices: int) -> int:
    """How many devices take part in each group of a collective."""
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    if listed:
        return len(listed[1].split(","))
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
    return int(iota[1]) if iota else devices


def _computations(hlo: str) -> Iterator[tuple[str, list[str]]]:
    """(name, lines) of each computation of a module's text; the entry's name is ENTRY."""
    name = ""
    lines: list[str] = []
    for line in hlo.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if head and not line.startswith(("HloModule", " ")):
            name, lines = "ENTRY" if head[1] else head[2], []
        elif line.startswith("}"):
            yield name, lines
        else:
            lines.append(line)


def _times_run(hlo: str) -> dict[str, int]:
    """How often each computation runs that is reached through loops and calls."""
    inside = {name: "\n".join(lines) for name, lines in _computations(hlo)}
    times: Counter[str] = Counter()

    def visit(name: str, count: int) -> None:
        times[name] += count
        for line in inside.get(name, "").splitlines():
            body = re.search(r"body=%?([\w.\-]+)", line)
            trips = re.search(r"known_trip_count[^\d]*(\d+)", line)
            if body:
                visit(body[1], count * (int(trips[1]) if trips else 1))
            for called in re.findall(r"(?:to_apply|calls)=%?([\w.\-]+)", line):
                if " call(" in line:
                    visit(called, count)

    visit("ENTRY", 1)
    return dict(times)


def measure(experiment: Experiment, mesh: Mesh, rows: int) -> Cost:
    """What an update of `rows` rows a device costs each device of the mesh; compiles it, runs nothing."""
    state = loop.abstract_state(experiment, mesh)
    whole = rows * mesh.size
    one_device, all_devices = (
        {
            name: jax.ShapeDtypeStruct((count, *field.shape[1:]), field.dtype)
            for name, field in experiment.train_batch(0).items()
        }
        for count in (rows, whole)
    )
    where = jax.tree.map(lambda leaf: leaf.sharding, state)
    layout: dict[str, Any] = {
        "in_shardings": (where, sharding.batch_sharding(mesh)),
        "out_shardings": (where, sharding.replicated(mesh)),
    }
    update = jax.jit(experiment.system.step, donate_argnums=0, **layout)
    # It is not run, so LLVM need not make it fast; what XLA fuses is the same.
    fast_compile: dict[str, Any] = {"xla_backend_optimization_level": 0}
    compiled = update.lower(state, all_devices).compile(fast_compile)
    analysis: Any = compiled.cost_analysis() or {}
    held: Any = compiled.memory_analysis()
    plain_state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
    traced = jax.make_jaxpr(experiment.system.step)(plain_state, one_device)
    flops = _count("flops", traced)
    once = _count_once("flops", traced)
    # The bytes of a loop's body are counted once too; they are taken to grow as its FLOPs do.
    fused = float(analysis.get("bytes accessed", 0.0)) * (flops / once if once else 1.0)
    return Cost(
        flops=flops,
        # The compiled program is fused, but looking rows up in a table or adding to them counts as the whole
        # table in it; before optimisation the rows alone count, but every operation by itself.
        traffic=min(fused, _count("bytes accessed", traced)),
        memory=float(
            held.argument_size_in_bytes
            + held.output_size_in_bytes
            - held.alias_size_in_bytes
            + held.temp_size_in_bytes
        ),
        collectives=read_collectives(
            compiled.as_text() or "", data=mesh.shape["data"], model=mesh.shape["model"]
        ),
    )


# ---- the model


def compute_seconds(cost: Cost, chip: Chip, dtype: str) -> float:
    """The roofline (Williams et al. 2009): max(FLOPs / peak, bytes / bandwidth)."""
    return max(cost.flops / chip.peak[dtype], cost.traffic / chip.bandwidth)


def collective_seconds(kind: str, size: float, members: int, chip: Chip) -> float:
    """Rings within domains of fast links, then between them; each passes on (k - 1) / k of its array.

    An all-reduce goes round twice (reduce-scatter, all-gather), the others once. Between domains a chip
    passes on its share of the array alone.
    """
    rounds = 2 if kind == "all-reduce" else 1
    inside = min(members, chip.domain)
    outside = -(-members // chip.domain)
    ring = lambda k: (k - 1) / k
    return rounds * size * (ring(inside) / chip.inner + ring(outside) / inside / chip.outer)


def _sizes(cost: Cost) -> dict[tuple[str, str], float]:
    """The bytes of the collectives of each kind and group."""
    sizes: dict[tuple[str, str], float] = {}
    for each in cost.collectives:
        sizes[each.kind, each.group] = sizes.get((each.kind, each.group), 0.0) + each.size
    return sizes


@dataclasses.dataclass(frozen=True)
class Plan:
    """An experiment's costs on a chip.

    rows: of the preset's batch, which `cost` is for, on each chip; `doubled` is for twice as many
    devices: how many the two were measured on
    """

    source: str
    chip: Chip
    dtype: str
    fsdp: int
    rows: int
    devices: int
    parameters: int
    cost: Cost
    doubled: Cost

    def seconds(self, chips: int, rows: float) -> float:
        """The time of a step with `rows` rows a chip: computation, then communication, none of it hidden."""
        cost = self.cost.at(self.rows, self.doubled, 2 * self.rows, rows)
        members = {"all": chips, "data": chips // self.fsdp, "model": self.fsdp}
        talking = sum(
            collective_seconds(kind, size, members[group], self.chip)
            for (kind, group), size in self.talk(chips, rows).items()
        )
        return compute_seconds(cost, self.chip, self.dtype) + talking

    def talk(self, chips: int, rows: float) -> dict[tuple[str, str], float]:
        """The bytes of the collectives of each kind and group.

        Those of gradients and parameters are the same for any batch. What grows with the rows is of the whole
        batch, and so grows with the chips too.
        """
        once, twice = _sizes(self.cost), _sizes(self.doubled)
        sizes = {}
        for what in once | twice:
            of_a_row = (twice.get(what, 0.0) - once.get(what, 0.0)) / self.rows
            fixed = once.get(what, 0.0) - of_a_row * self.rows
            sizes[what] = max(fixed + of_a_row * rows * chips / self.devices, 0.0)
        return sizes

    def weak(self, chips: int) -> float:
        """The efficiency with the preset's batch on every chip, against `fsdp` chips that do the same."""
        return self.seconds(self.fsdp, self.rows) / self.seconds(chips, self.rows)

    def strong(self, chips: int) -> float:
        """The efficiency with the batch of `fsdp` chips divided among more of them."""
        share = self.fsdp / chips
        return share * self.seconds(self.fsdp, self.rows) / self.seconds(chips, share * self.rows)

    def advice(self) -> str:
        """Whether an update fits a chip, and what to change where it does not."""
        needed, there = self.cost.memory, self.chip.memory
        share = f"{needed / 1e9:.3g} GB of a chip's {there / 1e9:.3g} GB"
        if needed <= there:
            return f"It fits: {share}."
        of_a_row = (self.doubled.memory - self.cost.memory) / self.rows
        fixed = needed - of_a_row * self.rows
        if fixed >= there:
            parts = 2 ** (math.floor(math.log2(self.fsdp * fixed / there)) + 1)
            return (
                f"It does NOT fit: {share}, and {fixed / 1e9:.3g} GB of it are there whatever the batch: lay "
                f"the state over more chips with --fsdp={parts}."
            )
        rows = int((there - fixed) / of_a_row)
        parts = next(
            n for n in range(1, self.rows + 1) if self.rows % n == 0 and self.rows / n <= max(rows, 1)
        )
        return (
            f"It does NOT fit: {share}; make the batch at most {max(rows, 1)} a chip, or work through it in "
            f"parts with --config.optim.accumulate={parts}."
        )

    def text(self, chip_counts: Iterable[int]) -> str:
        """The plan in words, with a row for each number of chips."""
        cost, chip = self.cost, self.chip
        times = {"FLOPs": cost.flops / chip.peak[self.dtype], "memory traffic": cost.traffic / chip.bandwidth}
        kept, growing = self.talk(self.devices, 0), self.talk(self.devices, self.rows)
        counts: Counter[tuple[str, str]] = Counter((each.kind, each.group) for each in cost.collectives)
        lines = [
            f"{self.source} on {chip.name}, {self.dtype}, {self.parameters:,} parameters.",
            f"An update of {self.rows:,} rows a chip: {cost.flops:.3g} FLOPs "
            f"({_milliseconds(times['FLOPs'])} ms), {cost.traffic:.3g} bytes to and from memory "
            f"({_milliseconds(times['memory traffic'])} ms); "
            f"bound by {max(times, key=lambda name: times[name])}.",
            *(
                f"{counts[kind, group]} {kind} over {_GROUPS[group]}: {kept[kind, group]:.3g} bytes, and "
                f"{(size - kept[kind, group]) / self.devices:.3g} for the rows of each chip."
                for (kind, group), size in growing.items()
            ),
            self.advice(),
            "",
            table([_HEADER, *(self._row(count) for count in chip_counts)], right=range(len(_HEADER))),
            "",
            "Predicted and not measured: from peak figures, which no program reaches, and from what XLA for "
            "CPUs reads and writes. Weak: the preset's batch on every chip; strong: divided among them.",
            f"Chip: {chip.source}.",
        ]
        return "\n".join(lines)

    def _row(self, chips: int) -> tuple[str, ...]:
        seconds = self.seconds(chips, self.rows)
        total = self.rows * self.fsdp
        divided = ("–",) * 3
        if total % chips == 0:
            rows = total // chips
            divided = (f"{rows:,}", _milliseconds(self.seconds(chips, rows)), f"{self.strong(chips):.1%}")
        weak = (
            f"{self.rows * chips:,}",
            _milliseconds(seconds),
            f"{self.rows * chips / seconds:,.0f}",
            f"{self.weak(chips):.1%}",
        )
        return (f"{chips:,}", *weak, *divided)


_GROUPS = {"all": "all chips", "data": "the data axis", "model": "the model axis"}
_HEADER = (
    *("chips", "weak: batch", "ms a step", "rows/s", "efficiency"),
    *("strong: rows a chip", "ms a step", "efficiency"),
)


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}"


# ---- the command


def make_plan(source: str, config: ConfigDict, chip: Chip, mesh: Mesh) -> Plan:
    """The plan of the experiment that `config` of `source` (FILE:PRESET) describes, measured on this mesh.

    mesh: devices that stand for chips, different numbers of them along `data` and `model`
    """
    module = cli.load_experiment(source.partition(":")[0]).module
    # Built for one device, as the sizes of the evaluation need not divide over the others.
    experiment = session.build(module, config, sharding.make_mesh(num_devices=1))
    rows = len(next(iter(experiment.train_batch(0).values())))
    state = loop.abstract_state(experiment, mesh)
    with written_for_accelerators():
        cost, doubled = (measure(experiment, mesh, count) for count in (rows, 2 * rows))
    return Plan(
        source=source,
        chip=chip,
        dtype=config.get("model", {}).get("dtype", "float32"),
        fsdp=mesh.shape["model"],
        rows=rows,
        devices=mesh.size,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        cost=cost,
        doubled=doubled,
    )


def plan(source: str, config: ConfigDict, *, chip: str, chips: int, fsdp: int) -> str:
    """What --mode=plan prints. Raises UserError where something asked for makes no sense."""
    chosen = chip_named(chip)
    if chips % fsdp:
        raise UserError(f"--fsdp={fsdp} does not divide --chips={chips}: use a divisor of it.")
    if config.get("num_seeds", 1) != 1 or config.get("sweep", ""):
        raise UserError("A plan is of one run: leave num_seeds at 1 and sweep empty.")
    mesh = _stand_ins(2 if fsdp != 2 else 4, fsdp)
    counts = sorted({*(count for count in CHIP_COUNTS if count % fsdp == 0), chips})
    return make_plan(source, config, chosen, mesh).text(counts)


def _stand_ins(data: int, model: int) -> Mesh:
    """CPU devices in place of chips; only a process that has not used JAX yet can have them."""
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("NPROC", "16")  # see sharding.initialize
    jax.config.update("jax_num_cpu_devices", data * model)
    return sharding.make_mesh(model)
