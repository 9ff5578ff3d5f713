"""The launchers of clusters: what tpu_pod.sh would do, the JobSet's structure, the SLURM script."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from jaxgen import run as entry

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[1]
SHELL = shutil.which("dash") or shutil.which("sh")
JOB = ("--config=experiments/ddpm.py:smoke", "--workdir=/mnt/share/runs/my run", "--config.seed=3")


def _tpu_pod(*arguments, **variables):
    done = subprocess.run(
        [SHELL, str(ROOT / "launch" / "tpu_pod.sh"), *arguments],
        env={"PATH": os.environ["PATH"], "TMPDIR": "/tmp", **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout.splitlines(), done.stderr


# ---- TPU pods


def test_tpu_pod_creates_copies_runs_on_every_worker_collects_and_deletes():
    status, lines, stderr = _tpu_pod(
        "--dry_run", "all", *JOB, TPU_NAME="slice", ZONE="z", SPOT="1", NFS="10.0.0.2:/share"
    )
    assert (status, stderr) == (0, "")
    gcloud = "gcloud compute tpus tpu-vm"
    assert lines[0] == (
        f"{gcloud} create slice --accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite --spot --zone=z"
    )
    assert lines[-1] == f"{gcloud} delete slice --quiet --zone=z"
    assert [line.split()[4] for line in lines if line.startswith(gcloud)] == [
        *("create", "scp", "ssh", "ssh", "ssh", "ssh", "ssh", "scp", "delete")
    ]
    copying, running = lines.index(next(line for line in lines if " scp " in line)), lines[6]
    assert "git ls-files -co --exclude-standard -z | tar czf" in lines[copying - 1]
    assert lines[copying] == f"{gcloud} scp /tmp/slice.tar.gz slice:jaxgen.tar.gz --worker=all --zone=z"
    assert "--worker=all" in running
    # Quoted once for the worker's shell and once for this one.
    assert running.endswith(
        "'--command=cd jaxgen && .venv/bin/python -m jaxgen.run --distributed "
        "--config=experiments/ddpm.py:smoke '\\''--workdir=/mnt/share/runs/my run'\\'' --config.seed=3'"
        " --zone=z"
    )
    assert any("mount -t nfs 10.0.0.2:/share /mnt/share" in line and "--worker=all" in line for line in lines)
    assert any("--worker=0" in line and "--exclude=checkpoints" in line for line in lines)
    assert any(line.startswith("tar xzf") and f"{ROOT}/runs/my run" in line for line in lines)


def test_tpu_pod_deletes_the_slice_when_the_job_fails(tmp_path):
    log = tmp_path / "log"
    gcloud = tmp_path / "gcloud"
    gcloud.write_text(f'#!/bin/sh\necho "$*" >>{log}\ncase "$*" in *jaxgen.run*) exit 3 ;; esac\n')
    gcloud.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    status, _, _ = _tpu_pod("all", *JOB, PATH=path, TMPDIR=str(tmp_path), TPU_NAME="slice")
    assert status == 3
    said = log.read_text().splitlines()
    assert "create slice" in said[0]
    assert "jaxgen.run" in said[-2]
    assert "delete slice --quiet" in said[-1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "Say what to do: create, copy, run, collect, delete or all"),
        (["--dry_run", "start"], "start is none of"),
        (["all", "--dry_run", *JOB], "--dry_run goes first"),
        (["--dry-run", "all", *JOB], "--dry_run goes first"),
        (["--dry_run", "all", "--config=x"], "--workdir=DIRECTORY among them"),
        (["--dry_run", "collect"], "--workdir=DIRECTORY among them"),
    ],
)
def test_tpu_pod_says_what_it_lacks_before_it_does_anything(arguments, says):
    status, lines, stderr = _tpu_pod(*arguments)
    assert (status, lines) == (2, [])
    assert says in stderr
    assert stderr.count("\n") == 1


# ---- Kubernetes: the part of JobSet v1alpha2 that is used, and what must agree within the file

# name: (type, whether it is required, the fields inside); a list's entries are described by its own fields.
_CONTAINER = {
    "name": (str, True, None),
    "image": (str, True, None),
    "workingDir": (str, False, None),
    "command": (list, True, str),
    "args": (list, True, str),
    "env": (
        list,
        True,
        {"name": (str, True, None), "value": (str, False, None), "valueFrom": (dict, False, dict)},
    ),
    "ports": (list, False, {"containerPort": (int, True, None)}),
    "resources": (dict, True, {"limits": (dict, True, dict)}),
    "volumeMounts": (list, False, {"name": (str, True, None), "mountPath": (str, True, None)}),
}
_POD = {
    "restartPolicy": (str, True, None),
    "terminationGracePeriodSeconds": (int, True, None),
    "nodeSelector": (dict, True, dict),
    "containers": (list, True, _CONTAINER),
    "volumes": (
        list,
        False,
        {
            "name": (str, True, None),
            "persistentVolumeClaim": (dict, False, {"claimName": (str, True, None)}),
            "emptyDir": (dict, False, {"medium": (str, False, None)}),
        },
    ),
}
_JOB = {
    "parallelism": (int, True, None),
    "completions": (int, True, None),
    "completionMode": (str, True, None),
    "backoffLimit": (int, True, None),
    "template": (dict, True, {"spec": (dict, True, _POD)}),
}
_JOBSET = {
    "apiVersion": (str, True, None),
    "kind": (str, True, None),
    "metadata": (dict, True, {"name": (str, True, None)}),
    "spec": (
        dict,
        True,
        {
            "network": (dict, True, {"enableDNSHostnames": (bool, True, None)}),
            "failurePolicy": (dict, True, {"maxRestarts": (int, True, None)}),
            "replicatedJobs": (
                list,
                True,
                {
                    "name": (str, True, None),
                    "replicas": (int, True, None),
                    "template": (dict, True, {"spec": (dict, True, _JOB)}),
                },
            ),
        },
    ),
}


def _faults(value, fields, where=""):
    if not isinstance(fields, dict):
        if fields not in (None, dict) and not isinstance(value, fields):
            yield f"{where} is no {fields.__name__}"
        return
    yield from (f"{where}.{name} is unknown" for name in value.keys() - fields.keys())
    for name, (kind, required, inside) in fields.items():
        if name not in value:
            if required:
                yield f"{where}.{name} is missing"
        elif type(value[name]) is not kind:
            yield f"{where}.{name} is no {kind.__name__}"
        elif kind is list:
            for number, entry_ in enumerate(value[name]):
                yield from _faults(entry_, inside, f"{where}.{name}[{number}]")
        elif kind is dict:
            yield from _faults(value[name], inside, f"{where}.{name}")


@pytest.fixture(scope="module")
def jobset():
    return yaml.safe_load((ROOT / "launch" / "gke_jobset.yaml").read_text())


def test_jobset_has_the_structure_of_a_jobset(jobset):
    assert list(_faults(jobset, _JOBSET)) == []
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")


def test_a_fault_in_the_structure_is_seen(jobset):
    faulty = {**jobset, "spec": {**jobset["spec"], "replicas": 2, "failurePolicy": {"maxRestarts": "20"}}}
    assert list(_faults(faulty, _JOBSET)) == [
        ".spec.replicas is unknown",
        ".spec.failurePolicy.maxRestarts is no int",
    ]


def test_jobset_s_numbers_and_names_agree_and_its_command_is_ours(jobset):
    (workers,) = jobset["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    variables = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert workers["replicas"] == 1
    assert job["parallelism"] == job["completions"] == int(variables["JAX_NUM_PROCESSES"])
    assert job["completionMode"] == "Indexed"  # else there is no index to be the process's number
    name = jobset["metadata"]["name"]
    host, port = variables["JAX_COORDINATOR_ADDRESS"].split(":")
    assert host == f"{name}-{workers['name']}-0-0.{name}"
    assert int(port) in [port["containerPort"] for port in container["ports"]]
    (number,) = [entry_ for entry_ in container["env"] if entry_["name"] == "JAX_PROCESS_ID"]
    assert "job-completion-index" in number["valueFrom"]["fieldRef"]["fieldPath"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }
    assert container["command"] == ["python", "-m", "jaxgen.run"]
    flags = entry.define_flags()
    flags(
        ["jaxgen.run", *(argument for argument in container["args"] if not argument.startswith("--config"))]
    )
    assert flags.distributed
    assert flags.workdir.startswith("/runs/")


# ---- SLURM


def test_the_slurm_script_is_bash_and_says_what_it_lacks(tmp_path):
    script = ROOT / "launch" / "slurm.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True)
    environment = {"PATH": os.environ["PATH"], "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "1"}
    done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(".venv/bin/python is not there: run")


@pytest.mark.parametrize(("ended", "requeued"), [(0, False), (2, False), (143, True)])
def test_the_slurm_script_queues_itself_again_after_a_preemption_only(tmp_path, ended, requeued):
    log = tmp_path / "log"
    for name, status in (("srun", ended), ("scontrol", 0)):
        tool = tmp_path / name
        tool.write_text(f'#!/bin/sh\necho {name} "$@" >>{log}\nexit {status}\n')
        tool.chmod(0o755)
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "python").symlink_to("/bin/true")
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "17",
        "JAXGEN_VENV": str(tmp_path / "venv"),
    }
    script = ROOT / "launch" / "slurm.sbatch"
    done = subprocess.run(["bash", str(script), "--workdir=a b"], env=environment, check=False)
    assert done.returncode == ended
    said = log.read_text().splitlines()
    assert said[0].startswith("srun --kill-on-bad-exit=1")
    assert said[0].endswith("-m jaxgen.run --distributed --workdir=a b")
    assert said[1:] == (["scontrol requeue 17"] if requeued else [])


@pytest.mark.slow
def test_two_tasks_on_a_real_slurm(tmp_path):
    """tests/slurm.sh starts one on this machine; nothing is installed."""
    python = shutil.which("python")
    workdir = tmp_path / "run"
    small = ["--config.evaluation.classifier=", "--config.evaluation.num_likelihood=16"]
    done = subprocess.run(
        [str(ROOT / "tests" / "slurm.sh"), str(tmp_path / "slurm"), JOB[0], f"--workdir={workdir}", *small],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAXGEN_VENV": str(Path(python).parent.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    log = (tmp_path / "slurm" / "job.log").read_text()
    assert done.returncode == 0, done.stdout + log
    manifest = (workdir / "manifest.json").read_text()
    assert '"process_count": 2' in manifest
    assert (workdir / "result.json").is_file()
    assert log.count("Report: ") == 1  # one process speaks for all
