"""Batch-norm statistics at evaluation time, compared with statistics measured by hooks."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command import TOY_TRAINING, Command
from torch import Tensor, nn

from segtrain.models import build_model
from segtrain.models.batch_norm import eval_mode, recalibrate
from segtrain.models.dense_block import DenseBlock
from segtrain.runtime.devices import autocast_for
from segtrain.runtime.signals import Stopped, handle_signals

CPU = torch.device("cpu")
SLIM_DENSE: dict[str, Any] = {
    "growth_rate": 3,
    "down_blocks": [1, 2],
    "bottleneck": 2,
    "up_blocks": [2, 1],
    "stem_channels": 4,
    "drop_rate": 0.5,
}
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "unet": lambda: build_model("unet", base_channels=4, depth=2, drop_rate=0.5),
    "tiramisu": lambda: build_model("tiramisu", **SLIM_DENSE),
    "unet valid": lambda: build_model("unet", base_channels=4, depth=2, padding="valid"),
}
all_networks = pytest.mark.parametrize("name", NETWORKS)


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name]()


def batch_norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def random_images(num: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num, 3, 20, 24), dtype=torch.uint8, generator=generator)


def copy_state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def measure_statistics(
    model: nn.Module, batches: list[Tensor], correction: int = 1
) -> dict[str, tuple[Tensor, Tensor]]:
    """Measure the mean over batches of each norm's input mean and variance.

    Dense blocks use the plain form, in which forward hooks on the norms work.
    """
    sums: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def record(key: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            var, mean = torch.var_mean(inputs[0].detach(), (0, 2, 3), correction=correction)
            sums.setdefault(key, []).append((mean, var))

        return hook

    handles = [
        module.register_forward_pre_hook(record(key))
        for key, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d)
    ]
    model.eval()
    for norm in batch_norms(model):
        norm.train()
        norm.track_running_stats = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DenseBlock, "forward", DenseBlock.forward_plain)
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    for norm in batch_norms(model):
        norm.track_running_stats = True
    return {
        key: (
            torch.stack([mean for mean, _ in pairs]).mean(0),
            torch.stack([var for _, var in pairs]).mean(0),
        )
        for key, pairs in sums.items()
    }


@all_networks
def test_batch_statistics_do_not_depend_on_running_statistics(name: str) -> None:
    model, image = build(name), random_images(1)
    for norm in batch_norms(model):
        norm.running_mean.uniform_(-1, 1)
    with torch.inference_mode():
        with eval_mode(model, "batch"):
            before = model(image)
        for norm in batch_norms(model):
            norm.running_mean += 10
            norm.running_var *= 7
        with eval_mode(model, "batch"):
            assert torch.equal(model(image), before)
        with eval_mode(model, "running"):
            assert not torch.allclose(model(image), before, atol=1e-2)


@all_networks
def test_batch_statistics_are_those_of_the_input_of_each_norm(name: str) -> None:
    """Running statistics set to those of each norm's input give the same logits."""
    model, image = build(name).double(), random_images(1)
    with torch.inference_mode(), eval_mode(model, "batch"):
        expected = model(image)
    for key, (mean, var) in measure_statistics(model, [image], correction=0).items():
        model.get_submodule(key).running_mean.copy_(mean)
        model.get_submodule(key).running_var.copy_(var)
    with torch.inference_mode(), eval_mode(model, "running"):
        torch.testing.assert_close(model(image), expected, rtol=1e-9, atol=1e-9)


@all_networks
def test_evaluating_with_batch_statistics_does_not_change_the_network(name: str) -> None:
    model = build(name)
    before = copy_state(model)
    with torch.inference_mode(), eval_mode(model, "batch"):
        model(random_images(2))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert not any(module.training for module in model.modules())
    model.train()(random_images(2))
    assert all(
        norm.num_batches_tracked == 1 for norm in batch_norms(model)
    )  # statistics are tracked again


def test_eval_mode_restores_the_norms_after_an_error() -> None:
    model = build("unet")

    def fail() -> None:
        with eval_mode(model, "batch"):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert all(norm.track_running_stats and not norm.training for norm in batch_norms(model))


def split_batches(images: Tensor, size: int) -> Iterator[dict[str, Tensor]]:
    for start in range(0, len(images), size):
        yield {"image": images[start : start + size]}


def run_recalibrate(model: nn.Module, images: Tensor, size: int, **kwargs: Any) -> list[int]:
    batch_sizes: list[int] = []
    recalibrate(
        model,
        split_batches(images, size),
        device=CPU,
        autocast=autocast_for("fp32", CPU),
        on_batch=batch_sizes.append,
        **kwargs,
    )
    return batch_sizes


@all_networks
def test_recalibrate_measures_the_mean_over_batches_without_dropout(name: str) -> None:
    model, images = build(name).double(), random_images(6)
    expected = measure_statistics(model, list(images.split(2)))
    for norm in batch_norms(model):
        norm.running_mean.fill_(123)  # the previous value must not matter
    run_recalibrate(model, images, 2)
    assert len(expected) == len(batch_norms(model))
    for key, (mean, var) in expected.items():
        norm = model.get_submodule(key)
        torch.testing.assert_close(norm.running_mean, mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(norm.running_var, var, rtol=1e-9, atol=1e-9)
        assert norm.momentum == 0.1
        assert norm.num_batches_tracked == 3
    assert not any(module.training for module in model.modules())


@all_networks
def test_recalibrate_does_not_change_weights(name: str) -> None:
    model = build(name)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    run_recalibrate(model, random_images(4), 2)
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, before[key]), key
        assert parameter.grad is None


def test_recalibrate_stops_after_enough_images() -> None:
    assert run_recalibrate(build("unet"), random_images(7), 2, num_images=3) == [2, 2]
    assert run_recalibrate(build("unet"), random_images(3), 2, num_images=100) == [2, 1]


def test_recalibrating_stops_at_a_signal() -> None:
    with handle_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped):
            run_recalibrate(build("unet"), random_images(4), 2)


def test_recalibrate_keeps_the_statistics_of_a_frozen_encoder() -> None:
    torch.manual_seed(0)
    model = build_model("unet", encoder="resnet18", base_channels=2)
    model.freeze_encoder(True)
    before = copy_state(model)
    run_recalibrate(model, random_images(4), 2)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed
    assert not any(key.startswith("encoder.") for key in changed)


def test_a_batch_is_split_only_where_its_images_are_independent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a CPU, FC-DenseNets process few images at a time, but batch statistics need all images."""
    model, images = build("tiramisu"), random_images(3)
    batch_sizes: list[int] = []
    model.stem.register_forward_hook(lambda _, inputs, output: batch_sizes.append(len(output)))

    def logits(bn_eval: str) -> Tensor:
        with torch.inference_mode(), eval_mode(model, bn_eval):
            return model(images)

    whole = {bn_eval: logits(bn_eval) for bn_eval in ("running", "batch")}
    monkeypatch.setattr("segtrain.models.fc_densenet._REUSED_BYTES", 1)
    batch_sizes.clear()
    for bn_eval, expected in whole.items():
        torch.testing.assert_close(logits(bn_eval), expected)
    assert batch_sizes == [1, 1, 1, 3]
    batch_sizes.clear()
    run_recalibrate(model, images, 3)
    model.train()(images)
    assert batch_sizes == [3, 3]


# --- Several GPUs -------------------------------------------------------------------------------


@pytest.mark.parametrize("bn_eval", ["running", "batch", "recalibrate"])
def test_sync_bn_synchronizes_only_in_training_steps(
    segtrain: Command, toy_coco: Path, monkeypatch: pytest.MonkeyPatch, bn_eval: str
) -> None:
    """Elsewhere the number of batches differs between processes, and one would wait forever."""

    def convert_norms(model: nn.Module, *_: object) -> None:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)

    def forward(norm: nn.SyncBatchNorm, x: Tensor) -> Tensor:
        assert torch.is_grad_enabled()
        synced.append(norm)
        return plain_forward(norm, x)

    synced: list[nn.SyncBatchNorm] = []
    plain_forward = nn.SyncBatchNorm.forward
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", forward)
    common = ["--data", toy_coco, *TOY_TRAINING, "--epochs", "2"]
    common += ["--set", f"train.bn_eval={bn_eval}"]
    assert segtrain("train", *common, "--name", "plain").code == 0
    assert not synced
    monkeypatch.setattr("segtrain.training.fit.prepare_model", convert_norms)
    assert segtrain("train", *common, "--name", "sync", "--debug").code == 0

    plain, sync = (
        [json.loads(line) for line in Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()]
        for name in ("plain", "sync")
    )
    assert synced
    for key in ("train/loss", "val/person_iou", "val/pixel_accuracy"):
        assert [row[key] for row in sync] == [row[key] for row in plain]
