"""Mistakes of the user: each ends with one sentence on stderr and status 2, and loses nothing.

Most cases call `run.main` in this process. The last part runs the command as a user does: what happens to a
run that is under way or done (damaged checkpoints, a full disk, numbers that are not finite).
"""

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
from command import ROOT, environment, jaxgen_command, run

from experiments import common
from jaxgen import run as entry
from jaxgen.types import UserError

DDPM = "--config=experiments/ddpm.py:smoke"
CLASSIFIER = "--config=experiments/classifier.py:smoke"
MIXTURE = "--config=experiments/mixture.py:smoke"


def _content(folder):
    """Every file below a folder with its bytes."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def own_caches(tmp_path_factory, monkeypatch):
    """No data set but the bundled one, and this process's compilation cache as it was."""
    monkeypatch.setenv("JAXGEN_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("JAXGEN_DATA_DIR", "")
    monkeypatch.setenv("TFDS_DATA_DIR", "")
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def refused(own_caches, tmp_path, capsys):
    """Runs a command that is to fail; returns its sentence. The folder `tmp_path` must not have changed."""

    def command(*arguments):
        before = _content(tmp_path)
        assert entry.main(["jaxgen.run", *map(str, arguments)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("jaxgen: ")
        assert err.count("\n") == 1
        assert err.endswith("\n")
        assert _content(tmp_path) == before
        return err.removeprefix("jaxgen: ").rstrip("\n")

    return command


# ---- the command line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "Say where the run's files go: --workdir=runs/NAME."),
        (["--workdir=here"], "Say what to run: --config=experiments/NAME.py:PRESET; --list shows them all."),
        ([DDPM], "Say where the run's files go: --workdir=runs/NAME."),
        (["--workdri=here"], "unknown flag '--workdri': did you mean '--workdir'?"),
        (["--confg=x"], "unknown flag '--confg': did you mean '--config'?"),
        (["--mode=sampel"], "flag --mode=sampel: did you mean 'sample'?"),
        (["--mode=all"], "flag --mode=all: choose one of train, evaluate, sample, report, compare"),
        (["--mode"], "Missing value for flag --mode"),
        (["--checkpoint=bst"], "flag --checkpoint=bst: did you mean 'best'?"),
        (["--num_samples=0"], "flag --num_samples=0: 0 is not a positive integer"),
        (["--num_samples=many"], "flag --num_samples=many: invalid literal for int() with base 10: 'many'"),
        (["--seed=-1"], "flag --seed=-1: -1 is not an integer in the range [0, 4294967295]"),
        ([DDPM, "--seed=1"], "--seed belongs to mode sample, not train: a run's seed is --config.seed."),
        (
            ["--mode=report", "--checkpoint=best"],
            "--checkpoint belongs to mode evaluate or sample, not report.",
        ),
        (["--mode=evaluate", "--profile"], "--profile belongs to mode train, not evaluate."),
        (["--list=maybe"], "Non-boolean argument to boolean flag"),
        (["train"], "Unexpected argument 'train': flags are written --name=value."),
        ([DDPM, "--config.model.channels", "8"], "Unexpected argument '8': flags are written --name=value."),
        (["--flagfile=/nowhere"], "ERROR:: Unable to open flagfile"),
        (["--config"], "--config needs a value: write --config=experiments/NAME.py:PRESET."),
        (
            ["--config.seed=1", "--workdir=here"],
            "--config.seed=1 needs --config=experiments/NAME.py:PRESET beside it.",
        ),
        (["--config=experiments/ddpm.py:smok"], "unknown preset of ddpm 'smok': did you mean 'smoke'?"),
        (["--config=experiments/ddpm.py:qqq"], "unknown preset of ddpm 'qqq': choose one of smoke, digits,"),
        (["--config=experiments/ddpm.py"], "Say which preset of ddpm: --config=experiments/ddpm.py:PRESET,"),
        (
            ["--config=experiments/dppm.py:smoke"],
            "unknown experiment file 'experiments/dppm.py': did you mean 'experiments/ddpm.py'?",
        ),
        (
            ["--config=ddpm:smoke"],
            "unknown experiment file 'ddpm': choose one of experiments/autoencoder.py,",
        ),
        (["--config="], "unknown experiment file ''"),
        (["--config=experiments:smoke"], "unknown experiment file 'experiments'"),
        (["--config=README.md:smoke"], "README.md cannot be loaded: ImportError: it is not a Python file."),
        (["--config=experiments/__init__.py:smoke"], "is not an experiment: it defines no PRESETS."),
        ([DDPM, "--config.model.chanels=8"], "unknown config field 'model.chanels': did you mean 'model.ch"),
        ([DDPM, "--workdir=here", "--data_dir=/nowhere"], "--data_dir=/nowhere is not a folder."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_command_line(refused, arguments, says):
    assert says in refused(*arguments)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("PRESETS = {\n", "cannot be loaded: SyntaxError: '{' was never closed (mine.py, line 1)."),
        ("PRESETS = {}\nimport nothing_of_this_name\n", "No module named 'nothing_of_this_name', line 2."),
        ("PRESETS = {}\nget_config = None\n", "is not an experiment: it defines no build."),
        ("\0", "Error: source code string cannot contain null bytes"),  # of Value or, from 3.11.4, of Syntax
    ],
)
def test_experiment_file(refused, tmp_path, monkeypatch, text, says):
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    (tmp_path / "mine.py").write_text(text)
    assert says in refused(f"--config={tmp_path}/mine.py:small", f"--workdir={tmp_path}/run")


# ---- values of the config


VALUES = [
    # of the wrong type
    (DDPM, "model.channels=6.5", "config.model.channels must be a whole number, not '6.5'."),
    (DDPM, "optim.learning_rate=fast", "config.optim.learning_rate must be a number, not 'fast'."),
    (DDPM, "optim.learning_rate=nan", "config.optim.learning_rate must be a finite number, not 'nan'."),
    (DDPM, "model.dropout=inf", "config.model.dropout must be a finite number, not 'inf'."),
    (DDPM, "model.remat=maybe", "config.model.remat must be true or false, not 'maybe'."),
    (DDPM, "model.channel_multipliers=1,x", "config.model.channel_multipliers must be a whole number, not"),
    # out of range, in every experiment
    (DDPM, "seed=-1", "seed must be at least 0, not -1."),
    (DDPM, "seed=2147483648", "config.seed must be below 2147483648, not 2147483648."),
    (DDPM, "data.batch_size=0", "data.batch_size must be at least 1, not 0."),
    (DDPM, "data.augment=flip,flop", "unknown data.augment 'flop': did you mean 'flip'?"),
    (DDPM, "data.augment=flip,flip", "data.augment names one twice: flip,flip."),
    (DDPM, "optim.optimizer=adan", "unknown optim.optimizer 'adan': did you mean 'adam'?"),
    (DDPM, "optim.learning_rate=0", "optim.learning_rate must be above 0, not 0.0."),
    (DDPM, "optim.schedule=cosin", "unknown optim.schedule 'cosin': did you mean 'cosine'?"),
    (DDPM, "optim.warmup_steps=-1", "optim.warmup_steps must be at least 0, not -1."),
    (DDPM, "optim.schedule=rsqrt optim.warmup_steps=0", "optim.schedule=rsqrt needs optim.warmup_steps"),
    (DDPM, "optim.schedule=step optim.decay_steps=", "optim.schedule=step needs optim.decay_steps"),
    (DDPM, "optim.decay_rate=0", "optim.decay_rate must be in (0, 1], not 0.0."),
    (DDPM, "optim.decay_steps=10,-5", "optim.decay_steps must be at least 1, not -5."),
    (DDPM, "optim.b1=1", "optim.b1 and optim.b2 must be in [0, 1), not 1.0 and 0.999."),
    (DDPM, "optim.eps=-1", "optim.eps must be at least 0, not -1.0."),
    (DDPM, "optim.weight_decay=-0.1", "optim.weight_decay must be at least 0, not -0.1."),
    (DDPM, "optim.clip_norm=-1", "optim.clip_norm must be at least 0, not -1.0."),
    (DDPM, "optim.ema_decay=1", "optim.ema_decay must be in [0, 1), not 1.0."),
    (DDPM, "optim.accumulate=0", "optim.accumulate must be at least 1, not 0."),
    (DDPM, "optim.accumulate=3", "optim.accumulate=3 does not divide data.batch_size=16."),
    (DDPM, "train.num_steps=0", "train.num_steps must be at least 1, not 0."),
    (DDPM, "train.num_steps=3000000000", "config.train.num_steps must be below 2147483648, not 3000000000."),
    (DDPM, "train.steps_per_dispatch=0", "train.steps_per_dispatch must be at least 1, not 0."),
    (DDPM, "train.log_every=0", "train.log_every must be at least 1, not 0."),
    (DDPM, "train.validate_every=-1", "train.validate_every must be at least 1, not -1."),
    (DDPM, "train.sample_every=-1", "train.sample_every must be at least 0, not -1."),
    (DDPM, "train.checkpoint_every=0", "train.checkpoint_every must be at least 1, not 0."),
    (DDPM, "train.keep_checkpoints=0", "train.keep_checkpoints must be at least 1, not 0."),
    (DDPM, "train.best_metric=los", "unknown train.best_metric 'los': did you mean 'loss'?"),
    # the network
    (DDPM, "model.channels=0", "model.channels must be at least 4, not 0."),
    (DDPM, "model.channel_multipliers=", "model.channel_multipliers must have a value for each level"),
    (DDPM, "model.channel_multipliers=1,0", "model.channel_multipliers must be at least 1, not 0."),
    (DDPM, "model.channel_multipliers=1,1,1,1,1", "Images of 8x8 cannot be halved 4 times, as the 5 values"),
    (DDPM, "model.num_res_blocks=0", "model.num_res_blocks must be at least 1, not 0."),
    (DDPM, "model.attention_resolutions=5", "model.attention_resolutions has 5, but the levels are 8"),
    (DDPM, "model.head_dim=-1", "model.head_dim must be at least 0, not -1."),
    (DDPM, "model.head_dim=5", "model.head_dim=5 does not divide the 8 channels of a level with attention"),
    (DDPM, "model.num_groups=0", "model.num_groups must be at least 1, not 0."),
    (DDPM, "model.num_groups=3", "model.num_groups=3 does not divide the 8 channels of a level"),
    (DDPM, "model.dropout=1.5", "model.dropout must be in [0, 1), not 1.5."),
    (DDPM, "model.dtype=bfloat", "unknown model.dtype 'bfloat': did you mean 'bfloat16'?"),
    (CLASSIFIER, "model.dtype=int8", "unknown model.dtype 'int8': choose one of float32, bfloat16"),
    (CLASSIFIER, "model.widths=4,0", "model.widths must be at least 1, not 0."),
    (CLASSIFIER, "model.widths=4,4,4,4", "Images of 8x8 cannot be halved 4 times, as the classifier's mod"),
    (CLASSIFIER, "model.hidden=0", "model.hidden must be at least 1, not 0."),
    (CLASSIFIER, "model.dropout=-0.1", "model.dropout must be in [0, 1), not -0.1."),
    (CLASSIFIER, "objective.label_smoothing=1", "objective.label_smoothing must be in [0, 1), not 1.0."),
    (CLASSIFIER, "evaluation.batch_size=0", "evaluation.batch_size must be at least 1, not 0."),
    (
        CLASSIFIER,
        "train.best_metric=acuracy",
        "unknown train.best_metric 'acuracy': did you mean 'accuracy'?",
    ),
    (MIXTURE, "model.variance_floor=0", "model.variance_floor must be above 0, not 0.0."),
    # diffusion
    (DDPM, "diffusion.num_steps=0", "diffusion.num_steps must be at least 1, not 0."),
    (DDPM, "diffusion.schedule=linaer", "unknown diffusion.schedule 'linaer': did you mean 'linear'?"),
    (DDPM, "diffusion.beta_start=0", "0 < diffusion.beta_start <= diffusion.beta_end < 1 must hold, but th"),
    (DDPM, "diffusion.beta_end=1", "0 < diffusion.beta_start <= diffusion.beta_end < 1 must hold, but they"),
    (DDPM, "diffusion.cosine_offset=-1", "diffusion.cosine_offset must be at least 0, not -1.0."),
    (DDPM, "diffusion.prediction=x1", "unknown diffusion.prediction 'x1': choose one of eps, x0, v"),
    (DDPM, "diffusion.loss=vbl", "unknown diffusion.loss 'vbl': did you mean 'vlb'?"),
    (DDPM, "diffusion.variance=learned", "unknown diffusion.variance 'learned'"),
    (DDPM, "diffusion.label_dropout=1.1", "diffusion.label_dropout must be in [0, 1], not 1.1."),
    (DDPM, "diffusion.label_dropout=0.1", "diffusion.label_dropout needs diffusion.conditional: leave it"),
    # sampling and evaluation
    (DDPM, "sampling.method=dimm", "unknown sampling.method 'dimm': did you mean 'ddim'?"),
    (DDPM, "sampling.num_steps=9", "sampling.num_steps must be in [1, 8], not 9."),
    (DDPM, "sampling.num_steps=0", "sampling.num_steps must be in [1, 8], not 0."),
    (DDPM, "sampling.eta=2", "sampling.eta must be in [0, 1], not 2.0."),
    (DDPM, "sampling.spacing=evn", "unknown sampling.spacing 'evn': did you mean 'even'?"),
    (
        DDPM,
        "sampling.spacing=quadratic sampling.num_steps=8",
        "sampling.num_steps and sampling.spacing do not",
    ),
    (DDPM, "sampling.guidance=2", "sampling.guidance needs a model trained with diffusion.conditional"),
    (DDPM, "sampling.guidance=2 diffusion.conditional=true", "and diffusion.label_dropout: leave it at 1."),
    (DDPM, "sampling.guidance=-1", "sampling.guidance must be at least 0, not -1.0."),
    (DDPM, "sampling.num=0", "sampling.num must be at least 1, not 0."),
    (DDPM, "evaluation.num_samples=1", "evaluation.num_samples must be at least 4, not 1."),
    (DDPM, "evaluation.num_likelihood=0", "evaluation.num_likelihood must be at least 1, not 0."),
    (DDPM, "evaluation.batch_size=0", "evaluation.batch_size must be at least 1, not 0."),
    (DDPM, "evaluation.classifier=digit", "unknown evaluation.classifier 'digit': did you mean 'digits'?"),
    (DDPM, "evaluation.classifier_workdir=/nowhere", "/nowhere holds no run (no config.json in it)."),
    (DDPM, "evaluation.inception=/nowhere", "The weights of InceptionV3 cannot be read from /nowhere"),
]


@pytest.mark.parametrize(("config", "overrides", "says"), VALUES, ids=[case[1] for case in VALUES])
def test_values(refused, tmp_path, config, overrides, says):
    changes = [f"--config.{override}" for override in overrides.split(" ")]
    assert says in refused(config, f"--workdir={tmp_path}/run", *changes)


# ---- data


def _npz(**arrays):
    return lambda path: np.savez(path, **arrays)


_PIXELS = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
_LABELS = np.arange(40, dtype=np.int32) % 10


@pytest.mark.parametrize(
    ("config", "write", "says"),
    [
        (DDPM, None, "there is no file"),
        (DDPM, lambda path: path.write_bytes(b""), "cannot be read as a NumPy .npz file"),
        (DDPM, lambda path: path.write_bytes(b"PK\3\4 cut off"), "cannot be read as a NumPy .npz file"),
        (DDPM, _npz(), "has no array 'image' (it has: nothing)"),
        (DDPM, _npz(image=_PIXELS[:0], label=_LABELS[:0]), "images have shape (0, 8, 8, 1) but must be"),
        (DDPM, _npz(image=_PIXELS[0, 0], label=_LABELS), "images have shape (8, 1) but must be"),
        (DDPM, _npz(image=_PIXELS / 10.0, label=_LABELS), "float images must lie in [0, 1]"),
        (DDPM, _npz(image=np.full((40, 8, 8, 1), np.nan), label=_LABELS), "images contain NaN or infinity"),
        (DDPM, _npz(image=_PIXELS, label=_LABELS[:-1]), "has 40 images but 39 labels"),
        (DDPM, _npz(image=_PIXELS, label=np.array(["zero"] * 40)), "labels must be a list of whole numbers"),
        (DDPM, _npz(image=_PIXELS, label=np.array([0, "zero"] * 20, object)), "cannot be read as a NumPy"),
        (DDPM, _npz(image=_PIXELS), "evaluation.classifier needs labels, and npz:"),
        (CLASSIFIER, _npz(image=_PIXELS), "has no labels, so no classifier can be trained on it."),
        (DDPM, _npz(image=_PIXELS[:1], label=_LABELS[:1]), "is empty"),
        (
            DDPM,
            _npz(image=_PIXELS, label=_LABELS, test_image=_PIXELS[:1], test_label=_LABELS[:1]),
            "evaluation.classifier needs at least 4 images to train and 4 to test on, and npz:",
        ),
        (
            DDPM,
            _npz(image=_PIXELS, label=_LABELS, test_image=_PIXELS[:, :4], test_label=_LABELS),
            "are (8, 8, 1) for training and (4, 8, 1) for test.",
        ),
        (
            f"{DDPM} --config.model.channel_multipliers=1,2,2 --config.model.attention_resolutions=",
            _npz(image=np.zeros((40, 30, 30, 1), np.uint8), label=_LABELS),
            "Images of 30x30 cannot be halved 2 times, as the 3 values of model.channel_multipliers ask",
        ),
        (
            f"{DDPM} --config.model.channel_multipliers=1,2",
            _npz(image=np.zeros((40, 7, 8, 3), np.uint8), label=_LABELS),
            "Images of 7x8 cannot be halved 1",
        ),
    ],
)
def test_npz(refused, tmp_path, config, write, says):
    path = tmp_path / "images.npz"
    if write is not None:
        write(path)
    text = refused(*config.split(), f"--workdir={tmp_path}/run", f"--config.data.source=npz:{path}")
    assert says in text


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("mnits", "unknown data set 'mnits': did you mean 'mnist'?"),
        ("mnist", "data set 'mnist' is missing: looked for in"),
        ("text:{root}/README.md", "README.md holds no images: choose a data set of images."),
        ("folder:{tmp}", "no images"),
        ("folder:/nowhere", "/nowhere"),
    ],
)
def test_data_sources(refused, tmp_path, source, says):
    source = source.format(root=ROOT, tmp=tmp_path)
    text = refused(DDPM, f"--workdir={tmp_path}/run", f"--config.data.source={source}")
    assert says in text


# ---- the other experiments, with files of the user's: {tmp} is an empty folder but for what FILES puts there

_VECTORS = b"2 2\ncat 0.5 1\ndog 1 -1\n"
FILES = {
    "empty.txt": b"",
    "latin1.txt": "caf\u00e9 au lait\n".encode("latin-1"),
    "short.txt": b"one two three\n",
    "short_end.txt": b"one two three four\n" * 20 + b"x" * 20,
    "one.txt": b"a\nb\n",
    "two.txt": b"c\n",
    "no_tab.tsv": b"hello\tbonjour\nbye\n",
    "good.vec": _VECTORS,
    "cut.vec": _VECTORS[:-6],
    "cut.bin": b"2 2\ncat \0\0\0\0",
    "liar.vec": b"900000000 300\ncat 1 2\n",
    "wide.vec": b"1 2\ncat 1 2 3\n",
    "twice.vec": b"2 2\ncat 1 2\ncat 3 4\n",
    "nan.vec": b"1 2\ncat nan 2\n",
    "head.vec": b"two 2\ncat 1 2\n",
    "pairs.tsv": b"cat\tanimal\n",
    "wide.tsv": b"cat\tanimal\tyes\tmaybe\n",
    "captions/captions.tsv": b"gone.png\ta small 3\n",
    "tabless/captions.tsv": b"gone.png a small 3\n",
    "blank/captions.tsv": b"\n\n",
    "foreign/config.json": b'{"experiment": "experiments/nothing.py", "preset": "x", "config": {}}',
    "damaged/config.json": b"{",
    "words/config.json": b'{"experiment": "experiments/word2vec.py", "preset": "smoke", "config": {}}',
    "later/config.json": b'{"experiment": "experiments/ddpm.py", "preset": "smoke", "config": {"model": 1}}',
}

OTHERS = [
    ("gan", "gan.game=hinje", "unknown gan.game 'hinje': did you mean 'hinge'?"),
    ("gan", "gan.num_critic=0", "gan.num_critic must be at least 1, not 0."),
    ("gan", "model.kind=resent", "unknown model.kind 'resent': did you mean 'resnet'?"),
    ("gan", "optim.discriminator_rate=0", "optim.discriminator_rate must be above 0, not 0.0."),
    ("vae", "objective.bound=iwaee", "unknown objective.bound 'iwaee': did you mean 'iwae'?"),
    ("vae", "model.latent_size=0", "model.latent_size must be at least 1, not 0."),
    ("vae", "data.binarise=dynamik", "unknown data.binarise 'dynamik': did you mean 'dynamic'?"),
    ("autoencoder", "objective.sparsity_target=1", "objective.sparsity_target must be in [0, 1), not 1.0."),
    ("autoencoder", "model.code_size=0", "model.code_size must be at least 1, not 0."),
    ("dae", "noise.sigma=0", "noise.sigma must be above 0.0, not 0.0."),
    ("dae", "model.depth=1", "model.depth must be at least 2, not 1."),
    ("semisupervised", "data.num_labels=7", "data.num_labels=7 is not a multiple of the 10 classes."),
    ("semisupervised", "model.hidden=", "model.hidden must have a width for each hidden layer"),
    ("naive_bayes", "model.variance_floor=0", "model.variance_floor must be above 0, not 0.0."),
    ("hmm", "em.num_starts=0", "em.num_starts must be at least 1, not 0."),
    ("hmm", "model.num_states=0", "model.num_states must be at least 1, not 0."),
    ("scene_reader", "model.widths=0", "model.widths must be at least 1, not 0."),
    ("text_to_image", "evaluation.reader=smok", "unknown evaluation.reader 'smok': did you mean 'smoke'?"),
    ("text_to_image", "sampling.num_steps=9", "sampling.num_steps must be in [1, 8], not 9."),
    ("text_to_image", "data.source=folder:{tmp}/nothing", "captions.tsv cannot be read"),
    ("text_to_image", "data.source=folder:{tmp}/captions", "gone.png is missing, and line 1 of"),
    ("text_to_image", "data.source=folder:{tmp}/tabless", "has no tab between file and caption"),
    (
        "text_to_image",
        "data.source=folder:{tmp}/blank",
        "captions.tsv is empty: write a line FILE<tab>",
    ),
    ("word2vec", "model.window=0", "model.window must be at least 1, not 0."),
    ("word2vec", "objective.loss=softmx", "unknown objective.loss 'softmx': did you mean 'softmax'?"),
    ("word2vec", "data.source=file", "data.source=file needs the name of the text: --config.data.path=FILE."),
    (
        "word2vec",
        "data.path={tmp}/my.txt",
        "my.txt is not read with data.source=pydocs: add --config.data.source",
    ),
    ("word2vec", "data.source=file data.path={tmp}/none.txt", "none.txt cannot be read: No such file"),
    ("word2vec", "data.source=file data.path={tmp}/latin1.txt", "latin1.txt is not UTF-8 text"),
    ("word2vec", "data.source=file data.path={tmp}/empty.txt", "has no words; give a text file."),
    ("word2vec", "data.source=wiki", "The text wiki is not at"),
    ("cooccurrence", "model.matrix=ppmi2", "unknown model.matrix 'ppmi2': did you mean 'ppmi'?"),
    ("cooccurrence", "data.source=file data.path={tmp}", "is no text file."),
    ("hypernyms", "data.source=planed", "data.source=planed is none of planted, zh,"),
    ("hypernyms", "data.source=pairs:{tmp}/pairs.tsv,{tmp}/none.vec", "there is no file"),
    ("hypernyms", "data.source=pairs:{tmp}/pairs.tsv,{tmp}/cut.vec", "cut.vec"),
    ("hypernyms", "data.source=pairs:{tmp}/pairs.tsv,{tmp}/cut.bin", "cut.bin"),
    ("hypernyms", "data.source=pairs:{tmp}/pairs.tsv,{tmp}/liar.vec", "liar.vec"),
    ("hypernyms", "data.source=pairs:{tmp}/pairs.tsv,{tmp}/wide.vec", "wide.vec"),
    ("hypernyms", "data.source=pairs:{tmp}/pairs.tsv,{tmp}/twice.vec", "twice.vec"),
    ("hypernyms", "data.source=pairs:{tmp}/pairs.tsv,{tmp}/nan.vec", "nan.vec"),
    ("hypernyms", "data.source=pairs:{tmp}/pairs.tsv,{tmp}/head.vec", "head.vec"),
    ("hypernyms", "data.source=pairs:{tmp}/pairs.tsv,{tmp}/good.vec", "has vectors for both words"),
    ("hypernyms", "data.source=pairs:{tmp}/wide.tsv,{tmp}/good.vec", "wide.tsv is no file of pairs"),
    ("hypernyms", "data.source=pairs:{tmp}/none.tsv,{tmp}/good.vec", "none.tsv cannot be read as UTF-8"),
    ("language_model", "data.source=text:{tmp}/none.txt", "there is no file"),
    ("language_model", "data.source=text:~nobody/none.txt", "there is no file"),
    ("language_model", "data.source=text:{tmp}/short_end.txt data.tokenizer=word", "has nothing to predict"),
    ("language_model", "data.source=text:{tmp}/empty.txt", "empty.txt is empty."),
    ("language_model", "data.source=text:{tmp}/latin1.txt", "latin1.txt is not UTF-8 text: byte 3"),
    ("language_model", "model.kind=gruu", "unknown model.kind 'gruu': did you mean 'gru'?"),
    ("translation", "data.source=lines:{tmp}/one.txt,{tmp}/two.txt", "one.txt has 2 lines but"),
    ("translation", "data.source=tsv:{tmp}/no_tab.tsv", "line 2, has no tab: each line must be source TAB"),
    ("translation", "data.source=tsv:{tmp}/empty.txt", "empty.txt is empty."),
    ("translation", "model.positions=learned sampling.max_new_tokens=999", "positions that are learned"),
    ("translation", "data.source=datse", "unknown pairs 'datse': did you mean 'dates'?"),
    ("restoration", "denoiser={tmp}/nothing", "nothing holds no run: "),
    ("restoration", "denoiser={tmp}/damaged", "config.json is damaged: it says no experiment, preset and"),
    ("restoration", "denoiser={tmp}/foreign", "which is none of these experiments."),
    ("restoration", "denoiser={tmp}/words", "which gives no denoiser: take one of ddpm,"),
    ("restoration", "denoiser={tmp}/later", "does not fit ddpm:smoke as it is now"),
    ("restoration", "restoration.noise=0", "restoration.noise must be positive, but it is 0.0."),
    ("classifier", "num_seeds=0", "num_seeds must be at least 1, not 0."),
    ("classifier", "sweep=optim.lr:1e-3", "needs two values or more, all different."),
    ("classifier", "sweep=model.widths:1,2", "only a field that is a number can be swept."),
    ("classifier", "sweep=train.num_steps:2,4", "A sweep cannot change a field of the group train"),
    ("classifier", "sweep=model.hidden:8,16", "cannot be trained in one program"),
]


@pytest.mark.parametrize(("name", "overrides", "says"), OTHERS, ids=[f"{n} {o}" for n, o, _ in OTHERS])
def test_other_experiments(refused, tmp_path, name, overrides, says):
    for file, content in FILES.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(content)
    changes = [f"--config.{each}" for each in overrides.format(tmp=tmp_path).split(" ")]
    text = refused(f"--config=experiments/{name}.py:smoke", f"--workdir={tmp_path}/run", *changes)
    assert says in text


# ---- the workdir


def _claimed(folder, *, preset="smoke", config=None, data="a"):
    """What a run leaves when it begins."""
    from jaxgen import cli

    module = cli.load_experiment("experiments/ddpm.py").module
    values = config or module.get_config(preset).to_dict()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(
        json.dumps({"experiment": "experiments/ddpm.py", "preset": preset, "config": values})
    )
    (folder / "manifest.json").write_text(json.dumps({"data": {"train": data}}))
    return folder


def test_workdir_that_is_or_lies_in_a_file(refused, tmp_path):
    (tmp_path / "file").write_text("keep me")
    for workdir in ("file", "file/run", "file/a/b"):
        text = refused(DDPM, f"--workdir={tmp_path}/{workdir}")
        assert text == f"The workdir {tmp_path}/{workdir} cannot be a folder: {tmp_path}/file is a file."


def test_workdir_with_files_of_something_else(refused, tmp_path):
    (tmp_path / "thesis.tex").write_text("keep me")
    assert "holds files of something else" in refused(DDPM, f"--workdir={tmp_path}")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that nobody may write to")
def test_workdir_that_cannot_be_written(refused):
    text = refused(DDPM, "--workdir=/proc/run")
    assert text.startswith("The workdir /proc/run cannot be written")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_workdir_without_permission(refused, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "cannot be written" in refused(DDPM, f"--workdir={tmp_path}/locked/run")


def test_workdir_with_a_name_too_long(refused, tmp_path):
    assert "File name too long" in refused(DDPM, f"--workdir={tmp_path}/{'x' * 300}")


@pytest.mark.parametrize("mode", ["train", "evaluate", "sample"])
def test_workdir_of_a_run_with_another_config(refused, tmp_path, mode):
    _claimed(tmp_path / "run")
    text = refused(DDPM, f"--workdir={tmp_path}/run", f"--mode={mode}", "--config.model.channels=16")
    assert text == (
        f"{tmp_path}/run holds a run with another config: model.channels is 8 there and 16 now; "
        "use that config, or another --workdir."
    )


def test_workdir_of_another_preset_and_of_another_experiment(refused, tmp_path):
    _claimed(tmp_path / "run")
    text = refused("--config=experiments/ddpm.py:digits", f"--workdir={tmp_path}/run")
    assert "holds a run with another config" in text
    assert "fields differ" in text
    text = refused(CLASSIFIER, f"--workdir={tmp_path}/run")
    assert text == (
        f"{tmp_path}/run holds a run of experiments/ddpm.py; "
        "use another --workdir for experiments/classifier.py."
    )


def test_workdir_of_a_run_on_other_data(refused, tmp_path):
    _claimed(tmp_path / "run")
    (tmp_path / "run" / ".lock").touch()
    text = refused(DDPM, f"--workdir={tmp_path}/run")
    assert text == f"The data have changed since the run in {tmp_path}/run began; use another --workdir."


@pytest.mark.parametrize("mode", ["evaluate", "sample", "report", "compare"])
def test_modes_that_need_a_run(refused, tmp_path, mode):
    text = refused(DDPM, f"--workdir={tmp_path}/nothing", f"--mode={mode}")
    assert text == f"{tmp_path}/nothing holds no run (no config.json in it)."


@pytest.mark.parametrize("mode", ["train", "evaluate", "report", "compare"])
@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"config": 3}', "\udc80"])
def test_damaged_config_json(refused, tmp_path, mode, content):
    _claimed(tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(content, errors="surrogateescape")
    text = refused(DDPM, f"--workdir={tmp_path}/run", f"--mode={mode}")
    assert text.startswith(f"{tmp_path}/run/config.json is ")
    assert "restore it" in text


@pytest.mark.parametrize("mode", ["train", "report", "compare"])
@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"data": 3}'])
def test_damaged_manifest_json(refused, tmp_path, mode, content):
    _claimed(tmp_path / "run")
    (tmp_path / "run" / "manifest.json").write_text(content)
    text = refused(DDPM, f"--workdir={tmp_path}/run", f"--mode={mode}")
    assert text.startswith(f"{tmp_path}/run/manifest.json is ")
    assert "restore it" in text


@pytest.mark.parametrize("content", ["", "[1]", '{"fid": 3}', '{"fid": {"value": "low"}}'])
def test_damaged_result_json(refused, tmp_path, content):
    _claimed(tmp_path / "run")
    (tmp_path / "run" / "result.json").write_text(content)
    text = refused(f"--workdir={tmp_path}/run", "--mode=report")
    assert text.startswith(f"{tmp_path}/run/result.json ")


def test_damaged_metrics(refused, tmp_path):
    _claimed(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    text = refused(f"--workdir={tmp_path}/run", "--mode=report")
    assert text.startswith(f"Line 2 of {tmp_path}/run/metrics.jsonl is damaged")


def test_compare_with_no_recorded_run(refused, tmp_path):
    text = refused(f"--workdir={_claimed(tmp_path / 'run')}", "--mode=compare", "--tag=nobody_records_this")
    assert "ddpm_smoke_nobody_records_this.json; recorded are: " in text


@pytest.mark.parametrize("mode", ["evaluate", "sample"])
def test_run_without_a_checkpoint(own_caches, tmp_path, capsys, mode):
    _claimed(tmp_path / "run")
    digits = {source.split: source.fingerprint for source in common.load_images("digits")}
    (tmp_path / "run" / "manifest.json").write_text(json.dumps({"data": digits}))
    before = set(_content(tmp_path))
    assert entry.main(["jaxgen.run", DDPM, f"--workdir={tmp_path}/run", f"--mode={mode}"]) == 2
    text = f"{tmp_path}/run holds no checkpoint yet: train it first, with --mode=train."
    assert capsys.readouterr().err == f"jaxgen: {text}\n"
    assert set(_content(tmp_path)) - before <= {tmp_path / "run" / "checkpoints"}


# ---- the machine


def test_distributed_without_a_cluster(tmp_path):
    status, stdout, stderr = run(DDPM, f"--workdir={tmp_path}/run", "--distributed")
    assert (status, stdout) == (2, "")
    assert stderr.startswith("jaxgen: JAX cannot start with --distributed: ")
    assert "JAX_COORDINATOR_ADDRESS" in stderr
    assert stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (UserError("a mistake"), 2, "a mistake"),
        (
            OSError(28, "No space left on device", "/full/file"),
            2,
            "No space left on device: /full/file; nothing",
        ),
        (MemoryError("1 TiB"), 2, "The memory does not suffice (1 TiB): lower data.batch_size"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore"),
            2,
            "The memory does not suffice (RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.)",
        ),
        (KeyboardInterrupt(), 130, "stopped by SIGINT."),
    ],
)
def test_what_goes_wrong_meanwhile(monkeypatch, capsys, error, status, says):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(entry, "run", fail)
    assert entry.main(["jaxgen.run"]) == status
    text = capsys.readouterr().err
    assert text.startswith(f"jaxgen: {says}")
    assert text.count("\n") == 1


def test_errors_that_are_not_the_user_s_keep_their_traceback(monkeypatch):
    for error in (ValueError("ours"), jax.errors.JaxRuntimeError("INTERNAL: ours")):

        def fail(*arguments, error=error):
            raise error

        monkeypatch.setattr(entry, "run", fail)
        with pytest.raises(type(error), match="ours"):
            entry.main(["jaxgen.run"])


# ---- as a user meets them


def _said(stderr):
    """What the command said, apart from its progress bars."""
    lines = stderr.replace("\r", "\n").split("\n")
    return [line for line in lines if line.strip() and "%|" not in line]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            [DDPM, "--config.model.chanels=8"],
            "unknown config field 'model.chanels': did you mean 'model.channels'?",
        ),
        ([DDPM, "--config.data.source=mnist"], "data set 'mnist' is missing: looked for in"),
    ],
    ids=["override", "data"],
)
def test_one_line_and_nothing_else(tmp_path, arguments, says):
    changes = {"JAXGEN_DATA_DIR": str(tmp_path), "JAXGEN_CACHE_DIR": str(tmp_path), "TFDS_DATA_DIR": ""}
    status, stdout, stderr = run(*arguments, f"--workdir={tmp_path}/run", **changes)
    assert (status, stdout) == (2, "")
    assert stderr.startswith(f"jaxgen: {says}")
    assert stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run: checkpoints after updates 2 and 4."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    status, _, stderr = run(CLASSIFIER, f"--workdir={workdir}")
    assert status == 0, stderr
    assert _said(stderr) == []
    return workdir


def _largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def _flip_a_bit(checkpoint):
    path = _largest(checkpoint / "state")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def _truncate(checkpoint):
    for path in checkpoint.rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 3)


@pytest.mark.parametrize("damage", [_flip_a_bit, _truncate])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(trained, tmp_path, damage):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    damage(workdir / "checkpoints" / "4")
    (workdir / "result.json").unlink()
    status, stdout, stderr = run(CLASSIFIER, f"--workdir={workdir}")
    assert status == 0, stderr
    assert f"Checkpoint 4 in {workdir}/checkpoints is damaged (" in stdout
    assert "Going on from checkpoint 2 instead." in stdout
    assert _said(stderr) == []
    # The damaged one is not lost, and training again from update 2 ends with the same bits.
    assert (workdir / "checkpoints_damaged" / "4" / "state").is_dir()
    for name in ("result.json", "checkpoints/4/meta/metadata"):
        assert (workdir / name).read_bytes() == (trained / name).read_bytes()


def test_no_good_checkpoint_and_a_checkpoint_of_another_model(trained, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    for step in (2, 4):
        _truncate(workdir / "checkpoints" / str(step))
    before = _content(workdir / "checkpoints")
    status, _, stderr = run(CLASSIFIER, f"--workdir={workdir}")
    assert status == 2
    assert _said(stderr) == [
        f"jaxgen: Every checkpoint in {workdir}/checkpoints is damaged: "
        "restore the folder from a copy, or start again in another workdir."
    ]
    assert _content(workdir / "checkpoints") == before

    # The run's own files with another config: its checkpoints are then of another model.
    shutil.rmtree(workdir)
    shutil.copytree(trained, workdir)
    config = json.loads((workdir / "config.json").read_text())
    config["config"]["model"]["hidden"] = 16
    (workdir / "config.json").write_text(json.dumps(config))
    before = _content(workdir / "checkpoints")
    status, _, stderr = run(CLASSIFIER, "--config.model.hidden=16", f"--workdir={workdir}")
    assert status == 2
    (line,) = _said(stderr)
    assert line.startswith(
        f"jaxgen: The checkpoint {workdir}/checkpoints/4 belongs to another model: .params"
    )
    assert "float32[8] in it and float32[16] in this config" in line
    assert _content(workdir / "checkpoints") == before


def test_a_number_that_is_not_finite_stops_the_run(tmp_path):
    """Adam's first update has the size of the rate; squared it overflows in the update's norm, not before."""
    rate = ("--config.optim.learning_rate=1e30", "--config.optim.clip_norm=0")
    status, stdout, stderr = run(CLASSIFIER, f"--workdir={tmp_path}", *rate)
    assert (status, stdout) == (2, "")
    assert _said(stderr) == [
        "jaxgen: Update 1 is not finite (first: update_norm, parameter_norm); the run stopped and its last "
        "checkpoint is from before it: lower optim.learning_rate, set optim.clip_norm or look at the data "
        f"(its batch is in {tmp_path}/bad_batch.npz)."
    ]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["0"]


def test_a_full_disk(trained, tmp_path):
    """On a file system of 200 KB, which then grows; it ends with the processes that see it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = shlex.join(jaxgen_command(CLASSIFIER, f"--workdir={disk}/run"))
    script = f"""
        mount -t tmpfs -o size=200k tmpfs {disk} || exit 77
        {command} 2> {tmp_path}/stderr
        echo $? > {tmp_path}/status
        ls {disk}/run/checkpoints > {tmp_path}/checkpoints
        mount -o remount,size=50m {disk}
        {command} && cp {disk}/run/result.json {tmp_path}
    """
    unshare = ["unshare", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], check=False).returncode:
        pytest.skip("this user may not make a mount namespace")
    done = subprocess.run(
        [*unshare, "sh", "-c", script],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 77:
        pytest.skip("this user may not mount a file system")
    assert (tmp_path / "status").read_text() == "2\n"
    [sentence] = _said((tmp_path / "stderr").read_text())
    assert sentence in (
        f"jaxgen: Saving a checkpoint in {disk}/run/checkpoints failed (no space left on the device); "
        "0 MiB are free there: make room and run the same command again, it goes on from the last complete "
        "checkpoint.",
        # A line of metrics.jsonl may be what finds no room while the save goes on beside it.
        "jaxgen: No space left on device; nothing saved was lost.",
    )
    # Which save is the first without room depends on when its parts reach the disk; one before it is whole.
    assert [name for name in (tmp_path / "checkpoints").read_text().split() if name.isdigit()]
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "result.json").read_bytes() == (trained / "result.json").read_bytes()
