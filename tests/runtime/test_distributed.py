"""Training in two processes on one machine, started as torchrun starts them on many."""

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
from helpers.coco import make_toy_coco
from helpers.command import Command

from segtrain.checkpoint import load_checkpoint
from segtrain.errors import UsageError
from segtrain.runtime import distributed
from segtrain.runtime.distributed import DistributedContext, distributed_context

PROJECT = Path(__file__).parents[2]
# Without batch norm, whose statistics cover only the images of one process. Images smaller than the
# crop have ignored pixels, so that the two processes count different numbers of pixels.
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
    launch = [
        sys.executable,
        "-m",
        "segtrain.runtime.launch",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
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


def processes_in(folder: Path) -> list[int]:
    """Other processes whose working directory is `folder`."""
    pids = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "cwd").resolve() == folder.resolve():
                pids.append(int(entry.name))
        except OSError:
            continue
    return [pid for pid in pids if pid != os.getpid()]


def wait_for_line(process: subprocess.Popen[str], prefix: str) -> None:
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(prefix):
            return
    raise AssertionError("".join(lines))


@pytest.mark.slow
def test_two_processes_take_the_same_steps_as_one(
    segtrain: Command, people: Path, tmp_path: Path
) -> None:
    """Batches of 2 x 3 and of 6; the last batch of an epoch has 2 images, one per process."""
    common = ["--data", people, *NETWORK, "--epochs", "3"]
    with two_processes(*common, "--batch-size", "3", "--name", "two", cwd=tmp_path) as process:
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    assert out.count("epoch 3/3") == 1  # only the main process logs
    assert segtrain("train", *common, "--batch-size", "6", "--name", "one").code == 0

    two, one = (rows(tmp_path / "runs" / name) for name in ("two", "one"))
    assert len(one) == len(two) == 3
    for row_two, row_one in zip(two, one, strict=True):
        assert row_two["train/loss"] == pytest.approx(row_one["train/loss"], abs=1e-5)
        assert row_two["train/person_iou"] == pytest.approx(row_one["train/person_iou"], abs=1e-3)
        assert row_two["global_step"] == row_one["global_step"]
        for key in ("person_iou", "mean_iou", "pixel_accuracy", "all_person_iou"):
            assert row_two[f"val/{key}"] == pytest.approx(row_one[f"val/{key}"], abs=1e-3)
        # Each image is evaluated exactly once, so the metric of the ground truth is exactly equal.
        assert row_two["val/all_person_iou"] == row_one["val/all_person_iou"]
    assert one[0]["train/loss"] - one[-1]["train/loss"] > 0.01
    weights = [
        load_checkpoint(tmp_path / "runs" / name / "checkpoints" / "last.pt").weights
        for name in ("two", "one")
    ]
    for key, value in weights[1].items():
        torch.testing.assert_close(weights[0][key], value, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_all_processes_stop_together_and_resume_exactly(
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
    assert processes_in(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_job(people: Path, tmp_path: Path, victim: int) -> None:
    common = ["--data", people, *NETWORK, "--batch-size", "2", "--epochs", "500", "--name", "two"]
    with two_processes(*common, cwd=tmp_path) as process:
        wait_for_line(process, "epoch 2/")
        saved = (tmp_path / "runs/two/checkpoints/last.pt").exists()
        ranks = sorted(pid for pid in processes_in(tmp_path) if pid != process.pid)
        assert len(ranks) == 2
        os.kill(ranks[victim], signal.SIGKILL)
        killed_at = time.monotonic()
        out, _ = process.communicate(timeout=60)

    assert time.monotonic() - killed_at < 30
    assert process.returncode == 5, out
    assert saved
    assert processes_in(tmp_path) == []
    errors = [line for line in out.splitlines() if line.startswith("error:")]
    assert len(errors) <= 1
    assert all("another process of the job died" in line for line in errors)
    assert "Traceback" not in out
    load_checkpoint(tmp_path / "runs/two/checkpoints/last.pt")


@pytest.mark.slow
def test_only_the_main_process_needs_the_checkpoints(people: Path, tmp_path: Path) -> None:
    """On several machines without a shared disk, at a change of stage and on resuming."""
    stages = tmp_path / "stages.yaml"
    stages.write_text("stages:\n  - epochs: 1\n    optim: {lr: 1.0e-4}\n")
    common = ["--data", people, *NETWORK, "--batch-size", "4", "--name", "two"]
    common += ["--config", stages, "--resume", "auto"]
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    for epochs in ("1", "2"):
        # The first call ends after the first stage, and the second resumes in it.
        with machines(*common, "--epochs", epochs, folders=folders, port=free_port()) as ranks:
            outs = [rank.communicate(timeout=120)[0] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0, 0], outs

    assert "runs/two/checkpoints/last.pt after epoch 2" in outs[0]
    assert not (folders[1] / "runs").exists()


@contextmanager
def machines(
    *arguments: str | Path, folders: list[Path], port: int
) -> Iterator[list[subprocess.Popen[str]]]:
    """Start one process in each folder, as if each folder were on its own machine."""
    ranks = []
    for rank, folder in enumerate(folders):
        variables = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(len(folders))}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        paths = os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")])
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-m", "segtrain", "train", *map(str, arguments)],
                cwd=folder,
                env={**os.environ, **variables, "PYTHONPATH": paths},
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
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


# --- One process --------------------------------------------------------------------------------


def test_one_process_returns_its_own_values() -> None:
    context = DistributedContext()
    values = torch.tensor([1.0, 2.0])

    assert context.is_main
    assert context.all_reduce_sum(values) is values
    assert [context.any_rank(True), context.any_rank(False)] == [True, False]
    assert context.all_reduce_min(3) == 3
    assert context.broadcast("x") == "x"
    with context.main_process_first():
        pass


def test_without_torchrun_the_world_size_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with distributed_context(on_cuda=False) as context:
        assert context == DistributedContext(rank=0, local_rank=0, size=1)


def test_a_world_size_that_is_not_a_number_is_a_usage_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(UsageError, match=r"WORLD_SIZE.*'many'"), distributed_context(on_cuda=False):
        pass


# --- Leaving a failed job -----------------------------------------------------------------------


def test_a_gpu_that_waits_for_a_dead_process_does_not_block_the_exit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu, exited = threading.Event(), threading.Event()
    codes: list[int] = []
    monkeypatch.setattr(dist, "destroy_process_group", gpu.wait)
    monkeypatch.setattr(os, "_exit", lambda code: (codes.append(code), exited.set()))
    monkeypatch.setattr(distributed, "_SECONDS_TO_LEAVE", 0.05)
    monkeypatch.setattr(distributed, "_SECONDS_TO_EXIT", 0.05)

    distributed._leave_failed_job()

    assert exited.wait(10)
    gpu.set()
    assert codes == [5]


def test_a_group_that_can_be_left_needs_no_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[bool] = []
    monkeypatch.setattr(dist, "destroy_process_group", lambda: left.append(True))
    monkeypatch.setattr(threading, "Timer", None)

    distributed._leave_failed_job()

    assert left == [True]
