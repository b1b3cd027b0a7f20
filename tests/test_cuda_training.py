"""What can only be seen on a GPU: that nothing waits for it, and that its precisions train."""

import math
from typing import Any

import pytest
import torch
from conftest import no_waiting
from torch import Tensor

from segtrain.config import OptimConfig
from segtrain.devices import (
    ResolvedPrecision,
    autocast_for,
    move_model,
    resolve_device,
    set_float32_arithmetic,
)
from segtrain.models import build_model
from segtrain.training.averaging import AveragedModel, StatisticsGuard
from segtrain.training.engine import Tally, training_steps
from segtrain.training.losses import cross_entropy
from segtrain.training.memory import fitting_number, rehearse_step
from segtrain.training.optim import build_optimizer

pytestmark = pytest.mark.gpu

NETWORKS: dict[str, dict[str, Any]] = {
    "unet": {"base_channels": 8, "depth": 2},
    "fc_densenet56": {"down_blocks": [2], "up_blocks": [2], "bottleneck": 2},
}


def pinned_batches(number: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    return [
        {
            "image": torch.randint(256, (6, 3, 64, 64), dtype=torch.uint8).pin_memory(),
            "mask": torch.randint(2, (6, 64, 64), dtype=torch.uint8).pin_memory(),
            "size": [(64, 64)] * 6,
        }
        for _ in range(number)
    ]


@pytest.mark.parametrize("optimizer_name", ["rmsprop", "sgd", "adam", "adamw"])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_no_step_waits_for_the_gpu(
    name: str,
    precision: ResolvedPrecision,
    optimizer_name: str,
) -> None:
    device = resolve_device("cuda")
    model = build_model(name, **NETWORKS[name])
    move_model(model, device)
    optimizer = build_optimizer(model, OptimConfig(name=optimizer_name))  # type: ignore[arg-type]
    average, guard, tally = AveragedModel(model, 0.9), StatisticsGuard(model), Tally(device)
    set_float32_arithmetic(precision)
    model.train()

    def take(batches: list[dict[str, Any]]) -> None:
        for _ in training_steps(
            model,
            batches,
            tally,
            loss_fn=cross_entropy,
            optimizer=optimizer,
            scaler=torch.amp.GradScaler("cuda", enabled=precision == "fp16"),
            autocast=autocast_for(precision, device),
            device=device,
            before_step=lambda: 1e-3,
            images_at_once=4,
            clip_norm=1.0,
        ):
            average.update(1)
            guard.look()

    batches = pinned_batches(3)
    take(batches[:1])  # kernels are chosen and memory is taken
    with no_waiting():
        take(batches)

    found = tally.read()
    assert math.isfinite(found.loss)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["rmsprop", "sgd", "adam", "adamw"])
def test_a_step_that_is_not_finite_is_left_out_by_the_kernel(name: str) -> None:
    device = resolve_device("cuda")
    weight = torch.nn.Conv2d(3, 4, 3).to(device)
    optimizer = build_optimizer(weight, OptimConfig(name=name, momentum=0.0))  # type: ignore[arg-type]
    before = [p.detach().clone() for p in weight.parameters()]
    for p in weight.parameters():
        p.grad = torch.full_like(p, math.nan)
    optimizer.found_inf = torch.ones((), device=device)  # type: ignore[attr-defined]
    optimizer.step()

    assert all(torch.equal(p, b) for p, b in zip(weight.parameters(), before, strict=True))


def test_a_batch_that_fits_is_found_where_memory_ends() -> None:
    device = resolve_device("cuda")
    model = build_model("unet", base_channels=64)
    move_model(model, device)
    total = torch.cuda.get_device_properties(device).total_memory
    held: list[Tensor] = []
    # All but two gigabytes are somebody else's.
    free, _ = torch.cuda.mem_get_info(device)
    held.append(torch.empty(max(free - 2 * 2**30, 1), dtype=torch.uint8, device=device))

    def try_with(number: int) -> None:
        rehearse_step(
            model,
            number,
            image_size=224,
            loss_fn=cross_entropy,
            autocast=autocast_for("fp32", device),
            device=device,
        )

    found = fitting_number(try_with, 64)

    assert total > free
    assert 0 < found < 64
