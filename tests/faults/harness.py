"""What can befall a run, done to a real one: each function does it and says what came of it.

Every run is the smoke preset of an experiment, started as a user would, without the other runs that its
evaluation needs. What a run must end with, whatever befell it, is what an undisturbed one ended with: the
same state bit for bit, the same scores, the same pictures, the same curves.
"""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from command import ROOT, environment, jaxgen_command, run

from jaxgen import cli

SECONDS = float(os.environ.get("JAXGEN_FAULTS_SECONDS", 600))  # the longest that one command may take
KILLS = int(os.environ.get("JAXGEN_FAULTS_KILLS", 20))


@dataclasses.dataclass
class Outcome:
    """How often a fault was tried, how often the run then ended as an undisturbed one, and the steps lost."""

    experiment: str
    fault: str
    tried: int = 0
    survived: int = 0
    lost_steps: int = 0
    notes: str = ""

    def see(self, what_went_wrong):
        """Counts one try; `what_went_wrong` is "" where nothing did."""
        self.tried += 1
        self.survived += not what_went_wrong
        if what_went_wrong:
            self.notes = f"{self.notes} {what_went_wrong}".strip()


class Undisturbed:
    """A run that went through, to compare with."""

    def __init__(self, name, workdir):
        self.name, self.workdir = name, Path(workdir)
        config = cli.load_experiment(f"experiments/{name}.py").module.get_config("smoke")
        unneeded = ["--config.evaluation.classifier="] if "classifier" in config.get("evaluation", {}) else []
        self.arguments = [f"--config=experiments/{name}.py:smoke", *unneeded]
        self._run_through(workdir)
        self.ending = ending(self.workdir)
        # The first one compiled. The moments to kill at are spread over what one takes that need not.
        again = self.workdir.with_name(f"{name}_again")
        started = time.monotonic()
        self._run_through(again)
        self.seconds = time.monotonic() - started
        assert self.difference(again) == ""

    def _run_through(self, workdir):
        status, _, stderr = self.run_in(workdir)
        assert status == 0, stderr

    def run_in(self, workdir, **changes):
        return run(*self.arguments, f"--workdir={workdir}", timeout=SECONDS, **changes)

    def start_in(self, workdir, *arguments, **changes):
        return subprocess.Popen(
            jaxgen_command(*self.arguments, f"--workdir={workdir}", *arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment(**changes),
        )

    def difference(self, workdir, *, apart_from=()):
        """What is different from here in another run's ending; "" where nothing is."""
        other = ending(workdir)
        names = [name for name in self.ending if name not in apart_from]
        return ", ".join(name for name in names if other[name] != self.ending[name])

    def goes_on(self, workdir, *, apart_from=()):
        """Runs the command again; says what went wrong or what is different at the end."""
        status, _, stderr = self.run_in(workdir)
        if status:
            return f"status {status}: {stderr[-300:]}"
        return self.difference(workdir, apart_from=apart_from)


def steps(workdir):
    """The steps of the complete checkpoints."""
    names = [path.name for path in (Path(workdir) / "checkpoints").glob("*")]
    return sorted(int(name) for name in names if name.isdigit())


def curves(workdir):
    path = Path(workdir) / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue  # the last one of a killed run
        rows.append({name: value for name, value in row.items() if not name.endswith("per_second")})
    return rows


def ending(workdir):
    """Everything of a finished run that must not depend on what befell it."""
    workdir = Path(workdir)
    last = workdir / "checkpoints" / str(steps(workdir)[-1])
    result = workdir / "result.json"
    return {
        "state": (last / "meta" / "metadata").read_bytes(),
        "scores": result.read_bytes() if result.exists() else None,
        "curves": curves(workdir),
        # A write that was cut off leaves a hidden .NAME.PID.tmp beside the file that comes in its place.
        "samples": {
            path.name: path.read_bytes()
            for path in (workdir / "samples").glob("*.*")
            if not path.name.startswith(".")
        },
    }


def _doing(workdir):
    """What a run that was just killed was at, by what it left."""
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    if any("tmp" in name for name in names):
        return "save"
    if (workdir / "samples").exists():
        return "evaluation" if any((workdir / "samples").iterdir()) else "sampling"
    return "steps" if curves(workdir) else "start"


def _wait_for(condition, process, seconds=SECONDS):
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        if time.monotonic() > end:
            process.kill()
            raise AssertionError(f"the run did not come that far: {process.communicate()}")
        time.sleep(0.005)


def _begun(workdir, since):
    manifest = workdir / "manifest.json"
    return lambda: manifest.exists() and manifest.stat().st_mtime > since


def sigkill(whole, folder, rng, kills=None):
    """kill -9 at random moments, time and again, until it has happened often enough; then to the end.

    A run that ends before its next kill comes is compared and begun anew.
    """
    outcome = Outcome(whole.name, "SIGKILL")
    seen = dict.fromkeys(("start", "steps", "save", "sampling", "evaluation"), 0)
    lost, problems = 0, []
    workdir = folder / "run_0"
    left, begun = KILLS if kills is None else kills, 0
    while left:
        process = whole.start_in(workdir)
        _wait_for(_begun(workdir, time.time()), process)
        moment = time.monotonic() + rng.uniform(0, 0.7 * whole.seconds)
        while process.poll() is None and time.monotonic() < moment:
            time.sleep(0.005)
        process.kill()
        process.communicate()
        if process.returncode == 0:
            begun += 1
            problems.append(whole.difference(workdir))
            workdir = folder / f"run_{begun}"
            continue
        left -= 1
        seen[_doing(workdir)] += 1
        logged = max((row["step"] for row in curves(workdir)), default=0)
        lost += max(0, logged - max(steps(workdir), default=0))
        outcome.tried += 1
    problems = [problem for problem in (*problems, whole.goes_on(workdir)) if problem]
    # Which of the kills did it is not known; one is counted for each run that ended otherwise.
    outcome.survived = outcome.tried - len(problems)
    outcome.lost_steps = lost
    outcome.notes = "; ".join([", ".join(f"{n} in {what}" for what, n in seen.items() if n), *problems])
    return outcome


def sigterm(whole, folder, rng):
    """SIGTERM at a random moment after the first checkpoint: no step is lost.

    The curves gain a point where the run stopped, and lose that of a validation that was under way.
    Status 143 means that the run stopped by itself; outside training, evaluation and sampling nothing is
    left to save, and the signal ends the process (which a shell calls 143 too).
    """
    outcome, workdir = Outcome(whole.name, "SIGTERM"), folder / "run"
    process = whole.start_in(workdir)
    _wait_for(lambda: steps(workdir), process)
    time.sleep(rng.uniform(0, 0.2 * whole.seconds))
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=SECONDS)
    logged = max((row["step"] for row in curves(workdir)), default=0)
    outcome.lost_steps = max(0, logged - steps(workdir)[-1])
    wrong = "" if process.returncode in (0, 128 + signal.SIGTERM, -signal.SIGTERM) else stderr[-300:]
    outcome.see(wrong or whole.goes_on(workdir, apart_from=("curves",)))
    return outcome


def _largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def _flip(path, rng):
    content = bytearray(path.read_bytes())
    content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)


def damage(whole, folder, rng):
    """The newest checkpoint with a flipped bit, with a file cut short, with each of its files gone in turn.

    Files in which a change changes nothing (a description that the arrays do not need) may be passed over.
    """
    outcomes = []
    newest = str(steps(whole.workdir)[-1])
    files = sorted(
        path.relative_to(whole.workdir)
        for path in (whole.workdir / "checkpoints" / newest).rglob("*")
        if path.is_file()
    )
    big = _largest(whole.workdir / "checkpoints" / newest / "state").relative_to(whole.workdir)
    faults = {
        "flipped bit in a checkpoint": [(big, lambda path: _flip(path, rng))] * 2,
        "truncated file in a checkpoint": [(big, lambda path: os.truncate(path, path.stat().st_size // 2))],
        "missing file in a checkpoint": [
            (big, Path.unlink),
            (files[int(rng.integers(len(files)))], Path.unlink),
        ],
    }
    for fault, tries in faults.items():
        outcome = Outcome(whole.name, fault)
        for number, (victim, do) in enumerate(tries):
            workdir = folder / f"{fault.split()[0]}_{number}"
            shutil.copytree(whole.workdir, workdir, ignore=shutil.ignore_patterns("result.json", "samples"))
            do(workdir / victim)
            outcome.see(whole.goes_on(workdir))
            outcome.lost_steps += int(newest) - steps(whole.workdir)[-2]
        outcomes.append(outcome)
    return outcomes


def _in_own_mounts(script):
    """(status, stderr) of a shell script in a mount namespace; None where this user may not have one."""
    unshare = ["unshare", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], check=False).returncode:
        return None
    done = subprocess.run(
        [*unshare, "sh", "-c", script],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=2 * SECONDS,
        check=False,
    )
    return None if done.returncode == 77 else (done.returncode, done.stderr)


def disk_full(whole, folder, rng):
    """A file system with room for a part of the run, which then grows."""
    outcome, disk = Outcome(whole.name, "disk full"), folder / "disk"
    disk.mkdir()
    size = sum(path.stat().st_size for path in whole.workdir.rglob("*") if path.is_file())
    room = max(64, int(rng.uniform(0.3, 0.8) * size) // 1024)
    command = subprocess.list2cmdline(jaxgen_command(*whole.arguments, f"--workdir={disk}/run"))
    ran = _in_own_mounts(f"""
        mount -t tmpfs -o size={room}k tmpfs {disk} || exit 77
        {command} 2> {folder}/stderr; echo $? > {folder}/status
        mount -o remount,size=1g {disk}
        {command} && cp -r {disk}/run {folder}/run
    """)
    if ran is None:
        return None
    status, said = int((folder / "status").read_text()), (folder / "stderr").read_text()
    wrong = "" if status == 2 and "Traceback" not in said else f"status {status}: {said[-300:]}"
    wrong = wrong or (f"then {ran[1][-300:]}" if ran[0] else whole.difference(folder / "run"))
    outcome.see(wrong)
    outcome.notes = f"{outcome.notes} room for {room} of {size // 1024} KiB".strip()
    return outcome


def read_only(whole, folder, rng):
    """A finished run's workdir that cannot be written: one sentence, status 2."""
    outcome, workdir = Outcome(whole.name, "read-only workdir"), folder / "run"
    shutil.copytree(whole.workdir, workdir)
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    command = subprocess.list2cmdline(jaxgen_command(*whole.arguments, f"--workdir={workdir}"))
    ran = _in_own_mounts(
        f"mount --bind {workdir} {workdir} && mount -o remount,ro,bind {workdir} || exit 77\n{command}"
    )
    if ran is None:
        return None
    status, said = ran
    unchanged = before == {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    told = status == 2 and said.count("\n") == 1 and "cannot be written" in said
    outcome.see("" if told and unchanged else f"status {status}: {said[-300:]}")
    return outcome


def two_runs(whole, folder, rng):
    """A second run on the workdir of one that is under way is refused, and harms nothing."""
    outcome, workdir = Outcome(whole.name, "two runs on one workdir"), folder / "run"
    first = whole.start_in(workdir)
    _wait_for(lambda: steps(workdir), first)
    os.kill(first.pid, signal.SIGSTOP)  # so that it is under way for as long as the second takes to start
    try:
        status, _, stderr = whole.run_in(workdir)
    finally:
        os.kill(first.pid, signal.SIGCONT)
    first.communicate(timeout=SECONDS)
    refused = status == 2 and "Another process is training" in stderr
    outcome.see(whole.difference(workdir) if refused else f"status {status}: {stderr[-300:]}")
    return outcome


_JUMPING = """
import random, time
real, real_ns = time.time, time.time_ns
jumps, offset = random.Random({seed}), 0
def now_off_by():
    global offset
    if jumps.random() < 0.05:
        offset = jumps.choice((-86400, -60, 0, 60, 86400))
    return offset
time.time = lambda: real() + now_off_by()
time.time_ns = lambda: real_ns() + now_off_by() * 10**9
"""


def clock(whole, folder, rng):
    """time.time jumps now and then by up to a day, either way; as Python sees it, the system's stays.

    Orbax measures its patience by that clock: a jump in a save may end the run in one sentence; it goes on.
    """
    outcome, workdir = Outcome(whole.name, "clock jumping"), folder / "run"
    (folder / "sitecustomize.py").write_text(_JUMPING.format(seed=int(rng.integers(2**31))))
    status, _, stderr = whole.run_in(workdir, PYTHONPATH=str(folder))
    if status == 2 and "the system's clock jumped" in stderr:
        outcome.notes = "ended in a save"
        newest = max(steps(workdir), default=0)
        outcome.lost_steps = max((row["step"] for row in curves(workdir)), default=newest) - newest
        outcome.see(whole.goes_on(workdir))
    else:
        outcome.see(f"status {status}: {stderr[-300:]}" if status else whole.difference(workdir))
    return outcome


def one_of_several(whole, folder, rng, limit=120.0):
    """kill -9 to one process of two: the other ends, says why, and both go on when started again."""
    import elastic

    outcome, workdir = Outcome(whole.name, "one process of two killed"), folder / "run"
    command = jaxgen_command(*whole.arguments, f"--workdir={workdir}", "--distributed")
    running = elastic.start(command, processes=2)
    victim = int(rng.integers(2))
    _wait_for(lambda: [step for step in steps(workdir) if step], running[victim])
    running[victim].kill()
    killed = time.monotonic()
    other = running[1 - victim]
    try:
        _, stderr = other.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        stderr = f"it still ran after {limit} s"
    seconds = time.monotonic() - killed
    elastic.finish(running)
    told = other.returncode not in (0, None) and ("process" in stderr or "coordination" in stderr)
    wrong = "" if told and seconds < limit else stderr[-500:]
    if not wrong:
        again = elastic.finish(elastic.start(command, processes=2), SECONDS)
        wrong = "".join(text[-300:] for status, _, text in again if status)
    outcome.see(wrong)
    sentence = next((line for line in stderr.splitlines() if line.startswith("jaxgen:")), "")
    outcome.notes += f" the other ended after {seconds:.0f} s, status {other.returncode}: {sentence[:60]}"
    return outcome


FAULTS = (sigkill, sigterm, damage, disk_full, read_only, two_runs, clock, one_of_several)


OUTCOMES = []  # of all tests, for the table at the end


def note(outcomes):
    """Keeps outcomes for the table at the end; adds their lines to JAXGEN_FAULTS_TABLE, if that is given."""
    OUTCOMES.extend(outcomes)
    if path := os.environ.get("JAXGEN_FAULTS_TABLE"):
        with open(path, "a") as file:
            file.writelines(f"{line}\n" for line in table(outcomes)[2 if file.tell() else 0 :])


def table(outcomes):
    """The outcomes as lines of Markdown."""
    lines = ["| experiment | fault | tried | survived | steps lost | |", "|---|---|---|---|---|---|"]
    return [
        *lines,
        *(
            f"| {o.experiment} | {o.fault} | {o.tried} | {o.survived} | {o.lost_steps} | {o.notes} |"
            for o in outcomes
        ),
    ]
