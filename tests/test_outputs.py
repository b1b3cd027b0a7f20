"""What a run shows and leaves: bars, lines, warnings, curves, TensorBoard's files."""

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
from conftest import Command, Finished
from faults import TINY, Steps, assert_one_error, at, digests, last, rows, warnings_of
from PIL import Image
from torch import nn

from segtrain.checkpoint import load_checkpoint
from segtrain.runs import RunFolder
from segtrain.training.logs import Row, RunLog, write_curves, write_samples
from segtrain.training.outputs import RunOutputs, collapsed, summary_table

pytestmark = pytest.mark.usefixtures("one_thread")

PROJECT = Path(__file__).parents[1]
RUN = Path("runs/toy")
Train = Callable[..., Finished]


@pytest.fixture
def train(segtrain: Command, toy_coco: Path) -> Train:
    def command(*arguments: str | Path, name: str = "toy") -> Finished:
        return segtrain(
            *("train", "--data", toy_coco, *TINY, "--batch-size", "2", "--name", name, *arguments)
        )

    return command


def row(epoch: int, **other: Any) -> Row:
    """A row as training writes it."""
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

CHEAP = {"background": {"val__predicted_share": 0.0}, "person": {"val__predicted_share": 1.0}}


@pytest.mark.parametrize("answer", CHEAP)
def test_one_answer_for_all_is_named_after_two_epochs_and_once(answer: str) -> None:
    history = [row(1), row(2, **CHEAP[answer])]
    assert collapsed(history[:1]) is None
    assert collapsed(history) is None
    history.append(row(3, **CHEAP[answer]))
    assert collapsed(history) == answer
    for epoch in (4, 5):
        history.append(row(epoch, **CHEAP[answer]))
        assert collapsed(history) is None
    # Once it was better, it is worth another word.
    history += [row(6), row(7, **CHEAP[answer]), row(8, **CHEAP[answer])]
    assert collapsed(history) == answer


def test_from_one_cheap_answer_to_the_other() -> None:
    history = [row(epoch, **CHEAP["person"]) for epoch in (1, 2)]
    assert collapsed(history) == "person"
    history.append(row(3, **CHEAP["background"]))
    assert collapsed(history) is None
    history.append(row(4, **CHEAP["background"]))
    assert collapsed(history) == "background"


@pytest.mark.parametrize(
    "other",
    [
        {"val__predicted_share": 0.0, "val__all_person_iou": 0.01},  # there is nearly nobody
        {"val__predicted_share": 1.0, "val__all_person_iou": 0.99},  # there is nothing else
        {"val__predicted_share": 0.01},
        {"val__predicted_share": 0.99},
    ],
)
def test_right_answers_and_doubtful_ones_are_no_collapse(other: dict[str, float]) -> None:
    assert collapsed([row(1, **other), row(2, **other)]) is None


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize(("bias", "answer"), [(-50.0, "background"), (50.0, "person")])
def test_a_run_that_collapses_says_so_in_one_warning(
    train: Train, monkeypatch: pytest.MonkeyPatch, bias: float, answer: str
) -> None:
    from segtrain.training import fit

    true_validate = fit.validate

    def validate(setting: Any, stage: Any, model: nn.Module) -> dict[str, float]:
        model.head.weight.data.zero_()
        model.head.bias.data.copy_(model.head.bias.new_tensor([0.0, bias]))
        return true_validate(setting, stage, model)

    monkeypatch.setattr(fit, "validate", validate)
    finished = train("--epochs", "4")

    assert finished.code == 0, finished.err
    [warning] = warnings_of(finished)
    assert f"everything {answer}" in warning
    assert "doctor" in warning
    assert warning in (RUN / "log.txt").read_text()
    assert re.search(r"warnings\s.*1", finished.out)


# --------------------------------------------------------------------------- TensorBoard


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a SummaryWriter in the place of the real one is told."""
    told: dict[str, Any] = {"folders": [], "scalars": [], "closed": 0}

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            told["folders"].append(Path(folder))

        def add_scalar(self, key: str, value: float, step: int) -> None:
            told["scalars"].append((key, value, step))

        def flush(self) -> None:
            pass

        def close(self) -> None:
            told["closed"] += 1

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr("segtrain.training.start.find_spec", lambda name: object())
    return told


@pytest.mark.usefixtures("no_curves")
def test_tensorboard_gets_the_numbers_of_metrics_jsonl(train: Train, board: dict[str, Any]) -> None:
    finished = train("--epochs", "2", "--tensorboard")

    assert finished.code == 0, finished.err
    assert board["folders"] == [RUN / "tensorboard"]
    expected = [(key, value, r["epoch"]) for r in rows(RUN) for key, value in r.items()]
    assert board["scalars"] == expected
    assert {"train/loss", "val/person_iou", "lr", "skipped_steps"} <= {s[0] for s in expected}
    assert board["closed"] == 1

    # Run again, a finished run adds nothing; resumed, it goes on with the next epoch.
    train("--epochs", "2", "--tensorboard", "--resume", "auto")
    assert board["folders"] == [RUN / "tensorboard"]
    train("--epochs", "3", "--tensorboard", "--resume", "auto")
    assert [step for key, _, step in board["scalars"] if key == "lr"] == [1, 2, 3]


@pytest.mark.usefixtures("no_curves")
def test_tensorboard_is_closed_when_the_training_fails(
    train: Train, board: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    Steps(monkeypatch, at(set(range(5, 99))))

    assert_one_error(train("--epochs", "2", "--tensorboard"), 6)

    assert board["closed"] == 1


def test_without_its_package_tensorboard_is_refused_before_there_is_a_run(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("segtrain.training.start.find_spec", lambda name: None)

    line = assert_one_error(train("--epochs", "1", "--tensorboard"), 2)

    assert "segtrain[tensorboard]" in line
    assert not Path("runs").exists()


def test_the_extra_that_is_named_exists() -> None:
    import tomllib

    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["tensorboard"]


# --------------------------------------------------------------------------- saving within epochs


@pytest.mark.usefixtures("no_curves")
def test_save_every_saves_within_an_epoch(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill then costs the steps since, and what comes of it is what an unbroken run makes."""
    assert train("--epochs", "2", name="straight").code == 0

    class Torn(BaseException):
        """As a kill: nothing gets a chance to save."""

    def act(number: int, image: Any, forward: Any) -> Any:
        if number == 7:
            raise Torn
        return forward(image)

    with monkeypatch.context() as torn:
        Steps(torn, act)
        with pytest.raises(Torn):
            train("--epochs", "2", "--save-every", "0s")
    saved = load_checkpoint(last(RUN))
    assert (saved.epoch, saved.global_step, saved.training["images_drawn"]) == (1, 6, 4)

    steps = Steps(monkeypatch, at(set()))
    assert train("--epochs", "2", "--resume", "auto").code == 0
    assert steps.count == 2
    straight = Path("runs/straight")
    ours, theirs = (load_checkpoint(last(run)).weights for run in (RUN, straight))
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    for key in ("train/loss", "train/person_iou", "val/person_iou", "skipped_steps", "lr"):
        assert [r[key] for r in rows(RUN)] == [r[key] for r in rows(straight)]


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize(("every", "saves"), [("1h", 2), ("0s", 8)])
def test_save_every_saves_that_often(
    train: Train, monkeypatch: pytest.MonkeyPatch, every: str, saves: int
) -> None:
    from segtrain.training import fit

    seen: list[int] = []
    true_save = fit.save_last

    def save_last(run: Any, state: Any, *rest: Any) -> None:
        seen.append(state.global_step)
        true_save(run, state, *rest)

    monkeypatch.setattr(fit, "save_last", save_last)

    assert train("--epochs", "2", "--save-every", every).code == 0

    # Before the first step, and after each epoch as ever.
    within = list(range(1, 9)) if every == "0s" else []
    assert seen == sorted([0, 4, 8, *within])


@pytest.mark.parametrize("wrong", ["10", "m", "1.5h", "-1m", "10d", "1h30m"])
def test_what_save_every_does_not_understand_is_refused(train: Train, wrong: str) -> None:
    assert_one_error(train("--epochs", "1", "--save-every", wrong), 2)


# --------------------------------------------------------------------------- bars and lines


@pytest.fixture(scope="module")
def on_terminal(toy_coco: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str]:
    """Exit code and everything that a terminal is shown of a run of three epochs."""
    folder = tmp_path_factory.mktemp("terminal")
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("4H", 40, 120, 0, 0))
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "segtrain", "train", "--data", str(toy_coco), *TINY),
            *("--batch-size", "1", "--epochs", "3", "--name", "toy"),
        ],
        cwd=folder,
        # However fast the machine is, the bar is drawn at every step.
        env=os.environ
        | {"TQDM_MININTERVAL": "0", "TQDM_MINITERS": "1"}
        | {"PYTHONPATH": str(PROJECT), "SEGTRAIN_CACHE": str(folder / "cache")},
        stdin=side,
        stdout=side,
        stderr=side,
    )
    os.close(side)
    shown = b""
    while True:
        try:
            piece = os.read(main, 65536)
        except OSError:  # the other side is closed
            break
        if not piece:
            break
        shown += piece
    os.close(main)
    return process.wait(timeout=30), shown.decode(errors="replace")


def test_on_a_terminal_one_bar_shows_loss_iou_and_waiting(on_terminal: tuple[int, str]) -> None:
    code, shown = on_terminal
    assert code == 0, shown
    bars = [part for part in re.split(r"[\r\n]", shown) if "|" in part and "epoch " in part]
    assert any("epoch 1/3" in bar for bar in bars)
    full = [bar for bar in bars if "loss=" in bar]
    assert full
    for bar in full:
        assert re.search(r"loss=\d\.\d{3}", bar)
        assert re.search(r"person_iou=\d\.\d{3}", bar)
        assert re.search(r"wait=\d+%", bar)
    # One bar at a time: a second one would be drawn a line below, by a cursor that goes up again.
    assert "\x1b[A" not in shown


def test_on_a_terminal_a_line_stands_by_itself(on_terminal: tuple[int, str]) -> None:
    """Neither is a bar left behind nor a line written into one."""
    _, shown = on_terminal
    screen = []
    for line in shown.split("\n"):
        left = ""
        for part in line.rstrip("\r").split("\r"):
            left = part + left[len(part) :]  # what comes later is written over it
        screen.append(left.rstrip())
    epochs = [line for line in screen if re.match(r"epoch \d/3 ", line)]
    assert len(epochs) == 3
    assert all("|" not in line and line.endswith(" s") for line in epochs)
    assert not [line for line in screen if "it/s" in line or "image/s" in line]


@pytest.mark.usefixtures("no_curves")
def test_elsewhere_there_are_plain_lines_and_no_bar(train: Train) -> None:
    finished = train("--epochs", "2")

    assert "\r" not in finished.out + finished.err
    assert "\x1b" not in finished.out + finished.err
    assert finished.err == ""
    assert len(re.findall(r"(?m)^epoch [12]/2  loss \d\.\d{4}  person IoU", finished.out)) == 2


@pytest.mark.usefixtures("no_curves")
def test_a_long_job_elsewhere_tells_now_and_then(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("segtrain.progress._SECONDS_BETWEEN_LINES", 0.0)

    finished = train("--epochs", "1")

    assert "\r" not in finished.err
    assert re.search(r"epoch 1/1: .*loss=.*person_iou=.*wait=", finished.err)


# --------------------------------------------------------------------------- warnings, summary


def test_warnings_are_counted_in_the_summary_and_kept_in_the_log(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    Steps(monkeypatch, at({2, 6}))

    finished = train("--epochs", "2")

    assert len(warnings_of(finished)) == 2
    assert re.search(r"warnings\s[^\d]*2\b", finished.out)
    assert re.search(r"steps left out\s[^\d]*2\b", finished.out)
    log = (RUN / "log.txt").read_text().splitlines()
    assert [line for line in log if line.startswith("warning:")] == warnings_of(finished)


def test_the_summary_of_a_run_of_hours(tmp_path: Path) -> None:
    from rich.console import Console

    history = [row(e, seconds=4000.0, val__person_iou=v) for e, v in ((1, 0.5), (2, 0.7), (3, 0.6))]
    history[1]["skipped_steps"] = 4
    console = Console(width=80)
    with console.capture() as captured:
        console.print(summary_table(history, num_warnings=3))

    text = captured.get()
    for words in ("0.7000 in epoch 2", "3 h 20 min", "20.0", "10.0%"):
        assert words in text
    assert re.search(r"steps left out[^\d]*4", text)
    assert re.search(r"warnings[^\d]*3", text)


# --------------------------------------------------------------------------- pictures


def drawn(path: Path, history: list[Row]) -> np.ndarray[Any, Any]:
    write_curves(path, history)
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def test_curves_of_one_epoch_and_of_stages(tmp_path: Path) -> None:
    one = drawn(tmp_path / "one.png", [row(1)])
    plain = drawn(tmp_path / "plain.png", [row(e) for e in range(1, 5)])
    staged = drawn(tmp_path / "staged.png", [row(e, stage=1 + (e > 2)) for e in range(1, 5)])

    assert one.shape == plain.shape == staged.shape
    for picture in (one, plain, staged):
        height, width = picture.shape[:2]
        assert width > 2 * height > 400
        # A third of the width each, and something other than white in all of them.
        for part in np.array_split(picture, 3, axis=1):
            assert (part.min(axis=2) < 200).mean() > 0.005
    # Where a stage begins there is something to see, and nothing but that.
    differing = (staged != plain).any(axis=2)
    assert 0 < differing.mean() < 0.05
    # A dotted line from the top to the bottom of each of the three.
    for part in np.array_split(differing, 3, axis=1):
        assert part.mean(axis=0).max() > 0.2


def test_curves_of_nothing_but_steps_left_out(tmp_path: Path) -> None:
    """Their loss is written as 0."""
    history = [row(1, train__loss=0.0, lr=0.0, skipped_steps=4)]
    assert drawn(tmp_path / "none.png", history).size


@pytest.fixture
def outputs(tmp_path: Path) -> Iterator[tuple[RunOutputs, RunFolder]]:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    with RunOutputs(run, RunLog(run.log), tensorboard=False) as writer:
        yield writer, run


def test_outputs_without_a_picture_to_show_have_no_sheet(
    outputs: tuple[RunOutputs, RunFolder],
) -> None:
    writer, run = outputs
    writer.write([row(1)], [])

    assert json.loads(run.metrics.read_text()) == row(1)
    assert not run.samples(1).exists()
    assert not (run.path / "tensorboard").exists()


def test_a_sheet_of_samples_has_a_row_a_picture(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pictures = []
    for height, width in ((48, 64), (64, 48), (20, 400)):
        image = rng.integers(0, 256, (height, width, 3), np.uint8)
        mask = rng.choice(np.array([0, 1, 255], np.uint8), (height, width))
        pictures.append((image, mask, (mask == 1).astype(np.uint8)))

    write_samples(tmp_path / "sheet.jpg", pictures)

    with Image.open(tmp_path / "sheet.jpg") as sheet:
        assert sheet.height > 3 * 200
        assert sheet.width >= 3 * 200


def test_checkpoints_are_those_of_the_row_that_is_written(train: Train) -> None:
    assert train("--epochs", "1").code == 0
    before = digests(RUN)
    assert load_checkpoint(last(RUN)).training["history"] == rows(RUN)
    assert before.keys() == {"last.pt", "best.pt", "previous.pt"}


def test_the_epoch_line_says_how_long_the_rest_will_take_where_that_is_long(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = RunLog(tmp_path / "log.txt")
    outputs = RunOutputs(RunFolder(tmp_path), log, tensorboard=False)
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

    for num_epochs in (3, 5, 103):
        outputs.tell([row], num_epochs=num_epochs)

    last, near, far = capsys.readouterr().out.splitlines()
    assert last.endswith(" 90 s")
    assert near.endswith(" 90 s  at most 3 min 00 s left")
    assert far.endswith(" 90 s  at most 2 h 30 min left")
