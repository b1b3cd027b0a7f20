"""Tests that need a GPU: steps do not wait for it, and every precision trains."""

import math
from functools import cache
from typing import Any, get_args

import pytest
import torch
from helpers.command import no_device_sync
from helpers.training import training_steps
from torch import Tensor
from torchvision.ops import StochasticDepth

from segtrain.config.schema import OptimConfig
from segtrain.models import build_model
from segtrain.models.encoders import ENCODERS
from segtrain.models.unet import NormKind, Padding, UpKind
from segtrain.runtime.devices import (
    ResolvedPrecision,
    autocast_for,
    move_model,
    resolve_device,
    set_float32_precision,
)
from segtrain.training.ema import AveragedModel
from segtrain.training.losses import cross_entropy
from segtrain.training.optim import build_optimizer
from segtrain.training.step import FiniteBatchNormGuard, StepStats

pytestmark = pytest.mark.gpu

NETWORKS: dict[str, dict[str, Any]] = {
    "unet": {"base_channels": 8, "depth": 2},
    "fc_densenet56": {"down_blocks": [2], "up_blocks": [2], "bottleneck": 2},
}


def pinned_batches(num_batches: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    return [
        {
            "image": torch.randint(256, (6, 3, 64, 64), dtype=torch.uint8).pin_memory(),
            "mask": torch.randint(2, (6, 64, 64), dtype=torch.uint8).pin_memory(),
            "size": [(64, 64)] * 6,
        }
        for _ in range(num_batches)
    ]


@pytest.mark.parametrize("optimizer_name", ["rmsprop", "sgd", "adam", "adamw"])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_steps_do_not_wait_for_the_gpu(
    name: str, precision: ResolvedPrecision, optimizer_name: str
) -> None:
    device = resolve_device("cuda")
    model = build_model(name, **NETWORKS[name])
    move_model(model, device)
    optimizer = build_optimizer(model, OptimConfig(name=optimizer_name))  # type: ignore[arg-type]
    ema, bn_guard = AveragedModel(model, 0.9), FiniteBatchNormGuard(model)
    stats = StepStats(device)
    set_float32_precision(precision)
    model.train()

    def run(batches: list[dict[str, Any]]) -> None:
        for _ in training_steps(
            model,
            batches,
            stats,
            loss_fn=cross_entropy,
            optimizer=optimizer,
            scaler=torch.amp.GradScaler("cuda", enabled=precision == "fp16"),
            autocast=autocast_for(precision, device),
            device=device,
            lr=1e-3,
            micro_batch_size=4,
            clip_norm=1.0,
        ):
            ema.update(1)
            bn_guard.check()

    batches = pinned_batches(3)
    run(batches[:1])  # chooses kernels and allocates memory
    with no_device_sync():
        run(batches)

    epoch_stats = stats.read()
    assert math.isfinite(epoch_stats.loss)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["rmsprop", "sgd", "adam", "adamw"])
def test_the_kernel_skips_a_step_that_is_not_finite(name: str) -> None:
    device = resolve_device("cuda")
    weight = torch.nn.Conv2d(3, 4, 3).to(device)
    optimizer = build_optimizer(weight, OptimConfig(name=name, momentum=0.0))  # type: ignore[arg-type]
    before = [p.detach().clone() for p in weight.parameters()]
    for p in weight.parameters():
        p.grad = torch.full_like(p, math.nan)
    optimizer.found_inf = torch.ones((), device=device)  # type: ignore[attr-defined]
    optimizer.step()

    assert all(torch.equal(p, b) for p, b in zip(weight.parameters(), before, strict=True))


# --- Networks -----------------------------------------------------------------------------------

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"unet {padding} {norm} {up}": (
            "unet",
            {"base_channels": 16, "depth": 2, "padding": padding, "norm": norm, "up": up},
        )
        for padding in get_args(Padding)
        for norm in get_args(NormKind)
        for up in get_args(UpKind)
        if (padding, norm) != ("valid", "group")
    },
    **{f"unet on {name}": ("unet", {"encoder": name, "base_channels": 4}) for name in ENCODERS},
    "unet on resnet34 group bilinear": (
        "unet",
        {"encoder": "resnet34", "base_channels": 8, "norm": "group", "up": "bilinear"},
    ),
    "fc_densenet56": ("fc_densenet56", {"drop_rate": 0.0}),
}


def loss_and_gradient(
    variant: tuple[str, dict[str, Any]], device: torch.device, precision: ResolvedPrecision
) -> tuple[float, Tensor]:
    """Loss and unscaled gradient of one step; the gradient of all weights is one vector."""
    torch.manual_seed(0)
    name, kwargs = variant
    model = build_model(name, **kwargs).train()
    for module in model.modules():
        if isinstance(module, StochasticDepth):
            module.p = 0.0
    move_model(model, device)
    set_float32_precision(precision)
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(256, (4, 3, 64, 64), dtype=torch.uint8, generator=generator).to(device)
    mask = (image.float().mean(1) > 127).byte()
    with autocast_for(precision, device)():
        logits = model(image)
    loss = cross_entropy(logits, mask)
    scale = 2.0**8 if precision == "fp16" else 1.0
    (loss * scale).backward()
    gradients = [p.grad.flatten() / scale for p in model.parameters() if p.grad is not None]
    return loss.item(), torch.cat(gradients).double().cpu()


@cache
def cpu_loss_and_gradient(name: str) -> tuple[float, Tensor]:
    return loss_and_gradient(VARIANTS[name], torch.device("cpu"), "fp32")


# On a CPU, fp16 differs by at most 0.002 with a cosine of at least 0.994, bf16 by 0.003 with 0.98.
@pytest.mark.parametrize(
    ("precision", "max_relative_error", "min_cosine"),
    [("fp32", 1e-3, 0.999), ("tf32", 0.005, 0.98), ("fp16", 0.005, 0.98), ("bf16", 0.01, 0.95)],
)
@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_of_every_network_agree_with_the_cpu(
    name: str, precision: ResolvedPrecision, max_relative_error: float, min_cosine: float
) -> None:
    expected_loss, expected_gradient = cpu_loss_and_gradient(name)
    loss, gradient = loss_and_gradient(VARIANTS[name], resolve_device("cuda"), precision)

    assert expected_gradient.norm() > 0
    assert loss == pytest.approx(expected_loss, rel=max_relative_error)
    assert torch.cosine_similarity(gradient, expected_gradient, dim=0) > min_cosine


# --- Losses and gradients that are not finite ---------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("name", ["rmsprop", "sgd", "adam", "adamw"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_that_overflows_changes_nothing(
    precision: ResolvedPrecision, name: Any, momentum: float
) -> None:
    """Neither the weights nor their average nor batch-norm statistics."""
    device = resolve_device("cuda")
    model = build_model("unet", **NETWORKS["unet"])
    move_model(model, device)
    ema, stats = AveragedModel(model, 0.9), StepStats(device)
    bn_guard = FiniteBatchNormGuard(model, ema.model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    scaler = torch.amp.GradScaler("cuda", enabled=precision == "fp16")
    [batch] = pinned_batches(1)
    batch["image"] = torch.full((6, 3, 64, 64), math.inf).pin_memory()
    for _ in training_steps(
        model.train(),
        [batch],
        stats,
        loss_fn=cross_entropy,
        optimizer=build_optimizer(model, OptimConfig(name=name, momentum=momentum)),
        scaler=scaler,
        autocast=autocast_for(precision, device),
        device=device,
        lr=1e-3,
        micro_batch_size=4,
        clip_norm=1.0,
    ):
        ema.update(1)
        bn_guard.check()

    assert stats.read().skipped == 1
    for network in (model, ema.model):
        for key, value in network.state_dict().items():
            assert "num_batches" in key or torch.equal(value, before[key]), key
    assert precision != "fp16" or scaler.get_scale() == 2.0**15
