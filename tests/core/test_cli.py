"""The command line: values of each type, suggestions, experiment files; more of it in test_bad_input.py."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgen import cli, recorded
from jaxgen.run import define_flags
from jaxgen.types import UserError, advice

SMOKE = "--config=experiments/ddpm.py:smoke"


def parse(*argv):
    values = define_flags()
    source, config = cli.parse(["run", *argv], values)
    return values, source, config


# ---- what is given


def test_flags_and_overrides_in_any_order():
    values, source, config = parse(
        "--config.model.channels=12", "--workdir=here", SMOKE, "--mode=sample", "--config.optim.b1=0.5"
    )
    assert (values.workdir, values.mode, source) == ("here", "sample", "experiments/ddpm.py:smoke")
    assert (config.model.channels, config.optim.b1) == (12, 0.5)
    assert (values.checkpoint, values.seed, values.record) == ("newest", 0, False)


def test_config_as_two_words_and_the_last_of_two_counts():
    _, source, config = parse(
        "--config", "experiments/classifier.py:digits", SMOKE, "--config.seed=1", "--config.seed=2"
    )
    assert source == "experiments/ddpm.py:smoke"
    assert config.seed == 2


def test_nothing_else_than_the_overridden_field_changes():
    before = recorded.flatten(parse(SMOKE)[2].to_dict())
    after = recorded.flatten(parse(SMOKE, "--config.model.channels=12")[2].to_dict())
    assert {name for name in before if before[name] != after[name]} == {"model.channels"}
    assert before.keys() == after.keys()


@pytest.mark.parametrize(
    ("text", "preset", "value"),
    [
        ("64", 8, 64),
        ("-3", 8, -3),
        ("1e-3", 0.1, 0.001),
        ("2", 0.1, 2.0),
        ("true", False, True),
        ("False", True, False),
        ("0", True, False),
        ("cosine", "linear", "cosine"),
        ("", "linear", ""),
        ("a=b:c", "", "a=b:c"),
        ("1,2,4", (1,), (1, 2, 4)),
        ("(1, 2)", (1,), (1, 2)),
        ("3", (1,), (3,)),
        ("(3,)", (1,), (3,)),
        ("()", (1,), ()),
        ("", (1,), ()),
        ("4", (), (4,)),
        ("0.5,1", (0.1,), (0.5, 1.0)),
        ("a,b", ("x",), ("a", "b")),
    ],
)
def test_values_take_the_type_of_the_preset(text, preset, value):
    found = cli.parse_value("group.field", text, preset)
    assert found == value
    assert type(found) is type(value)
    if isinstance(value, tuple):
        assert [type(item) for item in found] == [type(item) for item in value]


def test_a_flag_without_a_value_is_true_and_no_makes_it_false():
    assert parse(SMOKE, "--config.model.remat")[2].model.remat is True
    assert parse(SMOKE, "--noconfig.sampling.clip")[2].sampling.clip is False


@pytest.mark.parametrize(
    ("text", "preset", "says"),
    [
        ("6.5", 8, "must be a whole number, not '6.5'"),
        ("true", 8, "must be a whole number, not 'true'"),
        ("", 8, "must be a whole number, not ''"),
        ("9" * 5000, 8, "must be a whole number"),
        ("big", 0.1, "must be a number, not 'big'"),
        ("nan", 0.1, "must be a finite number, not 'nan'"),
        ("1e999", 0.1, "must be a finite number, not '1e999'"),
        ("yes please", True, "must be true or false, not 'yes please'"),
        ("1,b", (1,), "must be a whole number, not 'b'"),
        ("1,,2", (1,), "must be a whole number, not ''"),
        ("1.5", (1,), "must be a whole number, not '1.5'"),
        ("[1]", (1,), "must be a whole number, not '[1]'"),
    ],
)
def test_values_of_another_type_are_refused_by_name(text, preset, says):
    with pytest.raises(UserError) as error:
        cli.parse_value("group.field", text, preset)
    assert str(error.value).startswith(f"config.group.field {says}")


# ---- suggestions


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("--config.model.chanels=3", "unknown config field 'model.chanels': did you mean 'model.channels'?"),
        (
            "--config.modle.channels=3",
            "unknown config field 'modle.channels': did you mean 'model.channels'?",
        ),
        ("--config.sed=3", "unknown config field 'sed': did you mean 'seed'?"),
        (
            "--config.model.learning_rate=3",
            "unknown config field 'model.learning_rate': did you mean 'optim.learning_rate'?",
        ),
        ("--config.data.qqq=3", "choose one of data.augment, data.batch_size, data.source"),
        ("--config.qqq.qqq=3", "choose one of data.…, diffusion.…, evaluation.…, model.…"),
        (
            "--config.model=3",
            "config.model is a group of fields: override one of model.attention_resolutions,",
        ),
        ("--config.model.channels.x=3", "unknown config field 'model.channels.x'"),
        ("--config.model.channel_multipliers[0]=3", "did you mean 'model.channel_multipliers'?"),
        ("--config.model.channels", "config.model.channels needs a value: write --config.model.channels=8."),
        ("--config.model.channel_multipliers", "write --config.model.channel_multipliers=1."),
        ("--noconfig.model.remat=false", "config.model.remat needs a value"),
        ("--config.to_dict=3", "unknown config field 'to_dict'"),
        ("--config.=3", "unknown config field ''"),
    ],
)
def test_overrides_of_no_field(override, says):
    with pytest.raises(UserError) as error:
        parse(SMOKE, override)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("word", "choices", "says"),
    [
        ("sampel", ("train", "sample"), "did you mean 'sample'?"),
        ("qqq", ("train", "sample"), "choose one of train, sample"),
    ],
)
def test_advice(word, choices, says):
    assert advice(word, choices) == says


# ---- experiment files


def test_an_experiment_of_the_user(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from ml_collections import ConfigDict\n"
        "PRESETS = {'small': None}\n"
        "get_config = lambda preset: ConfigDict({'seed': 0, 'model': {'width': 4}})\n"
        "build = None\n"
    )
    experiment = cli.load_experiment(str(file))
    assert (experiment.name, experiment.file) == ("mine", file)
    _, source, config = parse(f"--config={file}:small", "--config.model.width=5")
    assert (source, config.model.width) == (f"{file}:small", 5)


def test_an_experiment_is_found_from_any_folder_and_is_one_module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from experiments import ddpm

    assert cli.load_experiment("experiments/ddpm.py").module is ddpm


def test_errors_of_an_experiment_file_tell_the_line(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("import math\n\nmath.sqrt(-1)\n")
    with pytest.raises(UserError, match=r"cannot be loaded: ValueError: .*, line 3\.$"):
        cli.load_experiment(str(file))


def test_what_is_said_is_one_line(capsys):
    cli.complain(UserError("two\nlines  of\ttext"))
    assert capsys.readouterr().err == "jaxgen: two lines of text\n"


# ---- whatever is typed

_FIELDS = sorted(recorded.flatten(parse(SMOKE)[2].to_dict()))
_NAMES = st.one_of(
    st.sampled_from(_FIELDS),
    st.sampled_from(_FIELDS).map(lambda name: name.rpartition(".")[0]),
    st.text(alphabet="abcdelmno._[]0=-", max_size=12),
)
_VALUES = st.one_of(
    st.text(max_size=8),
    st.text(alphabet="0123456789()[],.e-+", max_size=8),
    st.sampled_from(["nan", "-inf", "None", "((((((", "1,(2,3)", "{1: 2}", "0x10", "١"]),
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.sampled_from(["--", "-", "--no", "---", ""]), _NAMES, st.sampled_from(["=", " ", ""]), _VALUES)
def test_no_override_whatever_it_is_gives_a_traceback(dashes, name, between, value):
    with contextlib.suppress(UserError):
        _, _, config = parse(SMOKE, f"{dashes}config.{name}{between}{value}")
        assert sorted(recorded.flatten(config.to_dict())) == _FIELDS


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.text(alphabet="-=confighelpwdmas.:/ \n", max_size=12), max_size=3))
def test_no_command_line_whatever_it_is_gives_a_traceback(arguments):
    with contextlib.suppress(UserError):
        parse(*arguments)
