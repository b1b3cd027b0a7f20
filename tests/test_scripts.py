"""The shell scripts and the constraint files."""

import hashlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
SCRIPTS = [*sorted((PROJECT / "scripts").glob("*.sh")), PROJECT / ".ci" / "run"]
# The dev extra installs it beside python, whose folder may not be on the PATH.
SHELLCHECK = shutil.which("shellcheck") or shutil.which(
    "shellcheck", path=Path(sys.executable).parent
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_stop_on_errors(script: Path) -> None:
    text = script.read_text(encoding="utf-8")

    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_pass_shellcheck(script: Path) -> None:
    assert SHELLCHECK is not None
    done = subprocess.run(
        [SHELLCHECK, "--source-path", PROJECT, script], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stdout


CONSTRAINTS = sorted((PROJECT / "scripts").glob("constraints*.txt"))
PINNED = re.compile(
    r"([A-Za-z0-9._-]+)==([0-9][0-9A-Za-z.]*)(?:; python_version [<>]=? '[0-9.]+')?"
)


def requirements() -> list[str]:
    """The requirements in pyproject.toml, including those of the tests."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [*project["dependencies"], *project["optional-dependencies"]["dev"]]


@pytest.mark.parametrize("path", CONSTRAINTS, ids=lambda path: path.name)
def test_constraints_contain_names_and_versions_only(path: Path) -> None:
    for line in path.read_text(encoding="utf-8").splitlines():
        assert line.startswith("#") or PINNED.fullmatch(line), line


@pytest.mark.parametrize("path", CONSTRAINTS, ids=lambda path: path.name)
def test_every_direct_dependency_is_pinned(path: Path) -> None:
    names = {re.split(r"[<>=!~\[ ]", requirement)[0].lower() for requirement in requirements()}
    pinned = {line.split("==")[0].lower() for line in path.read_text().splitlines() if "==" in line}

    assert names <= pinned


def test_the_lowest_versions_are_the_lower_bounds_of_pyproject() -> None:
    lines = (PROJECT / "scripts" / "constraints-lowest.txt").read_text().splitlines()
    pinned = dict(match.groups() for line in lines if (match := PINNED.fullmatch(line)))

    for requirement in requirements():
        match = re.match(r"([\w.-]+)[>=]=([\d.]+)", requirement)
        assert match, f"{requirement} has no lower bound"
        name, bound = match.groups()
        assert f"{pinned[name.lower()]}.".startswith(f"{bound}."), requirement


# Seconds after which a script counts as hanging; generous, because the machine may be busy.
TIMEOUT = 120
# Replaces a program that the scripts call and prints its arguments.
PRINT_ARGUMENTS = """
echo "$(basename "$0")" "$@"
echo "threads ${OMP_NUM_THREADS:-unset}"
"""
# A program that saves on SIGTERM, as segtrain does.
SAVE_ON_SIGTERM = """
trap 'echo saved; exit 143' TERM
echo $$ >"$PID_FILE"
while :; do sleep 0.02; done
"""


class Sandbox:
    """A copy of the scripts without a .venv, and a PATH that starts with fake programs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[str]] = []
        self.bin = folder / "bin"
        self.bin.mkdir()
        shutil.copytree(PROJECT / "scripts", folder / "project" / "scripts")
        self.environment = {"PATH": f"{self.bin}:/usr/bin:/bin"}

    def add_program(self, name: str, body: str, *, folder: Path | None = None) -> None:
        path = (folder or self.bin) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{body}", encoding="utf-8")
        path.chmod(0o755)

    def start(self, script: str, *arguments: str, **environment: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            ["bash", self.folder / "project" / "scripts" / script, *arguments],
            cwd=self.folder,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def kill_processes(self) -> None:
        """Kill processes that a failed test left."""
        for process in self.started:
            if not group_is_gone(process.pid):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate(timeout=TIMEOUT)

    def run(
        self, script: str, *arguments: str, **environment: str
    ) -> "subprocess.CompletedProcess[str]":
        process = self.start(script, *arguments, **environment)
        out, err = process.communicate(timeout=TIMEOUT)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture
def sandbox(tmp_path: Path) -> Iterator[Sandbox]:
    sandbox = Sandbox(tmp_path)
    yield sandbox
    sandbox.kill_processes()


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, f"timed out after {TIMEOUT} s"
        time.sleep(0.01)


def group_is_gone(leader: int) -> bool:
    """Whether no process is left in the process group of `leader`."""
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return True
    return False


def error_lines(done: "subprocess.CompletedProcess[str]") -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


# --- train_multi_gpu.sh


@pytest.mark.parametrize(
    ("smi", "environment", "count"),
    [
        ("GPU 0: A (UUID: a)\nGPU 1: B (UUID: b)\nGPU 2: C (UUID: c)", {}, 3),
        ("GPU 0: A (UUID: a)\n  MIG 1g.5gb Device 0: (UUID: m)\nGPU 1: B (UUID: b)", {}, 2),
        ("GPU 0: A (UUID: a)\nGPU 1: B (UUID: b)", {"CUDA_VISIBLE_DEVICES": "5,3,1,0"}, 4),
        ("GPU 0: A (UUID: a)\nGPU 1: B (UUID: b)", {"CUDA_VISIBLE_DEVICES": "1,0,-1,2"}, 2),
        ("GPU 0: A (UUID: a)\nGPU 1: B (UUID: b)", {"GPUS": "6"}, 6),
    ],
)
def test_multi_gpu_starts_one_process_per_gpu(
    sandbox: Sandbox, smi: str, environment: dict[str, str], count: int
) -> None:
    sandbox.add_program("nvidia-smi", f"[ $1 = -L ] && cat <<'END'\n{smi}\nEND\n")
    sandbox.add_program("segtrain-launch", PRINT_ARGUMENTS)

    done = sandbox.run("train_multi_gpu.sh", "--name", "two words", **environment)

    assert done.stdout.splitlines()[0] == (
        f"segtrain-launch --standalone --nproc-per-node {count} -m segtrain train "
        "--resume auto --name two words"
    )
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("smi", "environment"),
    [
        ("exit 9", {}),  # no driver
        ("echo 'GPU 0: A (UUID: a)'", {}),
        ("printf 'GPU 0: A\nGPU 1: B\n'", {"CUDA_VISIBLE_DEVICES": ""}),
        ("printf 'GPU 0: A\nGPU 1: B\n'", {"CUDA_VISIBLE_DEVICES": "-1"}),
        ("printf 'GPU 0: A\nGPU 1: B\n'", {"CUDA_VISIBLE_DEVICES": "1"}),
        ("printf 'GPU 0: A\nGPU 1: B\n'", {"GPUS": "1"}),
    ],
)
def test_multi_gpu_with_at_most_one_gpu_is_plain_training(
    sandbox: Sandbox, smi: str, environment: dict[str, str]
) -> None:
    sandbox.add_program("nvidia-smi", smi)
    sandbox.add_program("segtrain", PRINT_ARGUMENTS)
    sandbox.add_program("segtrain-launch", PRINT_ARGUMENTS)

    done = sandbox.run("train_multi_gpu.sh", "--lr", "1", **environment)

    assert done.stdout.splitlines() == ["segtrain train --resume auto --lr 1", "threads unset"]


@pytest.mark.parametrize("resume", [["--resume", "runs/a"], ["--resume=runs/a"]])
@pytest.mark.parametrize("gpus", ["1", "2"])
def test_multi_gpu_keeps_an_explicit_resume(sandbox: Sandbox, gpus: str, resume: list[str]) -> None:
    for program in ("segtrain", "segtrain-launch"):
        sandbox.add_program(program, PRINT_ARGUMENTS)

    done = sandbox.run("train_multi_gpu.sh", "--lr", "1", *resume, GPUS=gpus)

    command = done.stdout.splitlines()[0]
    assert command.endswith(f"train --lr 1 {' '.join(resume)}")
    assert command.count("--resume") == 1


def test_multi_gpu_quotes_arguments(sandbox: Sandbox) -> None:
    sandbox.add_program("segtrain-launch", """printf '[%s]' "${@: -3}" """)

    done = sandbox.run("train_multi_gpu.sh", "--data", "a  b*", "", GPUS="2")

    assert done.stdout == "[--data][a  b*][]"


def test_multi_gpu_divides_the_cores_among_the_processes(sandbox: Sandbox) -> None:
    sandbox.add_program("nproc", "echo 12")
    sandbox.add_program("segtrain-launch", PRINT_ARGUMENTS)

    def threads(**environment: str) -> str:
        return sandbox.run("train_multi_gpu.sh", **environment).stdout.splitlines()[-1]

    assert threads(GPUS="4") == "threads 3"
    assert threads(GPUS="100") == "threads 1"
    assert threads(GPUS="4", OMP_NUM_THREADS="7") == "threads 7"


@pytest.mark.parametrize("gpus", ["two", "-1", "1.5", "2 "])
def test_multi_gpu_rejects_an_invalid_number_of_gpus(sandbox: Sandbox, gpus: str) -> None:
    done = sandbox.run("train_multi_gpu.sh", GPUS=gpus)

    assert done.returncode == 2
    assert error_lines(done) == done.stderr.splitlines()
    assert f"GPUS={gpus} " in done.stderr


def test_multi_gpu_prefers_the_venv_of_the_project(sandbox: Sandbox) -> None:
    for program in ("segtrain", "segtrain-launch"):
        sandbox.add_program(program, "echo from the PATH")
        sandbox.add_program(
            program, "echo from .venv", folder=sandbox.folder / "project" / ".venv" / "bin"
        )

    for gpus in ("1", "2"):
        assert sandbox.run("train_multi_gpu.sh", GPUS=gpus).stdout == "from .venv\n"


@pytest.mark.parametrize(("gpus", "program"), [("1", "segtrain"), ("2", "segtrain-launch")])
def test_multi_gpu_execs_the_program_so_that_signals_reach_it(
    sandbox: Sandbox, gpus: str, program: str
) -> None:
    sandbox.add_program(program, SAVE_ON_SIGTERM)
    pid_file = sandbox.folder / "pid"

    process = sandbox.start("train_multi_gpu.sh", GPUS=gpus, PID_FILE=str(pid_file))
    wait_until(lambda: pid_file.exists() and pid_file.read_text().endswith("\n"))
    process.terminate()
    out, _ = process.communicate(timeout=TIMEOUT)

    assert int(pid_file.read_text()) == process.pid
    assert process.returncode == 143
    assert out == "saved\n"
    wait_until(lambda: group_is_gone(process.pid))


# --- train_slurm.sh


@pytest.fixture
def slurm(sandbox: Sandbox) -> Sandbox:
    """The environment of a job on one node with four GPUs."""
    sandbox.add_program("srun", PRINT_ARGUMENTS)
    sandbox.add_program(
        "scontrol",
        """
        if [ "$1" = show ]; then printf '%s\n' n07 n08; else echo scontrol "$@"; fi
        """,
    )
    sandbox.environment |= {
        "SLURM_JOB_ID": "1020304",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "n07",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_CPUS_PER_TASK": "32",
        "SLURM_SUBMIT_DIR": str(sandbox.folder),
    }
    return sandbox


def test_slurm_on_one_node(slurm: Sandbox) -> None:
    done = slurm.run("train_slurm.sh", "--data", "/data/coco", "--name", "week")

    assert done.stdout.splitlines() == [
        "srun --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=60 --cpus-per-task=32 "
        "segtrain-launch --nnodes 1 --nproc-per-node 4 --standalone "
        "-m segtrain train --resume auto --data /data/coco --name week",
        "threads 8",
    ]
    assert done.returncode == 0


def test_slurm_on_two_nodes_uses_the_first_for_the_rendezvous(slurm: Sandbox) -> None:
    done = slurm.run(
        "train_slurm.sh",
        "--name",
        "week",
        SLURM_JOB_NUM_NODES="2",
        SLURM_JOB_NODELIST="n[07-08]",
        SLURM_RESTART_COUNT="3",
    )

    assert done.stdout.splitlines()[0] == (
        "srun --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=60 --cpus-per-task=32 "
        "segtrain-launch --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d "
        "--rdzv-id segtrain-1020304-3 --rdzv-endpoint n07:10304 "
        "-m segtrain train --resume auto --name week"
    )


def test_slurm_reads_the_hosts_of_the_job_from_scontrol(slurm: Sandbox) -> None:
    slurm.add_program("scontrol", "printf '%s\n' $3 other")

    done = slurm.run("train_slurm.sh", SLURM_JOB_NUM_NODES="2", SLURM_JOB_NODELIST="n42")

    assert "--rdzv-endpoint n42:10304 " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "--resume auto --name slurm-1020304"),
        (["--name=a"], "--resume auto --name=a"),
        (["--resume", "runs/a"], "--resume runs/a"),
        (["--resume=runs/a", "--name", "b"], "--resume=runs/a --name b"),
    ],
)
def test_slurm_resumes_its_own_run(slurm: Sandbox, arguments: list[str], expected: str) -> None:
    command = slurm.run("train_slurm.sh", *arguments).stdout.splitlines()[0]

    assert command.endswith(f"segtrain train {expected}")


def test_slurm_uses_the_venv_in_the_submission_folder(slurm: Sandbox) -> None:
    slurm.add_program("srun", "command -v segtrain-launch")
    for name in ("segtrain", "segtrain-launch"):
        slurm.add_program(name, "", folder=slurm.folder / ".venv" / "bin")

    assert slurm.run("train_slurm.sh").stdout.strip() == str(
        slurm.folder / ".venv/bin/segtrain-launch"
    )


TIME_LIMIT = {"SEGTRAIN_CHAIN": "2", "end": "100"}


@pytest.mark.parametrize(
    ("code", "environment", "requeued"),
    [
        (1, TIME_LIMIT, True),
        (1, TIME_LIMIT | {"SLURM_RESTART_COUNT": "1"}, True),
        (1, TIME_LIMIT | {"SLURM_RESTART_COUNT": "2"}, False),  # the chain is used up
        (1, TIME_LIMIT | {"SEGTRAIN_CHAIN": ""}, False),  # not enabled
        (1, TIME_LIMIT | {"end": "3600"}, False),  # an error, not the time limit
        (0, TIME_LIMIT, False),  # training is complete
        # Preempted, and ended within the grace period.
        (1, {"end": "3600", "preempted": "-5"}, True),
        (1, {"end": "3600", "preempted": "-5", "SLURM_RESTART_COUNT": "9"}, True),
        (0, {"end": "3600", "preempted": "-5"}, False),
        (1, {"end": "3600", "preempted": "-7200"}, False),  # before the current start
    ],
)
def test_slurm_requeues_unfinished_jobs(
    slurm: Sandbox, code: int, environment: dict[str, str], requeued: bool
) -> None:
    slurm.add_program("srun", f"exit {code}")
    environment = dict(environment)
    add_scontrol(slurm, int(environment.pop("end")), environment.pop("preempted", None))

    done = slurm.run("train_slurm.sh", "--name", "week", **environment)

    assert ("scontrol requeue 1020304" in done.stdout.splitlines()) is requeued
    assert done.returncode == (0 if requeued else code)
    assert done.stderr == ""


def test_slurm_keeps_the_exit_code_if_scontrol_fails(slurm: Sandbox) -> None:
    slurm.add_program("srun", "exit 6")
    slurm.add_program("scontrol", "exit 1")

    assert slurm.run("train_slurm.sh", SEGTRAIN_CHAIN="2").returncode == 6


def add_scontrol(slurm: Sandbox, end: int, preempted: str | None = None) -> None:
    """Add a `scontrol` with the shortened output of Slurm 24.05; times are seconds from now."""

    def time_in(seconds: float) -> str:
        return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + seconds))

    preempt_time = time_in(int(preempted)) if preempted else "None"
    slurm.add_program(
        "scontrol",
        f"""
        if [ "$1" != show ]; then echo scontrol "$@"; exit; fi
        [ "$*" = "show job 1020304" ] && [ $SLURM_TIME_FORMAT = standard ] || exit 1
        cat <<'END'
        JobId=1020304 JobName=segtrain
           JobState=RUNNING Reason=None Dependency=(null)
           Requeue=1 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=0:0
           SubmitTime=2001-01-01T00:00:00 EligibleTime=2001-01-01T00:00:00
           StartTime={time_in(-3600)} EndTime={time_in(end)} Deadline=N/A
           PreemptEligibleTime={time_in(-10)} PreemptTime={preempt_time}
END
        """,
    )
    if "TZ" in os.environ:
        slurm.environment["TZ"] = os.environ["TZ"]


def test_slurm_survives_sigterm_and_does_not_forward_it_to_srun(slurm: Sandbox) -> None:
    # Slurm sends SIGTERM to the script and to torchrun. Here srun ends after torchrun has saved. A
    # cancelled job must not be requeued.
    saved = slurm.folder / "saved"
    slurm.add_program(
        "srun",
        """
        trap 'echo srun received SIGTERM' TERM
        echo $$ >"$PID_FILE"
        until [ -e saved ]; do sleep 0.02; done
        echo torchrun has saved
        exit 1
        """,
    )
    add_scontrol(slurm, 100)
    pid_file = slurm.folder / "pid"

    process = slurm.start(
        "train_slurm.sh",
        SEGTRAIN_CHAIN="5",
        PID_FILE=str(pid_file),
    )
    wait_until(lambda: pid_file.exists() and pid_file.read_text().endswith("\n"))
    process.terminate()
    time.sleep(0.2)
    assert process.poll() is None
    assert int(pid_file.read_text()) != process.pid  # with exec, srun would receive the signal
    saved.touch()
    out, _ = process.communicate(timeout=TIMEOUT)

    assert out == "torchrun has saved\n"
    assert process.returncode == 1


def test_slurm_options_precede_the_first_command() -> None:
    text = (PROJECT / "scripts" / "train_slurm.sh").read_text(encoding="utf-8")
    head = text[: text.index("\nset -euo")].splitlines()
    options = {line.removeprefix("#SBATCH ") for line in head if line.startswith("#SBATCH")}

    assert all(line.startswith("#") for line in head)
    assert text.count("#SBATCH") == len(options)
    # B:TERM would signal the script instead of torchrun, and torchrun does not forward USR1.
    assert {"--requeue", "--open-mode=append", "--signal=TERM@120"} <= options
    assert "--ntasks-per-node=1" in options


@pytest.mark.parametrize(
    ("missing", "environment"),
    [("SLURM_JOB_ID", {}), ("", {"SEGTRAIN_CHAIN": "many"}), ("", {"SLURM_GPUS_ON_NODE": "0"})],
)
def test_slurm_rejects_an_invalid_environment(
    slurm: Sandbox, missing: str, environment: dict[str, str]
) -> None:
    slurm.environment.pop(missing, None)

    done = slurm.run("train_slurm.sh", **environment)

    assert done.returncode == 2
    assert done.stdout == ""
    assert error_lines(done) == done.stderr.splitlines()
    assert len(error_lines(done)) == 1


# --- test_versions.sh

# A fake uv with the commands that test_versions.sh uses.
FAKE_UV = """
echo "uv $*"
if [ "$1" = venv ]; then
  mkdir -p "${!#}/bin"
  cp "$(dirname "$0")/python" "${!#}/bin/python"
fi
"""


@pytest.fixture
def versions(sandbox: Sandbox) -> Sandbox:
    """A sandbox with a .venv and without pyenv."""
    venv = sandbox.folder / "project" / ".venv" / "bin"
    sandbox.add_program("setup.sh", "", folder=sandbox.folder / "project" / "scripts")
    sandbox.add_program("uv", FAKE_UV, folder=venv)
    sandbox.add_program("python", 'echo "tests: $*"', folder=venv)
    sandbox.environment["PYENV_ROOT"] = str(sandbox.folder / "pyenv")
    for version in ("3.11", "3.12", "3.13"):
        sandbox.add_program(f"python{version}", f"echo /found/python{version}")
    return sandbox


def test_versions_tests_three_environments(versions: Sandbox) -> None:
    done = versions.run("test_versions.sh")

    assert done.returncode == 0, done.stderr
    assert re.findall(r"uv venv .*--python /found/python(\S+) \S+/(\S+)", done.stdout) == [
        ("3.11", "lowest"),
        ("3.12", "torch2.11"),
        ("3.13", "python3.13"),
    ]
    assert re.findall(r"uv pip install .* -c (\S+)", done.stdout) == [
        "scripts/constraints-lowest.txt",
        ".venv-versions/torch2.11.txt",
        "scripts/constraints.txt",
    ]
    assert done.stdout.count("tests: -m pytest") == 3
    assert not (versions.folder / "project" / ".venv-versions").exists()


def test_versions_stops_at_failing_tests(versions: Sandbox) -> None:
    python = versions.folder / "project" / ".venv" / "bin"
    versions.add_program("python", "[[ $* != *pytest* ]] || exit 1", folder=python)

    done = versions.run("test_versions.sh")

    assert done.returncode == 1
    assert "torch2.11" not in done.stdout
    assert (versions.folder / "project" / ".venv-versions" / "lowest").is_dir()


def test_versions_finds_the_python_of_pyenv_behind_a_shim(versions: Sandbox) -> None:
    versions.add_program("python3.13", "exit 127")
    pyenv = versions.folder / "pyenv" / "versions" / "3.13.0" / "bin"
    versions.add_program("python", "echo /pyenv/python", folder=pyenv)

    done = versions.run("test_versions.sh", "python3.13")

    assert done.returncode == 0, done.stderr
    assert "--python /pyenv/python " in done.stdout


def test_versions_reports_a_missing_python(versions: Sandbox) -> None:
    versions.add_program("python3.13", "exit 127")

    done = versions.run("test_versions.sh", "python3.13")

    assert done.returncode == 2
    [line] = error_lines(done)
    assert "no Python 3.13 found" in line


def test_versions_rejects_an_unknown_environment(versions: Sandbox) -> None:
    done = versions.run("test_versions.sh", "python2")

    assert done.returncode == 2
    [line] = error_lines(done)
    assert "python2" in line


def test_versions_selects_existing_tests() -> None:
    script = (PROJECT / "scripts" / "test_versions.sh").read_text(encoding="utf-8")
    names: set[str] = set()
    for folders in re.findall(r"=\(tests/\{(.*)\}\.py\)", script):
        for name in folders.split(","):
            text = (PROJECT / "tests" / f"{name}.py").read_text(encoding="utf-8")
            names |= set(re.findall(r"^def (test_\w+)", text, re.MULTILINE))
    [excluded] = re.findall(r"^excluded='(.*)'$", script, re.MULTILINE)

    for word in excluded.split(" or "):
        assert any(word in name for name in names), word


# --- download_coco.sh

ZIPS = {
    "annotations": "annotations/annotations_trainval2017.zip",
    "val": "zips/val2017.zip",
    "train": "zips/train2017.zip",
}
FILES = {
    "annotations": {"annotations/instances_val2017.json": b"{}" * 100},
    "val": {f"val2017/{number}.jpg": bytes([number]) * 7000 for number in range(5)},
    "train": {f"train2017/{number}.jpg": bytes([number]) * 900 for number in range(7)},
}


class Mirror(Sandbox):
    """A folder with tiny archives in the layout of COCO, and a file of their checksums."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.archives: dict[str, bytes] = {}
        sums = ""
        for archive, path in ZIPS.items():
            buffer = io.BytesIO()
            with zipfile.ZipFile(buffer, "w") as file:
                for name, content in FILES[archive].items():
                    file.writestr(name, content)
            self.archives[path] = buffer.getvalue()
            target = folder / "mirror" / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(buffer.getvalue())
            digest = hashlib.md5(buffer.getvalue(), usedforsecurity=False).hexdigest()
            sums += f"{digest}  {target.name}\n"
        (folder / "sums").write_text(sums, encoding="utf-8")
        self.environment |= {
            "SEGTRAIN_COCO_URL": (folder / "mirror").as_uri(),
            "SEGTRAIN_COCO_MD5": str(folder / "sums"),
        }
        self.coco = folder / "coco"
        self.part = self.coco / ".download" / "val2017.zip.part"

    def files(self) -> dict[str, bytes]:
        """Relative path → content of the files in the data set."""
        return {
            str(path.relative_to(self.coco)): path.read_bytes()
            for path in self.coco.rglob("*")
            if path.is_file() and ".download" not in path.parts
        }


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[Mirror]:
    mirror = Mirror(tmp_path)
    yield mirror
    mirror.kill_processes()


class Server:
    """Serves a mirror over HTTP.

    limits: number of bytes after which each response hangs up or stalls; the last item applies to
        all further responses.
    """

    def __init__(self, mirror: Mirror) -> None:
        self.ranges: list[str | None] = []
        self.limits: list[int | None] = [None]
        self.stall = False
        self.supports_ranges = True
        self.released = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(mirror.archives[self.path[1:]])))
                self.end_headers()

            def do_GET(self) -> None:
                requested = self.headers["Range"]
                outer.ranges.append(requested)
                content = mirror.archives[self.path[1:]]
                start = int(requested[6:-1]) if requested and outer.supports_ranges else 0
                self.send_response(206 if requested and outer.supports_ranges else 200)
                if requested and outer.supports_ranges:
                    self.send_header(
                        "Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}"
                    )
                self.send_header("Content-Length", str(len(content) - start))
                self.end_headers()
                count = outer.limits.pop(0) if len(outer.limits) > 1 else outer.limits[0]
                self.wfile.write(content[start:][:count])
                if outer.stall:
                    outer.released.wait(10)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        mirror.environment["SEGTRAIN_COCO_URL"] = f"http://127.0.0.1:{self.http.server_port}"


@pytest.fixture
def server(mirror: Mirror) -> Iterator[Server]:
    server = Server(mirror)
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.released.set()
    server.http.shutdown()
    thread.join()
    server.http.server_close()


def test_download_unpacks_everything_and_removes_the_archives(mirror: Mirror) -> None:
    done = mirror.run("download_coco.sh")

    assert done.returncode == 0, done.stderr
    assert mirror.files() == FILES["annotations"] | FILES["val"] | FILES["train"]
    assert not list(mirror.coco.rglob("*.zip")) + list(mirror.coco.rglob("*.part"))
    assert not list(mirror.coco.rglob("*.unpacked"))


def test_download_only_the_named_archives(mirror: Mirror) -> None:
    done = mirror.run("download_coco.sh", "--only", "val,annotations", "my data/")

    mirror.coco = mirror.folder / "my data"
    assert done.returncode == 0
    assert mirror.files() == FILES["annotations"] | FILES["val"]
    assert done.stdout.splitlines()[-1] == "next: segtrain doctor my data"


def test_a_complete_download_is_not_repeated(mirror: Mirror, server: Server) -> None:
    mirror.run("download_coco.sh", "--only=val")
    assert server.ranges == [None]
    mirror.add_program("curl", "exit 7")
    mirror.part.write_bytes(b"left by an interruption just before the end")

    done = mirror.run("download_coco.sh", "--only=val")

    assert done.returncode == 0
    assert server.ranges == [None]
    assert mirror.files() == FILES["val"]
    assert not mirror.part.exists()


def test_download_repeats_if_its_folder_was_deleted(mirror: Mirror) -> None:
    mirror.run("download_coco.sh", "--only=val")
    shutil.rmtree(mirror.coco / "val2017")

    mirror.run("download_coco.sh", "--only=val")

    assert mirror.files() == FILES["val"]


@pytest.mark.parametrize("over", ["file", "http"])
def test_download_continues_a_partial_file(
    mirror: Mirror, over: str, request: pytest.FixtureRequest
) -> None:
    server = request.getfixturevalue("server") if over == "http" else None
    content = mirror.archives[ZIPS["val"]]
    mirror.part.parent.mkdir(parents=True)
    mirror.part.write_bytes(content[:1500])

    done = mirror.run("download_coco.sh", "--only", "val")

    assert done.returncode == 0, done.stderr
    assert mirror.files() == FILES["val"]
    assert server is None or server.ranges == ["bytes=1500-"]
    assert f"from byte 1500 of {len(content)}" in done.stdout


def test_download_of_a_complete_file_only_verifies_it(mirror: Mirror, server: Server) -> None:
    mirror.part.parent.mkdir(parents=True)
    mirror.part.write_bytes(mirror.archives[ZIPS["val"]])

    assert mirror.run("download_coco.sh", "--only", "val").returncode == 0
    assert server.ranges == []
    assert mirror.files() == FILES["val"]


def test_download_continues_after_a_broken_connection(mirror: Mirror, server: Server) -> None:
    server.limits = [15_000]

    done = mirror.run("download_coco.sh", "--only", "val")

    assert done.returncode == 0, done.stderr
    assert server.ranges == [None, "bytes=15000-", "bytes=30000-"]
    assert mirror.files() == FILES["val"]


def test_download_gives_up_without_progress(mirror: Mirror, server: Server) -> None:
    server.limits = [0, 0, 9_000, 0]  # progress resets the count
    mirror.add_program("sleep", 'echo "$1" >>naps')

    done = mirror.run("download_coco.sh", "--only", "val")

    assert done.returncode == 5
    assert len(error_lines(done)) == 1
    assert server.ranges == [None] * 3 + ["bytes=9000-"] * 5
    assert (mirror.folder / "naps").read_text().split() == ["2", "4", "2", "4", "8", "16"]


def test_download_restarts_if_the_server_does_not_support_ranges(
    mirror: Mirror, server: Server
) -> None:
    server.supports_ranges = False
    mirror.add_program("sleep", "")
    mirror.part.parent.mkdir(parents=True)
    mirror.part.write_bytes(mirror.archives[ZIPS["val"]][:1500])

    done = mirror.run("download_coco.sh", "--only", "val")

    assert done.returncode == 0, done.stderr
    assert server.ranges == ["bytes=1500-", None]
    assert mirror.files() == FILES["val"]


@pytest.mark.parametrize("damage", ["the mirror", "the partial file"])
def test_download_unpacks_nothing_with_a_wrong_checksum(mirror: Mirror, damage: str) -> None:
    path = mirror.folder / "mirror" / ZIPS["val"]
    good = path.read_bytes()
    if damage == "the mirror":
        # A valid archive in which one image differs: only the checksum detects it.
        with zipfile.ZipFile(path, "w") as file:
            for number, (name, content) in enumerate(FILES["val"].items()):
                file.writestr(name, content if number else content[::-1][1:] + b"?")
        assert len(path.read_bytes()) == len(good)
    else:
        mirror.part.parent.mkdir(parents=True)
        mirror.part.write_bytes(b"x" * 1000)

    done = mirror.run("download_coco.sh", "--only", "val,train")

    assert done.returncode == 3
    assert len(error_lines(done)) == 1
    assert hashlib.md5(good, usedforsecurity=False).hexdigest() in error_lines(done)[0]
    assert mirror.files() == {}
    path.write_bytes(good)
    assert mirror.run("download_coco.sh", "--only", "val").returncode == 0
    assert mirror.files() == FILES["val"]


@pytest.mark.parametrize(
    ("archive", "checksum"),
    [
        ("train", "cced6f7f71b7629ddf16f17bbcfab6b2"),
        ("val", "442b8da7639aecaf257c1dceb8ba8c80"),
        ("annotations", "f4bbac642086de4f52a3fdda2de5fa2c"),
    ],
)
def test_download_expects_the_checksums_of_coco(
    mirror: Mirror, archive: str, checksum: str
) -> None:
    del mirror.environment["SEGTRAIN_COCO_MD5"]

    done = mirror.run("download_coco.sh", "--only", archive)

    assert done.returncode == 3
    assert f"not {checksum};" in done.stderr


def test_download_and_its_child_end_on_sigterm(mirror: Mirror, server: Server) -> None:
    server.limits, server.stall = [20_000], True

    process = mirror.start("download_coco.sh", "--only", "val")
    wait_until(lambda: mirror.part.exists() and mirror.part.stat().st_size)
    process.terminate()  # the script alone, not its group
    process.communicate(timeout=TIMEOUT)

    assert process.returncode == 143
    wait_until(lambda: group_is_gone(process.pid))  # after init has reaped the last process
    partial = mirror.part.read_bytes()
    assert 0 < len(partial) <= 20_000
    assert mirror.archives[ZIPS["val"]].startswith(partial)
    assert mirror.files() == {}
    server.limits, server.stall = [None], False
    assert mirror.run("download_coco.sh", "--only", "val").returncode == 0
    assert server.ranges == [None, f"bytes={len(partial)}-"]
    assert mirror.files() == FILES["val"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("tool", ["md5sum", "unzip"])
def test_verifying_and_unpacking_can_be_interrupted(
    mirror: Mirror, tool: str, number: signal.Signals
) -> None:
    mirror.add_program(tool, "touch reached; exec sleep 1000")

    process = mirror.start("download_coco.sh", "--only", "val")
    wait_until((mirror.folder / "reached").exists)
    process.send_signal(number)
    process.communicate(timeout=TIMEOUT)

    assert process.returncode == 128 + number
    wait_until(lambda: group_is_gone(process.pid))  # after init has reaped the last process
    assert mirror.files() == {}
    (mirror.bin / tool).unlink()
    assert mirror.run("download_coco.sh", "--only", "val").returncode == 0
    assert mirror.files() == FILES["val"]


def test_download_keeps_existing_files(mirror: Mirror) -> None:
    own = {"val2017/own.jpg": b"mine", "notes.txt": b"mine too", "val2017/1.jpg": b"\1" * 7000}
    for name, content in own.items():
        (mirror.coco / name).parent.mkdir(parents=True, exist_ok=True)
        (mirror.coco / name).write_bytes(content)

    done = mirror.run("download_coco.sh", "--only", "val")

    assert done.returncode == 0, done.stderr
    assert mirror.files() == FILES["val"] | own


def test_download_does_not_overwrite_a_different_file(mirror: Mirror) -> None:
    (mirror.coco / "val2017").mkdir(parents=True)
    other = mirror.coco / "val2017" / "3.jpg"
    other.write_bytes(b"cut off")

    done = mirror.run("download_coco.sh", "--only", "val")

    assert done.returncode == 2
    assert error_lines(done) == done.stderr.splitlines()
    assert "coco/val2017/3.jpg" in done.stderr
    assert other.read_bytes() == b"cut off"
    other.unlink()
    assert mirror.run("download_coco.sh", "--only", "val").returncode == 0
    assert mirror.files() == FILES["val"]


@pytest.mark.parametrize(("free", "downloaded", "code"), [(60, 0, 5), (75, 0, 0), (60, 20_000, 0)])
def test_download_checks_the_free_space_first(
    mirror: Mirror, free: int, downloaded: int, code: int
) -> None:
    # An archive of 35 KB, which takes 35 KB more when unpacked.
    assert 34 < len(mirror.archives[ZIPS["val"]]) / 1024 < 36
    mirror.part.parent.mkdir(parents=True)
    mirror.part.write_bytes(mirror.archives[ZIPS["val"]][:downloaded])
    mirror.add_program("df", f"echo 'Filesystem blocks Used Available'; echo /dev/x 99 9 {free}")

    done = mirror.run("download_coco.sh", "--only", "val")

    assert done.returncode == code
    assert len(error_lines(done)) == (code == 5)
    assert bool(mirror.files()) is (code == 0)
    assert code == 0 or mirror.part.stat().st_size == downloaded


def test_download_without_a_network_is_exit_code_5(mirror: Mirror) -> None:
    done = mirror.run("download_coco.sh", SEGTRAIN_COCO_URL="file:///nowhere")

    assert done.returncode == 5
    assert len(error_lines(done)) == 1
    assert mirror.files() == {}


def test_download_with_a_full_disk_is_exit_code_5(mirror: Mirror) -> None:
    mirror.add_program("unzip", "echo 'write error (disk full?)' >&2; exit 50")

    done = mirror.run("download_coco.sh", "--only", "val")

    assert done.returncode == 5
    assert len(error_lines(done)) == 1
    assert mirror.files() == {}


def test_a_second_download_into_the_same_folder_is_refused(mirror: Mirror, server: Server) -> None:
    server.limits, server.stall = [20_000], True
    first = mirror.start("download_coco.sh", "--only", "val")
    wait_until(lambda: mirror.part.exists() and mirror.part.stat().st_size)

    second = mirror.run("download_coco.sh", "--only", "val")

    assert second.returncode == 2
    assert len(error_lines(second)) == 1
    assert len(server.ranges) == 1
    first.terminate()
    first.communicate(timeout=TIMEOUT)


@pytest.mark.parametrize(
    "arguments",
    [["--only"], ["--only", "test"], ["--only="], ["--only", "val,,train"], ["-x"], ["a", "b"]],
)
def test_download_shows_its_usage(mirror: Mirror, arguments: list[str]) -> None:
    done = mirror.run("download_coco.sh", *arguments)

    assert done.returncode == 2
    assert error_lines(done) == done.stderr.splitlines()
    assert "usage: scripts/download_coco.sh" in done.stderr
    assert sorted(path.name for path in mirror.folder.iterdir()) == [
        "bin",
        "mirror",
        "project",
        "sums",
    ]
