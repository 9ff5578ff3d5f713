"""Trains a small DDPM on one mesh after another, in this process or as one of several.

As a command, with its jobs as JSON: the number of devices is what XLA_FLAGS says, and the processes find each
other by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
"""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
from command import ROOT, environment

from jaxgen import cli, loop, session, sharding
from jaxgen.types import UserError

SMALL = {
    "model.channels": 16,
    "model.head_dim": 16,
    "model.channel_multipliers": (1,),
    "model.attention_resolutions": (),
    "data.batch_size": 16,
    "train.num_steps": 4,
    "train.validate_every": 4,
    "evaluation.num_likelihood": 16,
    "evaluation.classifier": "",
}
AS_FLAGS = [
    f"--config.{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
    for name, value in SMALL.items()
]


def build(*, devices=None, fsdp=1):
    """The small DDPM and the mesh that it is built for."""
    mesh = sharding.make_mesh(fsdp, num_devices=devices)
    module = cli.load_experiment("experiments/ddpm.py").module
    config = module.get_config("smoke")
    config.update_from_flattened_dict(SMALL)
    return module.build(config, mesh), mesh


def train(workdir, *, until, devices=None, fsdp=1, poisoned=None):
    """Trains to update `until`, saving at 2 and 4; the first process writes WORKDIR/seen.npz.

    poisoned: the number of a process whose rows of batch 2 hold a NaN

    That file holds each array of the last state, `batches`, the numbers of the batches that were asked
    for, and `largest_share`, the share of the largest parameter that a device holds.
    """
    workdir = Path(workdir)
    experiment, mesh = build(devices=devices, fsdp=fsdp)
    batches = []

    def train_batch(step):
        batches.append(step)
        rows = dict(experiment.train_batch(step))
        if step == 2 and jax.process_index() == poisoned:
            rows["image"] = rows["image"].copy()
            rows["image"][0, 0, 0, 0] = np.nan
        return rows

    def validate(state):
        return experiment.validate(state) if until == 4 else {}  # its program takes a while to compile

    settings = dataclasses.replace(experiment.loop, num_steps=until)
    state = loop.train(
        dataclasses.replace(experiment, train_batch=train_batch, validate=validate, loop=settings),
        workdir,
        mesh,
        show_progress=False,
    )
    largest = max(jax.tree.leaves(state.params), key=lambda leaf: leaf.size)
    arrays = as_arrays(state)
    if sharding.is_first_process():
        share = largest.addressable_shards[0].data.size / largest.size
        np.savez(workdir / "seen.npz", batches=batches, largest_share=share, **arrays)


def as_arrays(state):
    """{state.params['kernel']: its array, …}."""
    whole = sharding.to_host(state._replace(key=jax.random.key_data(state.key)))
    return {f"state{jax.tree_util.keystr(path)}": leaf for path, leaf in jax.tree.leaves_with_path(whole)}


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def start(command, *, processes=1, devices=1, **changes):
    """The started processes, each with its own `devices`, which find each other where there are several."""
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    together = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": str(processes)}
    return [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment(
                XLA_FLAGS=flags,
                **({**together, "JAX_PROCESS_ID": str(number)} if processes > 1 else {}),
                **changes,
            ),
        )
        for number in range(processes)
    ]


def finish(running, seconds=600):
    """(status, stdout, stderr) of each; none is left running."""
    try:
        done = [process.communicate(timeout=seconds) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    return [(process.returncode, *texts) for process, texts in zip(running, done, strict=True)]


def fail_on_process_1():
    """What goes wrong on one process alone."""
    with sharding.together():
        if jax.process_index() == 1:
            raise UserError("The disk of process 1 is full.")


def train_elsewhere(*jobs, processes=1, devices=1):
    """Has processes of their own do the jobs; returns the mistakes that each told, as lines.

    A job is the arguments of `train`, or "fail_on_process_1".
    """
    command = [sys.executable, str(Path(__file__)), json.dumps(jobs)]
    told = []
    for status, stdout, stderr in finish(start(command, processes=processes, devices=devices)):
        assert status == 0, stderr
        told.append([line for line in stdout.splitlines() if line.startswith("UserError: ")])
    return told


if __name__ == "__main__":
    session._use_compilation_cache()
    sharding.initialize(distributed="JAX_PROCESS_ID" in os.environ)
    for job in json.loads(sys.argv[1]):
        try:
            if job == "fail_on_process_1":
                fail_on_process_1()
            else:
                train(**job)
        except UserError as error:
            print(f"UserError: {error}", flush=True)
