"""Two processes on one machine, as torchrun starts them on many: one training, not two."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from coco_fixtures import make_toy_coco
from conftest import Command

from segtrain import distributed
from segtrain.checkpoint import load_checkpoint
from segtrain.distributed import World, joined
from segtrain.errors import UsageError

PROJECT = Path(__file__).parents[1]
# No batch norm: its statistics are of each process's own pictures. Pictures smaller than the crop
# leave pixels to ignore, so that the two processes count different numbers of them.
NETWORK = (
    *("--set", "model.base_channels=4", "--set", "model.depth=2", "--set", "model.norm=none"),
    *("--set", "optim.warmup_steps=2", "--image-size", "48", "--workers", "0"),
    *("--set", "data.augment=standard", "--precision", "fp32", "--device", "cpu"),
)


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy_coco(tmp_path_factory.mktemp("people") / "coco", num_train=20, num_val=7)


@contextmanager
def two_processes(*arguments: str | Path, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    launch = [sys.executable, "-m", "segtrain.launch", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*launch, "-m", "segtrain", "train", *map(str, arguments)],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def trainings_in(folder: Path) -> list[int]:
    """Processes whose working directory is `folder`."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "cwd").resolve() == folder.resolve():
                found.append(int(entry.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]


def wait_for_line(process: subprocess.Popen[str], beginning: str) -> None:
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith(beginning):
            return
    raise AssertionError("".join(seen))


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(
    segtrain: Command, people: Path, tmp_path: Path
) -> None:
    """Batches of 2 x 3 and of 6; the last one of an epoch has 2 pictures, one for each."""
    common = ["--data", people, *NETWORK, "--epochs", "3"]
    with two_processes(*common, "--batch-size", "3", "--name", "two", cwd=tmp_path) as process:
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    assert out.count("epoch 3/3") == 1  # one of them talks
    assert segtrain("train", *common, "--batch-size", "6", "--name", "one").code == 0

    two, one = (rows(tmp_path / "runs" / name) for name in ("two", "one"))
    assert len(one) == len(two) == 3
    for ours, theirs in zip(two, one, strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], abs=1e-5)
        assert ours["train/person_iou"] == pytest.approx(theirs["train/person_iou"], abs=1e-3)
        assert ours["global_step"] == theirs["global_step"]
        for key in ("person_iou", "mean_iou", "pixel_accuracy", "all_person_iou"):
            assert ours[f"val/{key}"] == pytest.approx(theirs[f"val/{key}"], abs=1e-3)
        # Sharded, every picture is judged once: of the truth not a pixel more or less.
        assert ours["val/all_person_iou"] == theirs["val/all_person_iou"]
    assert one[0]["train/loss"] - one[-1]["train/loss"] > 0.01
    weights = [
        load_checkpoint(tmp_path / "runs" / name / "checkpoints" / "last.pt").weights
        for name in ("two", "one")
    ]
    for key, value in weights[1].items():
        torch.testing.assert_close(weights[0][key], value, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_all_stop_together_and_go_on_as_if_nothing_had_been(
    segtrain: Command, people: Path, tmp_path: Path
) -> None:
    common = ["--data", people, *NETWORK, "--batch-size", "2", "--set", "train.ema_decay=0.9"]
    common += ["--set", "train.accumulation_steps=2"]
    with two_processes(*common, "--epochs", "200", "--name", "two", cwd=tmp_path) as process:
        wait_for_line(process, "epoch 2/")
        process.terminate()
        out, _ = process.communicate(timeout=30)
    assert process.returncode == 143, out
    assert "is saved" in out
    stopped = load_checkpoint(tmp_path / "runs/two/checkpoints/last.pt")
    epochs = str(stopped.epoch + 2)
    resume = ["--epochs", epochs, "--name", "two", "--resume", "auto"]
    with two_processes(*common, *resume, cwd=tmp_path) as process:
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    with two_processes(*common, "--epochs", epochs, "--name", "x", cwd=tmp_path) as process:
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out

    resumed, straight = (rows(tmp_path / "runs" / name) for name in ("two", "x"))
    assert [row["train/loss"] for row in resumed] == [row["train/loss"] for row in straight]
    assert trainings_in(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_job(people: Path, tmp_path: Path, victim: int) -> None:
    common = ["--data", people, *NETWORK, "--batch-size", "2", "--epochs", "500", "--name", "two"]
    with two_processes(*common, cwd=tmp_path) as process:
        wait_for_line(process, "epoch 2/")
        saved = (tmp_path / "runs/two/checkpoints/last.pt").exists()
        ranks = sorted(pid for pid in trainings_in(tmp_path) if pid != process.pid)
        assert len(ranks) == 2
        os.kill(ranks[victim], signal.SIGKILL)
        killed_at = time.monotonic()
        out, _ = process.communicate(timeout=60)

    assert time.monotonic() - killed_at < 30
    assert process.returncode == 5, out
    assert saved
    assert trainings_in(tmp_path) == []
    errors = [line for line in out.splitlines() if line.startswith("error:")]
    assert len(errors) <= 1
    assert all("another process of the job died" in line for line in errors)
    assert "Traceback" not in out
    load_checkpoint(tmp_path / "runs/two/checkpoints/last.pt")


@pytest.mark.slow
def test_only_the_first_process_needs_the_checkpoints(people: Path, tmp_path: Path) -> None:
    """On several machines without a common disk, in a stage's change and on resuming."""
    stages = tmp_path / "stages.yaml"
    stages.write_text("stages:\n  - epochs: 1\n    optim: {lr: 1.0e-4}\n")
    common = ["--data", people, *NETWORK, "--batch-size", "4", "--name", "two"]
    common += ["--config", stages, "--resume", "auto"]
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        folder.mkdir()
    for epochs in ("1", "2"):
        # The first ends after its stage, and is resumed in it.
        with machines(*common, "--epochs", epochs, folders=folders, port=free_port()) as ranks:
            outs = [rank.communicate(timeout=120)[0] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0, 0], outs

    assert "runs/two/checkpoints/last.pt after epoch 2" in outs[0]
    assert not (folders[1] / "runs").exists()


@contextmanager
def machines(
    *arguments: str | Path, folders: list[Path], port: int
) -> Iterator[list[subprocess.Popen[str]]]:
    """A process in each folder, as if each were a machine of its own."""
    ranks = []
    for rank, folder in enumerate(folders):
        place = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(len(folders))}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        paths = os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")])
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-m", "segtrain", "train", *map(str, arguments)],
                cwd=folder,
                env={**os.environ, **place, "PYTHONPATH": paths},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        yield ranks
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


# --- Alone --------------------------------------------------------------------------------------


def test_alone_nothing_is_exchanged() -> None:
    alone = World()
    values = torch.tensor([1.0, 2.0])

    assert alone.is_first
    assert alone.sum_(values) is values
    assert [alone.any(True), alone.any(False)] == [True, False]
    assert alone.smallest(3) == 3
    assert alone.told_by_first("x") == "x"
    with alone.first_alone():
        pass


def test_without_torchrun_this_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined(on_cuda=False) as world:
        assert world == World(rank=0, local_rank=0, size=1)


def test_a_world_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(UsageError, match=r"WORLD_SIZE.*'many'"), joined(on_cuda=False):
        pass


# --- Leaving a job that has failed --------------------------------------------------------------


def test_a_gpu_that_waits_for_a_dead_process_does_not_keep_this_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu, ended = threading.Event(), threading.Event()
    codes: list[int] = []
    monkeypatch.setattr(dist, "destroy_process_group", gpu.wait)
    monkeypatch.setattr(os, "_exit", lambda code: (codes.append(code), ended.set()))
    monkeypatch.setattr(distributed, "_SECONDS_TO_LEAVE", 0.05)
    monkeypatch.setattr(distributed, "_SECONDS_TO_END", 0.05)

    distributed._leave_in_time()

    assert ended.wait(10)
    gpu.set()
    assert codes == [5]


def test_a_job_that_can_be_left_ends_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[bool] = []
    monkeypatch.setattr(dist, "destroy_process_group", lambda: left.append(True))
    monkeypatch.setattr(threading, "Timer", None)

    distributed._leave_in_time()

    assert left == [True]
