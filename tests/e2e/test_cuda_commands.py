"""Commands on a GPU: device names, stopping, resuming, and dying loader processes."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.command import TOY_TRAINING, Command
from helpers.interruptions import metrics_rows, session_members

from segtrain.checkpoint import load_checkpoint

pytestmark = pytest.mark.gpu

PROJECT = Path(__file__).parents[2]
NETWORK = TOY_TRAINING[: TOY_TRAINING.index("--workers")]
# Loader processes only in separate processes: a fork of pytest, which has threads, is a warning.
TOY = (*NETWORK, "--workers", "0")
LAST = Path("runs/toy/checkpoints/last.pt")


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:0"])
def test_training_accepts_each_name_of_the_gpu(
    segtrain: Command, toy_coco: Path, device: str
) -> None:
    common = ["--data", toy_coco, *TOY, "--epochs", "1", "--name", "toy"]

    finished = segtrain("train", *common, "--device", device)

    assert finished.code == 0, finished.err
    assert "device: cuda:0 (" in finished.out


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_resumed_run_matches_an_uninterrupted_one(
    segtrain: Command, toy_coco: Path, precision: str
) -> None:
    """Not bit-identical: the order of additions on a GPU varies."""
    common = ["train", "--data", toy_coco, *TOY, "--device", "cuda", "--precision", precision]
    common += ["--set", "train.ema_decay=0.9"]
    assert segtrain(*common, "--epochs", "3", "--name", "uninterrupted").code == 0
    for epochs in ("1", "3"):
        finished = segtrain(*common, "--epochs", epochs, "--name", "toy", "--resume", "auto")
        assert finished.code == 0, finished.err
    expected_run = Path("runs/uninterrupted")

    for row, expected in zip(
        metrics_rows(LAST.parents[1]), metrics_rows(expected_run), strict=True
    ):
        assert (row["global_step"], row["lr"]) == (expected["global_step"], expected["lr"])
        assert row["train/loss"] == pytest.approx(expected["train/loss"], abs=0.02)
    resumed, uninterrupted = (
        load_checkpoint(run / "checkpoints/last.pt") for run in (Path("runs/toy"), expected_run)
    )
    assert resumed.training["scaler"] == uninterrupted.training["scaler"]
    assert bool(resumed.training["scaler"]) == (precision == "fp16")


@pytest.mark.parametrize("optimizer", ["rmsprop", "sgd", "adam", "adamw"])
def test_a_run_moves_to_the_cpu_and_back(segtrain: Command, toy_coco: Path, optimizer: str) -> None:
    common = ["train", "--data", toy_coco, *TOY, "--name", "toy", "--resume", "auto"]
    common += ["--set", f"optim.name={optimizer}", "--lr", "1e-4"]
    devices = [("cuda", "fp16"), ("cpu", "fp32"), ("cuda", "fp16"), ("cuda", "bf16")]
    for epoch, (device, precision) in enumerate(devices, 1):
        options = ["--device", device, "--precision", precision]
        finished = segtrain(*common, *options, "--epochs", str(epoch))

        assert finished.code == 0, finished.err
        assert f"device: {device}" in finished.out
        assert load_checkpoint(LAST).epoch == epoch


def test_evaluation_on_a_gpu_matches_the_cpu(segtrain: Command, trained_run: Path) -> None:
    metrics: dict[str, dict[str, float]] = {}
    for device in ("cpu", "cuda"):
        common = ["--checkpoint", trained_run, "--device", device, "--workers", "0", "--json"]
        finished = segtrain("eval", *common, "--tta", "scales")
        assert finished.code == 0, finished.err
        metrics[device] = json.loads(finished.out)["metrics"]

    for key in ("person_iou", "mean_iou", "pixel_accuracy"):
        assert metrics["cuda"][key] == pytest.approx(metrics["cpu"][key], abs=2e-3)


# --- Separate processes -------------------------------------------------------------------------


@contextmanager
def endless_training(data: Path, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A training with loader processes and pinned memory, in its own session, after two epochs."""
    command = ["train", "--data", str(data), *NETWORK, "--workers", "2", "--epochs", "9999"]
    command += ["--device", "cuda", "--precision", "bf16", "--name", "toy"]
    process = subprocess.Popen(
        [sys.executable, "-m", "segtrain", *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("epoch 2/"):
                break
        assert process.poll() is None, "".join(lines)
        yield process
    finally:
        for pid in session_members(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.wait()


def test_a_run_stopped_by_a_signal_can_be_resumed(
    segtrain: Command, toy_coco: Path, tmp_path: Path
) -> None:
    with endless_training(toy_coco, tmp_path) as process:
        process.terminate()
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 143, out
        assert session_members(process.pid) == []
    stopped = load_checkpoint(LAST)

    finished = segtrain(
        *("train", "--data", toy_coco, "--resume", "runs/toy", "--workers", "0"),
        *("--epochs", str(stopped.epoch + 1)),
    )

    assert finished.code == 0, finished.err
    assert load_checkpoint(LAST).global_step > stopped.global_step


def test_a_killed_loader_process_ends_the_training_with_an_error(
    toy_coco: Path, tmp_path: Path
) -> None:
    with endless_training(toy_coco, tmp_path) as process:
        children = [pid for pid in session_members(process.pid) if pid != process.pid]
        assert len(children) >= 2
        os.kill(children[-1], signal.SIGKILL)
        out, _ = process.communicate(timeout=120)

    assert process.returncode == 5, out
    assert out.count("error:") == 1
    assert "Traceback" not in out
    load_checkpoint(LAST)
