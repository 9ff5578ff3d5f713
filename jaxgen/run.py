"""The one entry point.

  python -m jaxgen.run --list
  python -m jaxgen.run --config=experiments/ddpm.py:digits --workdir=runs/ddpm_digits \\
      [--config.optim.clip_norm=0.5 ...]
  python -m jaxgen.run --config=... --workdir=... --mode=evaluate|sample|report|compare
  python -m jaxgen.run --config=... --mode=plan --chips=64 --chip=v5p

Mode train (the default) goes on from the newest checkpoint of the workdir if there is one, trains,
evaluates, samples and writes the report. A mistake of the user ends with one sentence and status 2.
"""

from __future__ import annotations

import functools
import io
import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import absl.logging
import jax
from absl import flags
from ml_collections import ConfigDict

from jaxgen import cli, memory
from jaxgen.types import UserError

MODES = ("train", "evaluate", "sample", "report", "compare", "plan")
# Flags that only these modes look at.
_ONLY_IN = {
    **dict.fromkeys(("seed", "num_samples"), ("sample",)),
    "checkpoint": ("evaluate", "sample"),
    "record": ("report",),
    "tag": ("report", "compare"),
    "profile": ("train",),
    **dict.fromkeys(("chip", "chips"), ("plan",)),
}
_NO_CONFIG = "Say what to run: --config=experiments/NAME.py:PRESET; --list shows them all."


def define_flags() -> flags.FlagValues:
    """The flags, not yet parsed."""
    values = flags.FlagValues()
    text, yes_no, whole = (
        functools.partial(define, flag_values=values)
        for define in (flags.DEFINE_string, flags.DEFINE_bool, flags.DEFINE_integer)
    )

    def choice(name: str, default: str, choices: Sequence[str], about: str) -> None:
        parser = cli.Choice(list(choices))
        about = f"<{'|'.join(choices)}>: {about}"
        flags.DEFINE(parser, name, default, about, values, flags.ArgumentSerializer())

    yes_no("help", False, "Show this.", short_name="h")
    yes_no("list", False, "List every experiment and preset, and stop.")
    text("workdir", None, "The folder that this run writes to.")
    choice("mode", "train", MODES, "What to do with the run.")
    text("data_dir", None, "Where original data files lie; default: the environment's JAXGEN_DATA_DIR.")
    whole("num_samples", None, "Mode sample: how many.", lower_bound=1)
    whole("seed", 0, "Mode sample: the seed of the samples.", lower_bound=0, upper_bound=2**32 - 1)
    about = "Modes evaluate and sample: which checkpoint; best on the test split if no other validates."
    choice("checkpoint", "newest", ("newest", "best"), about)
    yes_no("record", False, "Mode report: write the run to experiments/results/ too.")
    text("tag", "", "Modes report --record and compare: suffix of the recorded run's name.")
    yes_no("distributed", False, "Join the processes of a cluster.")
    whole("fsdp", 1, "Over how many devices each large array of the state is laid.", lower_bound=1)
    text("chip", "h100", "Mode plan: what it would run on: h100, v5e, v5p.")
    whole("chips", 1, "Mode plan: how many of them.", lower_bound=1, upper_bound=10**6)
    yes_no("profile", False, "Mode train: write a profiler trace to WORKDIR/profile.")
    return values


def run(asked: flags.FlagValues, source: str | None, config: ConfigDict | None) -> None:
    """Does what the parsed flags ask for."""
    if asked.help:
        print(f"{__doc__}\nFlags:\n{asked.module_help(sys.modules[__name__]).strip().partition(chr(10))[2]}")
        return
    if asked.list:
        print(cli.list_experiments())
        return
    _check_flags_of_mode(asked)
    if asked.data_dir is not None:
        data_dir = os.path.expanduser(asked.data_dir)
        if not os.path.isdir(data_dir):
            raise UserError(f"--data_dir={asked.data_dir} is not a folder.")
        os.environ["JAXGEN_DATA_DIR"] = os.path.abspath(data_dir)
    if asked.mode == "plan":
        if source is None or config is None:
            raise UserError(_NO_CONFIG)
        from jaxgen import plan  # here, as session below

        print(plan.plan(source, config, chip=asked.chip, chips=asked.chips, fsdp=asked.fsdp))
        return
    if not asked.workdir:
        raise UserError("Say where the run's files go: --workdir=runs/NAME.")
    workdir = Path(os.path.expanduser(asked.workdir)).absolute()  # "--workdir=~/x" is left so by the shell

    from jaxgen import session  # here, so that the mistakes above are told a second or two earlier

    if asked.mode == "report":
        session.report(workdir, record_it=asked.record, tag=asked.tag)
        return
    if asked.mode == "compare":
        session.compare(workdir, tag=asked.tag)
        return
    if source is None or config is None:
        raise UserError(_NO_CONFIG)
    this_run = session.Session(
        source,
        config,
        workdir,
        trained=asked.mode != "train",
        distributed=asked.distributed,
        fsdp=asked.fsdp,
    )
    if asked.mode == "train":
        this_run.train(profile=asked.profile)
    elif asked.mode == "evaluate":
        this_run.evaluate(asked.checkpoint)
    else:
        this_run.sample(asked.checkpoint, num=asked.num_samples or 0, seed=asked.seed)


def _check_flags_of_mode(asked: flags.FlagValues) -> None:
    """UserError for a flag that the mode would ignore."""
    for name, modes in _ONLY_IN.items():
        if asked[name].present and asked.mode not in modes:
            hint = ": a run's seed is --config.seed" if name == "seed" else ""
            raise UserError(f"--{name} belongs to mode {' or '.join(modes)}, not {asked.mode}{hint}.")


def main(argv: Sequence[str]) -> int:
    """Parses the command line and runs; returns the exit status."""
    try:
        asked = define_flags()
        source, config = cli.parse(argv, asked)
        run(asked, source, config)
    except UserError as error:
        cli.complain(error)
        return 2
    except OSError as error:
        # What no layer below has worded better: a full disk, a folder that may not be read, a name too long.
        where = f": {error.filename}" if error.filename else ""
        cli.complain(UserError(f"{error.strerror or error}{where}; nothing saved was lost."))
        return 2
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not memory.ran_out(error):
            raise
        reason = str(error).partition("\n")[0]
        cli.complain(
            UserError(
                f"The memory does not suffice ({reason}): lower data.batch_size, evaluation.batch_size or "
                "the size of the model, or raise optim.accumulate."
            )
        )
        return 2
    except KeyboardInterrupt:
        cli.complain(UserError("stopped by SIGINT."))
        return 128 + signal.SIGINT
    return 0


def _quiet_libraries() -> None:
    """Keeps Orbax from printing, with tracebacks, what it raises as well."""
    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        # TensorStore speaks of a write that failed to an event loop that Orbax has left.
        if "Event loop is closed" not in str(unraisable.exc_value):
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = hook


def _leave(argv: Sequence[str]) -> NoReturn:
    """Runs and ends the process; one of several that fails ends without waiting for the others."""
    try:
        status = main(argv)
    except SystemExit as stopped:
        status = stopped.code if isinstance(stopped.code, int) else 1
    except BaseException:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        status = 1
    if status and jax.distributed.is_initialized():
        # At a normal end JAX waits for the other processes, which wait for this one: for minutes.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a locale without arrows is no reason to fail
    _quiet_libraries()
    memory.collect_garbage_seldom()
    memory.keep_freed_memory()
    _leave(sys.argv)
