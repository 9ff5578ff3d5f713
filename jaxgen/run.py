"""The one entry point.

  python -m jaxgen.run --list
  python -m jaxgen.run --config=experiments/ddpm.py:digits --workdir=runs/ddpm_digits \\
      [--config.optim.clip_norm=0.5 ...]
  python -m jaxgen.run --config=... --workdir=... --mode=evaluate|sample|report|compare

Mode train (the default) goes on from the newest checkpoint of the workdir if there is one, trains,
evaluates, samples and writes the report.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict

from jaxgen import cli
from jaxgen.types import UserError

_WORKDIR = flags.DEFINE_string("workdir", None, "The folder that this run writes to.")
_MODE = flags.DEFINE_enum(
    "mode", "train", ["train", "evaluate", "sample", "report", "compare"], "What to do with the run."
)
_LIST = flags.DEFINE_bool("list", False, "List every experiment and preset, and stop.")
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Where original data files lie; the default is the environment's JAXGEN_DATA_DIR."
)
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", None, "Mode sample: how many.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Mode sample: the seed of the samples.", lower_bound=0)
_CHECKPOINT = flags.DEFINE_enum(
    "checkpoint", "newest", ["newest", "best"], "Modes evaluate and sample: which checkpoint."
)
_RECORD = flags.DEFINE_bool("record", False, "Mode report: write the run to experiments/results/ too.")
_TAG = flags.DEFINE_string("tag", "", "Modes report --record and compare: suffix of the recorded run's name.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Join the processes of a cluster.")
_PROFILE = flags.DEFINE_bool("profile", False, "Mode train: write a profiler trace to WORKDIR/profile.")

_DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def run(source: str | None, config: ConfigDict | None) -> None:
    """Does what the parsed flags ask for."""
    if _DATA_DIR.value is not None:
        if not os.path.isdir(_DATA_DIR.value):
            raise UserError(f"--data_dir={_DATA_DIR.value} is not a folder.")
        os.environ["JAXGEN_DATA_DIR"] = os.path.abspath(_DATA_DIR.value)
    if _LIST.value:
        print(cli.list_experiments())
        return
    if not _WORKDIR.value:
        raise UserError("Say where the run's files go: --workdir=runs/NAME.")
    workdir = Path(_WORKDIR.value).absolute()

    from jaxgen import session  # here, so that mistakes above are told without waiting for jax to load

    if _MODE.value == "report":
        session.report(workdir, record_it=_RECORD.value, tag=_TAG.value)
        return
    if _MODE.value == "compare":
        session.compare(workdir, tag=_TAG.value)
        return
    if source is None or config is None:
        raise UserError("Say what to run: --config=experiments/NAME.py:PRESET; --list shows them all.")
    this_run = session.Session(source, config, workdir, distributed=_DISTRIBUTED.value)
    if _MODE.value == "train":
        this_run.train(profile=_PROFILE.value)
    elif _MODE.value == "evaluate":
        this_run.evaluate(_CHECKPOINT.value)
    else:
        this_run.sample(_CHECKPOINT.value, num=_NUM_SAMPLES.value or 0, seed=_SEED.value)


def main() -> None:
    """Parses the command line and runs; the user's mistakes end with one sentence and status 2."""
    logging.set_verbosity(logging.ERROR)
    try:
        source, config = cli.parse(sys.argv, flags.FLAGS)
        app.run(lambda _: run(source, config), argv=sys.argv[:1], flags_parser=lambda argv: argv)
    except UserError as error:
        cli.fail(error)
    except OSError as error:
        if error.errno not in _DISK_TROUBLE:
            raise
        cli.fail(UserError(f"{error.strerror}: {error.filename or 'the workdir'}; nothing saved was lost."))


if __name__ == "__main__":
    main()
