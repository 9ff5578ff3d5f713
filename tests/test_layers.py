"""Who may import whom: read from the syntax trees of every file of jaxgen/ and experiments/."""

import ast
import graphlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The part of jaxgen (a file or folder of the package) -> the other parts that it may import.
_PURE = {"types", "processes", "denoising", "mixtures", "operators", "metrics"}
_LIBRARY = _PURE | {"models", "objectives", "samplers", "estimators"}
_BINDABLE = _LIBRARY | {"words", "data", "interop", "optim", "pictures", "sharding", "systems"}
ALLOWED = {
    "types": set(),
    "processes": {"types"},
    "denoising": {"types", "processes"},
    "mixtures": {"types"},
    "operators": {"types"},
    "words": {"types"},
    "metrics": {"types"},
    "models": _PURE,
    "objectives": _PURE,
    "samplers": _PURE,
    "estimators": _PURE,
    "interop": _PURE | {"models"},
    "optim": {"types"},
    "systems": _LIBRARY | {"optim"},
    "data": {"types"},
    "sharding": {"types"},
    "checkpoint": {"types", "memory", "sharding"},
    "workdir": {"types"},
    "tensorboard": {"types", "workdir"},
    "pictures": {"types", "workdir"},
    "recorded": {"types", "workdir"},
    "record": {"types", "workdir", "tensorboard"},
    "report": {"types", "workdir", "pictures", "recorded"},
    "replicas": {"types", "sharding"},
    "loop": {"types", "checkpoint", "data", "sharding", "record", "replicas"},
    "cli": {
        "types",
        "recorded",
        "replicas",
        "experiments",
    },  # the experiments it reads are files that the user names
    "session": {
        *("types", "checkpoint", "cli", "loop", "record", "recorded", "replicas", "report", "sharding"),
        "workdir",
    },
    "plan": {"types", "cli", "loop", "recorded", "session", "sharding"},
    "memory": set(),
    "run": {"types", "cli", "memory", "plan", "session"},
    # An experiment binds; it knows nothing of the loop that runs it, or of files. A figure may look at a run.
    "experiments": _BINDABLE,
    "figures": _BINDABLE | {"experiments", "checkpoint", "loop", "recorded", "run", "session", "workdir"},
}
# TensorFlow has no place at run time, PyTorch is a peer to compare with, and unpickling runs code.
_NOBODYS = ("tensorflow", "torch", "pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")
# Another library -> the only parts that may import it.
RESERVED = {
    "flax.linen": {"models"},
    "orbax": {"checkpoint"},
    "tensorflow_datasets": {"data"},
    "grain": {"data"},
    "array_record": {"data"},
    "flax": set(ALLOWED) - _PURE - {"objectives", "samplers", "loop"},
    **{name: set() for name in _NOBODYS},
}
# A part -> the only other libraries that it may import, the standard library apart.
LIMITED = {"loop": {"jax", "numpy"}, "types": {"jax"}}


def part_of(module):
    """The part that a module belongs to: jaxgen.models.unet -> models; None for other libraries."""
    names = module.split(".")
    if names[0] == "experiments":
        return "figures" if names[1:2] == ["figures"] else "experiments"
    return names[1] if names[0] == "jaxgen" and len(names) > 1 else None


def imported_modules(tree, module, is_package):
    """(line, dotted name) of each import in a file; a.b of `from a import b`, for b may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                names = module.split(".")
                package = names[: len(names) - node.level + is_package]
                base = ".".join([*package, *([base] if base else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func)
            if called in ("__import__", "import_module", "importlib.import_module"):
                yield node.lineno, str(node.args[0].value)


def forbidden_calls(tree):
    """(line, what) of the calls that run code from data."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        allow_pickle = [keyword.value for keyword in node.keywords if keyword.arg == "allow_pickle"]
        if called.split(".")[-1] == "load" and called.split(".")[0] in ("np", "numpy"):
            allow_pickle += node.args[2:3]
        if called in ("eval", "exec", "builtins.eval", "builtins.exec", "torch.load"):
            yield node.lineno, f"{called}()"
        elif any(not (isinstance(value, ast.Constant) and value.value is False) for value in allow_pickle):
            yield node.lineno, "allow_pickle"


def violations(source, module, *, is_package=False):
    """What a file's text does that the tables above forbid, one sentence each."""
    part, tree = part_of(module), ast.parse(source)
    if part is None:
        part = "types"  # jaxgen/__init__.py: imported by all, so it may import nothing
    found = [f"line {line}: {what} runs code from data" for line, what in forbidden_calls(tree)]
    if part not in ALLOWED:
        return [f"{part} is new: say in the table ALLOWED of tests/test_layers.py what it may import"]
    for line, name in imported_modules(tree, module, is_package):
        library, other = name.split(".")[0], part_of(name)
        if library in ("jaxgen", "experiments"):
            # `from jaxgen import __version__` names no part.
            if other not in (None, part, *ALLOWED[part]) and (other in ALLOWED or library == "experiments"):
                found.append(f"line {line}: {part} may not import {other}")
            continue
        for reserved, users in RESERVED.items():
            if f"{name}.".startswith(f"{reserved}.") and part not in users:
                found.append(f"line {line}: {part} may not import {name} (only: {sorted(users) or 'nobody'})")
        if part in LIMITED and library not in {*LIMITED[part], *sys.stdlib_module_names}:
            found.append(f"line {line}: {part} may import only {sorted(LIMITED[part])}, not {name}")
    return found


FILES = sorted(path for folder in ("jaxgen", "experiments") for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_keeps_to_its_layer(path):
    names = path.relative_to(ROOT).with_suffix("").parts
    is_package = names[-1] == "__init__"
    module = ".".join(names[:-1] if is_package else names)
    assert violations(path.read_text(), module, is_package=is_package) == []


def test_all_files_are_seen():
    assert {ROOT / "jaxgen" / "types.py", ROOT / "jaxgen" / "loop.py"} <= set(FILES)
    assert len(FILES) > 20


def test_the_layers_have_no_cycle():
    graph = {part: others - {"experiments"} if part == "cli" else others for part, others in ALLOWED.items()}
    assert next(iter(graphlib.TopologicalSorter(graph).static_order())) == "types"


BAD = [
    ("jaxgen.models.unet", "from jaxgen.objectives import ddpm"),
    ("jaxgen.models.unet", "import jaxgen.samplers.chain"),
    ("jaxgen.models.unet", "from jaxgen import samplers"),
    ("jaxgen.models.unet", "from ..objectives import ddpm"),
    ("jaxgen.models.unet", "from .. import objectives"),
    ("jaxgen.objectives.ddpm", "from jaxgen.models.unet import UNet"),
    ("jaxgen.objectives.ddpm", "def f():\n    from jaxgen.samplers import chain"),
    ("jaxgen.objectives.ddpm", "import flax"),
    ("jaxgen.objectives.ddpm", "from flax import struct"),
    ("jaxgen.samplers.ddim", "if TYPE_CHECKING:\n    from flax.core import FrozenDict"),
    ("jaxgen.samplers.ddim", "from jaxgen.systems import gradient_system"),
    ("jaxgen.systems", "import flax.linen as nn"),
    ("jaxgen.systems", "from flax import linen"),
    ("jaxgen.systems", "from jaxgen.loop import train"),
    ("jaxgen.types", "from jaxgen.processes import q_sample"),
    ("jaxgen.types", "import optax"),
    ("jaxgen.processes", "from jaxgen.models import unet"),
    ("jaxgen.metrics.frechet", "from jaxgen.models import convnet"),
    ("jaxgen.loop", "from jaxgen.models import unet"),
    ("jaxgen.loop", "from jaxgen import optim"),
    ("jaxgen.loop", "import optax"),
    ("jaxgen.loop", "import experiments.ddpm"),
    ("jaxgen.record", "import orbax.checkpoint as ocp"),
    ("jaxgen.loop", "from orbax import checkpoint"),
    ("jaxgen.metrics.fid", "import tensorflow_datasets as tfds"),
    ("jaxgen.loop", "import grain.python as pygrain"),
    ("jaxgen.data.load", "import tensorflow as tf"),
    ("jaxgen.data.load", "importlib.import_module('tensorflow')"),
    ("jaxgen.data.load", "__import__('pickle')"),
    ("jaxgen.data.load", "import pickle"),
    ("jaxgen.interop.weights", "import torch"),
    ("experiments.ddpm", "from torch import nn"),
    ("experiments.ddpm", "from flax import linen as nn"),
    ("experiments.ddpm", "from jaxgen import loop"),
    ("experiments.ddpm", "from experiments.figures import forward"),
    ("experiments.common.judging", "from jaxgen.checkpoint import Checkpoints"),
    ("jaxgen", "from jaxgen.models import unet"),
    ("jaxgen.brand_new", "import jax"),
    ("jaxgen.data.files", "np.load(file, allow_pickle=True)"),
    ("jaxgen.data.files", "numpy.load(file, None, True)"),
    ("jaxgen.data.files", "np.load(file, allow_pickle=flag)"),
    ("jaxgen.data.files", "eval(text)"),
    ("jaxgen.run", "exec(open('config.py').read())"),
    ("jaxgen.interop.weights", "torch.load(path, weights_only=True)"),
]
GOOD = [
    ("jaxgen.models.unet", "import flax.linen as nn\nfrom jaxgen.models.attention import Attention"),
    (
        "jaxgen.models.unet",
        "from . import attention\nfrom .attention import A\nfrom ..types import Array",
    ),
    ("jaxgen.objectives.ddpm", "from jaxgen.processes import q_sample\nfrom jaxgen import processes"),
    ("jaxgen.samplers.ddim", "import jax\nfrom jaxgen.samplers.chain import run_chain"),
    (
        "jaxgen.loop",
        "import time\nimport jax.numpy as jnp\nfrom jaxgen import data, sharding, record",
    ),
    ("jaxgen.checkpoint", "import orbax.checkpoint as ocp"),
    ("jaxgen.data.load", "import grain\nimport tensorflow_datasets as tfds\nnp.load(f, allow_pickle=False)"),
    ("jaxgen.interop.weights", "from flax import traverse_util"),
    ("jaxgen.record", "from jaxgen import __version__"),
    ("experiments.ddpm", "from experiments import common\nfrom jaxgen import systems\njax.eval_shape(f)"),
]


@pytest.mark.parametrize(("module", "source"), BAD)
def test_the_checker_sees_what_is_wrong(module, source):
    assert len(violations(source, module)) >= 1


@pytest.mark.parametrize(("module", "source"), GOOD)
def test_the_checker_lets_pass_what_is_right(module, source):
    assert violations(source, module) == []


def test_relative_imports_of_a_package():
    # In a package's __init__.py one dot is the package itself.
    assert violations("from . import attention", "jaxgen.models", is_package=True) == []
    assert violations("from .. import samplers", "jaxgen.models", is_package=True) != []
