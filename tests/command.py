"""Running jaxgen as a user does: a process of its own, with what it printed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxgen import cli

ROOT = Path(__file__).resolve().parent.parent


def jaxgen_command(*arguments):
    return [sys.executable, "-m", "jaxgen.run", *map(str, arguments)]


def environment(**changes):
    """This process's environment with its own cache left in place, so that programs are compiled once."""
    return {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "default", **changes}


def run(*arguments, timeout=300, cwd=ROOT, **changes):
    """(status, stdout, stderr) of `python -m jaxgen.run ARGUMENTS`."""
    done = subprocess.run(
        jaxgen_command(*arguments),
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        env=environment(**changes),
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def experiment_params():
    """The experiments' names as pytest parameters; a module whose SLOW is true is left to the slow tests."""
    return [
        pytest.param(name, marks=[pytest.mark.slow] if is_slow(name) else [])
        for name in cli.experiment_names()
    ]


def is_slow(name):
    """Whether even the smoke preset takes minutes to compile on a CPU."""
    return getattr(cli.load_experiment(f"experiments/{name}.py").module, "SLOW", False)
