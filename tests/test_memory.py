"""Out of memory: the steps stay the same, and the user hears how to go on."""

import gc
import re
import shlex
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from coco_fixtures import make_toy_coco
from conftest import Command, Finished
from faults import (
    TINY,
    Forward,
    Steps,
    assert_one_error,
    at,
    digests,
    largest_difference,
    last,
    rows,
    warnings_of,
)
from torch import Tensor, nn

from segtrain.checkpoint import load_checkpoint
from segtrain.devices import autocast_for
from segtrain.models import build_model
from segtrain.training.memory import fitting_number, is_out_of_memory, rehearse_step

pytestmark = pytest.mark.usefixtures("one_thread", "no_curves")

RUN = Path("runs/toy")
# Batch norm sees only a piece of a batch, so with it smaller pieces are another training.
NO_NORM = ("--set", "model.norm=none")

OUT_OF_MEMORY = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cudnn without a workspace": lambda: RuntimeError(
        "GET was unable to find an engine to execute this computation"
    ),
    "cudnn": lambda: RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "cudnn at its start": lambda: RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
    "cublas": lambda: RuntimeError(
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    ),
    "numpy": lambda: MemoryError("Unable to allocate 9.9 GiB for an array"),
    "cpu": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate "
        "memory: you tried to allocate 9 bytes. Error code 12 (Cannot allocate memory)"
    ),
}

Train = Callable[..., Finished]


@pytest.fixture(scope="module")
def twelve(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures to train on."""
    return make_toy_coco(tmp_path_factory.mktemp("twelve"), num_train=12, num_val=4)


@pytest.fixture
def train(segtrain: Command, twelve: Path) -> Train:
    def command(*arguments: str | Path, name: str = "toy", data: Path = twelve) -> Finished:
        return segtrain("train", "--data", data, *TINY, *NO_NORM, "--name", name, *arguments)

    return command


def no_room_for(
    more_than: int, *, since: int = 1, kind: str = "cuda"
) -> Callable[[int, Tensor, Forward], Tensor]:
    """A memory that from one pass on is full with more than so many pictures."""

    def act(number: int, image: Tensor, forward: Forward) -> Tensor:
        if number >= since and len(image) > more_than:
            raise OUT_OF_MEMORY[kind]()
        return forward(image)

    return act


# --------------------------------------------------------------------------- a number of one's own


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_out_of_memory_says_how_to_go_on_and_that_very_command_does(
    train: Train, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    arguments = ["--batch-size", "4", "--epochs", "3"]
    assert train(*arguments, name="unbroken").code == 0

    # Three steps an epoch: the fifth does not fit, nor do four pictures from then on.
    steps = Steps(monkeypatch, no_room_for(2, since=5, kind=kind))
    broken = train(*arguments)

    line = assert_one_error(broken, 5)
    assert "4 pictures" in line
    assert "2 fit" in line
    saved = load_checkpoint(last(RUN))
    assert saved.global_step == 4
    assert saved.training["images_drawn"] == 4
    assert saved.training["tally"][4] == 0  # steps left out

    advice = re.search(r"continue with (--.*)", line)
    assert advice is not None
    before = steps.count
    finished = train(*arguments, *shlex.split(advice[1]))

    assert finished.code == 0, finished.err
    # Four, which does not fit, and two: that was the search. Then five steps in two pieces each.
    assert [size[0] for size in steps.sizes[before:]] == [4, 2, *[2] * 10]
    assert "batch size: 2 at once, 4 images a step" in finished.out
    assert load_checkpoint(last(RUN)).global_step == 9
    assert largest_difference(last(RUN), last(Path("runs/unbroken"))) < 1e-6
    for row, expected in zip(rows(RUN), rows(Path("runs/unbroken")), strict=True):
        assert row["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-5)
        assert row["global_step"] == expected["global_step"]
        assert row["lr"] == expected["lr"]


def test_where_not_even_one_fits_it_says_so(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    Steps(monkeypatch, no_room_for(0, since=3))

    line = assert_one_error(train("--batch-size", "4", "--epochs", "1"), 5)

    assert "fewer do not fit either" in line
    assert "--image-size" in line
    assert load_checkpoint(last(RUN)).global_step == 2


def test_the_first_step_may_be_the_one_that_does_not_fit(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    Steps(monkeypatch, no_room_for(3))

    line = assert_one_error(train("--batch-size", "12", "--epochs", "1"), 5)

    assert "3 fit" in line
    assert "effective_batch=12" in line
    assert load_checkpoint(last(RUN)).global_step == 0


def test_memory_that_validation_lacks_is_advised_alike(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the epoch's steps are not lost."""
    from segtrain.models.unet import UNet

    true_forward = UNet.forward
    # On a CPU pictures are judged one by one, so that others must have taken the memory.
    taken_by_others = True

    def forward(model: UNet, image: Tensor) -> Tensor:
        if not model.training and taken_by_others:
            raise OUT_OF_MEMORY["cuda"]()
        return true_forward(model, image)

    monkeypatch.setattr(UNet, "forward", forward)
    arguments = ["--batch-size", "4", "--epochs", "1"]
    line = assert_one_error(train(*arguments), 5)

    assert load_checkpoint(last(RUN)).global_step == 3
    assert load_checkpoint(last(RUN)).epoch == 0
    advice = line.partition("continue with ")[2]
    taken_by_others = False
    # The search is for training, where in this test there is room for four.
    Steps(monkeypatch, no_room_for(2))
    resumed = train(*arguments, *shlex.split(advice))
    assert resumed.code == 0, resumed.err
    assert [row["global_step"] for row in rows(RUN)] == [3]


def test_a_bug_of_ours_is_no_lack_of_memory(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    def act(number: int, image: Tensor, forward: Forward) -> Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    Steps(monkeypatch, act)
    finished = train("--batch-size", "4", "--epochs", "1")

    assert finished.code == 1
    assert "mat1 and mat2" in finished.error_lines[0]


# --------------------------------------------------------------------------- auto


def test_auto_finds_the_number_keeps_the_step_and_remembers_it(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--set", "train.effective_batch=8"]
    assert train("--batch-size", "8", "--epochs", "2", name="at-once").code == 0
    steps = Steps(monkeypatch, no_room_for(3))

    first = train("--batch-size", "auto", *arguments, "--epochs", "1")

    assert first.code == 0, first.err
    assert "batch size: 2 at once, 8 images a step" in first.out
    # Eight, four and two are tried; a step of eight and the last of four follow.
    assert [size[0] for size in steps.sizes] == [8, 4, 2, 2, 2, 2, 2, 2, 2]
    assert rows(RUN)[0]["global_step"] == 2
    assert load_checkpoint(last(RUN)).training["images_at_once"] == 2

    before = steps.count
    resumed = train("--batch-size", "auto", *arguments, "--epochs", "2", "--resume", "auto")

    assert resumed.code == 0, resumed.err
    assert [size[0] for size in steps.sizes[before:]] == [2] * 6
    assert "batch size:" not in resumed.out
    assert largest_difference(last(RUN), last(Path("runs/at-once"))) < 1e-6


def test_auto_with_no_room_at_all_ends_before_the_first_step(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(monkeypatch, no_room_for(0))

    line = assert_one_error(train("--batch-size", "auto", "--epochs", "1"), 5)

    assert "single picture" in line
    assert "--image-size" in line
    assert [size[0] for size in steps.sizes] == [16, 8, 4, 2, 1]


def test_auto_lowers_its_number_where_it_turns_out_too_large(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed with the same number it would fail for ever, and the number is ours."""
    arguments = ["--set", "train.effective_batch=4", "--epochs", "2"]
    assert train("--batch-size", "4", "--epochs", "2", name="at-once").code == 0
    # One pass for the search, then three an epoch.
    steps = Steps(monkeypatch, no_room_for(2, since=3))

    finished = train("--batch-size", "auto", *arguments)

    assert finished.code == 0, finished.err
    [warning] = warnings_of(finished)
    assert "from here on 2" in warning
    assert [size[0] for size in steps.sizes[:5]] == [4, 4, 4, 2, 2]
    assert load_checkpoint(last(RUN)).training["images_at_once"] == 2
    assert largest_difference(last(RUN), last(Path("runs/at-once"))) < 1e-6
    assert [row["global_step"] for row in rows(RUN)] == [3, 6]


def test_a_stages_own_batch_size_is_lowered_for_no_option_can(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stages = tmp_path / "stages.yaml"
    stages.write_text("stages:\n- {epochs: 1, train: {batch_size: 6}}\n")
    steps = Steps(monkeypatch, no_room_for(4))

    finished = train("--batch-size", "4", "--epochs", "1", "--config", stages)

    assert finished.code == 0, finished.err
    [warning] = warnings_of(finished)
    assert "the steps stay those of 6" in warning
    # Three steps of four; six do not fit, three do; two steps of twice three.
    assert [size[0] for size in steps.sizes] == [4, 4, 4, 6, 3, 3, 3, 3, 3]


# --------------------------------------------------------------------------- the search itself


@pytest.mark.parametrize("fails", [False, True])
def test_a_rehearsal_leaves_the_network_as_it_was(fails: bool) -> None:
    model = build_model("unet", base_channels=2, depth=1).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def loss_fn(logits: Tensor, mask: Tensor, border: Tensor | None) -> Tensor:
        loss = logits.square().mean()
        if fails:
            # Batch norm and a part of the gradients have been touched by then.
            logits.register_hook(lambda gradient: None)
            model.encoders[0][0].weight.register_hook(_full)
        return loss

    def rehearse() -> None:
        rehearse_step(
            model,
            2,
            image_size=16,
            loss_fn=loss_fn,
            autocast=autocast_for("fp32", torch.device("cpu")),
            device=torch.device("cpu"),
        )

    if fails:
        with pytest.raises(torch.OutOfMemoryError):
            rehearse()
    else:
        rehearse()

    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not model.training


def _full(gradient: Tensor) -> None:
    raise OUT_OF_MEMORY["cuda"]()


@pytest.mark.parametrize(
    ("room", "largest", "found", "tried"),
    [
        (100, 8, 8, [8]),
        (5, 8, 4, [8, 4]),
        (1, 7, 1, [7, 3, 1]),
        (0, 4, 0, [4, 2, 1]),
        (9, 0, 0, []),
    ],
)
def test_the_search_halves(room: int, largest: int, found: int, tried: list[int]) -> None:
    asked = []

    def try_with(number: int) -> None:
        asked.append(number)
        if number > room:
            raise OUT_OF_MEMORY["cpu"]()

    assert fitting_number(try_with, largest) == found
    assert asked == tried


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        *[(make(), True) for make in OUT_OF_MEMORY.values()],
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"), False),
        (RuntimeError("shape mismatch"), False),
        (MemoryError("Caught MemoryError in DataLoader worker process 0."), False),
    ],
)
def test_which_errors_are_a_lack_of_the_networks_memory(error: Exception, answer: bool) -> None:
    assert is_out_of_memory(error) is answer


def test_the_failed_step_holds_no_memory_while_a_smaller_one_is_tried(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error keeps the frames that it has come through, and they the activations."""
    failed: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []

    def act(number: int, image: Tensor, forward: Forward) -> Tensor:
        if number == 2:
            logits = forward(image)
            activation = nn.functional.relu(logits)
            failed.extend([weakref.ref(logits), weakref.ref(activation), weakref.ref(image)])
            raise OUT_OF_MEMORY["cuda"]()
        if number == 3:
            # Not gc.collect(): nothing calls it there.
            alive.extend(reference() is not None for reference in failed)
        return forward(image)

    gc.disable()
    try:
        Steps(monkeypatch, act)
        assert_one_error(train("--batch-size", "4", "--epochs", "1"), 5)
    finally:
        gc.enable()
    assert alive == [False, False, False]


# --------------------------------------------------------------------------- accumulation


def test_batches_of_two_times_three_are_batches_of_six(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The epoch's last group is smaller, and its last piece too: three are two and one."""
    data = make_toy_coco(tmp_path / "fifteen", num_train=15, num_val=2)
    steps = Steps(monkeypatch, at(set()))

    def run(name: str, *arguments: str) -> list[dict[str, Any]]:
        finished = train("--epochs", "2", *arguments, name=name, data=data)
        assert finished.code == 0, finished.err
        return rows(Path("runs") / name)

    whole = run("six", "--batch-size", "6")
    num_whole = steps.count
    pieces = run("two", "--batch-size", "2", "--set", "train.accumulation_steps=3")

    assert [size[0] for size in steps.sizes[:num_whole]] == [6, 6, 3] * 2
    assert [size[0] for size in steps.sizes[num_whole:]] == [*[2] * 7, 1] * 2
    assert [row["global_step"] for row in whole] == [3, 6]
    for row, expected in zip(pieces, whole, strict=True):
        assert row["train/loss"] == pytest.approx(expected["train/loss"], abs=1e-6)
        assert row["train/person_iou"] == pytest.approx(expected["train/person_iou"], abs=1e-3)
        assert row["global_step"] == expected["global_step"]
    assert largest_difference(last(Path("runs/two")), last(Path("runs/six"))) < 1e-6


def test_images_a_second_counts_images_not_steps_or_pieces(train: Train) -> None:
    finished = train(
        *("--batch-size", "2", "--set", "train.accumulation_steps=3", "--epochs", "1"),
    )

    assert finished.code == 0, finished.err
    [row] = rows(RUN)
    # All seconds of the epoch are more than those of its steps, and validation is among them.
    assert row["images_per_second"] * row["seconds"] > 12 * 0.99
    assert row["images_per_second"] > 12 / row["seconds"]
    table = next(line for line in finished.out.splitlines() if "images a second" in line)
    assert f"{row['images_per_second']:.1f}" in table


def test_checkpoints_stay_whole_when_memory_is_full(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """last.pt is what came after the last good step; best.pt is not touched."""
    assert train("--batch-size", "4", "--epochs", "1").code == 0
    before = digests(RUN)
    Steps(monkeypatch, no_room_for(2, since=2))

    broken = train("--batch-size", "4", "--epochs", "2", "--resume", "auto")

    assert_one_error(broken, 5)
    after = digests(RUN)
    assert after["best.pt"] == before["best.pt"]
    assert after["previous.pt"] == before["last.pt"]
    assert load_checkpoint(last(RUN)).global_step == 4
