"""Stages, averages, frozen encoders and compilation, as a whole training goes through them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from coco_fixtures import annotation_row, image_row, write_coco
from conftest import Command, Finished
from faults import (
    TINY,
    Forward,
    Steps,
    assert_one_error,
    at,
    largest_difference,
    last,
    rows,
    warnings_of,
)
from torch import Tensor, nn

from segtrain.checkpoint import load_checkpoint
from segtrain.training.setting import Setting, Stage

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
def staged(tmp_path: Path) -> Callable[[str], Path]:
    """A YAML file with these stages."""

    def write(stages: str) -> Path:
        path = tmp_path / "stages.yaml"
        path.write_text(f"stages:\n{stages}\n")
        return path

    return write


@pytest.fixture
def ious(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What validation is going to say, an epoch each; fill it. Empty: the truth."""
    told: list[float] = []
    from segtrain.training import fit

    true_validate = fit.validate

    def validate(setting: Setting, stage: Stage, model: nn.Module) -> dict[str, float]:
        found = true_validate(setting, stage, model)
        return {**found, "val/person_iou": told.pop(0)} if told else found

    monkeypatch.setattr(fit, "validate", validate)
    return told


# --------------------------------------------------------------------------- stages

WHOLE = (
    "- {epochs: 2, data: {whole: true}, train: {batch_size: 1, accumulation_steps: 4}, "
    "optim: {name: adam, lr: 1.0e-4, warmup_steps: 4}}"
)


def test_the_second_stage_goes_on_from_the_best_weights_with_a_fresh_optimizer(
    train: Train, staged: Any, ious: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    from segtrain.training import fit

    begun: list[dict[str, Any]] = []
    best: list[dict[str, Tensor]] = []
    true_next_stage = fit.next_stage

    def next_stage(state: Any, config: Any, loaded: Any, *rest: Any, **options: Any) -> Any:
        best.append({name: value.clone() for name, value in loaded.weights.items()})
        new = true_next_stage(state, config, loaded, *rest, **options)
        begun.append({name: value.clone() for name, value in new.model.state_dict().items()})
        assert type(new.optimizer) is torch.optim.Adam
        assert not any(
            value.any() for state in new.optimizer.state.values() for value in state.values()
        )
        return new

    monkeypatch.setattr(fit, "next_stage", next_stage)
    # The second epoch is the best of the first stage, the fourth of all.
    ious.extend([0.2, 0.5, 0.3, 0.6, 0.4])

    finished = train("--config", staged(WHOLE), "--epochs", "3")

    assert finished.code == 0, finished.err
    assert "stage 2 of 2: on with the weights of epoch 2" in finished.out
    [weights], [expected] = begun, best
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    # Two steps an epoch: eight pictures, four at a time or four pieces of one.
    assert [(row["epoch"], row["stage"], row["global_step"]) for row in rows(RUN)] == [
        *[(1, 1, 2), (2, 1, 4), (3, 1, 6)],
        *[(4, 2, 8), (5, 2, 10)],
    ]
    # A warm-up of its own over four steps; the schedule's first epoch is its own as well.
    assert [row["lr"] for row in rows(RUN)[3:]] == pytest.approx([0.5e-4, 1e-4 * 0.995])
    assert "epoch 5/5" in finished.out
    saved = load_checkpoint(RUN / "checkpoints/best.pt")
    assert (saved.epoch, load_checkpoint(last(RUN)).epoch) == (4, 5)
    assert "best person IoU 0.6000 in epoch 4 of 5" in finished.out


def test_a_stage_without_a_better_epoch_leaves_the_best_alone(
    train: Train, staged: Any, ious: list[float]
) -> None:
    ious.extend([0.5, 0.3, 0.2])

    assert train("--config", staged("- {epochs: 2}"), "--epochs", "1").code == 0

    assert load_checkpoint(RUN / "checkpoints/best.pt").epoch == 1


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_stages_stopped_and_resumed_are_those_of_a_straight_run(
    train: Train, staged: Any, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    """Stopped in the second stage's first epoch, too, of which nothing is done but its start."""
    stages = staged("- {epochs: 2, optim: {name: sgd, momentum: 0.9, lr: 0.01}}")
    arguments = ["--config", stages, "--epochs", "1", "--set", "train.ema_decay=0.9"]
    assert train(*arguments, name="straight").code == 0

    class Torn(BaseException):
        """As a kill: nothing gets a chance to save."""

    def act(number: int, image: Tensor, forward: Forward) -> Tensor:
        if number == 2 * stop_after:
            raise Torn
        return forward(image)

    with monkeypatch.context() as torn:
        Steps(torn, act)
        with pytest.raises(Torn):
            train(*arguments)
    finished = train(*arguments, "--resume", "auto")

    assert finished.code == 0, finished.err
    assert largest_difference(last(RUN), last(Path("runs/straight"))) == 0
    assert [row["val/person_iou"] for row in rows(RUN)] == [
        row["val/person_iou"] for row in rows(Path("runs/straight"))
    ]


def test_patience_ends_a_stage_and_goes_on_to_the_next_and_then_ends_the_run(
    train: Train, segtrain: Command, staged: Any, ious: list[float]
) -> None:
    # What the first stage reached does not count against the second.
    ious.extend([0.5, 0.4, 0.45, 0.3, 0.4, 0.35, 0.2])

    finished = train(
        *("--config", staged("- {epochs: 9, optim: {lr: 1.0e-4}}"), "--epochs", "9"),
        *("--set", "train.patience=2"),
    )

    assert finished.code == 0, finished.err
    assert [row["stage"] for row in rows(RUN)] == [1, 1, 1, 2, 2, 2, 2]
    early = [row.get("stopped_early") for row in rows(RUN)]
    assert early == [None, None, True, None, None, None, True]
    assert load_checkpoint(last(RUN)).training["history"][-1]["stopped_early"] is True
    [listed] = json.loads(segtrain("runs", "runs", "--json").out)
    assert listed["state"] == "finished"
    assert (listed["epochs_done"], listed["epochs_planned"]) == (7, 12)
    assert listed["best_epoch"] == 1


def test_patience_that_runs_out_with_the_last_epoch_stops_nothing_early(
    train: Train, ious: list[float]
) -> None:
    ious.extend([0.5, 0.4])

    assert train("--epochs", "2", "--set", "train.patience=1").code == 0

    assert not rows(RUN)[-1].get("stopped_early")


@pytest.mark.parametrize("stages", ["", "- {epochs: 1}"])
@pytest.mark.parametrize("patience", ["", "1"])
def test_a_finished_run_run_again_changes_nothing(
    train: Train, staged: Any, ious: list[float], stages: str, patience: str
) -> None:
    ious.extend([0.5, 0.4, 0.3])
    arguments = ["--epochs", "3", *(("--config", staged(stages)) if stages else ())]
    arguments += ["--set", f"train.patience={patience}"] if patience else []
    assert train(*arguments).code == 0
    before = contents(RUN)
    assert len(rows(RUN)) == {("", ""): 3, ("", "1"): 2}.get((stages, patience), 4 - bool(patience))

    again = train(*arguments, "--resume", "auto")

    assert again.code == 0, again.err
    assert contents(RUN) == before


def contents(run: Path) -> dict[str, bytes]:
    """All files but the log, which keeps what is said."""
    files = [p for p in run.rglob("*") if p.is_file() and p.name != "log.txt"]
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("stages", "words"),
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
def test_a_stage_with_a_mistake_is_refused_before_there_is_a_run(
    train: Train, staged: Any, stages: str, words: str
) -> None:
    line = assert_one_error(train("--config", staged(stages), "--epochs", "1"), 2)

    assert words in line
    assert not Path("runs").exists()


def test_damaged_pictures_of_an_earlier_stage_are_told_of(
    train: Train, staged: Any, tmp_path: Path
) -> None:
    """Each stage has loaders of its own, and those of the first have seen it first."""
    from coco_fixtures import make_toy_coco

    root = make_toy_coco(tmp_path / "coco")
    first = min((root / "train2017").iterdir())
    first.write_bytes(first.read_bytes()[:50])

    finished = train("--config", staged("- {epochs: 1}"), "--epochs", "1", data=root)

    assert finished.code == 0, finished.err
    told = [line for line in warnings_of(finished) if first.name in line]
    assert len(told) == 2


# --------------------------------------------------------------------------- whole pictures

SIZES = [(48, 64), (64, 48), (48, 48), (50, 120), (60, 61)]


@pytest.fixture(scope="module")
def many_sizes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of many sizes, with one person in the upper left of each."""
    root = tmp_path_factory.mktemp("sizes") / "coco"
    for split, first in (("train", 1), ("val", 101)):
        images = [image_row(first + i, *size) for i, size in enumerate(SIZES)]
        box = [0.0, 0.0, 20.0, 0.0, 20.0, 30.0, 0.0, 30.0]
        people = [annotation_row(row["id"], row["id"], [box]) for row in images]
        write_coco(root, split, images, people)
    return root


def test_whole_pictures_go_through_the_network_unpadded(
    train: Train, many_sizes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from segtrain.training import setting

    shown: list[tuple[tuple[int, ...], tuple[int, ...], float]] = []
    losses: list[tuple[float, int]] = []
    true_build = setting.build_loss

    def build_loss(config: Any) -> Any:
        loss_fn = true_build(config)

        def measured(logits: Tensor, mask: Tensor, border: Tensor | None) -> Tensor:
            person = float((mask == 1).double().mean())
            shown.append((tuple(logits.shape[2:]), tuple(mask.shape[1:]), person))
            assert (mask != 255).all()
            loss = loss_fn(logits, mask, border)
            losses.append((loss.item(), mask.numel()))
            return loss

        return measured

    monkeypatch.setattr(setting, "build_loss", build_loss)
    steps = Steps(monkeypatch, at(set()))
    # Five pictures in one step, each of its own size.
    finished = train(
        *("--set", "data.whole=true", "--batch-size", "1", "--epochs", "1"),
        *("--set", "train.accumulation_steps=5"),
        data=many_sizes,
    )

    assert finished.code == 0, finished.err
    assert [row["global_step"] for row in rows(RUN)] == [1]
    # The short side becomes 48.
    expected = [(48, 64), (64, 48), (48, 48), (48, 115), (48, 49)]
    assert sorted(steps.sizes) == sorted((1, *size) for size in expected)
    assert sorted(logits for logits, _, _ in shown) == sorted(expected)
    assert all(logits == mask for logits, mask, _ in shown)
    # The person covers 20 x 30 pixels of the original.
    covered = {logits: person for logits, _, person in shown}
    for size, original in zip(expected, SIZES, strict=True):
        assert covered[size] == pytest.approx(600 / (original[0] * original[1]), abs=0.02)
    # The step's loss is that of all its pixels, and not the mean of the pictures' own means.
    total = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
    assert rows(RUN)[0]["train/loss"] == pytest.approx(total, rel=1e-6)
    assert rows(RUN)[0]["train/loss"] != pytest.approx(sum(x for x, _ in losses) / 5, rel=1e-6)


# --------------------------------------------------------------------------- averages


def test_validation_and_best_use_the_average_and_last_holds_both(
    train: Train, segtrain: Command
) -> None:
    assert train("--epochs", "2", "--set", "train.ema_decay=0.9").code == 0

    held = load_checkpoint(last(RUN))
    best = load_checkpoint(RUN / "checkpoints/best.pt")
    assert held.training["average"].keys() == held.weights.keys() == best.weights.keys()
    changed = [
        name
        for name, value in held.weights.items()
        if not torch.equal(value, held.training["average"][name])
    ]
    assert "head.weight" in changed
    assert "encoders.0.1.running_var" in changed
    if best.epoch == 2:
        for name, value in held.training["average"].items():
            assert torch.equal(best.weights[name], value)
    # What validation said is what the average gives.
    judged = json.loads(segtrain("eval", "--checkpoint", RUN, "--json").out)
    assert judged["figures"]["person_iou"] == pytest.approx(
        best.metrics["val/person_iou"], abs=1e-6
    )


def test_the_best_of_an_averaged_run_is_the_average_of_that_epoch(
    train: Train, ious: list[float]
) -> None:
    ious.extend([0.1, 0.2])

    assert train("--epochs", "2", "--set", "train.ema_decay=0.9").code == 0

    held, best = load_checkpoint(last(RUN)), load_checkpoint(RUN / "checkpoints/best.pt")
    assert all(torch.equal(best.weights[n], v) for n, v in held.training["average"].items())
    assert not torch.equal(best.weights["head.weight"], held.weights["head.weight"])


ENCODER = (
    *("train", "--model", "unet", "--set", "model.encoder=mobilenet_v3_large", "--workers", "0"),
    *("--image-size", "48", "--batch-size", "4", "--precision", "fp32", "--device", "cpu"),
    *("--set", "train.freeze_encoder_epochs=2", "--set", "train.ema_decay=0.9"),
    *("--set", "optim.warmup_steps=0", "--lr", "1e-2"),
)


@pytest.mark.slow
def test_a_frozen_encoder_stays_as_it_is_with_an_average_and_over_a_stop(
    segtrain: Command, toy_coco: Path
) -> None:
    def run(name: str, epochs: int, *more: str) -> dict[str, Tensor]:
        arguments = [*ENCODER, "--data", toy_coco, "--name", name, "--epochs", epochs, *more]
        finished = segtrain(*arguments)
        assert finished.code == 0, finished.err
        saved = load_checkpoint(last(Path("runs") / name))
        return {
            **saved.weights,
            **{f"average {n}": v for n, v in saved.training["average"].items()},
        }

    def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
        return {name for name in before if not torch.equal(before[name], after[name])}

    straight = run("straight", 3)
    first = run("stopped", 1)
    second = run("stopped", 2, "--resume", "auto")
    third = run("stopped", 3, "--resume", "auto")

    still = moved(first, second)
    assert "head.weight" in still
    assert "average head.weight" in still
    assert not [name for name in still if "encoder." in name]
    freed = [name for name in moved(second, third) if "encoder." in name]
    assert any("running_mean" in name for name in freed)
    assert any("weight" in name and name.startswith("average") for name in freed)
    assert moved(third, straight) == set()


# --------------------------------------------------------------------------- compilation


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler itself gives some
@pytest.mark.parametrize("mode", ["blocks", "full"])
@pytest.mark.parametrize(
    "model",
    [
        ("--set", "model.base_channels=4", "--set", "model.depth=2"),
        (
            *("--model", "fc_densenet56", "--set", "model.down_blocks=[2]"),
            *("--set", "model.up_blocks=[2]", "--set", "model.bottleneck=2"),
            *("--set", "model.drop_rate=0"),  # a compiled network draws other values
        ),
    ],
    ids=["unet", "fc_densenet"],
)
def test_compiled_networks_train_as_others_do(
    segtrain: Command, toy_coco: Path, mode: str, model: tuple[str, ...]
) -> None:
    common = ("train", "--data", toy_coco, *model, "--image-size", "48", "--workers", "0")
    common += ("--precision", "fp32", "--device", "cpu", "--batch-size", "3", "--epochs", "2")
    for name in ("off", mode):
        finished = segtrain(*common, "--set", f"train.compile={name}", "--name", name)
        assert finished.code == 0, finished.err

    plain, compiled = Path("runs/off"), Path("runs") / mode
    assert (
        load_checkpoint(last(compiled)).weights.keys()
        == load_checkpoint(last(plain)).weights.keys()
    )
    for row, expected in zip(rows(compiled), rows(plain), strict=True):
        assert row["train/loss"] == pytest.approx(expected["train/loss"], abs=1e-3)
        assert row["val/person_iou"] == pytest.approx(expected["val/person_iou"], abs=5e-2)
    assert segtrain("eval", "--checkpoint", compiled).code == 0
