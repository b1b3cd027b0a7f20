"""Trainings with kills, full and read-only disks, and two processes in one run folder."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers.coco import make_toy_coco
from helpers.command import TOY_TRAINING, Command, Finished
from helpers.interruptions import (
    PROJECT,
    Case,
    after_step,
    assert_same_training,
    digests,
    kill_at_random,
    kill_self,
    leftovers,
    run_cases,
    session_members,
)

import segtrain.training.epoch
from segtrain.checkpoint import load_checkpoint
from segtrain.cli.main import run
from segtrain.runtime.files import atomic_write
from segtrain.runtime.lock import lock_folder
from segtrain.training.reporting import RunOutputs

pytestmark = pytest.mark.usefixtures("one_thread")

RESOURCE, BUSY = 5, 7
NUM_TRAIN, STEPS_PER_EPOCH = 24, 6
ENVIRONMENT = {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    return make_toy_coco(folder / "coco", num_train=NUM_TRAIN, num_val=4)


@pytest.fixture(scope="module")
def command(toy: Path) -> list[str]:
    """Trains the run `x` for two epochs, or resumes it."""
    arguments = ["--data", str(toy), "--epochs", "2", "--name", "x", "--resume", "auto"]
    return ["train", *arguments, *TOY_TRAINING]


@pytest.fixture(scope="module")
def uninterrupted(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without interruptions."""
    output = tmp_path_factory.mktemp("uninterrupted")
    assert run([*command, "--output", str(output)]) == 0
    return output / "x"


def assert_error(finished: Finished, code: int, *expected: str) -> None:
    assert finished.code == code, finished.err
    [line] = finished.error_lines
    assert len(line) <= 200
    assert "Traceback" not in finished.err
    for text in expected:
        assert text in line


@pytest.fixture
def no_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if a training step starts."""

    def refuse(*args: object, **kwargs: object) -> None:
        pytest.fail("a step started")

    monkeypatch.setattr(segtrain.training.epoch, "train_step", refuse)


# --- Kills --------------------------------------------------------------------------------------


def kill_and_resume(segtrain: Command, tmp_path: Path, rounds: int) -> None:
    # Saves so often that a good part of the kills hit a save.
    toy = make_toy_coco(tmp_path / "coco", num_train=8, num_val=2)
    arguments = ["train", "--data", str(toy), *TOY_TRAINING, "--save-every", "0s"]

    outcomes = kill_at_random(
        tmp_path, [*arguments, "--name", "x", "--resume", "auto", "--epochs", "9999"], rounds
    )

    assert len(outcomes) == rounds
    for outcome in outcomes:
        assert outcome.valid, outcome
        assert "error:" not in outcome.err
        assert "Traceback" not in outcome.err
    steps = [outcome.step for outcome in outcomes]
    assert steps == sorted(steps)
    assert steps[-1] > steps[0], "each run continues the previous one"
    # Enough kills must hit a save, or nothing is tested.
    assert sum(outcome.num_temp_files > 0 for outcome in outcomes) >= rounds // 6
    assert max(outcome.num_temp_files for outcome in outcomes) <= 2, "each start removes older ones"

    last = load_checkpoint(tmp_path / "runs" / "x" / "checkpoints" / "last.pt")
    epochs = ["--epochs", str(last.epoch + 1)]
    assert segtrain(*arguments, "--name", "x", "--resume", "auto", *epochs).code == 0
    assert leftovers(tmp_path) == []
    assert segtrain(*arguments, "--name", "uninterrupted", *epochs).code == 0
    assert_same_training(tmp_path / "runs" / "x", tmp_path / "runs" / "uninterrupted")


@pytest.mark.slow
def test_a_run_continues_after_each_of_forty_kills(segtrain: Command, tmp_path: Path) -> None:
    kill_and_resume(segtrain, tmp_path, rounds=40)


def test_temporary_files_of_a_killed_run_are_removed_at_the_next_start(
    segtrain: Command, command: list[str]
) -> None:
    assert segtrain(*command).code == 0
    temp_files = [
        Path("runs/x", name)
        for name in ("checkpoints/.last.pt.123.tmp", "samples/.a.jpg.9.tmp", ".config.yaml.1.tmp")
    ]
    for path in temp_files:
        path.write_bytes(b"half a file")
    before = digests(Path("runs/x"))

    assert segtrain(*command).code == 0

    assert leftovers(Path("runs")) == []
    assert digests(Path("runs/x")) == before


class Killed(BaseException):
    """Ends a command immediately, as a kill does."""


@pytest.mark.parametrize("epoch", [1, 2])
def test_outputs_missing_after_a_kill_are_written_on_resume(
    segtrain: Command,
    command: list[str],
    uninterrupted: Path,
    monkeypatch: pytest.MonkeyPatch,
    epoch: int,
) -> None:
    """The checkpoint is written before metrics.jsonl, curves and samples."""
    original = RunOutputs.write

    def write(self: Any, history: Any, images: Any) -> None:
        if len(history) == epoch:
            raise Killed
        original(self, history, images)

    with monkeypatch.context() as patch:
        patch.setattr(RunOutputs, "write", write)
        with pytest.raises(Killed):
            segtrain(*command)

    assert segtrain(*command).code == 0

    assert_same_training(Path("runs/x"), uninterrupted)
    for image in ("samples/epoch_0001.jpg", "samples/epoch_0002.jpg", "curves.png"):
        assert Path("runs/x", image).read_bytes() == (uninterrupted / image).read_bytes()


@pytest.mark.parametrize("renames", [1, 2])
def test_a_kill_between_the_renames_of_a_save_keeps_the_run_intact(
    segtrain: Command,
    command: list[str],
    uninterrupted: Path,
    monkeypatch: pytest.MonkeyPatch,
    renames: int,
) -> None:
    """First last.pt becomes previous.pt, then the new file becomes last.pt."""
    original, num_renames = Path.replace, 0

    def replace(self: Path, target: Path) -> Path:
        nonlocal num_renames
        moved = original(self, target)
        num_renames += target.name in {"last.pt", "previous.pt"} and Path("after_step").exists()
        if num_renames == renames:
            raise Killed
        return moved

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        after_step(patch.setattr, 2, lambda: Path("after_step").touch())
        with pytest.raises(Killed):
            segtrain(*command)
    for name in ("last.pt", "previous.pt"):
        load_checkpoint(Path("runs/x/checkpoints", name))

    assert segtrain(*command).code == 0

    assert leftovers(Path("runs")) == []
    assert_same_training(Path("runs/x"), uninterrupted)


def test_two_hard_links_to_one_file_leave_no_temporary_file(tmp_path: Path) -> None:
    """A kill between the renames leaves two links, and renaming one to the other does nothing."""
    path, backup = tmp_path / "last.pt", tmp_path / "previous.pt"
    path.write_bytes(b"old")
    backup.hardlink_to(path)

    with atomic_write(path, backup=backup) as file:
        file.write(b"new")

    assert (path.read_bytes(), backup.read_bytes()) == (b"new", b"old")
    assert leftovers(tmp_path) == []


# --- Signals while saving -----------------------------------------------------------------------


@pytest.mark.slow
def test_a_save_survives_the_second_signal_and_not_the_third(
    segtrain: Command, command: list[str], uninterrupted: Path, tmp_path: Path
) -> None:
    laters = {"second": [signal.SIGTERM], "third": [signal.SIGTERM, signal.SIGTERM]}
    cases = [
        Case(
            folder=tmp_path / name,
            arguments=command,
            step=STEPS_PER_EPOCH + 2,
            signals=[signal.SIGTERM],
            later=later,
        )
        for name, later in laters.items()
    ]
    for case in cases:
        case.folder.mkdir()

    second, third = run_cases(cases)

    for ended in (second, third):
        assert ended.code == 143
        assert "error:" not in ended.err
        assert "Traceback" not in ended.err
    steps = (STEPS_PER_EPOCH + 2, STEPS_PER_EPOCH)
    for case, step, num_temp_files in zip(cases, steps, (0, 1), strict=True):
        folder = case.folder / "runs" / "x"
        before = json.loads((case.folder / "before.json").read_text())["x"]
        assert len(leftovers(folder)) == num_temp_files
        assert load_checkpoint(folder / "checkpoints" / "last.pt").global_step == step
        # Existing files are kept; if the save finished, last.pt became previous.pt.
        assert digests(folder)["last.pt" if num_temp_files else "previous.pt"] == before["last.pt"]
        assert digests(folder)["best.pt"] == before["best.pt"]

        resumed = segtrain(*command, "--output", case.folder / "runs")
        assert resumed.code == 0, resumed.err
        assert leftovers(folder) == []
        assert_same_training(folder, uninterrupted)


# --- Disks --------------------------------------------------------------------------------------


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """Writing more than this into a file fails inside the block, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def megabytes(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.1f} MB"


@pytest.mark.usefixtures("no_steps")
def test_a_full_disk_is_detected_before_the_first_step(
    segtrain: Command, command: list[str], uninterrupted: Path
) -> None:
    with file_size_limit(20_000):
        finished = segtrain(*command)

    # Before the first step there is no optimizer state, so the checkpoint is smaller.
    assert_error(finished, RESOURCE, "last.pt", " MB or choose another folder")
    assert digests(Path("runs/x")) == {}
    assert leftovers(Path("runs")) == []


@pytest.mark.parametrize("when", ["at the end of an epoch", "after a signal"])
def test_a_disk_that_fills_up_later_damages_no_checkpoint(
    segtrain: Command, command: list[str], uninterrupted: Path, when: str
) -> None:
    assert segtrain(*command).code == 0
    folder = Path("runs/x")
    before = digests(folder)
    longer = [*(a for a in command if a not in {"--epochs", "2"}), "--epochs", "3"]

    with file_size_limit(20_000), pytest.MonkeyPatch.context() as patch:
        if when == "after a signal":
            after_step(patch.setattr, 2, kill_self(signal.SIGTERM))
        finished = segtrain(*longer)

    # The end of an epoch writes the smaller best.pt first, if the epoch is the best.
    size = megabytes(folder / "checkpoints/last.pt") if when == "after a signal" else "MB"
    assert_error(finished, RESOURCE, ".pt: ", f"{size} or choose another folder")
    assert digests(folder) == before
    assert leftovers(Path("runs")) == []
    # With free space the run continues.
    assert segtrain(*longer).code == 0


# Runs commands on a small private disk and prints {case: [code, stderr, digests, trained]}.
ON_A_SMALL_DISK = """
import contextlib, io, json, os, subprocess, sys
from pathlib import Path
import torch
from helpers.interruptions import after_step, digests
from segtrain.cli.main import run

torch.set_num_threads(1)
disk, size, command = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
results = {}

def mount(*options):
    subprocess.run(["mount", *map(str, options)], check=True)

def record(case, arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(arguments)
    results[case] = [code, err.getvalue(), digests(disk / "x"), "images/s" in out.getvalue()]

def fill():
    with open(disk / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass

for case, num_bytes in (("no room", size // 2), ("little room", size * 2)):
    mount("-t", "tmpfs", "-o", f"size={num_bytes // 4096 * 4096}", "tmpfs", disk)
    record(case, command)
    subprocess.run(["umount", str(disk)], check=True)

mount("-t", "tmpfs", "-o", f"size={size * 8 + 600_000}", "tmpfs", disk)
record("room", [*command, "--epochs", "1"])
after_step(setattr, 2, fill)
record("filled up", [*command, "--epochs", "2"])
record("full", [*command, "--epochs", "2"])
(disk / "filler").unlink()
mount("-o", "remount,ro", disk)
record("read-only", [*command, "--epochs", "2"])
record("read-only, new", [*command[:-1], "new", "--epochs", "2"])
mount("-o", "remount,rw", disk)
record("again", [*command, "--epochs", "2"])
print(json.dumps(results))
"""


def private_mounts() -> list[str]:
    """The command prefix that gives a command its own private mounts."""
    for prefix in (["unshare", "--mount"], ["unshare", "--map-root-user", "--mount"]):
        probe = [*prefix, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
        try:
            if subprocess.run(probe, capture_output=True).returncode == 0:
                return prefix
        except OSError:
            break
    pytest.skip("mounting is not permitted")


@pytest.mark.slow
def test_small_full_and_read_only_disks(
    command: list[str], uninterrupted: Path, tmp_path: Path
) -> None:
    prefix = private_mounts()
    disk = tmp_path / "disk"
    disk.mkdir()
    size = (uninterrupted / "checkpoints" / "last.pt").stat().st_size
    plain = [a for a in command if a not in {"--epochs", "2", "--name", "x"}]
    done = subprocess.run(
        [
            *(*prefix, sys.executable, "-c", ON_A_SMALL_DISK, disk, str(size)),
            *(*plain, "--output", disk, "--name", "x"),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": f"{PROJECT}:{PROJECT / 'tests'}"},
    )
    assert done.returncode == 0, done.stderr
    results = {
        case: (Finished(code, "", err), checkpoints, trained)
        for case, (code, err, checkpoints, trained) in json.loads(done.stdout).items()
    }

    for case, texts in {
        "no room": ("last.pt", "No space left", " MB or choose another folder"),
        "little room": ("needs ", " MB more for checkpoints", "--output"),
        "filled up": (".pt", "No space left", " MB or choose another folder"),
        "full": ("No space left",),
        "read-only": ("Read-only file system",),
        "read-only, new": ("Read-only file system", "--output"),
    }.items():
        finished, _, trained = results[case]
        assert_error(finished, RESOURCE, *texts)
        assert not trained, "it must end before the end of an epoch"
    for case in ("room", "again"):
        assert results[case][0].code == 0, results[case][0].err
    for case in ("filled up", "full", "read-only"):
        assert results[case][1] == results["room"][1], case


@pytest.mark.usefixtures("no_steps")
@pytest.mark.parametrize(
    ("obstacle", "expected"),
    [("runs", "runs/x"), ("runs/x/checkpoints", "checkpoints/last.pt"), ("runs/x/.lock/", ".lock")],
)
def test_an_unwritable_run_folder_is_detected_before_the_first_step(
    segtrain: Command, command: list[str], obstacle: str, expected: str
) -> None:
    """A file or folder in the way, because root ignores permissions."""
    path = Path(obstacle)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir() if obstacle.endswith("/") else path.write_text("in the way")

    finished = segtrain(*command)

    assert_error(finished, RESOURCE, expected)
    assert path.is_dir() or path.read_text() == "in the way"


# --- Two processes in one folder ----------------------------------------------------------------


def test_a_second_training_in_a_folder_is_refused_while_the_first_runs(
    segtrain: Command, command: list[str], tmp_path: Path
) -> None:
    endless = [a for a in command if a not in {"--workers", "0", "--epochs", "2"}]
    endless += ["--workers", "2", "--epochs", "9999"]
    holder = subprocess.Popen(
        [sys.executable, "-m", "segtrain", *endless],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **ENVIRONMENT},
        start_new_session=True,
    )
    last = tmp_path / "runs" / "x" / "checkpoints" / "last.pt"
    try:
        wait_for(last.with_name("best.pt").exists)
        for arguments in (endless, ["train", "--resume", "runs/x"], ["train", "--name", "x"]):
            assert_refused(arguments, tmp_path, holder.pid)

        holder.kill()
        holder.wait()
        assert session_members(holder.pid), "its loader processes outlive it for a moment"

        epoch = load_checkpoint(last).epoch
        finished = segtrain(*endless[:-1], str(epoch + 1))
        assert finished.code == 0, finished.err
        assert load_checkpoint(last).epoch == epoch + 1
    finally:
        for pid in session_members(holder.pid):
            os.kill(pid, signal.SIGKILL)
        holder.wait()


def assert_refused(arguments: list[str], folder: Path, holder: int) -> None:
    started = time.monotonic()
    second = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "segtrain", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, **ENVIRONMENT},
    )
    seconds = time.monotonic() - started

    finished = Finished(second.returncode, second.stdout, second.stderr)
    assert_error(finished, BUSY, f"in use by process {holder} on ", "wait for it or stop it")
    assert seconds < 10  # 2 s on an idle machine
    imported = {line.rpartition("|")[2].strip() for line in second.stderr.splitlines()}
    assert "segtrain.runtime.lock" in imported
    assert "torch" not in imported, "the import of torch takes longer than everything else"


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_of_two_trainings_started_together_only_one_gets_the_lock(
    segtrain: Command, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second checks before the first has created the folder."""
    monkeypatch.setattr("segtrain.runtime.lock.refuse_if_busy", lambda folder: None)
    assert segtrain(*command).code == 0
    files = {path: path.stat().st_mtime_ns for path in Path("runs/x").rglob("*") if path.is_file()}

    with lock_folder(Path("runs/x").absolute()):
        files[Path("runs/x/.lock")] = Path("runs/x/.lock").stat().st_mtime_ns
        finished = segtrain(*command)

    assert_error(finished, BUSY, f"process {os.getpid()} on ")
    assert files == {
        path: path.stat().st_mtime_ns for path in Path("runs/x").rglob("*") if path.is_file()
    }
