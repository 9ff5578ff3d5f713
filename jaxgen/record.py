"""What a run writes as it goes: its manifest, its curves, its progress bar."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxgen import __version__
from jaxgen.tensorboard import EventFile
from jaxgen.types import UserError
from jaxgen.workdir import append, plain, truncate_metrics, writing

_PACKAGES = (
    *("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13"),
    *("libtpu", "flax", "optax", "orbax-checkpoint", "chex", "grain", "tensorflow-datasets"),
    *("ml-collections", "numpy", "scipy", "scikit-learn", "pillow"),
)
# Variables that change what is computed; others may hold addresses or secrets and are nobody's business.
_ENVIRONMENT = ("XLA_FLAGS", "JAX_PLATFORMS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION")


# ---- manifest


def manifest(
    *,
    config: Any,
    experiment: str,
    preset: str,
    seed: int,
    data_fingerprints: Mapping[str, str],
    command: Sequence[str],
) -> dict[str, Any]:
    """What it takes to trust and repeat a run: code, packages, machine, seed, data, config and command line.

    `data_fingerprints` maps a data set's name to a digest of its content. `git` holds None outside a checkout
    of jaxgen. Looking at the devices starts JAX's backend.
    """
    devices = jax.devices()
    canonical = json.dumps(plain(config), sort_keys=True, separators=(",", ":"))
    return {
        "experiment": experiment,
        "preset": preset,
        "seed": seed,
        "command": list(command),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config_sha256": hashlib.sha256(canonical.encode()).hexdigest(),
        "data": dict(data_fingerprints),
        "jaxgen": __version__,
        "git": _git_state(Path(__file__).resolve().parent),
        "python": platform.python_version(),
        "packages": _package_versions(),
        "environment": {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "backend": devices[0].platform,
        "device_kind": devices[0].device_kind,
        "device_count": len(devices),
        "local_device_count": jax.local_device_count(),
        "process_count": jax.process_count(),
    }


def _git_state(directory: Path) -> dict[str, Any]:
    """The revision of the checkout that holds the code in `directory`, and whether code changed since."""
    # A caller's GIT_DIR (a hook sets one) would name another repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(directory), *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=30, env=environment
        )
        return done.stdout.strip()

    try:
        # Fails where the code is only installed inside somebody else's repository.
        git("ls-files", "--error-unmatch", "__init__.py")
        changed = git(
            "status",
            "--porcelain",
            "--untracked-files=all",
            "--",
            ":(top)*.py",
            ":(top)*.toml",
            ":(top)*.jinja",
        )
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.SubprocessError):
        return {"revision": None, "dirty": None}


def _package_versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


# ---- curves and progress


class Recorder:
    """Writes `metrics.jsonl` and TensorBoard files into a workdir and a progress bar to stderr.

    Use as a context manager. With `enabled=False` (every process but the first) all methods do nothing. Every
    method that writes raises UserError where the disk refuses.

    start_step: the number of updates already done; lines of `metrics.jsonl` from later steps, left by a
        process that was killed after its last checkpoint, are dropped, as is a last line that was cut short.
    num_steps: the number of updates at which the run ends.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        start_step: int,
        num_steps: int,
        enabled: bool = True,
        show_progress: bool = True,
    ) -> None:
        self._enabled = enabled
        if not enabled:
            return
        self._path = Path(workdir) / "metrics.jsonl"
        with writing(workdir):
            Path(workdir).mkdir(parents=True, exist_ok=True)
            damaged = truncate_metrics(self._path, start_step)
            self._events = EventFile(Path(workdir) / "tensorboard", int(start_step) + 1)
            # Unbuffered: a line reaches the file in one system call, so a signal cannot cut it in two.
            self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        to_terminal = sys.stderr.isatty()
        seconds = 0.2 if to_terminal else 20.0  # a log file does not want five lines a second
        self._bar = tqdm(
            total=num_steps,
            initial=int(start_step),
            unit="step",
            dynamic_ncols=to_terminal,
            mininterval=seconds,
            maxinterval=max(10.0, seconds),
            disable=not show_progress,
            file=sys.stderr,
        )
        if damaged:
            self.message(f"{self._path} had {damaged} damaged line(s), now removed.")

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *exc: object) -> None:
        if exc[0] is None:
            self.close()
        else:
            with contextlib.suppress(UserError):  # the first error is the one to show
                self.close()

    def close(self) -> None:
        if not self._enabled:
            return
        self._enabled = False
        self._bar.close()
        with writing(self._path), contextlib.ExitStack() as stack:
            stack.callback(self._file.close)
            stack.callback(self._events.close)
            os.fsync(self._file.fileno())

    def log(self, step: int, metrics: Mapping[str, Any], *, prefix: str = "") -> None:
        """Appends one line: the step and each metric (a float or a scalar array), named `prefix/name`."""
        if not self._enabled:
            return
        separator = "/" if prefix and not prefix.endswith("/") else ""
        values = {f"{prefix}{separator}{name}": float(value) for name, value in metrics.items()}
        if "step" in values:
            raise ValueError('a metric cannot be called "step"')
        line = json.dumps(plain({"step": int(step), **values}), allow_nan=False).encode() + b"\n"
        with writing(self._path):
            append(self._file, line)
        with writing(self._path.parent / "tensorboard"):
            self._events.scalars(int(step), values)

    def advance(self, step: int, postfix: Mapping[str, float] | None = None) -> None:
        """Moves the progress bar to `step`, with its rate and time to go, and shows `postfix` beside it."""
        if not self._enabled:
            return
        if postfix:
            text = ", ".join(f"{name} {value:.4g}" for name, value in postfix.items())
            self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(int(step) - self._bar.n)

    def image(self, name: str, step: int, image: np.ndarray) -> None:
        """Shows `image`, uint8 [H, W, C] with C of 1 or 3 as from `pictures.image_grid`, in TensorBoard."""
        image = np.asarray(image)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] not in (1, 3):
            raise ValueError(f"an image is uint8 [H, W, 1 or 3], not {image.dtype} {image.shape}")
        if self._enabled:
            with writing(self._path.parent / "tensorboard"):
                self._events.image(int(step), name, image)

    def message(self, text: str) -> None:
        """Prints `text` to stderr above the progress bar."""
        if self._enabled:
            tqdm.write(text, file=sys.stderr)
