"""The launch scripts, run by a real sh with stand-ins for Python and pip: no network, nothing installed."""

import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
SHELL = shutil.which("dash") or shutil.which("sh")  # dash: the strictest sh in wide use
FIRST_CHOICES = ("python3.13", "python3.12", "python3.11", "python3")

# A Python that says it is of another version, or that lacks modules, and that makes `-m venv` an empty shell.
INTERPRETER = """#!{real} -S
import os, sys
sys.version_info = {version}
if not {has_ensurepip}:
    sys.modules["ensurepip"] = None
if sys.argv[1] == "-c":
    exec(sys.argv[2])
elif sys.argv[1:3] == ["-m", "venv"]:
    folder = sys.argv[3]
    os.makedirs(folder + "/bin", exist_ok=True)
    open(folder + "/pyvenv.cfg", "w").close()
    os.symlink(os.environ["VENV_PYTHON"], folder + "/bin/python")
else:
    print("Python", *sys.version_info[:3])
"""
# The Python of the virtual environment: writes down what it is asked to run, and does what the test wants.
VENV_PYTHON = """#!/bin/sh
case "$*" in
    "-c "*) exec {real} -S "$@" ;;
    "-m pip --version") exit 0 ;;
    "-m pip index versions torch") echo "Available versions: 2.99.0, $TORCH, 2.0.0"; exit 0 ;;
esac
echo "$PWD> $*" >>"$LOG"
case "$*" in "-m pip install"*) exit "${{PIP_STATUS:-0}}" ;; esac
"""


def write_script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def fake_python(path, version=(3, 12, 1), has_ensurepip=True):
    write_script(path, INTERPRETER.format(real=sys.executable, version=version, has_ensurepip=has_ensurepip))


@pytest.fixture
def checkout(tmp_path):
    """A checkout with the real scripts in a folder with a space in its name; no Python on its PATH."""
    root = tmp_path / "my checkout"
    shutil.copytree(ROOT / "launch", root / "launch")
    (root / "pyproject.toml").write_text('peers = ["torch==2.13.0"]\n')
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("dirname", "cat", "cksum", "ls", "mkdir", "rm", "sed", "grep", "uname", "sh", "env"):
        (tools / tool).symlink_to(shutil.which(tool))
    write_script(tmp_path / "venv_python", VENV_PYTHON.format(real=sys.executable))
    return root


def run(checkout, script, *args, cwd=None, **environment):
    """Runs a script: its exit status, its output, and what the environment's Python was asked to run."""
    log = checkout.parent / "log"
    log.unlink(missing_ok=True)
    path = f"{checkout.parent}/bin:{checkout.parent}/tools"
    done = subprocess.run(
        [SHELL, str(checkout / "launch" / script), *args],
        cwd=cwd or checkout.parent,
        env={"PATH": path, "LOG": str(log), "VENV_PYTHON": f"{checkout.parent}/venv_python", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    lines = log.read_text().splitlines() if log.exists() else []
    return done.returncode, done.stdout + done.stderr, [line.removeprefix(f"{checkout}> ") for line in lines]


INSTALL = "-m pip install --editable ."
MAIN_JOB = "-m jaxgen.run --config=experiments/ddpm.py:digits --workdir=runs/ddpm_digits"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_posix_sh(script):
    text = script.read_text()
    subprocess.run([SHELL, "-n", script], check=True)
    bash_only = r"\[\[|\bfunction\b|\blocal\s+\w+=|<<<|\$'|&>|\bsource\b"
    assert not re.search(bash_only, text)
    if script.name != "setup.sh":  # which is sourced
        assert text.startswith("#!/bin/sh\n")
        assert "set -eu" in text


def test_ci_script_is_executable_bash():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().startswith("#!/usr/bin/env bash\n")
    if shutil.which("bash"):
        subprocess.run(["bash", "-n", script], check=True)


def test_shellcheck_is_content():
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    subprocess.run(["shellcheck", "-x", "-s", "sh", *SCRIPTS], check=True, cwd=ROOT)


def test_the_extras_that_the_scripts_name_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"cuda", "test", "peers"} <= set(extras)
    # setup.sh reads this pin to look for the CPU build; `test` alone must not pull the gigabytes.
    assert any(re.fullmatch(r"torch==[0-9.]+", requirement) for requirement in extras["peers"])
    assert not any("torch" in requirement or "peers" in requirement for requirement in extras["test"])


@pytest.mark.parametrize(
    ("versions", "chosen"),
    [
        ({"python3.11": (3, 11, 0), "python3": (3, 14, 0)}, "python3.11"),
        ({"python3.13": (3, 13, 0), "python3.11": (3, 11, 9), "python3": (3, 11, 9)}, "python3.13"),
        ({"python3": (3, 14, 0)}, "python3"),
        ({"python3.12": (3, 10, 0), "python3": (3, 12, 0)}, "python3"),  # the name says 3.12, the program not
    ],
)
def test_the_first_python_that_will_do_is_chosen(checkout, versions, chosen):
    for name, version in versions.items():
        fake_python(checkout.parent / "bin" / name, version)
    status, output, log = run(checkout, "local.sh")
    assert status == 0, output
    assert "Python {} {} {}".format(*versions[chosen]) in output
    assert log == [INSTALL, MAIN_JOB]


def test_shims_that_exist_and_fail_are_passed_over(checkout):
    for name in ("python3.13", "python3.12"):
        write_script(checkout.parent / "bin" / name, "#!/bin/sh\necho no such version >&2\nexit 127\n")
    fake_python(checkout.parent / "bin" / "python3.11", (3, 11, 7))
    status, output, _ = run(checkout, "local.sh")
    assert status == 0, output
    assert "no such version" not in output


def test_a_python_without_ensurepip_is_passed_over(checkout):
    fake_python(checkout.parent / "bin" / "python3.13", (3, 13, 0), has_ensurepip=False)
    fake_python(checkout.parent / "bin" / "python3.11", (3, 11, 7))
    status, output, _ = run(checkout, "local.sh")
    assert status == 0, output
    assert "Python 3 11 7" in output


@pytest.mark.parametrize(
    ("pythons", "environment", "message"),
    [
        (
            {},
            {},
            "No Python of version 3.11 or later was found: install one, or name it in the variable PYTHON.",
        ),
        ({"python3": {"version": (3, 10, 4)}}, {}, "No Python of version 3.11 or later was found"),
        (
            {"python3": {"has_ensurepip": False}},
            {},
            "python3 lacks the modules venv and ensurepip: install them",
        ),
        (
            {"python3": {}},
            {"PYTHON": "python2"},
            "PYTHON=python2 is no working Python of version 3.11 or later",
        ),
        (
            {"python3": {}, "mine": {"has_ensurepip": False}},
            {"PYTHON": "mine"},
            "PYTHON=mine lacks the modules venv and ensurepip",
        ),
    ],
)
def test_without_a_python_there_is_one_sentence(checkout, pythons, environment, message):
    for name, settings in pythons.items():
        fake_python(checkout.parent / "bin" / name, **settings)
    status, output, log = run(checkout, "local.sh", **environment)
    assert status == 2
    assert output.startswith(message)
    assert output.count("\n") == 1, "one sentence"
    assert log == []
    assert not (checkout / ".venv").exists()


def test_python_can_be_named(checkout):
    for name in FIRST_CHOICES:
        fake_python(checkout.parent / "bin" / name, (3, 11, 1))
    fake_python(checkout.parent / "elsewhere" / "py", (3, 12, 7))
    status, output, _ = run(checkout, "local.sh", PYTHON=str(checkout.parent / "elsewhere" / "py"))
    assert status == 0, output
    assert "Python 3 12 7" in output


@pytest.fixture
def with_python(checkout):
    fake_python(checkout.parent / "bin" / "python3", sys.version_info[:3])
    return checkout


def test_a_second_start_installs_nothing(with_python):
    assert run(with_python, "local.sh")[2] == [INSTALL, MAIN_JOB]
    status, output, log = run(with_python, "local.sh")
    assert (status, output, log) == (0, "", [MAIN_JOB])


def test_a_changed_pyproject_is_installed(with_python):
    run(with_python, "local.sh")
    with (with_python / "pyproject.toml").open("a") as file:
        file.write("# a new dependency\n")
    assert run(with_python, "local.sh")[2] == [INSTALL, MAIN_JOB]


def test_a_moved_checkout_is_installed(with_python):
    run(with_python, "local.sh")
    moved = with_python.rename(with_python.parent / "moved")
    assert run(moved, "local.sh")[2] == [INSTALL, MAIN_JOB]


def test_an_interrupted_installation_is_done_again(with_python):
    status, output, log = run(with_python, "local.sh", PIP_STATUS="1")
    assert status == 2
    assert "The installation failed" in output
    assert log == [INSTALL], "nothing is run after a failed installation"
    assert run(with_python, "local.sh")[2] == [INSTALL, MAIN_JOB]


def test_an_interrupted_environment_is_made_again(with_python):
    run(with_python, "local.sh")
    (with_python / ".venv" / "bin" / "python").unlink()
    status, output, log = run(with_python, "local.sh")
    assert status == 0, output
    assert log == [INSTALL, MAIN_JOB]


def test_a_foreign_folder_is_left_alone(with_python):
    mine = with_python / ".venv" / "bin" / "mine"
    write_script(mine, "")
    status, output, log = run(with_python, "local.sh")
    assert status == 2
    assert "set JAXGEN_VENV to another folder" in output
    assert log == []
    assert mine.exists()


def test_another_environment_folder(with_python):
    status, output, log = run(with_python, "local.sh", JAXGEN_VENV="env here")
    assert status == 0, output
    assert log == [INSTALL, MAIN_JOB]
    assert (with_python.parent / "env here" / "bin" / "python").exists()
    assert not (with_python / ".venv").exists()


def test_another_python_than_the_environments_is_told(with_python):
    run(with_python, "local.sh")
    fake_python(with_python.parent / "bin" / "other", (3, 99, 0))
    status, output, log = run(with_python, "local.sh", PYTHON="other")
    assert status == 2
    assert "but PYTHON=other is another" in output
    assert log == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config.model.channels=8", "--seed=1"], MAIN_JOB + " --config.model.channels=8 --seed=1"),
        (["--list"], MAIN_JOB + " --list"),
        (["--config=a.py:b", "--workdir=w"], "-m jaxgen.run --config=a.py:b --workdir=w"),
        (["--workdir=w", "--config", "a.py"], "-m jaxgen.run --workdir=w --config a.py"),
    ],
)
def test_arguments_of_the_main_job(with_python, arguments, expected):
    assert run(with_python, "local.sh", *arguments)[2][-1] == expected


def test_any_working_directory_and_relative_call(with_python, tmp_path):
    elsewhere = tmp_path / "else" / "where"
    elsewhere.mkdir(parents=True)
    assert run(with_python, "local.sh", cwd=elsewhere)[2] == [INSTALL, MAIN_JOB]
    environment = {"PATH": f"{tmp_path}/bin:{tmp_path}/tools", "LOG": str(tmp_path / "log"), "CDPATH": "/"}
    subprocess.run([SHELL, "local.sh"], cwd=with_python / "launch", env=environment, check=True)
    assert (tmp_path / "log").read_text().splitlines()[-1] == f"{with_python}> {MAIN_JOB}"


def test_the_cuda_build_where_there_is_a_gpu(with_python):
    write_script(with_python.parent / "bin" / "nvidia-smi", "#!/bin/sh\n")
    write_script(with_python.parent / "bin" / "uname", "#!/bin/sh\necho Linux\n")
    assert run(with_python, "local.sh")[2] == [INSTALL + "[cuda]", MAIN_JOB]
    assert run(with_python, "local.sh")[2] == [MAIN_JOB]


@pytest.mark.parametrize(
    ("system", "torch", "peers", "extras"),
    [
        ("Linux", "2.13.0+cpu", "", "test,peers"),
        ("Linux", "2.13.0", "", "test"),
        ("Linux", "2.12.0+cpu", "", "test"),  # a CPU build, but not of the pinned version
        ("Linux", "2.13.0", "1", "test,peers"),
        ("Linux", "2.13.0+cpu", "0", "test"),
        ("Darwin", "2.13.0", "", "test,peers"),
    ],
)
def test_peers_come_where_torch_has_a_cpu_build(with_python, system, torch, peers, extras):
    write_script(with_python.parent / "bin" / "uname", f"#!/bin/sh\necho {system}\n")
    environment = {"TORCH": torch, "JAXGEN_PEERS": peers}
    status, output, log = run(with_python, "test.sh", "tests/core", "-k", "a b", **environment)
    assert status == 0, output
    assert log == [f"{INSTALL}[{extras}]", "-m pytest -n 2 --dist loadfile tests/core -k a b"]
    assert ("Leaving out the comparisons" in output) == (extras == "test" and peers == "")
    status, output, log = run(with_python, "test.sh", **environment)
    assert (status, output, log) == (0, "", ["-m pytest -n 2 --dist loadfile"])


def test_peers_setting_out_of_range(with_python):
    status, output, log = run(with_python, "test.sh", JAXGEN_PEERS="yes")
    assert status == 2
    assert output == "JAXGEN_PEERS=yes means nothing: give 1, 0 or auto.\n"
    assert log == []


def test_slow_tests_pass_arguments_on(with_python):
    assert (
        run(with_python, "test_slow.sh", "-x", JAXGEN_PEERS="0")[2][-1]
        == "-m pytest -n 2 --dist loadfile -m slow -x"
    )


def test_local_and_test_share_one_environment(with_python):
    assert run(with_python, "test.sh", JAXGEN_PEERS="0")[2] == [
        INSTALL + "[test]",
        "-m pytest -n 2 --dist loadfile",
    ]
    assert run(with_python, "local.sh")[2] == [MAIN_JOB]


def test_the_exit_status_is_the_jobs(with_python):
    write_script(with_python.parent / "venv_python", '#!/bin/sh\ncase "$*" in *jaxgen.run*) exit 7 ;; esac\n')
    assert run(with_python, "local.sh")[0] == 7
