"""Network options on the command line: batch norm, encoders, pretrained weights, freezing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command import TOY_TRAINING, Command

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
    """A weights file in torchvision's format, with random weights."""
    from torchvision.models import resnet18

    torch.manual_seed(7)
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(resnet18().state_dict(), path)
    return path


def train_run(segtrain: Command, toy_coco: Path, *options: str | Path, name: str = "run") -> Path:
    finished = segtrain("train", "--data", toy_coco, "--name", name, *options)
    assert finished.code == 0, finished.err
    return Path("runs", name)


def test_a_frozen_encoder_is_unchanged_and_trained_afterwards(
    segtrain: Command, toy_coco: Path, resnet18_file: Path
) -> None:
    options = (*ENCODER, "--set", f"model.pretrained={resnet18_file}")
    frozen = ("--set", "train.freeze_encoder_epochs=1")
    run = train_run(segtrain, toy_coco, *options, *frozen, "--epochs", "1")
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


def test_a_checkpoint_does_not_need_the_pretrained_file(
    segtrain: Command, toy_coco: Path, resnet18_file: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.pth"
    copy.write_bytes(resnet18_file.read_bytes())
    options = (*ENCODER, "--set", f"model.pretrained={copy}", "--epochs", "1")
    run = train_run(segtrain, toy_coco, *options)
    copy.unlink()
    assert segtrain("eval", "--checkpoint", run).code == 0
    image = next((toy_coco / "val2017").iterdir())
    assert segtrain("predict", image, "--checkpoint", run).code == 0
    assert segtrain("train", "--resume", run, "--epochs", "2").code == 0


@pytest.mark.parametrize(
    ("options", "code", "expected"),
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
def test_invalid_options_create_no_run(
    segtrain: Command, toy_coco: Path, options: tuple[str, ...], code: int, expected: str
) -> None:
    finished = segtrain("train", "--data", toy_coco, *options)
    assert finished.code == code
    [error] = finished.error_lines
    assert expected in error
    assert not Path("runs").exists()


def test_recalibration_changes_the_saved_statistics_and_no_weights(
    segtrain: Command, toy_coco: Path
) -> None:
    running = train_run(segtrain, toy_coco, *TOY_TRAINING, "--epochs", "2", name="running")
    recalibrate = ("--epochs", "2", "--set", "train.bn_eval=recalibrate")
    recalibrated = train_run(segtrain, toy_coco, *TOY_TRAINING, *recalibrate, name="recalibrated")
    weights = weights_of(recalibrated)
    for key, value in weights_of(running).items():
        assert torch.equal(value, weights[key]) != is_running_statistic(key), key


@pytest.mark.parametrize("bn_eval", ["batch", "recalibrate"])
def test_eval_uses_the_batch_norm_mode_of_the_run(
    segtrain: Command, toy_coco: Path, bn_eval: str
) -> None:
    options = (*TOY_TRAINING, "--epochs", "1", "--set", f"train.bn_eval={bn_eval}")
    run = train_run(segtrain, toy_coco, *options)
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    finished = segtrain("eval", "--checkpoint", run, "--json", "--batch-size", "3")
    result = json.loads(finished.out)
    assert result["bn"] == bn_eval
    assert result["metrics"]["person_iou"] == pytest.approx(row["val/person_iou"], abs=1e-6)


def eval_json(segtrain: Command, run: Path, *options: str) -> dict[str, Any]:
    finished = segtrain("eval", "--checkpoint", run, "--json", *options)
    assert finished.code == 0, finished.err
    result: dict[str, Any] = json.loads(finished.out)
    return result


def test_eval_compares_the_three_batch_norm_modes(segtrain: Command, trained_run: Path) -> None:
    combined = eval_json(segtrain, trained_run, "--bn-eval", "all")
    separate = {
        mode: eval_json(segtrain, trained_run, "--bn-eval", mode)
        for mode in ("running", "batch", "recalibrate")
    }
    for mode, result in separate.items():
        assert combined[mode]["metrics"]["person_iou"] == result["metrics"]["person_iou"]
        assert combined[mode]["metrics"]["pixel_accuracy"] == result["metrics"]["pixel_accuracy"]
    assert len({result["metrics"]["pixel_accuracy"] for result in separate.values()}) == 3

    table = segtrain("eval", "--checkpoint", trained_run, "--bn-eval", "all").out
    for mode, result in separate.items():
        assert mode in table
        assert f"{result['metrics']['pixel_accuracy']:.4f}" in table


def test_batch_statistics_are_computed_per_image(segtrain: Command, trained_run: Path) -> None:
    options = ("--bn-eval", "batch", "--batch-size")
    one, many = (eval_json(segtrain, trained_run, *options, size) for size in ("1", "8"))
    assert one == many


def test_predict_uses_the_batch_norm_mode_of_the_run(segtrain: Command, toy_coco: Path) -> None:
    """With batch statistics, the mask does not depend on the running ones."""
    from segtrain.checkpoint import save_checkpoint
    from segtrain.imaging.images import read_image

    options = (*TOY_TRAINING, "--epochs", "1", "--set", "train.bn_eval=batch")
    best = train_run(segtrain, toy_coco, *options) / "checkpoints" / "best.pt"
    image = next((toy_coco / "val2017").iterdir())
    assert segtrain("predict", image, "--checkpoint", best, "--output", "before").code == 0
    checkpoint = load_checkpoint(best)
    for key, value in checkpoint.weights.items():
        if "running_mean" in key:
            value += 100
    save_checkpoint(best, checkpoint)
    assert segtrain("predict", image, "--checkpoint", best, "--output", "after").code == 0
    name = f"{image.stem}_mask.png"
    before, after = (read_image(Path(folder, name)) for folder in ("before", "after"))
    assert (before == after).all()


def test_memory_efficient_can_change_on_resume(segtrain: Command, toy_coco: Path) -> None:
    slim = ("growth_rate=2", "down_blocks=[1]", "bottleneck=1", "up_blocks=[1]", "stem_channels=4")
    options = [option for value in slim for option in ("--set", f"model.{value}")]
    common = ("--model", "tiramisu", *options, *TOY_TRAINING[4:], "--epochs")
    efficient = train_run(segtrain, toy_coco, *common, "2", name="efficient")
    mixed = train_run(segtrain, toy_coco, *common, "1", name="mixed")
    plain = ("--set", "model.memory_efficient=false")
    finished = segtrain("train", "--resume", mixed, "--epochs", "2", *plain)
    assert finished.code == 0, finished.err
    weights = weights_of(mixed)
    for key, value in weights_of(efficient).items():
        assert torch.equal(value, weights[key]), key


def test_the_example_model_of_contributing_trains_and_predicts(
    segtrain: Command, toy_coco: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One function and one row, extracted from CONTRIBUTING.md."""
    import re

    from torch import nn

    from segtrain.models import MODELS
    from segtrain.models.layers import Normalize, he_uniform_

    page = Path(__file__).parents[2].joinpath("CONTRIBUTING.md").read_text(encoding="utf-8")
    function, row = re.findall(r"```python\n(.*?)```", page.split("## Add a model")[1], re.DOTALL)[
        :2
    ]
    scope = {"nn": nn, "Normalize": Normalize, "he_uniform_": he_uniform_}
    exec(function, scope)  # our own page
    for name, factory in eval(f"{{{row}}}", scope).items():
        monkeypatch.setitem(MODELS, name, factory)

    options = ("--model", "per_pixel", "--set", "model.hidden=5", *TOY_TRAINING[4:])
    run = train_run(segtrain, toy_coco, *options, "--epochs", "1")
    assert weights_of(run)["1.weight"].shape == (5, 3, 1, 1)
    image = next((toy_coco / "val2017").iterdir())
    assert segtrain("predict", image, "--checkpoint", run).code == 0
    assert segtrain("train", "--resume", run, "--epochs", "2").code == 0
