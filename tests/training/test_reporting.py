"""Output of a training run: progress bars, log lines, warnings, curves, TensorBoard files."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.command import Command, Finished
from helpers.faults import (
    TINY,
    PatchedForward,
    assert_one_error,
    digests,
    fault_at,
    last_checkpoint,
    rows,
    warnings_of,
)
from PIL import Image
from torch import nn

from segtrain.checkpoint import load_checkpoint
from segtrain.runs.folder import RunFolder
from segtrain.runs.read import Row
from segtrain.runtime.logs import console_log
from segtrain.training.plots import write_curves, write_samples
from segtrain.training.reporting import RunOutputs, detect_collapse, summary_table

pytestmark = pytest.mark.usefixtures("one_thread")

PROJECT = Path(__file__).parents[2]
RUN = Path("runs/toy")
Train = Callable[..., Finished]


@pytest.fixture
def train(segtrain: Command, toy_coco: Path) -> Train:
    def command(*arguments: str | Path, name: str = "toy") -> Finished:
        return segtrain(
            *("train", "--data", toy_coco, *TINY, "--batch-size", "2", "--name", name, *arguments)
        )

    return command


def metrics_row(epoch: int, **other: Any) -> Row:
    """A row of metrics.jsonl; `__` in a keyword stands for `/`."""
    return {
        "epoch": epoch,
        "stage": 1,
        "global_step": 10 * epoch,
        "lr": 1e-3,
        "train/loss": 1 / epoch,
        "train/person_iou": 0.5,
        "skipped_steps": 0,
        "images_per_second": 20.0,
        "data_wait": 0.1,
        "seconds": 5.0,
        "val/person_iou": 0.4,
        "val/mean_iou": 0.5,
        "val/all_person_iou": 0.3,
        "val/predicted_share": 0.3,
        **{key.replace("__", "/"): value for key, value in other.items()},
    }


# --------------------------------------------------------------------------- collapse

CONSTANT_PREDICTIONS = {
    "background": {"val__predicted_share": 0.0},
    "person": {"val__predicted_share": 1.0},
}


@pytest.mark.parametrize("label", CONSTANT_PREDICTIONS)
def test_a_collapse_is_reported_once_after_two_epochs(label: str) -> None:
    history = [metrics_row(1), metrics_row(2, **CONSTANT_PREDICTIONS[label])]
    assert detect_collapse(history[:1]) is None
    assert detect_collapse(history) is None
    history.append(metrics_row(3, **CONSTANT_PREDICTIONS[label]))
    assert detect_collapse(history) == label
    for epoch in (4, 5):
        history.append(metrics_row(epoch, **CONSTANT_PREDICTIONS[label]))
        assert detect_collapse(history) is None
    # After a better epoch, it is reported again.
    history += [
        metrics_row(6),
        metrics_row(7, **CONSTANT_PREDICTIONS[label]),
        metrics_row(8, **CONSTANT_PREDICTIONS[label]),
    ]
    assert detect_collapse(history) == label


def test_collapse_from_one_class_to_the_other() -> None:
    history = [metrics_row(epoch, **CONSTANT_PREDICTIONS["person"]) for epoch in (1, 2)]
    assert detect_collapse(history) == "person"
    history.append(metrics_row(3, **CONSTANT_PREDICTIONS["background"]))
    assert detect_collapse(history) is None
    history.append(metrics_row(4, **CONSTANT_PREDICTIONS["background"]))
    assert detect_collapse(history) == "background"


@pytest.mark.parametrize(
    "other",
    [
        {"val__predicted_share": 0.0, "val__all_person_iou": 0.01},  # almost no person pixels
        {"val__predicted_share": 1.0, "val__all_person_iou": 0.99},  # almost only person pixels
        {"val__predicted_share": 0.01},
        {"val__predicted_share": 0.99},
    ],
)
def test_right_and_uncertain_predictions_are_not_a_collapse(other: dict[str, float]) -> None:
    assert detect_collapse([metrics_row(1, **other), metrics_row(2, **other)]) is None


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize(("bias", "label"), [(-50.0, "background"), (50.0, "person")])
def test_a_run_that_collapses_has_one_warning(
    train: Train, monkeypatch: pytest.MonkeyPatch, bias: float, label: str
) -> None:
    from segtrain.training import fit

    true_validate = fit.validate

    def validate(ctx: Any, stage: Any, model: nn.Module) -> dict[str, float]:
        model.head.weight.data.zero_()
        model.head.bias.data.copy_(model.head.bias.new_tensor([0.0, bias]))
        return true_validate(ctx, stage, model)

    monkeypatch.setattr(fit, "validate", validate)
    finished = train("--epochs", "4")

    assert finished.code == 0, finished.err
    [warning] = warnings_of(finished)
    assert f"predicted {label} everywhere" in warning
    assert "doctor" in warning
    assert warning in (RUN / "log.txt").read_text()
    assert re.search(r"warnings\s.*1", finished.out)


# --------------------------------------------------------------------------- TensorBoard


@pytest.fixture
def tensorboard(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Calls of a fake SummaryWriter that replaces the real one."""
    calls: dict[str, Any] = {"folders": [], "scalars": [], "closed": 0}

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            calls["folders"].append(Path(folder))

        def add_scalar(self, key: str, value: float, step: int) -> None:
            calls["scalars"].append((key, value, step))

        def flush(self) -> None:
            pass

        def close(self) -> None:
            calls["closed"] += 1

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr("segtrain.training.setup.find_spec", lambda name: object())
    return calls


@pytest.mark.usefixtures("no_curves")
def test_tensorboard_gets_the_metrics_of_metrics_jsonl(
    train: Train, tensorboard: dict[str, Any]
) -> None:
    finished = train("--epochs", "2", "--tensorboard")

    assert finished.code == 0, finished.err
    assert tensorboard["folders"] == [RUN / "tensorboard"]
    expected = [(key, value, r["epoch"]) for r in rows(RUN) for key, value in r.items()]
    assert tensorboard["scalars"] == expected
    assert {"train/loss", "val/person_iou", "lr", "skipped_steps"} <= {s[0] for s in expected}
    assert tensorboard["closed"] == 1

    # Resuming a finished run writes nothing; with more epochs, it continues with the next one.
    train("--epochs", "2", "--tensorboard", "--resume", "auto")
    assert tensorboard["folders"] == [RUN / "tensorboard"]
    train("--epochs", "3", "--tensorboard", "--resume", "auto")
    assert [step for key, _, step in tensorboard["scalars"] if key == "lr"] == [1, 2, 3]


@pytest.mark.usefixtures("no_curves")
def test_tensorboard_is_closed_when_the_training_fails(
    train: Train, tensorboard: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    PatchedForward(monkeypatch, fault_at(set(range(5, 99))))

    assert_one_error(train("--epochs", "2", "--tensorboard"), 6)

    assert tensorboard["closed"] == 1


def test_without_its_package_tensorboard_is_rejected_before_a_run_is_created(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("segtrain.training.setup.find_spec", lambda name: None)

    line = assert_one_error(train("--epochs", "1", "--tensorboard"), 2)

    assert "segtrain[tensorboard]" in line
    assert not Path("runs").exists()


def test_the_extra_in_the_message_exists() -> None:
    import tomllib

    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["tensorboard"]


# --------------------------------------------------------------------------- saving within epochs


@pytest.mark.usefixtures("no_curves")
def test_save_every_saves_within_an_epoch(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a kill, only the steps since are lost, and the result equals an uninterrupted run."""
    assert train("--epochs", "2", name="uninterrupted").code == 0

    class Killed(BaseException):
        """Like a kill: nothing is saved."""

    def act(number: int, image: Any, forward: Any) -> Any:
        if number == 7:
            raise Killed
        return forward(image)

    with monkeypatch.context() as patch:
        PatchedForward(patch, act)
        with pytest.raises(Killed):
            train("--epochs", "2", "--save-every", "0s")
    saved = load_checkpoint(last_checkpoint(RUN))
    assert (saved.epoch, saved.global_step, saved.training["samples_seen"]) == (1, 6, 4)

    steps = PatchedForward(monkeypatch, fault_at(set()))
    assert train("--epochs", "2", "--resume", "auto").code == 0
    assert steps.count == 2
    uninterrupted = Path("runs/uninterrupted")
    weights, expected = (
        load_checkpoint(last_checkpoint(run)).weights for run in (RUN, uninterrupted)
    )
    assert all((weights[name] == expected[name]).all() for name in expected)
    for key in ("train/loss", "train/person_iou", "val/person_iou", "skipped_steps", "lr"):
        assert [r[key] for r in rows(RUN)] == [r[key] for r in rows(uninterrupted)]


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize("save_every", ["1h", "0s"])
def test_save_every_saves_at_that_interval(
    train: Train, monkeypatch: pytest.MonkeyPatch, save_every: str
) -> None:
    from segtrain.training import fit

    saved_steps: list[int] = []
    true_save = fit.save_last

    def save_last(run: Any, state: Any, *rest: Any) -> None:
        saved_steps.append(state.global_step)
        true_save(run, state, *rest)

    monkeypatch.setattr(fit, "save_last", save_last)

    assert train("--epochs", "2", "--save-every", save_every).code == 0

    # Before the first step and after each epoch, as always.
    within = list(range(1, 9)) if save_every == "0s" else []
    assert saved_steps == sorted([0, 4, 8, *within])


@pytest.mark.parametrize("save_every", ["10", "m", "1.5h", "-1m", "10d", "1h30m"])
def test_an_invalid_save_every_is_rejected(train: Train, save_every: str) -> None:
    assert_one_error(train("--epochs", "1", "--save-every", save_every), 2)


# --------------------------------------------------------------------------- bars and log lines


@pytest.fixture(scope="module")
def terminal_output(toy_coco: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str]:
    """Exit code and terminal output of a run of three epochs."""
    folder = tmp_path_factory.mktemp("terminal")
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("4H", 40, 120, 0, 0))
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "segtrain", "train", "--data", str(toy_coco), *TINY),
            *("--batch-size", "1", "--epochs", "3", "--name", "toy"),
        ],
        cwd=folder,
        # Draw the bar at every step, however fast the machine is.
        env=os.environ
        | {"TQDM_MININTERVAL": "0", "TQDM_MINITERS": "1"}
        | {"PYTHONPATH": str(PROJECT), "SEGTRAIN_CACHE": str(folder / "cache")},
        stdin=side,
        stdout=side,
        stderr=side,
    )
    os.close(side)
    output = b""
    while True:
        try:
            chunk = os.read(main, 65536)
        except OSError:  # the other side is closed
            break
        if not chunk:
            break
        output += chunk
    os.close(main)
    return process.wait(timeout=30), output.decode(errors="replace")


def test_on_a_terminal_one_bar_shows_loss_iou_and_waiting_time(
    terminal_output: tuple[int, str],
) -> None:
    code, output = terminal_output
    assert code == 0, output
    bars = [part for part in re.split(r"[\r\n]", output) if "|" in part and "epoch " in part]
    assert any("epoch 1/3" in bar for bar in bars)
    full = [bar for bar in bars if "loss=" in bar]
    assert full
    for bar in full:
        assert re.search(r"loss=\d\.\d{3}", bar)
        assert re.search(r"person_iou=\d\.\d{3}", bar)
        assert re.search(r"wait=\d+%", bar)
    # One bar at a time: a second one would be drawn below, and the cursor would move up again.
    assert "\x1b[A" not in output


def test_on_a_terminal_log_lines_and_bars_do_not_mix(terminal_output: tuple[int, str]) -> None:
    """No bar remains, and no log line is written into one."""
    _, output = terminal_output
    screen = []
    for line in output.split("\n"):
        visible = ""
        for part in line.rstrip("\r").split("\r"):
            visible = part + visible[len(part) :]  # later text overwrites earlier text
        screen.append(visible.rstrip())
    epochs = [line for line in screen if re.match(r"epoch \d/3 ", line)]
    assert len(epochs) == 3
    assert all("|" not in line and line.endswith(" s") for line in epochs)
    assert not [line for line in screen if "it/s" in line or "image/s" in line]


@pytest.mark.usefixtures("no_curves")
def test_without_a_terminal_there_are_plain_lines_and_no_bar(train: Train) -> None:
    finished = train("--epochs", "2")

    assert "\r" not in finished.out + finished.err
    assert "\x1b" not in finished.out + finished.err
    assert finished.err == ""
    assert len(re.findall(r"(?m)^epoch [12]/2  loss \d\.\d{4}  person IoU", finished.out)) == 2


@pytest.mark.usefixtures("no_curves")
def test_without_a_terminal_a_long_job_logs_its_progress(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("segtrain.runtime.progress._SECONDS_BETWEEN_LINES", 0.0)

    finished = train("--epochs", "1")

    assert "\r" not in finished.err
    assert re.search(r"epoch 1/1: .*loss=.*person_iou=.*wait=", finished.err)


# --------------------------------------------------------------------------- warnings and summary


def test_warnings_are_counted_in_the_summary_and_written_to_the_log(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    PatchedForward(monkeypatch, fault_at({2, 6}))

    finished = train("--epochs", "2")

    assert len(warnings_of(finished)) == 2
    assert re.search(r"warnings\s[^\d]*2\b", finished.out)
    assert re.search(r"skipped steps\s[^\d]*2\b", finished.out)
    log = (RUN / "log.txt").read_text().splitlines()
    assert [line for line in log if line.startswith("warning:")] == warnings_of(finished)


def test_the_summary_of_a_run_of_several_hours(tmp_path: Path) -> None:
    from rich.console import Console

    history = [
        metrics_row(e, seconds=4000.0, val__person_iou=v) for e, v in ((1, 0.5), (2, 0.7), (3, 0.6))
    ]
    history[1]["skipped_steps"] = 4
    console = Console(width=80)
    with console.capture() as captured:
        console.print(summary_table(history, num_warnings=3))

    text = captured.get()
    for words in ("0.7000 in epoch 2", "3 h 20 min", "20.0", "10.0%"):
        assert words in text
    assert re.search(r"skipped steps[^\d]*4", text)
    assert re.search(r"warnings[^\d]*3", text)


# --------------------------------------------------------------------------- images


def draw_curves(path: Path, history: list[Row]) -> np.ndarray[Any, Any]:
    write_curves(path, history)
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_curves_of_one_epoch_and_of_stages(tmp_path: Path) -> None:
    one = draw_curves(tmp_path / "one.png", [metrics_row(1)])
    plain = draw_curves(tmp_path / "plain.png", [metrics_row(e) for e in range(1, 5)])
    staged = draw_curves(
        tmp_path / "staged.png", [metrics_row(e, stage=1 + (e > 2)) for e in range(1, 5)]
    )

    assert one.shape == plain.shape == staged.shape
    for image in (one, plain, staged):
        height, width = image.shape[:2]
        assert width > 2 * height > 400
        # Three plots, a third of the width each, none of them empty.
        for part in np.array_split(image, 3, axis=1):
            assert (part.min(axis=2) < 200).mean() > 0.005
    # Only the start of a stage is drawn differently.
    differing = (staged != plain).any(axis=2)
    assert 0 < differing.mean() < 0.05
    # A dotted line from top to bottom in each of the three plots.
    for part in np.array_split(differing, 3, axis=1):
        assert part.mean(axis=0).max() > 0.2


def test_curves_of_an_epoch_of_skipped_steps(tmp_path: Path) -> None:
    """Its loss is 0."""
    history = [metrics_row(1, train__loss=0.0, lr=0.0, skipped_steps=4)]
    assert draw_curves(tmp_path / "none.png", history).size


@pytest.fixture
def outputs(tmp_path: Path) -> Iterator[tuple[RunOutputs, RunFolder]]:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    with RunOutputs(run, tensorboard=False) as writer:
        yield writer, run


def test_without_samples_no_sheet_is_written(
    outputs: tuple[RunOutputs, RunFolder],
) -> None:
    writer, run = outputs
    writer.write([metrics_row(1)], [])

    assert json.loads(run.metrics.read_text()) == metrics_row(1)
    assert not run.samples(1).exists()
    assert not (run.path / "tensorboard").exists()


def test_a_sheet_of_samples_has_a_row_per_image(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    samples = []
    for height, width in ((48, 64), (64, 48), (20, 400)):
        image = rng.integers(0, 256, (height, width, 3), np.uint8)
        mask = rng.choice(np.array([0, 1, 255], np.uint8), (height, width))
        samples.append((image, mask, (mask == 1).astype(np.uint8)))

    write_samples(tmp_path / "sheet.jpg", samples)

    with Image.open(tmp_path / "sheet.jpg") as sheet:
        assert sheet.height > 3 * 200
        assert sheet.width >= 3 * 200


def test_checkpoints_hold_the_history_of_metrics_jsonl(train: Train) -> None:
    assert train("--epochs", "1").code == 0
    before = digests(RUN)
    assert load_checkpoint(last_checkpoint(RUN)).training["history"] == rows(RUN)
    assert before.keys() == {"last.pt", "best.pt", "previous.pt"}


def test_the_epoch_line_shows_the_time_left_if_it_is_long(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = RunOutputs(RunFolder(tmp_path), tensorboard=False)
    row = {
        "epoch": 3,
        "train/loss": 0.5,
        "seconds": 90.0,
        "images_per_second": 1.0,
        "val/person_iou": 0.5,
        "val/predicted_share": 0.4,
        "val/all_person_iou": 0.3,
        "skipped_steps": 0,
    }

    with console_log():
        for num_epochs in (3, 5, 103):
            outputs.report([row], num_epochs=num_epochs)

    last_line, near_line, far_line = capsys.readouterr().out.splitlines()
    assert last_line.endswith(" 90 s")
    assert near_line.endswith(" 90 s  at most 3 min 00 s left")
    assert far_line.endswith(" 90 s  at most 2 h 30 min left")
