"""What the machine does to a training: kills, full and read-only disks, a second one beside it."""

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
from coco_fixtures import make_toy_coco
from conftest import TOY_TRAINING, Command, Finished
from interruptions import (
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
from segtrain.cli import run
from segtrain.files import atomic_write
from segtrain.locking import locked
from segtrain.training.outputs import RunOutputs

pytestmark = pytest.mark.usefixtures("one_thread")

RESOURCE, BUSY = 5, 7
NUM_TRAIN, STEPS_AN_EPOCH = 24, 6
ENVIRONMENT = {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    return make_toy_coco(folder / "coco", num_train=NUM_TRAIN, num_val=4)


@pytest.fixture(scope="module")
def command(toy: Path) -> list[str]:
    """Trains the run `x` for two epochs, or goes on with it."""
    arguments = ["--data", str(toy), "--epochs", "2", "--name", "x", "--resume", "auto"]
    return ["train", *arguments, *TOY_TRAINING]


@pytest.fixture(scope="module")
def straight(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happened to."""
    output = tmp_path_factory.mktemp("straight")
    assert run([*command, "--output", str(output)]) == 0
    return output / "x"


def assert_error(finished: Finished, code: int, *said: str) -> None:
    assert finished.code == code, finished.err
    [line] = finished.error_lines
    assert len(line) <= 200
    assert "Traceback" not in finished.err
    for words in said:
        assert words in line


@pytest.fixture
def no_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be trained."""

    def refuse(*args: object, **kwargs: object) -> None:
        pytest.fail("a step was begun")

    monkeypatch.setattr(segtrain.training.epoch, "training_steps", refuse)


# --- Killed -------------------------------------------------------------------------------------


def killed_again_and_again(segtrain: Command, tmp_path: Path, rounds: int) -> None:
    # Saved so often that a good part of the kills come within a save.
    toy = make_toy_coco(tmp_path / "coco", num_train=8, num_val=2)
    arguments = ["train", "--data", str(toy), *TOY_TRAINING, "--save-every", "0s"]

    killed = kill_at_random(
        tmp_path, [*arguments, "--name", "x", "--resume", "auto", "--epochs", "9999"], rounds
    )

    assert len(killed) == rounds
    for outcome in killed:
        assert outcome.whole, outcome
        assert "error:" not in outcome.err
        assert "Traceback" not in outcome.err
    steps = [outcome.step for outcome in killed]
    assert steps == sorted(steps)
    assert steps[-1] > steps[0], "each went on where the one before was killed"
    # Some were hit in the middle of a save: else nothing was tested.
    assert sum(outcome.stale > 0 for outcome in killed) >= rounds // 6
    assert max(outcome.stale for outcome in killed) <= 2, "the next one sweeps"

    last = load_checkpoint(tmp_path / "runs" / "x" / "checkpoints" / "last.pt")
    epochs = ["--epochs", str(last.epoch + 1)]
    assert segtrain(*arguments, "--name", "x", "--resume", "auto", *epochs).code == 0
    assert leftovers(tmp_path) == []
    assert segtrain(*arguments, "--name", "straight", *epochs).code == 0
    assert_same_training(tmp_path / "runs" / "x", tmp_path / "runs" / "straight")


@pytest.mark.slow
def test_forty_of_forty_runs_that_are_killed_go_on(segtrain: Command, tmp_path: Path) -> None:
    killed_again_and_again(segtrain, tmp_path, rounds=40)


def test_what_a_killed_writer_left_is_swept_at_the_next_start(
    segtrain: Command, command: list[str]
) -> None:
    assert segtrain(*command).code == 0
    left = [
        Path("runs/x", name)
        for name in ("checkpoints/.last.pt.123.tmp", "samples/.a.jpg.9.tmp", ".config.yaml.1.tmp")
    ]
    for path in left:
        path.write_bytes(b"half a file")
    before = digests(Path("runs/x"))

    assert segtrain(*command).code == 0

    assert leftovers(Path("runs")) == []
    assert digests(Path("runs/x")) == before


class Killed(BaseException):
    """Ends a command at once, as a kill does."""


@pytest.mark.parametrize("epoch", [1, 2])
def test_an_epoch_whose_outputs_a_kill_has_prevented_gets_them(
    segtrain: Command,
    command: list[str],
    straight: Path,
    monkeypatch: pytest.MonkeyPatch,
    epoch: int,
) -> None:
    """The checkpoint is written first; metrics.jsonl, curves and samples come after it."""
    real = RunOutputs.write

    def write(self: Any, history: Any, pictures: Any) -> None:
        if len(history) == epoch:
            raise Killed
        real(self, history, pictures)

    with monkeypatch.context() as patch:
        patch.setattr(RunOutputs, "write", write)
        with pytest.raises(Killed):
            segtrain(*command)

    assert segtrain(*command).code == 0

    assert_same_training(Path("runs/x"), straight)
    for picture in ("samples/epoch_0001.jpg", "samples/epoch_0002.jpg", "curves.png"):
        assert Path("runs/x", picture).read_bytes() == (straight / picture).read_bytes()


@pytest.mark.parametrize("renames", [1, 2])
def test_a_kill_between_the_renames_of_a_save_leaves_a_whole_run(
    segtrain: Command,
    command: list[str],
    straight: Path,
    monkeypatch: pytest.MonkeyPatch,
    renames: int,
) -> None:
    """First what was last.pt becomes previous.pt, then the new file becomes last.pt."""
    real, done = Path.replace, 0

    def replace(self: Path, target: Path) -> Path:
        nonlocal done
        moved = real(self, target)
        done += target.name in {"last.pt", "previous.pt"} and step_is_taken()
        if done == renames:
            raise Killed
        return moved

    def step_is_taken() -> bool:
        return Path("taken").exists()

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        after_step(patch.setattr, 2, lambda: Path("taken").touch())
        with pytest.raises(Killed):
            segtrain(*command)
    for name in ("last.pt", "previous.pt"):
        load_checkpoint(Path("runs/x/checkpoints", name))

    assert segtrain(*command).code == 0

    assert leftovers(Path("runs")) == []
    assert_same_training(Path("runs/x"), straight)


def test_two_names_of_one_file_do_not_leave_a_third(tmp_path: Path) -> None:
    """That is how a kill between the renames leaves them, and renaming one to the other is void."""
    path, before = tmp_path / "last.pt", tmp_path / "previous.pt"
    path.write_bytes(b"old")
    before.hardlink_to(path)

    with atomic_write(path, keep_as=before) as file:
        file.write(b"new")

    assert (path.read_bytes(), before.read_bytes()) == (b"new", b"old")
    assert leftovers(tmp_path) == []


# --- Signals while saving -----------------------------------------------------------------------


@pytest.mark.slow
def test_a_second_signal_lets_the_save_finish_and_a_third_does_not(
    segtrain: Command, command: list[str], straight: Path, tmp_path: Path
) -> None:
    laters = {"second": [signal.SIGTERM], "third": [signal.SIGTERM, signal.SIGTERM]}
    cases = [
        Case(
            folder=tmp_path / name,
            arguments=command,
            step=STEPS_AN_EPOCH + 2,
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
    for case, step, saving in zip(cases, (STEPS_AN_EPOCH + 2, STEPS_AN_EPOCH), (0, 1), strict=True):
        folder = case.folder / "runs" / "x"
        before = json.loads((case.folder / "before.json").read_text())["x"]
        assert len(leftovers(folder)) == saving
        assert load_checkpoint(folder / "checkpoints" / "last.pt").global_step == step
        # What was there is there; where the save was finished last.pt has become previous.pt.
        assert digests(folder)["last.pt" if saving else "previous.pt"] == before["last.pt"]
        assert digests(folder)["best.pt"] == before["best.pt"]

        resumed = segtrain(*command, "--output", case.folder / "runs")
        assert resumed.code == 0, resumed.err
        assert leftovers(folder) == []
        assert_same_training(folder, straight)


# --- Disks --------------------------------------------------------------------------------------


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Within, writing more into a file fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def megabytes(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.1f} MB"


@pytest.mark.usefixtures("no_steps")
def test_a_full_disk_is_found_before_the_first_step(
    segtrain: Command, command: list[str], straight: Path
) -> None:
    with largest_file(20_000):
        finished = segtrain(*command)

    # A run that has not begun has no optimizer state yet: its checkpoint is the smaller one.
    assert_error(finished, RESOURCE, "last.pt", " MB or choose another folder")
    assert digests(Path("runs/x")) == {}
    assert leftovers(Path("runs")) == []


@pytest.mark.parametrize("when", ["at the end of an epoch", "after a signal"])
def test_a_disk_that_fills_up_later_costs_no_checkpoint(
    segtrain: Command, command: list[str], straight: Path, when: str
) -> None:
    assert segtrain(*command).code == 0
    folder = Path("runs/x")
    before = digests(folder)
    longer = [*(a for a in command if a not in {"--epochs", "2"}), "--epochs", "3"]

    with largest_file(20_000), pytest.MonkeyPatch.context() as patch:
        if when == "after a signal":
            after_step(patch.setattr, 2, kill_self(signal.SIGTERM))
        finished = segtrain(*longer)

    # An epoch's end writes the smaller best.pt first, if it is one.
    size = megabytes(folder / "checkpoints/last.pt") if when == "after a signal" else "MB"
    assert_error(finished, RESOURCE, ".pt: ", f"{size} or choose another folder")
    assert digests(folder) == before
    assert leftovers(Path("runs")) == []
    # With space it goes on.
    assert segtrain(*longer).code == 0


# Runs commands on a small disk of its own, which nobody else sees: {"what": [code, err, digests]}.
ON_A_SMALL_DISK = """
import contextlib, io, json, os, subprocess, sys
from pathlib import Path
import torch
from interruptions import after_step, digests
from segtrain.cli import run

torch.set_num_threads(1)
disk, size, command = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
said = {}

def mount(*options):
    subprocess.run(["mount", *map(str, options)], check=True)

def note(what, arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(arguments)
    said[what] = [code, err.getvalue(), digests(disk / "x"), "images/s" in out.getvalue()]

def fill():
    with open(disk / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass

for what, num_bytes in (("no room", size // 2), ("little room", size * 2)):
    mount("-t", "tmpfs", "-o", f"size={num_bytes // 4096 * 4096}", "tmpfs", disk)
    note(what, command)
    subprocess.run(["umount", str(disk)], check=True)

mount("-t", "tmpfs", "-o", f"size={size * 8 + 600_000}", "tmpfs", disk)
note("room", [*command, "--epochs", "1"])
after_step(setattr, 2, fill)
note("filled up", [*command, "--epochs", "2"])
note("full", [*command, "--epochs", "2"])
(disk / "filler").unlink()
mount("-o", "remount,ro", disk)
note("read-only", [*command, "--epochs", "2"])
note("read-only, new", [*command[:-1], "new", "--epochs", "2"])
mount("-o", "remount,rw", disk)
note("again", [*command, "--epochs", "2"])
print(json.dumps(said))
"""


def private_mounts() -> list[str]:
    """The command before one that may mount without anybody else seeing it."""
    for prefix in (["unshare", "--mount"], ["unshare", "--map-root-user", "--mount"]):
        probe = [*prefix, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
        try:
            if subprocess.run(probe, capture_output=True).returncode == 0:
                return prefix
        except OSError:
            break
    pytest.skip("nothing can be mounted here")


@pytest.mark.slow
def test_small_full_and_read_only_disks(command: list[str], straight: Path, tmp_path: Path) -> None:
    prefix = private_mounts()
    disk = tmp_path / "disk"
    disk.mkdir()
    size = (straight / "checkpoints" / "last.pt").stat().st_size
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
    said = {
        what: (Finished(code, "", err), found, trained)
        for what, (code, err, found, trained) in json.loads(done.stdout).items()
    }

    for what, words in {
        "no room": ("last.pt", "No space left", " MB or choose another folder"),
        "little room": ("needs ", " MB more for checkpoints", "--output"),
        "filled up": (".pt", "No space left", " MB or choose another folder"),
        "full": ("No space left",),
        "read-only": ("Read-only file system",),
        "read-only, new": ("Read-only file system", "--output"),
    }.items():
        finished, _, trained = said[what]
        assert_error(finished, RESOURCE, *words)
        assert not trained, "it ends before an epoch does"
    for what in ("room", "again"):
        assert said[what][0].code == 0, said[what][0].err
    for what in ("filled up", "full", "read-only"):
        assert said[what][1] == said["room"][1], what


@pytest.mark.usefixtures("no_steps")
@pytest.mark.parametrize(
    ("in_the_way", "said"),
    [("runs", "runs/x"), ("runs/x/checkpoints", "checkpoints/last.pt"), ("runs/x/.lock/", ".lock")],
)
def test_a_run_folder_that_cannot_be_written_is_found_before_the_first_step(
    segtrain: Command, command: list[str], in_the_way: str, said: str
) -> None:
    """Root may write wherever permissions forbid it: something that is in the way stops all."""
    path = Path(in_the_way)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir() if in_the_way.endswith("/") else path.write_text("in the way")

    finished = segtrain(*command)

    assert_error(finished, RESOURCE, said)
    assert path.is_dir() or path.read_text() == "in the way"


# --- Two in one folder --------------------------------------------------------------------------


def test_the_second_training_in_a_folder_is_refused_until_the_first_is_gone(
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
    assert seconds < 10  # 2 on a machine with nothing else to do
    imported = {line.rpartition("|")[2].strip() for line in second.stderr.splitlines()}
    assert "segtrain.locking" in imported
    assert "torch" not in imported, "importing it takes longer than all the rest"


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_two_that_start_at_the_same_time_are_told_apart_by_the_lock(
    segtrain: Command, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second looked before the first had made the folder."""
    monkeypatch.setattr("segtrain.locking.refuse_if_busy", lambda folder: None)
    assert segtrain(*command).code == 0
    files = {path: path.stat().st_mtime_ns for path in Path("runs/x").rglob("*") if path.is_file()}

    with locked(Path("runs/x").absolute()):
        files[Path("runs/x/.lock")] = Path("runs/x/.lock").stat().st_mtime_ns
        finished = segtrain(*command)

    assert_error(finished, BUSY, f"process {os.getpid()} on ")
    assert files == {
        path: path.stat().st_mtime_ns for path in Path("runs/x").rglob("*") if path.is_file()
    }
