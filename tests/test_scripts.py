"""The shell scripts and what they install."""

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
# With the dev extra it lies beside python, whether or not that folder is on the PATH.
SHELLCHECK = shutil.which("shellcheck") or shutil.which(
    "shellcheck", path=Path(sys.executable).parent
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_stop_at_the_first_error(script: Path) -> None:
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
    """What pyproject.toml asks for, with all that the tests need."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [*project["dependencies"], *project["optional-dependencies"]["dev"]]


@pytest.mark.parametrize("path", CONSTRAINTS, ids=lambda path: path.name)
def test_constraints_hold_names_and_versions_only(path: Path) -> None:
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


# Seconds after which something hangs; a busy machine may take a while over what takes none.
FOREVER = 120
# Programs that the scripts call: this one says how it was called.
SAYS_ITS_ARGUMENTS = """
echo "$(basename "$0")" "$@"
echo "threads ${OMP_NUM_THREADS:-unset}"
"""
# A program that saves when it is asked to stop, as segtrain does.
SAVES_ON_SIGTERM = """
trap 'echo saved; exit 143' TERM
echo $$ >"$PID_FILE"
while :; do sleep 0.02; done
"""


class Box:
    """A copy of the scripts, without a .venv, and a PATH that begins with made-up programs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[str]] = []
        self.bin = folder / "bin"
        self.bin.mkdir()
        shutil.copytree(PROJECT / "scripts", folder / "project" / "scripts")
        self.environment = {"PATH": f"{self.bin}:/usr/bin:/bin"}

    def program(self, name: str, body: str, *, folder: Path | None = None) -> None:
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

    def end(self) -> None:
        """Leave nothing behind when a test has failed."""
        for process in self.started:
            if not group_is_gone(process.pid):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate(timeout=FOREVER)

    def run(
        self, script: str, *arguments: str, **environment: str
    ) -> "subprocess.CompletedProcess[str]":
        process = self.start(script, *arguments, **environment)
        out, err = process.communicate(timeout=FOREVER)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    box = Box(tmp_path)
    yield box
    box.end()


def wait_until(is_so: Callable[[], object]) -> None:
    end = time.monotonic() + FOREVER
    while not is_so():
        assert time.monotonic() < end, f"waited {FOREVER} s in vain"
        time.sleep(0.01)


def group_is_gone(leader: int) -> bool:
    """No process is left of those that `leader`, the first of a session, started."""
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
def test_multi_gpu_starts_a_process_for_each_gpu(
    box: Box, smi: str, environment: dict[str, str], count: int
) -> None:
    box.program("nvidia-smi", f"[ $1 = -L ] && cat <<'END'\n{smi}\nEND\n")
    box.program("segtrain-launch", SAYS_ITS_ARGUMENTS)

    done = box.run("train_multi_gpu.sh", "--name", "two words", **environment)

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
def test_multi_gpu_with_one_or_none_is_plain_training(
    box: Box, smi: str, environment: dict[str, str]
) -> None:
    box.program("nvidia-smi", smi)
    box.program("segtrain", SAYS_ITS_ARGUMENTS)
    box.program("segtrain-launch", SAYS_ITS_ARGUMENTS)

    done = box.run("train_multi_gpu.sh", "--lr", "1", **environment)

    assert done.stdout.splitlines() == ["segtrain train --resume auto --lr 1", "threads unset"]


@pytest.mark.parametrize("own", [["--resume", "runs/a"], ["--resume=runs/a"]])
@pytest.mark.parametrize("gpus", ["1", "2"])
def test_multi_gpu_leaves_a_resume_of_the_users_alone(box: Box, gpus: str, own: list[str]) -> None:
    for program in ("segtrain", "segtrain-launch"):
        box.program(program, SAYS_ITS_ARGUMENTS)

    done = box.run("train_multi_gpu.sh", "--lr", "1", *own, GPUS=gpus)

    first = done.stdout.splitlines()[0]
    assert first.endswith(f"train --lr 1 {' '.join(own)}")
    assert first.count("--resume") == 1


def test_multi_gpu_keeps_every_argument_whole(box: Box) -> None:
    box.program("segtrain-launch", """printf '[%s]' "${@: -3}" """)

    done = box.run("train_multi_gpu.sh", "--data", "a  b*", "", GPUS="2")

    assert done.stdout == "[--data][a  b*][]"


def test_multi_gpu_shares_the_cores_among_the_processes(box: Box) -> None:
    box.program("nproc", "echo 12")
    box.program("segtrain-launch", SAYS_ITS_ARGUMENTS)

    def threads(**environment: str) -> str:
        return box.run("train_multi_gpu.sh", **environment).stdout.splitlines()[-1]

    assert threads(GPUS="4") == "threads 3"
    assert threads(GPUS="100") == "threads 1"
    assert threads(GPUS="4", OMP_NUM_THREADS="7") == "threads 7"


@pytest.mark.parametrize("gpus", ["two", "-1", "1.5", "2 "])
def test_multi_gpu_says_what_is_wrong_with_gpus(box: Box, gpus: str) -> None:
    done = box.run("train_multi_gpu.sh", GPUS=gpus)

    assert done.returncode == 2
    assert error_lines(done) == done.stderr.splitlines()
    assert f"GPUS={gpus} " in done.stderr


def test_multi_gpu_prefers_the_environment_of_the_project(box: Box) -> None:
    for program in ("segtrain", "segtrain-launch"):
        box.program(program, "echo from the PATH")
        box.program(program, "echo from .venv", folder=box.folder / "project" / ".venv" / "bin")

    for gpus in ("1", "2"):
        assert box.run("train_multi_gpu.sh", GPUS=gpus).stdout == "from .venv\n"


@pytest.mark.parametrize(("gpus", "program"), [("1", "segtrain"), ("2", "segtrain-launch")])
def test_multi_gpu_becomes_the_program_so_that_signals_reach_it(
    box: Box, gpus: str, program: str
) -> None:
    box.program(program, SAVES_ON_SIGTERM)
    pid_file = box.folder / "pid"

    process = box.start("train_multi_gpu.sh", GPUS=gpus, PID_FILE=str(pid_file))
    wait_until(lambda: pid_file.exists() and pid_file.read_text().endswith("\n"))
    process.terminate()
    out, _ = process.communicate(timeout=FOREVER)

    assert int(pid_file.read_text()) == process.pid
    assert process.returncode == 143
    assert out == "saved\n"
    wait_until(lambda: group_is_gone(process.pid))


# --- train_slurm.sh


@pytest.fixture
def slurm(box: Box) -> Box:
    """What a job of one node with four GPUs finds."""
    box.program("srun", SAYS_ITS_ARGUMENTS)
    box.program(
        "scontrol",
        """
        if [ "$1" = show ]; then printf '%s\n' n07 n08; else echo scontrol "$@"; fi
        """,
    )
    box.environment |= {
        "SLURM_JOB_ID": "1020304",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "n07",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_CPUS_PER_TASK": "32",
        "SLURM_SUBMIT_DIR": str(box.folder),
    }
    return box


def test_slurm_on_one_node(slurm: Box) -> None:
    done = slurm.run("train_slurm.sh", "--data", "/data/coco", "--name", "week")

    assert done.stdout.splitlines() == [
        "srun --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=60 --cpus-per-task=32 "
        "segtrain-launch --nnodes 1 --nproc-per-node 4 --standalone "
        "-m segtrain train --resume auto --data /data/coco --name week",
        "threads 8",
    ]
    assert done.returncode == 0


def test_slurm_on_two_nodes_meets_on_the_first(slurm: Box) -> None:
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


def test_slurm_asks_slurm_for_the_hosts_of_this_job(slurm: Box) -> None:
    slurm.program("scontrol", "printf '%s\n' $3 other")

    done = slurm.run("train_slurm.sh", SLURM_JOB_NUM_NODES="2", SLURM_JOB_NODELIST="n42")

    assert "--rdzv-endpoint n42:10304 " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "then"),
    [
        ([], "--resume auto --name slurm-1020304"),
        (["--name=a"], "--resume auto --name=a"),
        (["--resume", "runs/a"], "--resume runs/a"),
        (["--resume=runs/a", "--name", "b"], "--resume=runs/a --name b"),
    ],
)
def test_slurm_finds_its_own_run_again(slurm: Box, arguments: list[str], then: str) -> None:
    first = slurm.run("train_slurm.sh", *arguments).stdout.splitlines()[0]

    assert first.endswith(f"segtrain train {then}")


def test_slurm_takes_the_environment_of_the_folder_it_was_submitted_from(slurm: Box) -> None:
    slurm.program("srun", "command -v segtrain-launch")
    for name in ("segtrain", "segtrain-launch"):
        slurm.program(name, "", folder=slurm.folder / ".venv" / "bin")

    assert slurm.run("train_slurm.sh").stdout.strip() == str(
        slurm.folder / ".venv/bin/segtrain-launch"
    )


TIME_LIMIT = {"SEGTRAIN_CHAIN": "2", "end": "100"}


@pytest.mark.parametrize(
    ("code", "environment", "again"),
    [
        (1, TIME_LIMIT, True),
        (1, TIME_LIMIT | {"SLURM_RESTART_COUNT": "1"}, True),
        (1, TIME_LIMIT | {"SLURM_RESTART_COUNT": "2"}, False),  # the chain is used up
        (1, TIME_LIMIT | {"SEGTRAIN_CHAIN": ""}, False),  # nobody asked for it
        (1, TIME_LIMIT | {"end": "3600"}, False),  # an error, no time limit
        (0, TIME_LIMIT, False),  # all epochs are done
        # Pre-empted with a time of grace, in which it has ended.
        (1, {"end": "3600", "preempted": "-5"}, True),
        (1, {"end": "3600", "preempted": "-5", "SLURM_RESTART_COUNT": "9"}, True),
        (0, {"end": "3600", "preempted": "-5"}, False),
        (1, {"end": "3600", "preempted": "-7200"}, False),  # that was before this start
    ],
)
def test_slurm_queues_again_what_was_not_done(
    slurm: Box, code: int, environment: dict[str, str], again: bool
) -> None:
    slurm.program("srun", f"exit {code}")
    environment = dict(environment)
    shows_job(slurm, int(environment.pop("end")), environment.pop("preempted", None))

    done = slurm.run("train_slurm.sh", "--name", "week", **environment)

    assert ("scontrol requeue 1020304" in done.stdout.splitlines()) is again
    assert done.returncode == (0 if again else code)
    assert done.stderr == ""


def test_slurm_keeps_the_exit_code_when_slurm_does_not_answer(slurm: Box) -> None:
    slurm.program("srun", "exit 6")
    slurm.program("scontrol", "exit 1")

    assert slurm.run("train_slurm.sh", SEGTRAIN_CHAIN="2").returncode == 6


def shows_job(slurm: Box, end: int, preempted: str | None = None) -> None:
    """`scontrol show job` as Slurm 24.05 prints it, shortened; times are seconds from now."""

    def time_in(seconds: float) -> str:
        return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + seconds))

    preempt_time = time_in(int(preempted)) if preempted else "None"
    slurm.program(
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


def test_slurm_outlives_the_sigterm_that_srun_must_not_get(slurm: Box) -> None:
    # Slurm sends it to the script and, by itself, to torchrun. Here srun ends when torchrun has
    # saved, and a cancelled job must not come back.
    go_on = slurm.folder / "saved"
    slurm.program(
        "srun",
        """
        trap 'echo srun was signalled' TERM
        echo $$ >"$PID_FILE"
        until [ -e saved ]; do sleep 0.02; done
        echo torchrun has saved
        exit 1
        """,
    )
    shows_job(slurm, 100)
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
    assert int(pid_file.read_text()) != process.pid  # exec would hand srun the signal
    go_on.touch()
    out, _ = process.communicate(timeout=FOREVER)

    assert out == "torchrun has saved\n"
    assert process.returncode == 1


def test_slurm_options_precede_the_first_command() -> None:
    text = (PROJECT / "scripts" / "train_slurm.sh").read_text(encoding="utf-8")
    head = text[: text.index("\nset -euo")].splitlines()
    options = {line.removeprefix("#SBATCH ") for line in head if line.startswith("#SBATCH")}

    assert all(line.startswith("#") for line in head)
    assert text.count("#SBATCH") == len(options)
    # B:TERM would signal the script and not torchrun, and torchrun does not pass USR1 on.
    assert {"--requeue", "--open-mode=append", "--signal=TERM@120"} <= options
    assert "--ntasks-per-node=1" in options


@pytest.mark.parametrize(
    ("missing", "environment"),
    [("SLURM_JOB_ID", {}), ("", {"SEGTRAIN_CHAIN": "many"}), ("", {"SLURM_GPUS_ON_NODE": "0"})],
)
def test_slurm_says_what_is_wrong(slurm: Box, missing: str, environment: dict[str, str]) -> None:
    slurm.environment.pop(missing, None)

    done = slurm.run("train_slurm.sh", **environment)

    assert done.returncode == 2
    assert done.stdout == ""
    assert error_lines(done) == done.stderr.splitlines()
    assert len(error_lines(done)) == 1


# --- test_versions.sh

# uv, as far as test_versions.sh goes: an environment's python is one of these.
MAKES_ENVIRONMENTS = """
echo "uv $*"
if [ "$1" = venv ]; then
  mkdir -p "${!#}/bin"
  cp "$(dirname "$0")/python" "${!#}/bin/python"
fi
"""


@pytest.fixture
def versions(box: Box) -> Box:
    """A box whose .venv is set up, and which has no Python of pyenv."""
    venv = box.folder / "project" / ".venv" / "bin"
    box.program("setup.sh", "", folder=box.folder / "project" / "scripts")
    box.program("uv", MAKES_ENVIRONMENTS, folder=venv)
    box.program("python", 'echo "tests: $*"', folder=venv)
    box.environment["PYENV_ROOT"] = str(box.folder / "pyenv")
    for version in ("3.11", "3.12", "3.13"):
        box.program(f"python{version}", f"echo /found/python{version}")
    return box


def test_versions_are_those_of_three_files_of_constraints(versions: Box) -> None:
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


def test_versions_stop_at_tests_that_fail(versions: Box) -> None:
    python = versions.folder / "project" / ".venv" / "bin"
    versions.program("python", "[[ $* != *pytest* ]] || exit 1", folder=python)

    done = versions.run("test_versions.sh")

    assert done.returncode == 1
    assert "torch2.11" not in done.stdout
    assert (versions.folder / "project" / ".venv-versions" / "lowest").is_dir()


def test_versions_find_the_python_of_pyenv_behind_a_shim(versions: Box) -> None:
    versions.program("python3.13", "exit 127")
    pyenv = versions.folder / "pyenv" / "versions" / "3.13.0" / "bin"
    versions.program("python", "echo /pyenv/python", folder=pyenv)

    done = versions.run("test_versions.sh", "python3.13")

    assert done.returncode == 0, done.stderr
    assert "--python /pyenv/python " in done.stdout


def test_versions_name_the_python_that_is_missing(versions: Box) -> None:
    versions.program("python3.13", "exit 127")

    done = versions.run("test_versions.sh", "python3.13")

    assert done.returncode == 2
    [line] = error_lines(done)
    assert "no Python 3.13 found" in line


def test_versions_know_their_environments(versions: Box) -> None:
    done = versions.run("test_versions.sh", "python2")

    assert done.returncode == 2
    [line] = error_lines(done)
    assert "python2" in line


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


class Mirror(Box):
    """A folder with archives as COCO's, tiny, and the file of their checksums."""

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

    def present(self) -> dict[str, bytes]:
        """What lies in the data set by now."""
        return {
            str(path.relative_to(self.coco)): path.read_bytes()
            for path in self.coco.rglob("*")
            if path.is_file() and ".download" not in path.parts
        }


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[Mirror]:
    mirror = Mirror(tmp_path)
    yield mirror
    mirror.end()


class Server:
    """Serves a mirror over HTTP; after the bytes in `serve`, an answer each, it hangs up or stalls.

    The last one of `serve` is that of all further answers.
    """

    def __init__(self, mirror: Mirror) -> None:
        self.ranges: list[str | None] = []
        self.serve: list[int | None] = [None]
        self.stalls = False
        self.resumes = True
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
                wanted = self.headers["Range"]
                outer.ranges.append(wanted)
                content = mirror.archives[self.path[1:]]
                begin = int(wanted[6:-1]) if wanted and outer.resumes else 0
                self.send_response(206 if wanted and outer.resumes else 200)
                if wanted and outer.resumes:
                    self.send_header(
                        "Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}"
                    )
                self.send_header("Content-Length", str(len(content) - begin))
                self.end_headers()
                count = outer.serve.pop(0) if len(outer.serve) > 1 else outer.serve[0]
                self.wfile.write(content[begin:][:count])
                if outer.stalls:
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


def test_download_unpacks_everything_and_leaves_no_archive(mirror: Mirror) -> None:
    done = mirror.run("download_coco.sh")

    assert done.returncode == 0, done.stderr
    assert mirror.present() == FILES["annotations"] | FILES["val"] | FILES["train"]
    assert not list(mirror.coco.rglob("*.zip")) + list(mirror.coco.rglob("*.part"))
    assert not list(mirror.coco.rglob("*.unpacked"))


def test_download_takes_only_what_is_named(mirror: Mirror) -> None:
    done = mirror.run("download_coco.sh", "--only", "val,annotations", "my data/")

    mirror.coco = mirror.folder / "my data"
    assert done.returncode == 0
    assert mirror.present() == FILES["annotations"] | FILES["val"]
    assert done.stdout.splitlines()[-1] == "next: segtrain doctor my data"


def test_download_again_costs_nothing(mirror: Mirror, server: Server) -> None:
    mirror.run("download_coco.sh", "--only=val")
    assert server.ranges == [None]
    mirror.program("curl", "exit 7")
    mirror.part.write_bytes(b"left by a stop just before the end")

    done = mirror.run("download_coco.sh", "--only=val")

    assert done.returncode == 0
    assert server.ranges == [None]
    assert mirror.present() == FILES["val"]
    assert not mirror.part.exists()


def test_download_again_when_its_folder_was_deleted(mirror: Mirror) -> None:
    mirror.run("download_coco.sh", "--only=val")
    shutil.rmtree(mirror.coco / "val2017")

    mirror.run("download_coco.sh", "--only=val")

    assert mirror.present() == FILES["val"]


@pytest.mark.parametrize("over", ["file", "http"])
def test_download_goes_on_with_a_partial_file(
    mirror: Mirror, over: str, request: pytest.FixtureRequest
) -> None:
    server = request.getfixturevalue("server") if over == "http" else None
    content = mirror.archives[ZIPS["val"]]
    mirror.part.parent.mkdir(parents=True)
    mirror.part.write_bytes(content[:1500])

    done = mirror.run("download_coco.sh", "--only", "val")

    assert done.returncode == 0, done.stderr
    assert mirror.present() == FILES["val"]
    assert server is None or server.ranges == ["bytes=1500-"]
    assert f"from byte 1500 of {len(content)}" in done.stdout


def test_download_of_a_whole_file_only_compares(mirror: Mirror, server: Server) -> None:
    mirror.part.parent.mkdir(parents=True)
    mirror.part.write_bytes(mirror.archives[ZIPS["val"]])

    assert mirror.run("download_coco.sh", "--only", "val").returncode == 0
    assert server.ranges == []
    assert mirror.present() == FILES["val"]


def test_download_goes_on_by_itself_when_the_line_breaks(mirror: Mirror, server: Server) -> None:
    server.serve = [15_000]

    done = mirror.run("download_coco.sh", "--only", "val")

    assert done.returncode == 0, done.stderr
    assert server.ranges == [None, "bytes=15000-", "bytes=30000-"]
    assert mirror.present() == FILES["val"]


def test_download_gives_up_when_nothing_comes(mirror: Mirror, server: Server) -> None:
    server.serve = [0, 0, 9_000, 0]  # what came in between starts the count again
    mirror.program("sleep", 'echo "$1" >>naps')

    done = mirror.run("download_coco.sh", "--only", "val")

    assert done.returncode == 5
    assert len(error_lines(done)) == 1
    assert server.ranges == [None] * 3 + ["bytes=9000-"] * 5
    assert (mirror.folder / "naps").read_text().split() == ["2", "4", "2", "4", "8", "16"]


def test_download_begins_again_where_the_server_cannot_go_on(
    mirror: Mirror, server: Server
) -> None:
    server.resumes = False
    mirror.program("sleep", "")
    mirror.part.parent.mkdir(parents=True)
    mirror.part.write_bytes(mirror.archives[ZIPS["val"]][:1500])

    done = mirror.run("download_coco.sh", "--only", "val")

    assert done.returncode == 0, done.stderr
    assert server.ranges == ["bytes=1500-", None]
    assert mirror.present() == FILES["val"]


@pytest.mark.parametrize("damage", ["the mirror", "the partial file"])
def test_download_unpacks_nothing_of_a_wrong_checksum(mirror: Mirror, damage: str) -> None:
    path = mirror.folder / "mirror" / ZIPS["val"]
    good = path.read_bytes()
    if damage == "the mirror":
        # A picture of it differs, and the archive is a good one: only the checksum can tell.
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
    assert mirror.present() == {}
    path.write_bytes(good)
    assert mirror.run("download_coco.sh", "--only", "val").returncode == 0
    assert mirror.present() == FILES["val"]


@pytest.mark.parametrize(
    ("archive", "known"),
    [
        ("train", "cced6f7f71b7629ddf16f17bbcfab6b2"),
        ("val", "442b8da7639aecaf257c1dceb8ba8c80"),
        ("annotations", "f4bbac642086de4f52a3fdda2de5fa2c"),
    ],
)
def test_download_expects_the_true_coco(mirror: Mirror, archive: str, known: str) -> None:
    del mirror.environment["SEGTRAIN_COCO_MD5"]

    done = mirror.run("download_coco.sh", "--only", archive)

    assert done.returncode == 3
    assert f"not {known};" in done.stderr


def test_download_ends_with_its_child_on_sigterm(mirror: Mirror, server: Server) -> None:
    server.serve, server.stalls = [20_000], True

    process = mirror.start("download_coco.sh", "--only", "val")
    wait_until(lambda: mirror.part.exists() and mirror.part.stat().st_size)
    process.terminate()  # the script alone, not its group
    process.communicate(timeout=FOREVER)

    assert process.returncode == 143
    wait_until(lambda: group_is_gone(process.pid))  # once init has buried the last of them
    partial = mirror.part.read_bytes()
    assert 0 < len(partial) <= 20_000
    assert mirror.archives[ZIPS["val"]].startswith(partial)
    assert mirror.present() == {}
    server.serve, server.stalls = [None], False
    assert mirror.run("download_coco.sh", "--only", "val").returncode == 0
    assert server.ranges == [None, f"bytes={len(partial)}-"]
    assert mirror.present() == FILES["val"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("tool", ["md5sum", "unzip"])
def test_download_can_be_stopped_later_too(
    mirror: Mirror, tool: str, number: signal.Signals
) -> None:
    mirror.program(tool, "touch reached; exec sleep 1000")

    process = mirror.start("download_coco.sh", "--only", "val")
    wait_until((mirror.folder / "reached").exists)
    process.send_signal(number)
    process.communicate(timeout=FOREVER)

    assert process.returncode == 128 + number
    wait_until(lambda: group_is_gone(process.pid))  # once init has buried the last of them
    assert mirror.present() == {}
    (mirror.bin / tool).unlink()
    assert mirror.run("download_coco.sh", "--only", "val").returncode == 0
    assert mirror.present() == FILES["val"]


def test_download_keeps_what_lies_there(mirror: Mirror) -> None:
    own = {"val2017/own.jpg": b"mine", "notes.txt": b"mine too", "val2017/1.jpg": b"\1" * 7000}
    for name, content in own.items():
        (mirror.coco / name).parent.mkdir(parents=True, exist_ok=True)
        (mirror.coco / name).write_bytes(content)

    done = mirror.run("download_coco.sh", "--only", "val")

    assert done.returncode == 0, done.stderr
    assert mirror.present() == FILES["val"] | own


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
    assert mirror.present() == FILES["val"]


@pytest.mark.parametrize(("free", "have", "code"), [(60, 0, 5), (75, 0, 0), (60, 20_000, 0)])
def test_download_looks_at_the_space_before_it_begins(
    mirror: Mirror, free: int, have: int, code: int
) -> None:
    # An archive of 35 KB, and as much again unpacked.
    assert 34 < len(mirror.archives[ZIPS["val"]]) / 1024 < 36
    mirror.part.parent.mkdir(parents=True)
    mirror.part.write_bytes(mirror.archives[ZIPS["val"]][:have])
    mirror.program("df", f"echo 'Filesystem blocks Used Available'; echo /dev/x 99 9 {free}")

    done = mirror.run("download_coco.sh", "--only", "val")

    assert done.returncode == code
    assert len(error_lines(done)) == (code == 5)
    assert bool(mirror.present()) is (code == 0)
    assert code == 0 or mirror.part.stat().st_size == have


def test_download_says_that_there_is_no_network(mirror: Mirror) -> None:
    done = mirror.run("download_coco.sh", SEGTRAIN_COCO_URL="file:///nowhere")

    assert done.returncode == 5
    assert len(error_lines(done)) == 1
    assert mirror.present() == {}


def test_download_says_that_the_disk_is_full(mirror: Mirror) -> None:
    mirror.program("unzip", "echo 'write error (disk full?)' >&2; exit 50")

    done = mirror.run("download_coco.sh", "--only", "val")

    assert done.returncode == 5
    assert len(error_lines(done)) == 1
    assert mirror.present() == {}


def test_two_downloads_do_not_write_into_the_same_file(mirror: Mirror, server: Server) -> None:
    server.serve, server.stalls = [20_000], True
    first = mirror.start("download_coco.sh", "--only", "val")
    wait_until(lambda: mirror.part.exists() and mirror.part.stat().st_size)

    second = mirror.run("download_coco.sh", "--only", "val")

    assert second.returncode == 2
    assert len(error_lines(second)) == 1
    assert len(server.ranges) == 1
    first.terminate()
    first.communicate(timeout=FOREVER)


@pytest.mark.parametrize(
    "arguments",
    [["--only"], ["--only", "test"], ["--only="], ["--only", "val,,train"], ["-x"], ["a", "b"]],
)
def test_download_explains_its_usage(mirror: Mirror, arguments: list[str]) -> None:
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
