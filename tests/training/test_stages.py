"""Stages, averaged weights, frozen encoders and compilation, over a whole training run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.coco import annotation_row, image_row, write_coco
from helpers.command import Command, Finished
from helpers.faults import (
    TINY,
    Forward,
    PatchedForward,
    assert_one_error,
    fault_at,
    largest_difference,
    last_checkpoint,
    rows,
    warnings_of,
)
from torch import Tensor, nn

from segtrain.checkpoint import load_checkpoint
from segtrain.training.setup import StageData, TrainContext

pytestmark = pytest.mark.usefixtures("one_thread", "no_curves")

RUN = Path("runs/toy")
Train = Callable[..., Finished]


@pytest.fixture
def train(segtrain: Command, toy_coco: Path) -> Train:
    def command(*arguments: str | Path, name: str = "toy", data: Path = toy_coco) -> Finished:
        return segtrain(
            *("train", "--data", data, *TINY, "--batch-size", "4", "--name", name, *arguments)
        )

    return command


@pytest.fixture
def write_stages(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a YAML file with the given stages and returns its path."""

    def write(stages: str) -> Path:
        path = tmp_path / "stages.yaml"
        path.write_text(f"stages:\n{stages}\n")
        return path

    return write


@pytest.fixture
def ious(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The validation IoU of the coming epochs, to be filled by the test; if empty, the true one."""
    from segtrain.training import fit

    values: list[float] = []
    true_validate = fit.validate

    def validate(ctx: TrainContext, stage: StageData, model: nn.Module) -> dict[str, float]:
        metrics = true_validate(ctx, stage, model)
        return {**metrics, "val/person_iou": values.pop(0)} if values else metrics

    monkeypatch.setattr(fit, "validate", validate)
    return values


# --------------------------------------------------------------------------- stages

WHOLE_IMAGES = (
    "- {epochs: 2, data: {whole: true}, train: {batch_size: 1, accumulation_steps: 4}, "
    "optim: {name: adam, lr: 1.0e-4, warmup_steps: 4}}"
)


def test_the_second_stage_starts_from_the_best_weights_with_a_fresh_optimizer(
    train: Train, write_stages: Any, ious: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    from segtrain.training import fit

    start_weights: list[dict[str, Any]] = []
    best_weights: list[dict[str, Tensor]] = []
    true_next_stage_state = fit.next_stage_state

    def next_stage_state(state: Any, config: Any, best: Any, *rest: Any, **options: Any) -> Any:
        best_weights.append({name: value.clone() for name, value in best.weights.items()})
        new = true_next_stage_state(state, config, best, *rest, **options)
        start_weights.append(
            {name: value.clone() for name, value in new.model.state_dict().items()}
        )
        assert type(new.optimizer) is torch.optim.Adam
        assert not any(
            value.any() for state in new.optimizer.state.values() for value in state.values()
        )
        return new

    monkeypatch.setattr(fit, "next_stage_state", next_stage_state)
    # The second epoch is the best of the first stage, the fourth the best of all.
    ious.extend([0.2, 0.5, 0.3, 0.6, 0.4])

    finished = train("--config", write_stages(WHOLE_IMAGES), "--epochs", "3")

    assert finished.code == 0, finished.err
    assert "stage 2 of 2: starting from the weights of epoch 2" in finished.out
    [weights], [expected] = start_weights, best_weights
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    # Two steps per epoch: eight images, in batches of four or in four micro-batches of one.
    assert [(row["epoch"], row["stage"], row["global_step"]) for row in rows(RUN)] == [
        *[(1, 1, 2), (2, 1, 4), (3, 1, 6)],
        *[(4, 2, 8), (5, 2, 10)],
    ]
    # The stage has its own warm-up over four steps, and the schedule starts at its first epoch.
    assert [row["lr"] for row in rows(RUN)[3:]] == pytest.approx([0.5e-4, 1e-4 * 0.995])
    assert "epoch 5/5" in finished.out
    saved = load_checkpoint(RUN / "checkpoints/best.pt")
    assert (saved.epoch, load_checkpoint(last_checkpoint(RUN)).epoch) == (4, 5)
    assert "best person IoU 0.6000 in epoch 4 of 5" in finished.out


def test_a_stage_without_a_better_epoch_does_not_replace_the_best(
    train: Train, write_stages: Any, ious: list[float]
) -> None:
    ious.extend([0.5, 0.3, 0.2])

    assert train("--config", write_stages("- {epochs: 2}"), "--epochs", "1").code == 0

    assert load_checkpoint(RUN / "checkpoints/best.pt").epoch == 1


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_stages_that_were_killed_and_resumed_equal_those_of_an_uninterrupted_run(
    train: Train, write_stages: Any, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    """Also if the kill comes in the first epoch of the second stage."""
    stages = write_stages("- {epochs: 2, optim: {name: sgd, momentum: 0.9, lr: 0.01}}")
    arguments = ["--config", stages, "--epochs", "1", "--set", "train.ema_decay=0.9"]
    assert train(*arguments, name="uninterrupted").code == 0

    class Killed(BaseException):
        """Like a kill: nothing is saved."""

    def act(number: int, image: Tensor, forward: Forward) -> Tensor:
        if number == 2 * stop_after:
            raise Killed
        return forward(image)

    with monkeypatch.context() as patch:
        PatchedForward(patch, act)
        with pytest.raises(Killed):
            train(*arguments)
    finished = train(*arguments, "--resume", "auto")

    assert finished.code == 0, finished.err
    assert (
        largest_difference(last_checkpoint(RUN), last_checkpoint(Path("runs/uninterrupted"))) == 0
    )
    assert [row["val/person_iou"] for row in rows(RUN)] == [
        row["val/person_iou"] for row in rows(Path("runs/uninterrupted"))
    ]


def test_patience_ends_a_stage_then_continues_with_the_next_and_ends_the_run(
    train: Train, segtrain: Command, write_stages: Any, ious: list[float]
) -> None:
    # The best IoU of the first stage does not count in the second.
    ious.extend([0.5, 0.4, 0.45, 0.3, 0.4, 0.35, 0.2])

    finished = train(
        *("--config", write_stages("- {epochs: 9, optim: {lr: 1.0e-4}}"), "--epochs", "9"),
        *("--set", "train.patience=2"),
    )

    assert finished.code == 0, finished.err
    assert [row["stage"] for row in rows(RUN)] == [1, 1, 1, 2, 2, 2, 2]
    early = [row.get("stopped_early") for row in rows(RUN)]
    assert early == [None, None, True, None, None, None, True]
    assert load_checkpoint(last_checkpoint(RUN)).training["history"][-1]["stopped_early"] is True
    [listed] = json.loads(segtrain("runs", "runs", "--json").out)
    assert listed["state"] == "finished"
    assert (listed["epochs_done"], listed["epochs_planned"]) == (7, 12)
    assert listed["best_epoch"] == 1


def test_patience_that_runs_out_in_the_last_epoch_does_not_stop_early(
    train: Train, ious: list[float]
) -> None:
    ious.extend([0.5, 0.4])

    assert train("--epochs", "2", "--set", "train.patience=1").code == 0

    assert not rows(RUN)[-1].get("stopped_early")


@pytest.mark.parametrize("stages", ["", "- {epochs: 1}"])
@pytest.mark.parametrize("patience", ["", "1"])
def test_resuming_a_finished_run_changes_nothing(
    train: Train, write_stages: Any, ious: list[float], stages: str, patience: str
) -> None:
    ious.extend([0.5, 0.4, 0.3])
    arguments = ["--epochs", "3", *(("--config", write_stages(stages)) if stages else ())]
    arguments += ["--set", f"train.patience={patience}"] if patience else []
    assert train(*arguments).code == 0
    before = read_files(RUN)
    assert len(rows(RUN)) == {("", ""): 3, ("", "1"): 2}.get((stages, patience), 4 - bool(patience))

    again = train(*arguments, "--resume", "auto")

    assert again.code == 0, again.err
    assert read_files(RUN) == before


def read_files(run: Path) -> dict[str, bytes]:
    """All files except the log, which records every command."""
    files = [p for p in run.rglob("*") if p.is_file() and p.name != "log.txt"]
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ("- {epochs: 1, data: {whole: true}}", "stage 2: data.whole"),
        ("- {epochs: 1, data: {root: elsewhere}}", "data.root"),
        ("- {epochs: 1, train: {seed: 3}}", "train.seed"),
        ("- {epochs: 1, optim: {lrr: 3}}", "lrr"),
        ("- {epochs: 1, optim: {lr: -1}}", "stage 2: optim.lr"),
        ("- {epochs: 1, model: {depth: 3}}", "unknown key 'model'"),
        ("- {epochs: 1, optimm: {lr: 3}}", "'optim'"),
        ("- {optim: {lr: 1.0e-4}}", "stage 2: epochs"),
        ("- {epochs: 1}\n- {epochs: 0}", "stage 3: epochs"),
        ("- 3", "stage 2"),
        ("- {epochs: 1, optim: 3}", "stage 2: optim"),
    ],
)
def test_an_invalid_stage_is_rejected_before_a_run_is_created(
    train: Train, write_stages: Any, stages: str, expected: str
) -> None:
    line = assert_one_error(train("--config", write_stages(stages), "--epochs", "1"), 2)

    assert expected in line
    assert not Path("runs").exists()


def test_damaged_images_are_reported_for_every_stage(
    train: Train, write_stages: Any, tmp_path: Path
) -> None:
    """Each stage has its own loaders, which find the damaged image again."""
    from helpers.coco import make_toy_coco

    root = make_toy_coco(tmp_path / "coco")
    first = min((root / "train2017").iterdir())
    first.write_bytes(first.read_bytes()[:50])

    finished = train("--config", write_stages("- {epochs: 1}"), "--epochs", "1", data=root)

    assert finished.code == 0, finished.err
    warnings = [line for line in warnings_of(finished) if first.name in line]
    assert len(warnings) == 2


# --------------------------------------------------------------------------- whole images

SIZES = [(48, 64), (64, 48), (48, 48), (50, 120), (60, 61)]


@pytest.fixture(scope="module")
def data_of_many_sizes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of several sizes, each with one person in the upper left corner."""
    root = tmp_path_factory.mktemp("sizes") / "coco"
    for split, first in (("train", 1), ("val", 101)):
        images = [image_row(first + i, *size) for i, size in enumerate(SIZES)]
        box = [0.0, 0.0, 20.0, 0.0, 20.0, 30.0, 0.0, 30.0]
        annotations = [annotation_row(row["id"], row["id"], [box]) for row in images]
        write_coco(root, split, images, annotations)
    return root


def test_whole_images_are_not_padded(
    train: Train, data_of_many_sizes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from segtrain.training import setup

    calls: list[tuple[tuple[int, ...], tuple[int, ...], float]] = []
    losses: list[tuple[float, int]] = []
    true_build = setup.build_loss

    def build_loss(config: Any) -> Any:
        loss_fn = true_build(config)

        def recording_loss(logits: Tensor, mask: Tensor, border: Tensor | None) -> Tensor:
            person_fraction = float((mask == 1).double().mean())
            calls.append((tuple(logits.shape[2:]), tuple(mask.shape[1:]), person_fraction))
            assert (mask != 255).all()
            loss = loss_fn(logits, mask, border)
            losses.append((loss.item(), mask.numel()))
            return loss

        return recording_loss

    monkeypatch.setattr(setup, "build_loss", build_loss)
    steps = PatchedForward(monkeypatch, fault_at(set()))
    # Five images in one step, each of its own size.
    finished = train(
        *("--set", "data.whole=true", "--batch-size", "1", "--epochs", "1"),
        *("--set", "train.accumulation_steps=5"),
        data=data_of_many_sizes,
    )

    assert finished.code == 0, finished.err
    assert [row["global_step"] for row in rows(RUN)] == [1]
    # The short side is scaled to 48.
    expected = [(48, 64), (64, 48), (48, 48), (48, 115), (48, 49)]
    assert sorted(steps.sizes) == sorted((1, *size) for size in expected)
    assert sorted(logits_size for logits_size, _, _ in calls) == sorted(expected)
    assert all(logits_size == mask_size for logits_size, mask_size, _ in calls)
    # The person covers 20 x 30 pixels of the original.
    person_fractions = {size: person_fraction for size, _, person_fraction in calls}
    for size, original in zip(expected, SIZES, strict=True):
        assert person_fractions[size] == pytest.approx(600 / (original[0] * original[1]), abs=0.02)
    # The loss of the step is the mean over all its pixels, not the mean of the means per image.
    total = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
    assert rows(RUN)[0]["train/loss"] == pytest.approx(total, rel=1e-6)
    assert rows(RUN)[0]["train/loss"] != pytest.approx(sum(x for x, _ in losses) / 5, rel=1e-6)


# --------------------------------------------------------------------------- averaged weights


def test_validation_and_best_use_the_averaged_weights_and_last_holds_both(
    train: Train, segtrain: Command
) -> None:
    assert train("--epochs", "2", "--set", "train.ema_decay=0.9").code == 0

    saved = load_checkpoint(last_checkpoint(RUN))
    best = load_checkpoint(RUN / "checkpoints/best.pt")
    assert saved.training["ema"].keys() == saved.weights.keys() == best.weights.keys()
    changed = [
        name
        for name, value in saved.weights.items()
        if not torch.equal(value, saved.training["ema"][name])
    ]
    assert "head.weight" in changed
    assert "encoders.0.1.running_var" in changed
    if best.epoch == 2:
        for name, value in saved.training["ema"].items():
            assert torch.equal(best.weights[name], value)
    # Validation was of the averaged weights.
    result = json.loads(segtrain("eval", "--checkpoint", RUN, "--json").out)
    assert result["metrics"]["person_iou"] == pytest.approx(
        best.metrics["val/person_iou"], abs=1e-6
    )


def test_best_holds_the_averaged_weights_of_the_best_epoch(train: Train, ious: list[float]) -> None:
    ious.extend([0.1, 0.2])

    assert train("--epochs", "2", "--set", "train.ema_decay=0.9").code == 0

    saved, best = (
        load_checkpoint(last_checkpoint(RUN)),
        load_checkpoint(RUN / "checkpoints/best.pt"),
    )
    assert all(torch.equal(best.weights[n], v) for n, v in saved.training["ema"].items())
    assert not torch.equal(best.weights["head.weight"], saved.weights["head.weight"])


ENCODER = (
    *("train", "--model", "unet", "--set", "model.encoder=mobilenet_v3_large", "--workers", "0"),
    *("--image-size", "48", "--batch-size", "4", "--precision", "fp32", "--device", "cpu"),
    *("--set", "train.freeze_encoder_epochs=2", "--set", "train.ema_decay=0.9"),
    *("--set", "optim.warmup_steps=0", "--lr", "1e-2"),
)


@pytest.mark.slow
def test_a_frozen_encoder_does_not_change_with_ema_and_across_a_stop(
    segtrain: Command, toy_coco: Path
) -> None:
    def run(name: str, epochs: int, *more: str) -> dict[str, Tensor]:
        arguments = [*ENCODER, "--data", toy_coco, "--name", name, "--epochs", epochs, *more]
        finished = segtrain(*arguments)
        assert finished.code == 0, finished.err
        saved = load_checkpoint(last_checkpoint(Path("runs") / name))
        return {
            **saved.weights,
            **{f"ema {n}": v for n, v in saved.training["ema"].items()},
        }

    def find_changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
        return {name for name in before if not torch.equal(before[name], after[name])}

    uninterrupted = run("uninterrupted", 3)
    first = run("stopped", 1)
    second = run("stopped", 2, "--resume", "auto")
    third = run("stopped", 3, "--resume", "auto")

    while_frozen = find_changed(first, second)
    assert "head.weight" in while_frozen
    assert "ema head.weight" in while_frozen
    assert not [name for name in while_frozen if "encoder." in name]
    unfrozen = [name for name in find_changed(second, third) if "encoder." in name]
    assert any("running_mean" in name for name in unfrozen)
    assert any("weight" in name and name.startswith("ema") for name in unfrozen)
    assert find_changed(third, uninterrupted) == set()


# --------------------------------------------------------------------------- compilation


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler emits some
@pytest.mark.parametrize("mode", ["blocks", "full"])
@pytest.mark.parametrize(
    "model",
    [
        ("--set", "model.base_channels=4", "--set", "model.depth=2"),
        (
            *("--model", "fc_densenet56", "--set", "model.down_blocks=[2]"),
            *("--set", "model.up_blocks=[2]", "--set", "model.bottleneck=2"),
            *("--set", "model.drop_rate=0"),  # a compiled network draws other random numbers
        ),
    ],
    ids=["unet", "fc_densenet"],
)
def test_compiled_networks_train_like_uncompiled_ones(
    segtrain: Command, toy_coco: Path, mode: str, model: tuple[str, ...]
) -> None:
    common = ("train", "--data", toy_coco, *model, "--image-size", "48", "--workers", "0")
    common += ("--precision", "fp32", "--device", "cpu", "--batch-size", "3", "--epochs", "2")
    for name in ("off", mode):
        finished = segtrain(*common, "--set", f"train.compile={name}", "--name", name)
        assert finished.code == 0, finished.err

    uncompiled, compiled = Path("runs/off"), Path("runs") / mode
    assert (
        load_checkpoint(last_checkpoint(compiled)).weights.keys()
        == load_checkpoint(last_checkpoint(uncompiled)).weights.keys()
    )
    for row, expected in zip(rows(compiled), rows(uncompiled), strict=True):
        assert row["train/loss"] == pytest.approx(expected["train/loss"], abs=1e-3)
        assert row["val/person_iou"] == pytest.approx(expected["val/person_iou"], abs=5e-2)
    assert segtrain("eval", "--checkpoint", compiled).code == 0
