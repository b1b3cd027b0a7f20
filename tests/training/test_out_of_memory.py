"""Out of memory: the steps stay the same, and the error names the options to continue with."""

import gc
import re
import shlex
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.coco import make_toy_coco
from helpers.command import Command, Finished
from helpers.faults import (
    TINY,
    Forward,
    PatchedForward,
    assert_one_error,
    digests,
    fault_at,
    largest_difference,
    last_checkpoint,
    rows,
    warnings_of,
)
from torch import Tensor, nn

from segtrain.checkpoint import load_checkpoint
from segtrain.models import build_model
from segtrain.runtime.devices import autocast_for
from segtrain.training.batch_size import dry_run_step, find_micro_batch_size, is_out_of_memory

pytestmark = pytest.mark.usefixtures("one_thread", "no_curves")

RUN = Path("runs/toy")
# Batch norm sees only one micro-batch, so with it, smaller micro-batches change the result.
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
def twelve_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set with twelve training images."""
    return make_toy_coco(tmp_path_factory.mktemp("twelve_images"), num_train=12, num_val=4)


@pytest.fixture
def train(segtrain: Command, twelve_images: Path) -> Train:
    def command(*arguments: str | Path, name: str = "toy", data: Path = twelve_images) -> Finished:
        return segtrain("train", "--data", data, *TINY, *NO_NORM, "--name", name, *arguments)

    return command


def out_of_memory_above(
    num_images: int, *, first_pass: int = 1, kind: str = "cuda"
) -> Callable[[int, Tensor, Forward], Tensor]:
    """From pass `first_pass` on, more than `num_images` images do not fit in memory."""

    def act(number: int, image: Tensor, forward: Forward) -> Tensor:
        if number >= first_pass and len(image) > num_images:
            raise OUT_OF_MEMORY[kind]()
        return forward(image)

    return act


# --------------------------------------------------------------------------- a chosen batch size


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_the_advised_command_continues_with_the_same_steps(
    train: Train, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    arguments = ["--batch-size", "4", "--epochs", "3"]
    assert train(*arguments, name="uninterrupted").code == 0

    # Three steps per epoch. From the fifth on, four images do not fit.
    steps = PatchedForward(monkeypatch, out_of_memory_above(2, first_pass=5, kind=kind))
    failed = train(*arguments)

    line = assert_one_error(failed, 5)
    assert "4 images" in line
    assert "2 fit" in line
    saved = load_checkpoint(last_checkpoint(RUN))
    assert saved.global_step == 4
    assert saved.training["samples_seen"] == 4
    assert saved.training["step_stats"][4] == 0  # skipped steps

    advice = re.search(r"continue with (--.*)", line)
    assert advice is not None
    before = steps.count
    finished = train(*arguments, *shlex.split(advice[1]))

    assert finished.code == 0, finished.err
    # The search tries four, which does not fit, and two. Then five steps of two micro-batches.
    assert [size[0] for size in steps.sizes[before:]] == [4, 2, *[2] * 10]
    assert "batch size: 2 images per pass, 4 per step" in finished.out
    assert load_checkpoint(last_checkpoint(RUN)).global_step == 9
    assert (
        largest_difference(last_checkpoint(RUN), last_checkpoint(Path("runs/uninterrupted"))) < 1e-6
    )
    for row, expected in zip(rows(RUN), rows(Path("runs/uninterrupted")), strict=True):
        assert row["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-5)
        assert row["global_step"] == expected["global_step"]
        assert row["lr"] == expected["lr"]


def test_not_even_one_image_fits(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    PatchedForward(monkeypatch, out_of_memory_above(0, first_pass=3))

    line = assert_one_error(train("--batch-size", "4", "--epochs", "1"), 5)

    assert "and with fewer" in line
    assert "--image-size" in line
    assert load_checkpoint(last_checkpoint(RUN)).global_step == 2


def test_the_first_step_does_not_fit(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    PatchedForward(monkeypatch, out_of_memory_above(3))

    line = assert_one_error(train("--batch-size", "12", "--epochs", "1"), 5)

    assert "3 fit" in line
    assert "effective_batch=12" in line
    assert load_checkpoint(last_checkpoint(RUN)).global_step == 0


def test_running_out_of_memory_in_validation_has_the_same_advice(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps of the epoch are not lost."""
    from segtrain.models.unet import UNet

    true_forward = UNet.forward
    # On a CPU, images are evaluated one by one, so other processes must be using the memory.
    used_by_others = True

    def forward(model: UNet, image: Tensor) -> Tensor:
        if not model.training and used_by_others:
            raise OUT_OF_MEMORY["cuda"]()
        return true_forward(model, image)

    monkeypatch.setattr(UNet, "forward", forward)
    arguments = ["--batch-size", "4", "--epochs", "1"]
    line = assert_one_error(train(*arguments), 5)

    assert load_checkpoint(last_checkpoint(RUN)).global_step == 3
    assert load_checkpoint(last_checkpoint(RUN)).epoch == 0
    advice = line.partition("continue with ")[2]
    used_by_others = False
    # The search runs training steps, for which two images fit in this test.
    PatchedForward(monkeypatch, out_of_memory_above(2))
    resumed = train(*arguments, *shlex.split(advice))
    assert resumed.code == 0, resumed.err
    assert [row["global_step"] for row in rows(RUN)] == [3]


def test_other_runtime_errors_are_bugs(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    def act(number: int, image: Tensor, forward: Forward) -> Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    PatchedForward(monkeypatch, act)
    finished = train("--batch-size", "4", "--epochs", "1")

    assert finished.code == 1
    assert "mat1 and mat2" in finished.error_lines[0]


# --------------------------------------------------------------------------- batch size auto


def test_auto_finds_a_size_keeps_the_steps_and_is_not_repeated_on_resuming(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--set", "train.effective_batch=8"]
    assert train("--batch-size", "8", "--epochs", "2", name="whole-batch").code == 0
    steps = PatchedForward(monkeypatch, out_of_memory_above(3))

    first = train("--batch-size", "auto", *arguments, "--epochs", "1")

    assert first.code == 0, first.err
    assert "batch size: 2 images per pass, 8 per step" in first.out
    # The search tries eight, four and two. Then a step of eight images and the last of four.
    assert [size[0] for size in steps.sizes] == [8, 4, 2, 2, 2, 2, 2, 2, 2]
    assert rows(RUN)[0]["global_step"] == 2
    assert load_checkpoint(last_checkpoint(RUN)).training["micro_batch_size"] == 2

    before = steps.count
    resumed = train("--batch-size", "auto", *arguments, "--epochs", "2", "--resume", "auto")

    assert resumed.code == 0, resumed.err
    assert [size[0] for size in steps.sizes[before:]] == [2] * 6
    assert "batch size:" not in resumed.out
    assert (
        largest_difference(last_checkpoint(RUN), last_checkpoint(Path("runs/whole-batch"))) < 1e-6
    )


def test_auto_fails_before_the_first_step_if_not_even_one_image_fits(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = PatchedForward(monkeypatch, out_of_memory_above(0))

    line = assert_one_error(train("--batch-size", "auto", "--epochs", "1"), 5)

    assert "single image" in line
    assert "--image-size" in line
    assert [size[0] for size in steps.sizes] == [16, 8, 4, 2, 1]


def test_auto_reduces_a_size_that_turns_out_too_large(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resuming with the same size would fail again, and the user has not chosen it."""
    arguments = ["--set", "train.effective_batch=4", "--epochs", "2"]
    assert train("--batch-size", "4", "--epochs", "2", name="whole-batch").code == 0
    # One pass for the search, then three per epoch.
    steps = PatchedForward(monkeypatch, out_of_memory_above(2, first_pass=3))

    finished = train("--batch-size", "auto", *arguments)

    assert finished.code == 0, finished.err
    [warning] = warnings_of(finished)
    assert "continuing with 2" in warning
    assert [size[0] for size in steps.sizes[:5]] == [4, 4, 4, 2, 2]
    assert load_checkpoint(last_checkpoint(RUN)).training["micro_batch_size"] == 2
    assert (
        largest_difference(last_checkpoint(RUN), last_checkpoint(Path("runs/whole-batch"))) < 1e-6
    )
    assert [row["global_step"] for row in rows(RUN)] == [3, 6]


def test_the_batch_size_of_a_stage_is_reduced_because_no_option_can_change_it(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stages = tmp_path / "stages.yaml"
    stages.write_text("stages:\n- {epochs: 1, train: {batch_size: 6}}\n")
    steps = PatchedForward(monkeypatch, out_of_memory_above(4))

    finished = train("--batch-size", "4", "--epochs", "1", "--config", stages)

    assert finished.code == 0, finished.err
    [warning] = warnings_of(finished)
    assert "each step still has 6 images" in warning
    # Three steps of four images. Six do not fit, three do: two steps of two micro-batches.
    assert [size[0] for size in steps.sizes] == [4, 4, 4, 6, 3, 3, 3, 3, 3]


# --------------------------------------------------------------------------- search and dry run


@pytest.mark.parametrize("fails", [False, True])
def test_a_dry_run_leaves_the_model_unchanged(fails: bool) -> None:
    model = build_model("unet", base_channels=2, depth=1).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def loss_fn(logits: Tensor, mask: Tensor, border: Tensor | None) -> Tensor:
        loss = logits.square().mean()
        if fails:
            # By then, batch norm and some of the gradients have been updated.
            logits.register_hook(lambda gradient: None)
            model.encoders[0][0].weight.register_hook(_raise_out_of_memory)
        return loss

    def dry_run() -> None:
        dry_run_step(
            model,
            2,
            image_size=16,
            loss_fn=loss_fn,
            autocast=autocast_for("fp32", torch.device("cpu")),
            device=torch.device("cpu"),
        )

    if fails:
        with pytest.raises(torch.OutOfMemoryError):
            dry_run()
    else:
        dry_run()

    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not model.training


def _raise_out_of_memory(gradient: Tensor) -> None:
    raise OUT_OF_MEMORY["cuda"]()


@pytest.mark.parametrize(
    ("limit", "largest", "expected", "expected_tried"),
    [
        (100, 8, 8, [8]),
        (5, 8, 4, [8, 4]),
        (1, 7, 1, [7, 3, 1]),
        (0, 4, 0, [4, 2, 1]),
        (9, 0, 0, []),
    ],
)
def test_the_search_halves_the_size(
    limit: int, largest: int, expected: int, expected_tried: list[int]
) -> None:
    tried = []

    def try_size(size: int) -> None:
        tried.append(size)
        if size > limit:
            raise OUT_OF_MEMORY["cpu"]()

    assert find_micro_batch_size(try_size, largest) == expected
    assert tried == expected_tried


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        *[(build_error(), True) for build_error in OUT_OF_MEMORY.values()],
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"), False),
        (RuntimeError("shape mismatch"), False),
        (MemoryError("Caught MemoryError in DataLoader worker process 0."), False),
    ],
)
def test_which_errors_mean_that_the_network_is_out_of_memory(
    error: Exception, expected: bool
) -> None:
    assert is_out_of_memory(error) is expected


def test_the_memory_of_a_failed_step_is_released_before_smaller_sizes_are_tried(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error keeps the stack frames of its traceback alive, and these the activations."""
    failed: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []

    def act(number: int, image: Tensor, forward: Forward) -> Tensor:
        if number == 2:
            logits = forward(image)
            activation = nn.functional.relu(logits)
            failed.extend([weakref.ref(logits), weakref.ref(activation), weakref.ref(image)])
            raise OUT_OF_MEMORY["cuda"]()
        if number == 3:
            # Without gc.collect(), which nothing calls here.
            alive.extend(reference() is not None for reference in failed)
        return forward(image)

    gc.disable()
    try:
        PatchedForward(monkeypatch, act)
        assert_one_error(train("--batch-size", "4", "--epochs", "1"), 5)
    finally:
        gc.enable()
    assert alive == [False, False, False]


# --------------------------------------------------------------------------- gradient accumulation


def test_three_accumulated_batches_of_two_equal_a_batch_of_six(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The last step of the epoch is smaller, and so is its last micro-batch: two and one image."""
    data = make_toy_coco(tmp_path / "fifteen_images", num_train=15, num_val=2)
    steps = PatchedForward(monkeypatch, fault_at(set()))

    def run(name: str, *arguments: str) -> list[dict[str, Any]]:
        finished = train("--epochs", "2", *arguments, name=name, data=data)
        assert finished.code == 0, finished.err
        return rows(Path("runs") / name)

    whole = run("six", "--batch-size", "6")
    num_passes = steps.count
    accumulated = run("two", "--batch-size", "2", "--set", "train.accumulation_steps=3")

    assert [size[0] for size in steps.sizes[:num_passes]] == [6, 6, 3] * 2
    assert [size[0] for size in steps.sizes[num_passes:]] == [*[2] * 7, 1] * 2
    assert [row["global_step"] for row in whole] == [3, 6]
    for row, expected in zip(accumulated, whole, strict=True):
        assert row["train/loss"] == pytest.approx(expected["train/loss"], abs=1e-6)
        assert row["train/person_iou"] == pytest.approx(expected["train/person_iou"], abs=1e-3)
        assert row["global_step"] == expected["global_step"]
    assert (
        largest_difference(last_checkpoint(Path("runs/two")), last_checkpoint(Path("runs/six")))
        < 1e-6
    )


def test_images_per_second_counts_images_not_steps_or_micro_batches(train: Train) -> None:
    finished = train(
        *("--batch-size", "2", "--set", "train.accumulation_steps=3", "--epochs", "1"),
    )

    assert finished.code == 0, finished.err
    [row] = rows(RUN)
    # The time of the epoch includes validation, so it is longer than that of its steps.
    assert row["images_per_second"] * row["seconds"] > 12 * 0.99
    assert row["images_per_second"] > 12 / row["seconds"]
    table = next(line for line in finished.out.splitlines() if "images per second" in line)
    assert f"{row['images_per_second']:.1f}" in table


def test_checkpoints_stay_intact_when_memory_runs_out(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """last.pt holds the state after the last step; best.pt is unchanged."""
    assert train("--batch-size", "4", "--epochs", "1").code == 0
    before = digests(RUN)
    PatchedForward(monkeypatch, out_of_memory_above(2, first_pass=2))

    failed = train("--batch-size", "4", "--epochs", "2", "--resume", "auto")

    assert_one_error(failed, 5)
    after = digests(RUN)
    assert after["best.pt"] == before["best.pt"]
    assert after["previous.pt"] == before["last.pt"]
    assert load_checkpoint(last_checkpoint(RUN)).global_step == 4
