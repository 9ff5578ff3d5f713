"""Weak scaling over forced host devices: what n devices cost on top of the work itself.

  python -m benchmarks.scaling [--quick] [--record | --out=FILE]

All devices share the same cores, so n devices with a batch each take n times as long at best. What the
devices themselves cost is seen against one device that does the same total work on the same cores; what our
loop costs (making batches, placing them, dispatching, logging) against the same compiled update called on a
batch that is already there. Every point is a process of its own. The last line of stdout is
{devices: {"rows", "one_device", "devices", "loop", "devices_overhead", "loop_overhead"}}: seconds an update,
and shares of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import timing

DEVICES = (1, 2, 4, 8)
ROWS = 32  # of each device's batch
EXPERIMENT, PRESET = "experiments/classifier.py", "digits"


def measure(rows: int, steps: int) -> dict[str, float]:
    """Seconds an update with `rows` rows over all devices of this process: bare, and in the loop."""
    import jax
    import numpy as np

    from jaxgen import cli, loop, sharding, workdir

    sharding.initialize(distributed=False)
    mesh = sharding.make_mesh()
    experiment_file = cli.load_experiment(EXPERIMENT)
    config = cli.preset_config(experiment_file, PRESET)
    span = 10
    config.update_from_flattened_dict(
        {
            "data.batch_size": rows,
            "train.num_steps": steps,
            "train.steps_per_dispatch": span,
            "train.log_every": span,
            "train.validate_every": steps,
            "train.checkpoint_every": steps,
            "evaluation.batch_size": 360,
        }
    )
    experiment = experiment_file.module.build(config, mesh)
    abstract = loop.abstract_state(experiment, mesh)
    state = loop.initial_state(experiment, mesh, abstract)
    where = jax.tree.map(lambda leaf: leaf.sharding, state)
    update = loop.make_steps(experiment.system, mesh, state_sharding=where)
    batches = [experiment.train_batch(step) for step in range(span)]
    stacked = {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}
    placed = sharding.place(mesh, stacked, axis=1)
    seconds = []
    for _ in range(1 + steps // span):
        start = time.perf_counter()
        state, metrics = update(state, placed)
        jax.block_until_ready((state, metrics))
        seconds.append((time.perf_counter() - start) / span)
    with tempfile.TemporaryDirectory() as folder:
        loop.train(experiment, Path(folder), mesh, show_progress=False)
        rates = workdir.read_metrics(folder)["train/steps_per_second"]
    return {
        "bare": statistics.median(seconds[1:]),  # the first one compiles
        "loop": statistics.median(1 / rate for _, rate in rates),
    }


def _elsewhere(devices: int, rows: int, steps: int) -> dict[str, float]:
    """`measure` in a process with that many devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.scaling", f"--measure={rows}", f"--steps={steps}"],
        env={**os.environ, "XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def compare(steps: int) -> dict[str, dict[str, float]]:
    """The table: for each number of devices what the docstring of this file says."""
    found = {}
    for devices in DEVICES:
        rows = ROWS * devices
        alone = _elsewhere(1, rows, steps)
        several = alone if devices == 1 else _elsewhere(devices, rows, steps)
        found[str(devices)] = {
            "rows": rows,
            "one_device": alone["bare"],
            "devices": several["bare"],
            "loop": several["loop"],
            "devices_overhead": several["bare"] / alone["bare"] - 1,
            "loop_overhead": several["loop"] / several["bare"] - 1,
        }
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    """The points as lines of text."""
    lines = ["devices   rows  one device  n devices       loop  devices cost  loop costs   (ms an update)"]
    for devices, row in found.items():
        times = "".join(f"{1e3 * row[name]:11.2f}" for name in ("one_device", "devices", "loop"))
        shares = f"{row['devices_overhead']:+13.1%} {row['loop_overhead']:+11.1%}"
        lines.append(f"{devices:>7s} {row['rows']:6.0f} {times} {shares}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer updates")
    parser.add_argument("--record", action="store_true", help="write to benchmarks/results/scaling.json")
    parser.add_argument("--out", type=Path, help="write the same to this file")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)  # rows; a point's own process
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        print(json.dumps(measure(asked.measure, asked.steps)))
        return
    found = compare(60 if asked.quick else 300)
    print(table(found))
    contents: dict[str, Any] = {
        "cases": found,
        "preset": f"{EXPERIMENT}:{PRESET}",
        "unit": "seconds an update",
        "hardware": timing.hardware(),
        "versions": {name: timing._version(name) for name in ("jaxgen", "jax", "jaxlib", "flax", "optax")}
        | {"python": platform.python_version()},
    }
    for path in [asked.out] * bool(asked.out) + [timing.RESULTS / "scaling.json"] * asked.record:
        path.write_text(json.dumps(contents, indent=1) + "\n")
        print(f"written to {path}")
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
