"""Error lines, exit codes and signals of the command line."""

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.command import TOY_TRAINING, Command
from helpers.interruptions import session_members

from segtrain import __version__
from segtrain.checkpoint import load_checkpoint
from segtrain.cli.main import _one_line, main
from segtrain.imaging.images import write_image

USAGE, DATA, CHECKPOINT, RESOURCE, DIVERGED = 2, 3, 4, 5, 6


def test_version(segtrain: Command) -> None:
    assert segtrain("--version").out == f"segtrain {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["train", "--nonsense"], USAGE, "--nonsense"),
        (["nonsense"], USAGE, "nonsense"),
        (["predict"], USAGE, "images"),
        (["train", "--epochs", "many"], USAGE, "--epochs"),
        (["train", "--model", "unett"], USAGE, "unett"),
        (["train", "--set", "model.nonsense=1"], USAGE, "nonsense"),
        (["train", "--set", "optim.nonsense=1"], USAGE, "optim.nonsense"),
        (["train", "--lr", "0.1", "--set", "optim.lr=0.1"], USAGE, "twice"),
        (["train", "--config", "nope.yaml"], USAGE, "nope.yaml"),
        (["train", "--device", "tpu"], USAGE, "tpu"),
        (["train", "--device", "cuda:99"], USAGE, "cuda:99"),
        (["train", "--data", "nope"], DATA, "nope"),
        (["train", "--data", "empty"], DATA, "empty"),
        (["train", "--resume", "nope"], CHECKPOINT, "nope"),
        (["eval"], CHECKPOINT, "segtrain train"),
        (["eval", "--checkpoint", "nope.pt"], CHECKPOINT, "nope.pt"),
        (["eval", "--checkpoint", "text.pt"], CHECKPOINT, "text.pt"),
        (["eval", "--split", "test"], USAGE, "test"),
        (["predict", "nope.jpg"], USAGE, "nope.jpg"),
        (["predict", "text.pt", "--checkpoint", "text.pt"], CHECKPOINT, "text.pt"),
        (["predict", "text.pt", "--background", "nope"], USAGE, "nope"),
        (["demo", "empty"], USAGE, "empty"),
        (["demo", "text.pt/below"], RESOURCE, "text.pt/below"),
    ],
)
def test_user_errors_are_one_line_and_an_exit_code(
    segtrain: Command, tmp_path: Path, arguments: list[str], code: int, expected: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pt").write_text("no checkpoint")

    finished = segtrain(*arguments)

    assert finished.code == code
    [line] = finished.error_lines
    assert expected in line
    assert len(line) <= 200
    assert "Traceback" not in finished.err
    assert not (tmp_path / "runs").exists(), "a wrong command must not create a run folder"


def test_no_arguments_show_the_help(segtrain: Command) -> None:
    finished = segtrain()

    assert finished.code == 0
    assert "Usage" in finished.out
    assert finished.err == ""


def test_debug_shows_the_traceback(segtrain: Command) -> None:
    with pytest.raises(Exception, match="nope"):
        segtrain("eval", "--checkpoint", "nope.pt", "--debug")


def test_a_bug_has_exit_code_1(segtrain: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("segtrain.demo.dataset.draw_demo_people", broken)

    finished = segtrain("demo", "people")

    assert finished.code == 1
    assert finished.error_lines == [
        "error: ZeroDivisionError: oh; this is a bug, --debug shows the traceback"
    ]


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_out_of_memory_has_a_hint(
    segtrain: Command, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def run_out_of_memory(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("segtrain.demo.dataset.draw_demo_people", run_out_of_memory)

    finished = segtrain("demo", "people")

    assert finished.code == RESOURCE
    assert "--batch-size" in finished.error_lines[0]


def test_a_worker_that_dies_during_a_step_is_not_a_bug(
    segtrain: Command, toy_coco: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch raises from a signal handler, so the error can surface anywhere in the main process."""

    def interrupted_step(*args: object, **kwargs: object) -> None:
        raise RuntimeError("DataLoader worker (pid 123) is killed by signal: Killed. ")

    monkeypatch.setattr("segtrain.training.fit.train_one_epoch", interrupted_step)

    finished = segtrain("train", "--data", toy_coco, *TOY_TRAINING)

    assert finished.code == RESOURCE
    assert "--workers 0" in finished.error_lines[0]


def test_an_existing_run_is_not_overwritten(
    segtrain: Command, toy_coco: Path, trained_run: Path
) -> None:
    before = (trained_run / "checkpoints" / "last.pt").read_bytes()

    finished = segtrain(
        *("train", "--data", toy_coco, "--output", trained_run.parent, "--name", trained_run.name)
    )

    assert finished.code == USAGE
    assert "--resume auto" in finished.error_lines[0]
    assert (trained_run / "checkpoints" / "last.pt").read_bytes() == before


@pytest.mark.slow
def test_a_diverged_run_has_exit_code_6_and_a_valid_checkpoint(
    segtrain: Command, toy_coco: Path
) -> None:
    finished = segtrain(
        *("train", "--data", toy_coco, "--name", "diverging", "--epochs", "3", *TOY_TRAINING),
        *("--lr", "1e30"),
    )

    assert finished.code == DIVERGED
    [line] = finished.error_lines
    assert "--lr" in line
    assert "learning rate times 0.5" in finished.err
    assert finished.err.count("back to the state") == 1
    load_checkpoint(Path("runs/diverging/checkpoints/last.pt"))


def test_a_long_message_loses_its_middle_and_keeps_its_hint() -> None:
    line = _one_line("cannot read " + "x" * 500 + "\n do this")

    assert len("error: " + line) <= 200
    assert line.startswith("cannot read")
    assert line.endswith("x do this")


def test_white_space_in_a_message_is_collapsed() -> None:
    assert _one_line("a\n  b\tc") == "a b c"


@pytest.mark.parametrize(
    ("sent", "code", "to_group"),
    [
        pytest.param(signal.SIGTERM, 143, False, id="TERM"),
        pytest.param(signal.SIGTERM, 143, True, id="TERM to the group", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 130, True, id="INT to the group", marks=pytest.mark.slow),
    ],
)
def test_a_signal_stops_training_with_its_exit_code_and_keeps_the_last_epoch(
    toy_coco: Path, tmp_path: Path, sent: signal.Signals, code: int, to_group: bool
) -> None:
    arguments = ["train", "--data", toy_coco, "--name", "x", "--epochs", "9999", *TOY_TRAINING]
    process = subprocess.Popen(
        [sys.executable, "-m", "segtrain", *map(str, arguments), "--workers", "2"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        start_new_session=True,
    )
    last = tmp_path / "runs" / "x" / "checkpoints" / "last.pt"
    deadline = time.monotonic() + 60
    while not last.exists() and time.monotonic() < deadline:
        time.sleep(0.05)

    (os.killpg if to_group else os.kill)(process.pid, sent)
    _, err = process.communicate(timeout=60)

    assert process.returncode == code
    assert "stopped" in err
    assert "Traceback" not in err
    assert last.exists()
    assert not list(last.parent.glob(".*.tmp"))
    assert session_members(process.pid) == [], "orphaned processes"


@pytest.fixture
def freeze_calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One item per call of gc.freeze by a process that has imported neither onnx nor triton."""
    for name in ("onnx", "triton"):  # other tests import them
        monkeypatch.delitem(sys.modules, name, raising=False)
    calls: list[bool] = []
    monkeypatch.setattr(gc, "freeze", lambda: calls.append(True))
    monkeypatch.setattr(sys, "argv", ["segtrain", "--version"])
    return calls


def test_exit_skips_the_garbage_collection(freeze_calls: list[bool]) -> None:
    with pytest.raises(SystemExit) as exited:
        main()
    assert exited.value.code == 0
    assert freeze_calls


@pytest.mark.parametrize("name", ["onnx", "triton"])
def test_garbage_is_collected_if_a_library_reports_leaks(
    name: str, freeze_calls: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, sys)
    with pytest.raises(SystemExit):
        main()
    assert not freeze_calls


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ("models",),
        ("train", "--epochs", "1", *TOY_TRAINING),
        ("eval",),
        ("predict", "photo.png"),
        ("export", "--output", "again.onnx"),
        ("export", "--output", "again.pt2", "--format", "torch"),
    ],
    ids=" ".join,
)
def test_no_command_prints_a_leak_report(
    command: tuple[str, ...], exported_unet: tuple[Path, Path], toy_coco: Path
) -> None:
    write_image(Path("photo.png"), np.zeros((40, 40, 3), dtype=np.uint8))
    data = ("--data", str(toy_coco)) if command[0] in {"train", "eval"} else ()
    done = subprocess.run(
        [sys.executable, "-m", "segtrain", *command, *data],
        env={**os.environ, "SEGTRAIN_CHECKPOINT": str(exported_unet[0])},
        capture_output=True,
        text=True,
        check=True,
    )

    assert "leak" not in done.stderr
