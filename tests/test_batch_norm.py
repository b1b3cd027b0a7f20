"""The statistics that networks are judged and used by, against batch norm written out by hand."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TOY_TRAINING, Command
from torch import Tensor, nn

from segtrain.devices import autocast_for
from segtrain.models import build_model
from segtrain.models.batch_norm import evaluation_statistics, recalibrate
from segtrain.models.dense_block import DenseBlock

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
every_network = pytest.mark.parametrize("name", NETWORKS)


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name]()


def norms_of(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def pictures(num: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num, 3, 20, 24), dtype=torch.uint8, generator=generator)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def statistics_by_hooks(
    model: nn.Module, batches: list[Tensor], correction: int = 1
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean over the batches of each norm's mean and variance, from what goes into it.

    In the textbook's form, where the norms are modules that can be listened to.
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
    for norm in norms_of(model):
        norm.train()
        norm.track_running_stats = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DenseBlock, "forward", DenseBlock.as_in_the_paper)
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    for norm in norms_of(model):
        norm.track_running_stats = True
    return {
        key: (
            torch.stack([mean for mean, _ in pairs]).mean(0),
            torch.stack([var for _, var in pairs]).mean(0),
        )
        for key, pairs in sums.items()
    }


@every_network
def test_batch_statistics_make_the_shift_of_a_running_mean_irrelevant(name: str) -> None:
    model, image = make(name), pictures(1)
    for norm in norms_of(model):
        norm.running_mean.uniform_(-1, 1)
    with torch.inference_mode():
        with evaluation_statistics(model, "batch"):
            before = model(image)
        for norm in norms_of(model):
            norm.running_mean += 10
            norm.running_var *= 7
        with evaluation_statistics(model, "batch"):
            assert torch.equal(model(image), before)
        with evaluation_statistics(model, "running"):
            assert not torch.allclose(model(image), before, atol=1e-2)


@every_network
def test_batch_statistics_are_those_of_each_layers_input(name: str) -> None:
    """Running statistics set to what goes into each norm give the same logits."""
    model, image = make(name).double(), pictures(1)
    with torch.inference_mode(), evaluation_statistics(model, "batch"):
        expected = model(image)
    for key, (mean, var) in statistics_by_hooks(model, [image], correction=0).items():
        model.get_submodule(key).running_mean.copy_(mean)
        model.get_submodule(key).running_var.copy_(var)
    with torch.inference_mode(), evaluation_statistics(model, "running"):
        torch.testing.assert_close(model(image), expected, rtol=1e-9, atol=1e-9)


@every_network
def test_judging_by_batch_statistics_changes_nothing_in_the_network(name: str) -> None:
    model = make(name)
    before = state_of(model)
    with torch.inference_mode(), evaluation_statistics(model, "batch"):
        model(pictures(2))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert not any(module.training for module in model.modules())
    model.train()(pictures(2))
    assert all(norm.num_batches_tracked == 1 for norm in norms_of(model))  # it learns again


def test_the_network_is_put_right_after_an_error() -> None:
    model = make("unet")

    def fail() -> None:
        with evaluation_statistics(model, "batch"):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert all(norm.track_running_stats and not norm.training for norm in norms_of(model))


def batches_of(images: Tensor, size: int) -> Iterator[dict[str, Tensor]]:
    for start in range(0, len(images), size):
        yield {"image": images[start : start + size]}


def recalibrated(model: nn.Module, images: Tensor, size: int, **kwargs: Any) -> list[int]:
    seen: list[int] = []
    recalibrate(
        model,
        batches_of(images, size),
        device=CPU,
        autocast=autocast_for("fp32", CPU),
        on_batch=seen.append,
        **kwargs,
    )
    return seen


@every_network
def test_recalibrating_measures_the_mean_over_batches_without_dropout(name: str) -> None:
    model, images = make(name).double(), pictures(6)
    expected = statistics_by_hooks(model, list(images.split(2)))
    for norm in norms_of(model):
        norm.running_mean.fill_(123)  # what was there before does not count
    recalibrated(model, images, 2)
    assert len(expected) == len(norms_of(model))
    for key, (mean, var) in expected.items():
        norm = model.get_submodule(key)
        torch.testing.assert_close(norm.running_mean, mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(norm.running_var, var, rtol=1e-9, atol=1e-9)
        assert norm.momentum == 0.1
        assert norm.num_batches_tracked == 3
    assert not any(module.training for module in model.modules())


@every_network
def test_recalibrating_touches_no_weight(name: str) -> None:
    model = make(name)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    recalibrated(model, pictures(4), 2)
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, before[key]), key
        assert parameter.grad is None


def test_recalibrating_stops_after_enough_images() -> None:
    assert recalibrated(make("unet"), pictures(7), 2, num_images=3) == [2, 2]
    assert recalibrated(make("unet"), pictures(3), 2, num_images=100) == [2, 1]


def test_a_frozen_encoder_keeps_its_statistics() -> None:
    torch.manual_seed(0)
    model = build_model("unet", encoder="resnet18", base_channels=2)
    model.freeze_encoder(True)
    before = state_of(model)
    recalibrated(model, pictures(4), 2)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed
    assert not any(key.startswith("encoder.") for key in changed)


def test_a_batch_is_split_where_pictures_do_not_feel_each_other_and_only_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """FC-DenseNets take few images at a time on a CPU; a batch's statistics are of all of it."""
    model, images = make("tiramisu"), pictures(3)
    stems: list[int] = []
    model.stem.register_forward_hook(lambda module, inputs, output: stems.append(len(output)))

    def logits(bn_eval: str) -> Tensor:
        with torch.inference_mode(), evaluation_statistics(model, bn_eval):
            return model(images)

    whole = {bn_eval: logits(bn_eval) for bn_eval in ("running", "batch")}
    monkeypatch.setattr("segtrain.models.tiramisu._REUSED_BYTES", 1)
    stems.clear()
    for bn_eval, expected in whole.items():
        torch.testing.assert_close(logits(bn_eval), expected)
    assert stems == [1, 1, 1, 3]
    stems.clear()
    recalibrated(model, images, 3)
    model.train()(images)
    assert stems == [3, 3]


# --- Over several GPUs --------------------------------------------------------------------------


@pytest.mark.parametrize("bn_eval", ["running", "batch", "recalibrate"])
def test_sync_bn_synchronizes_in_steps_only_and_is_judged_as_plain_batch_norm(
    segtrain: Command, toy_coco: Path, monkeypatch: pytest.MonkeyPatch, bn_eval: str
) -> None:
    """Elsewhere the processes pass different numbers of batches, and one would wait for ever."""

    def synchronized(model: nn.Module, *_: object) -> None:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)

    def forward(norm: nn.SyncBatchNorm, x: Tensor) -> Tensor:
        assert torch.is_grad_enabled()
        steps.append(norm)
        return plain_forward(norm, x)

    steps: list[nn.SyncBatchNorm] = []
    plain_forward = nn.SyncBatchNorm.forward
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", forward)
    common = ["--data", toy_coco, *TOY_TRAINING, "--epochs", "2"]
    common += ["--set", f"train.bn_eval={bn_eval}"]
    assert segtrain("train", *common, "--name", "plain").code == 0
    assert not steps
    monkeypatch.setattr("segtrain.training.fit.make_ready", synchronized)
    assert segtrain("train", *common, "--name", "sync", "--debug").code == 0

    plain, sync = (
        [json.loads(line) for line in Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()]
        for name in ("plain", "sync")
    )
    assert steps
    for key in ("train/loss", "val/person_iou", "val/pixel_accuracy"):
        assert [row[key] for row in sync] == [row[key] for row in plain]
