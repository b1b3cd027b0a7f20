"""What the command line makes of a network's options: statistics, encoders, weights, freezing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TOY_TRAINING, Command

from segtrain.checkpoint import load_checkpoint

ENCODER = (
    *("--set", "model.encoder=resnet18", "--set", "model.base_channels=2", "--image-size", "48"),
    *("--batch-size", "4", "--workers", "0", "--precision", "fp32", "--device", "cpu"),
    *("--set", "optim.warmup_steps=5"),
)


def weights_of(run: Path, which: str = "last") -> dict[str, torch.Tensor]:
    return load_checkpoint(run / "checkpoints" / f"{which}.pt").weights


def is_running_statistic(key: str) -> bool:
    return "running_" in key or key.endswith("num_batches_tracked")


@pytest.fixture(scope="session")
def resnet18_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as torchvision's own, of weights that nobody else has."""
    from torchvision.models import resnet18

    torch.manual_seed(7)
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(resnet18().state_dict(), path)
    return path


def train(segtrain: Command, toy_coco: Path, *options: str | Path, name: str = "run") -> Path:
    finished = segtrain("train", "--data", toy_coco, "--name", name, *options)
    assert finished.code == 0, finished.err
    return Path("runs", name)


def test_a_frozen_encoder_is_as_it_was_and_learns_afterwards(
    segtrain: Command, toy_coco: Path, resnet18_file: Path
) -> None:
    options = (*ENCODER, "--set", f"model.pretrained={resnet18_file}")
    frozen = ("--set", "train.freeze_encoder_epochs=1")
    run = train(segtrain, toy_coco, *options, *frozen, "--epochs", "1")
    pretrained = torch.load(resnet18_file, weights_only=True)
    encoder = {
        key.removeprefix("encoder."): value
        for key, value in weights_of(run).items()
        if key.startswith("encoder.")
    }
    assert len(encoder) > 100
    for key, value in encoder.items():
        assert torch.equal(value, pretrained[key]), key

    finished = segtrain("train", "--resume", run, "--epochs", "2")
    assert finished.code == 0, finished.err
    for key, value in weights_of(run).items():
        if key.startswith("encoder.") and not key.endswith("num_batches_tracked"):
            assert not torch.equal(value, pretrained[key.removeprefix("encoder.")]), key


def test_the_checkpoint_needs_the_pretrained_file_no_more(
    segtrain: Command, toy_coco: Path, resnet18_file: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.pth"
    mine.write_bytes(resnet18_file.read_bytes())
    options = (*ENCODER, "--set", f"model.pretrained={mine}", "--epochs", "1")
    run = train(segtrain, toy_coco, *options)
    mine.unlink()
    assert segtrain("eval", "--checkpoint", run).code == 0
    picture = next((toy_coco / "val2017").iterdir())
    assert segtrain("predict", picture, "--checkpoint", run).code == 0
    assert segtrain("train", "--resume", run, "--epochs", "2").code == 0


@pytest.mark.parametrize(
    ("options", "code", "must_say"),
    [
        (("--set", "train.freeze_encoder_epochs=1"), 2, "encoder"),
        (("--set", "model.pretrained=true"), 2, "encoder"),
        (("--set", "model.encoder=resnet18", "--set", "model.pretrained=no.pth"), 4, "no.pth"),
        (("--set", "model.encoder=resnet99"), 2, "resnet99"),
        (("--set", "model.padding=valid", "--set", "model.norm=group"), 2, "padding=valid"),
        (("--set", "train.bn_eval=sometimes"), 2, "bn_eval"),
        (("--model", "tiramisu", "--set", "model.memory_efficient=perhaps"), 2, "memory_efficient"),
    ],
)
def test_options_that_cannot_be_leave_nothing_behind(
    segtrain: Command, toy_coco: Path, options: tuple[str, ...], code: int, must_say: str
) -> None:
    finished = segtrain("train", "--data", toy_coco, *options)
    assert finished.code == code
    (error,) = finished.error_lines
    assert must_say in error
    assert not Path("runs").exists()


def test_recalibrated_statistics_are_saved_and_the_weights_are_the_same(
    segtrain: Command, toy_coco: Path
) -> None:
    plain = train(segtrain, toy_coco, *TOY_TRAINING, "--epochs", "2", name="plain")
    again = ("--epochs", "2", "--set", "train.bn_eval=recalibrate")
    measured = train(segtrain, toy_coco, *TOY_TRAINING, *again, name="measured")
    theirs = weights_of(measured)
    for key, value in weights_of(plain).items():
        if is_running_statistic(key):
            assert not torch.equal(value, theirs[key]), key
        else:
            assert torch.equal(value, theirs[key]), key


@pytest.mark.parametrize("bn_eval", ["batch", "recalibrate"])
def test_eval_goes_by_what_the_run_went_by(segtrain: Command, toy_coco: Path, bn_eval: str) -> None:
    options = (*TOY_TRAINING, "--epochs", "1", "--set", f"train.bn_eval={bn_eval}")
    run = train(segtrain, toy_coco, *options)
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    finished = segtrain("eval", "--checkpoint", run, "--json", "--batch-size", "3")
    judged = json.loads(finished.out)
    assert judged["bn"] == bn_eval
    assert judged["figures"]["person_iou"] == pytest.approx(row["val/person_iou"], abs=1e-6)


def eval_json(segtrain: Command, run: Path, *options: str) -> dict[str, Any]:
    finished = segtrain("eval", "--checkpoint", run, "--json", *options)
    assert finished.code == 0, finished.err
    result: dict[str, Any] = json.loads(finished.out)
    return result


def test_eval_shows_the_difference_between_the_three_statistics(
    segtrain: Command, trained_run: Path
) -> None:
    together = eval_json(segtrain, trained_run, "--bn-eval", "all")
    apart = {
        way: eval_json(segtrain, trained_run, "--bn-eval", way)
        for way in ("running", "batch", "recalibrate")
    }
    for way, judged in apart.items():
        assert together[way]["figures"]["person_iou"] == judged["figures"]["person_iou"]
        assert together[way]["figures"]["pixel_accuracy"] == judged["figures"]["pixel_accuracy"]
    assert len({judged["figures"]["pixel_accuracy"] for judged in apart.values()}) == 3

    table = segtrain("eval", "--checkpoint", trained_run, "--bn-eval", "all").out
    for way, judged in apart.items():
        assert way in table
        assert f"{judged['figures']['pixel_accuracy']:.4f}" in table


def test_by_batch_statistics_no_picture_feels_the_others(
    segtrain: Command, trained_run: Path
) -> None:
    options = ("--bn-eval", "batch", "--batch-size")
    one, many = (eval_json(segtrain, trained_run, *options, size) for size in ("1", "8"))
    assert one == many


def test_predict_goes_by_what_the_run_went_by(segtrain: Command, toy_coco: Path) -> None:
    """By batch statistics a picture's mask does not depend on the running ones."""
    from segtrain.checkpoint import save_checkpoint
    from segtrain.images import read_image

    options = (*TOY_TRAINING, "--epochs", "1", "--set", "train.bn_eval=batch")
    best = train(segtrain, toy_coco, *options) / "checkpoints" / "best.pt"
    picture = next((toy_coco / "val2017").iterdir())
    assert segtrain("predict", picture, "--checkpoint", best, "--output", "before").code == 0
    checkpoint = load_checkpoint(best)
    for key, value in checkpoint.weights.items():
        if "running_mean" in key:
            value += 100
    save_checkpoint(best, checkpoint)
    assert segtrain("predict", picture, "--checkpoint", best, "--output", "after").code == 0
    name = f"{picture.stem}_mask.png"
    before, after = (read_image(Path(folder, name)) for folder in ("before", "after"))
    assert (before == after).all()


def test_a_run_may_go_on_with_another_way_to_keep_memory(segtrain: Command, toy_coco: Path) -> None:
    slim = ("growth_rate=2", "down_blocks=[1]", "bottleneck=1", "up_blocks=[1]", "stem_channels=4")
    options = [option for value in slim for option in ("--set", f"model.{value}")]
    common = ("--model", "tiramisu", *options, *TOY_TRAINING[4:], "--epochs")
    lean = train(segtrain, toy_coco, *common, "2", name="lean")
    mixed = train(segtrain, toy_coco, *common, "1", name="mixed")
    plain = ("--set", "model.memory_efficient=false")
    finished = segtrain("train", "--resume", mixed, "--epochs", "2", *plain)
    assert finished.code == 0, finished.err
    theirs = weights_of(mixed)
    for key, value in weights_of(lean).items():
        assert torch.equal(value, theirs[key]), key


def test_the_model_that_contributing_adds_trains_and_predicts(
    segtrain: Command, toy_coco: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One function and one row, taken from the page itself."""
    import re

    from torch import nn

    from segtrain.models import MODELS
    from segtrain.models.layers import Normalize, he_uniform_

    page = Path(__file__).parents[1].joinpath("CONTRIBUTING.md").read_text(encoding="utf-8")
    function, row = re.findall(r"```python\n(.*?)```", page.split("## Add a model")[1], re.DOTALL)[
        :2
    ]
    scope = {"nn": nn, "Normalize": Normalize, "he_uniform_": he_uniform_}
    exec(function, scope)  # our own page
    for name, factory in eval(f"{{{row}}}", scope).items():
        monkeypatch.setitem(MODELS, name, factory)

    options = ("--model", "per_pixel", "--set", "model.hidden=5", *TOY_TRAINING[4:])
    run = train(segtrain, toy_coco, *options, "--epochs", "1")
    assert weights_of(run)["1.weight"].shape == (5, 3, 1, 1)
    picture = next((toy_coco / "val2017").iterdir())
    assert segtrain("predict", picture, "--checkpoint", run).code == 0
    assert segtrain("train", "--resume", run, "--epochs", "2").code == 0
