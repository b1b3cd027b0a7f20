"""Training steps, compared with gradient descent by hand and with whole batches."""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers.training import training_steps
from torch import Tensor, nn

from segtrain.config.schema import OptimConfig
from segtrain.models import build_model
from segtrain.training.ema import AveragedModel
from segtrain.training.losses import cross_entropy
from segtrain.training.optim import build_optimizer
from segtrain.training.step import (
    FiniteBatchNormGuard,
    StepResult,
    StepStats,
    micro_batches,
)

CPU = torch.device("cpu")


class LinearModel(nn.Module):
    """A 1x1 convolution: the smallest network that can learn."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def forward(self, image: Tensor) -> Tensor:
        return self.conv(image.float() / 255 - 0.5)


def separable_batches(sizes: list[int], *, ignored: float = 0.0) -> list[dict[str, Any]]:
    """Batches of the given sizes in which a pixel is person if red is larger than green.

    Args:
        ignored: mean fraction of ignored pixels.
    """
    rng = np.random.default_rng(6)
    batches = []
    for size in sizes:
        image = rng.integers(0, 256, (size, 3, 8, 8), dtype=np.uint8)
        mask = (image[:, 0] > image[:, 1]).astype(np.uint8)
        # The fraction differs from image to image.
        mask[rng.random(mask.shape) < rng.uniform(0, 2 * ignored, (size, 1, 1))] = 255
        batches.append(
            {
                "image": torch.from_numpy(image),
                "mask": torch.from_numpy(mask),
                "size": [(8, 8)] * size,
            }
        )
    return batches


def run_steps(
    model: nn.Module,
    batches: list[dict[str, Any]],
    *,
    stats: StepStats | None = None,
    lr: float | Callable[[], float] = 0.05,
    **kwargs: Any,
) -> list[StepResult]:
    """Take a step per batch; `kwargs` are those of `train_step`."""
    kwargs.setdefault("loss_fn", cross_entropy)
    kwargs.setdefault("optimizer", build_optimizer(model, OptimConfig()))
    kwargs.setdefault("scaler", torch.amp.GradScaler("cpu", enabled=False))
    kwargs.setdefault("autocast", contextlib.nullcontext)
    kwargs.setdefault("micro_batch_size", 100)
    return list(
        training_steps(
            model,
            batches,
            stats if stats is not None else StepStats(CPU),
            device=CPU,
            lr=lr,
            **kwargs,
        )
    )


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return build_optimizer(model, OptimConfig(name="sgd", weight_decay=0.0))


def test_training_solves_a_separable_problem() -> None:
    model, batches = LinearModel(), separable_batches([4] * 10)
    optimizer, losses = build_optimizer(model, OptimConfig()), []
    for _ in range(4):
        stats = StepStats(CPU)
        run_steps(model, batches, optimizer=optimizer, stats=stats)
        losses.append(stats.read().loss)

    assert losses[0] < math.log(2)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.4
    accuracies = [(model(b["image"]).argmax(1) == b["mask"]).float().mean() for b in batches]
    assert torch.stack(accuracies).mean() > 0.95


def test_steps_equal_gradient_descent_by_hand() -> None:
    """Two steps; afterwards all gradients are None."""
    model, by_hand = LinearModel(), LinearModel()
    batches = separable_batches([3, 2])
    run_steps(model, batches, optimizer=sgd(model), lr=0.5)
    for batch in batches:
        loss = cross_entropy(by_hand(batch["image"]), batch["mask"])
        gradients = torch.autograd.grad(loss, list(by_hand.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(by_hand.parameters(), gradients, strict=True):
                parameter -= 0.5 * gradient

    torch.testing.assert_close(model.state_dict(), by_hand.state_dict())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_micro_batches_take_the_step_of_the_whole_batch(
    micro_batch_size: int, ignored: float
) -> None:
    """Also with a smaller last micro-batch, and with different numbers of ignored pixels."""
    whole, accumulated = LinearModel(), LinearModel()
    batches = separable_batches([7, 7, 5], ignored=ignored)
    all_stats = StepStats(CPU), StepStats(CPU)
    run_steps(whole, batches, optimizer=sgd(whole), lr=0.5, stats=all_stats[0])
    run_steps(
        accumulated,
        batches,
        optimizer=sgd(accumulated),
        lr=0.5,
        stats=all_stats[1],
        micro_batch_size=micro_batch_size,
    )

    assert whole.conv.weight.abs().max() > 0.1
    torch.testing.assert_close(accumulated.state_dict(), whole.state_dict())
    assert all_stats[1].read() == pytest.approx(all_stats[0].read())


def test_the_loss_is_the_mean_over_images() -> None:
    """Losses 1, 2 and 6 of batches of 4, 4 and 1 images."""
    values, stats = iter([1.0, 2.0, 6.0]), StepStats(CPU)
    run_steps(
        LinearModel(),
        separable_batches([4, 4, 1]),
        loss_fn=lambda logits, mask, border: logits.sum() * 0 + next(values),
        stats=stats,
    )

    assert stats.read().loss == pytest.approx((4 * 1 + 4 * 2 + 1 * 6) / 9)


def test_the_statistics_count_person_iou() -> None:
    """The logits are fixed, and the expected IoU is counted by hand."""
    mask = torch.tensor([[[1, 1, 0, 255]], [[0, 1, 255, 255]]], dtype=torch.uint8)
    logits = torch.tensor([[[0, 2, 2, 2]], [[2, 2, 0, 2]]])[:, None] * torch.tensor(
        [-1.0, 1.0]
    ).view(1, 2, 1, 1)

    class Fixed(LinearModel):
        def forward(self, image: Tensor) -> Tensor:
            return logits + self.conv(image.float()) * 0

    stats = StepStats(CPU)
    batch = {"image": torch.zeros(2, 3, 1, 4), "mask": mask, "size": [(1, 4)] * 2}
    run_steps(Fixed(), [batch], stats=stats)

    # Predicted person pixels: 1, 2 and (3, ignored) of the first image; 0, 1 and (3, ignored) of
    # the second.
    assert stats.read().person_iou == 2 / 5


def test_each_step_uses_the_given_learning_rate() -> None:
    lrs: list[float] = []

    class Recording(torch.optim.SGD):
        def step(self, closure: None = None) -> None:
            lrs.extend(group["lr"] for group in self.param_groups)

    model = LinearModel()
    groups = [{"params": [model.conv.weight]}, {"params": [model.conv.bias]}]
    rates = iter([70.0, 80.0, 90.0])
    run_steps(
        model,
        separable_batches([2, 2, 1]),
        optimizer=Recording(groups, lr=99.0),
        lr=lambda: next(rates),
    )

    assert lrs == [70.0, 70.0, 80.0, 80.0, 90.0, 90.0]


def test_the_forward_pass_runs_in_autocast_and_the_loss_outside() -> None:
    calls: list[tuple[torch.dtype, bool]] = []

    def loss_fn(logits: Tensor, mask: Tensor, border: Tensor | None) -> Tensor:
        calls.append((logits.dtype, torch.is_autocast_enabled("cpu")))
        return cross_entropy(logits, mask)

    model = LinearModel()
    run_steps(
        model,
        separable_batches([2]),
        loss_fn=loss_fn,
        autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    )

    assert calls == [(torch.bfloat16, False)]
    assert all(p.dtype == torch.float32 and p.abs().sum() > 0 for p in model.parameters())


def test_the_loss_gets_the_border_of_each_micro_batch() -> None:
    [batch] = separable_batches([5])
    batch["border"] = torch.arange(5, dtype=torch.uint8).view(5, 1, 1).expand(5, 8, 8)
    borders = []

    def loss_fn(logits: Tensor, mask: Tensor, border: Tensor | None) -> Tensor:
        assert border is not None
        borders.append(border[:, 0, 0].tolist())
        return cross_entropy(logits, mask)

    run_steps(LinearModel(), [batch], loss_fn=loss_fn, micro_batch_size=2)

    assert borders == [[0, 1], [2, 3], [4]]


def test_a_scaled_loss_is_unscaled_before_the_step() -> None:
    scaled, plain = LinearModel(), LinearModel()
    for model, enabled in ((scaled, True), (plain, False)):
        run_steps(
            model,
            separable_batches([2, 2]),
            optimizer=sgd(model),
            scaler=torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled),
        )

    assert scaled.conv.weight.abs().sum() > 0
    torch.testing.assert_close(scaled.state_dict(), plain.state_dict())


@pytest.mark.parametrize("enabled", [False, True])
def test_the_whole_gradient_is_clipped_after_unscaling(enabled: bool) -> None:
    clipped, plain = LinearModel(), LinearModel()
    for model, clip_norm in ((clipped, 0.01), (plain, None)):
        run_steps(
            model,
            separable_batches([4]),
            optimizer=sgd(model),
            lr=1.0,
            scaler=torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled),
            clip_norm=clip_norm,
        )

    clipped_update, update = (
        torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (clipped, plain)
    )
    assert update.norm() > 0.05
    torch.testing.assert_close(clipped_update, update * 0.01 / update.norm())


def test_a_small_gradient_is_not_clipped() -> None:
    clipped, plain = LinearModel(), LinearModel()
    run_steps(clipped, separable_batches([4]), optimizer=sgd(clipped), clip_norm=100.0)
    run_steps(plain, separable_batches([4]), optimizer=sgd(plain))

    torch.testing.assert_close(clipped.state_dict(), plain.state_dict())


# --- Losses and gradients that are not finite ---------------------------------------------------


def loss_with_bad_steps(
    bad_steps: set[int], value: float
) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """A loss that is `value` in the given steps, and so are all its gradients."""
    steps = iter(range(1000))

    def loss_fn(logits: Tensor, mask: Tensor, border: Tensor | None) -> Tensor:
        loss = cross_entropy(logits, mask)
        return loss * value if next(steps) in bad_steps else loss

    return loss_fn


@pytest.mark.parametrize("name", ["rmsprop", "sgd", "adam", "adamw"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_skipped_and_counted(name: str, value: float) -> None:
    momentum = 0.5 if name == "sgd" else 0.0
    config = OptimConfig(name=name, momentum=momentum)  # type: ignore[arg-type]
    batches = separable_batches([2, 2, 2, 2])
    model, reference, stats = LinearModel(), LinearModel(), StepStats(CPU)
    run_steps(
        model,
        batches,
        optimizer=build_optimizer(model, config),
        loss_fn=loss_with_bad_steps({0, 2}, value),
        stats=stats,
    )
    run_steps(reference, [batches[1], batches[3]], optimizer=build_optimizer(reference, config))

    torch.testing.assert_close(model.state_dict(), reference.state_dict(), rtol=0, atol=0)
    epoch_stats = stats.read()
    assert (epoch_stats.skipped, epoch_stats.skipped_in_a_row) == (2, 1)
    assert math.isfinite(epoch_stats.loss)


def test_a_step_with_a_finite_loss_but_a_bad_gradient_is_skipped() -> None:
    def loss_fn(logits: Tensor, mask: Tensor, border: Tensor | None) -> Tensor:
        return cross_entropy(logits, mask) + (logits.sum() * 0).sqrt()  # 0, with infinite slope

    model, stats = LinearModel(), StepStats(CPU)
    run_steps(model, separable_batches([2]), loss_fn=loss_fn, stats=stats)

    assert stats.read().skipped == 1
    assert not any(p.any() for p in model.parameters())


def test_rmsprop_with_momentum_skips_steps_too() -> None:
    model, stats = LinearModel(), StepStats(CPU)
    optimizer = build_optimizer(model, OptimConfig(momentum=0.9))
    run_steps(
        model,
        separable_batches([2, 2]),
        optimizer=optimizer,
        loss_fn=loss_with_bad_steps({0}, math.nan),
        stats=stats,
    )

    assert all(p.isfinite().all() and p.any() for p in model.parameters())


def test_the_longest_run_of_skipped_steps_is_counted_since_the_last_read() -> None:
    model, stats = LinearModel(), StepStats(CPU)
    loss_fn = loss_with_bad_steps({1, 2, 4, 5, 6, 8}, math.nan)
    run_steps(model, separable_batches([1] * 8), loss_fn=loss_fn, stats=stats)
    first = stats.read()
    run_steps(model, separable_batches([1] * 2), loss_fn=loss_fn, stats=stats)
    second = stats.read()

    assert (first.skipped, first.skipped_in_a_row) == (5, 3)
    assert (second.skipped, second.skipped_in_a_row) == (6, 1)


def test_statistics_continue_from_saved_sums() -> None:
    uninterrupted, model = StepStats(CPU), LinearModel()
    batches = separable_batches([2, 3, 1])
    run_steps(LinearModel(), batches, stats=uninterrupted)
    first = StepStats(CPU)
    optimizer = build_optimizer(model, OptimConfig())
    run_steps(model, batches[:1], stats=first, optimizer=optimizer)
    second = StepStats(CPU, first.sums.tolist())
    run_steps(model, batches[1:], stats=second, optimizer=optimizer)

    assert second.read() == uninterrupted.read()


def test_the_scaler_skips_an_overflow_in_fp16() -> None:
    model, stats = LinearModel(), StepStats(CPU)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    run_steps(
        model,
        separable_batches([2, 2]),
        scaler=scaler,
        loss_fn=loss_with_bad_steps({0}, math.inf),
        stats=stats,
    )

    assert stats.read().skipped == 1
    assert scaler.get_scale() == 32.0
    assert all(p.isfinite().all() and p.any() for p in model.parameters())


# --- Waiting for the device ---------------------------------------------------------------------

READS_FROM_THE_DEVICE = (
    "item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "nonzero"
)  # fmt: skip


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the called methods that would wait for the GPU."""
    calls: list[str] = []
    for name in READS_FROM_THE_DEVICE:
        original = getattr(Tensor, name)

        def counting(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            calls.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(Tensor, name, counting)
    yield calls
    monkeypatch.undo()


@pytest.mark.parametrize("name", ["rmsprop", "sgd", "adam", "adamw"])
def test_steps_read_nothing_from_the_device(name: str, reads: list[str]) -> None:
    model, batches, stats = LinearModel(), separable_batches([3, 3, 1]), StepStats(CPU)
    reads.clear()
    run_steps(
        model,
        batches,
        optimizer=build_optimizer(model, OptimConfig(name=name)),  # type: ignore[arg-type]
        micro_batch_size=2,
        clip_norm=1.0,
        stats=stats,
    )
    assert reads == []

    stats.read()
    assert reads == ["tolist"]


def test_ema_and_batch_norm_guard_read_nothing_from_the_device(reads: list[str]) -> None:
    model = build_model("unet", base_channels=2, depth=1)
    ema, bn_guard = AveragedModel(model, 0.9), FiniteBatchNormGuard(model)
    reads.clear()

    ema.update(1)
    bn_guard.check()

    assert reads == []


@pytest.mark.parametrize("use_scaler", [False, True])
@pytest.mark.parametrize("loss", [math.inf, math.nan])
def test_a_step_with_a_bad_loss_but_finite_gradients_is_skipped(
    loss: float, use_scaler: bool
) -> None:
    """The scaler checks gradients only, and must agree with the statistics."""
    model, stats = LinearModel(), StepStats(CPU)
    before = copy.deepcopy(model.state_dict())
    scaler = torch.amp.GradScaler("cpu", enabled=use_scaler)

    run_steps(
        model,
        separable_batches([4]),
        stats=stats,
        scaler=scaler,
        loss_fn=lambda *batch: cross_entropy(*batch) + loss,
    )

    assert stats.read().skipped == 1
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not use_scaler or scaler.get_scale() == 2.0**15  # halved, as after an overflow


# --- Moving average and batch-norm guard --------------------------------------------------------


def test_the_moving_average_follows_its_formula() -> None:
    model = LinearModel()
    ema = AveragedModel(model, 0.5)
    expected = 0.0
    for step, value in enumerate([1.0, 5.0, -3.0, 2.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0], 1):
        nn.init.constant_(model.conv.bias, value)
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value

    assert decay == 0.5  # both terms of the minimum were used
    assert ema.model.conv.bias[0].item() == pytest.approx(expected)
    assert not ema.model.training
    assert not any(p.requires_grad for p in ema.model.parameters())


def test_the_moving_average_includes_batch_norm_and_shares_no_memory() -> None:
    model = build_model("unet", base_channels=2, depth=1)
    ema = AveragedModel(model, 0.999)
    model.train()(torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8))
    before = {key: value.clone() for key, value in ema.model.state_dict().items()}

    ema.update(10**6)

    after = ema.model.state_dict()
    values = model.state_dict()
    for key, value in values.items():
        if "running" in key:
            torch.testing.assert_close(after[key], before[key] * 0.999 + value * 0.001)
            assert not torch.equal(after[key], value)
        elif "num_batches" in key:
            assert after[key] == value == 1
        assert after[key].data_ptr() != value.data_ptr()


def test_the_guard_restores_only_statistics_that_are_not_finite() -> None:
    model = build_model("unet", base_channels=2, depth=1)
    bn_guard = FiniteBatchNormGuard(model)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    model.train()(torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8))
    bn_guard.check()
    good = [norm.running_var.clone() for norm in norms]

    norms[1].running_var[0] = math.nan
    norms[1].running_var[1] = 5.0
    norms[2].running_var.fill_(7.0)
    bn_guard.check()

    assert norms[1].running_var.tolist() == [good[1][0].item(), 5.0]
    assert torch.equal(norms[2].running_var, torch.full_like(good[2], 7.0))
    assert not torch.equal(good[1], torch.ones_like(good[1]))


# --- Micro-batches ------------------------------------------------------------------------------


def test_a_micro_batch_is_cropped_to_its_largest_image() -> None:
    batch = {
        "image": torch.zeros(3, 3, 9, 9),
        "mask": torch.zeros(3, 9, 9),
        "size": [(4, 9), (9, 5), (6, 6)],
        "image_id": ["a", "b", "c"],
    }

    shapes = [[tuple(p["image"].shape), tuple(p["mask"].shape)] for p in micro_batches(batch, 1)]
    pairs = [tuple(p["mask"].shape) for p in micro_batches(batch, 2)]

    assert shapes == [
        [(1, 3, 4, 9), (1, 4, 9)],
        [(1, 3, 9, 5), (1, 9, 5)],
        [(1, 3, 6, 6), (1, 6, 6)],
    ]
    assert pairs == [(2, 9, 9), (1, 6, 6)]
