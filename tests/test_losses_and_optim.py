"""The optimizer's step and one epoch, each written a second time in numpy or by hand."""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from segtrain.config import OptimConfig
from segtrain.models import build_model
from segtrain.training.engine import train_one_epoch
from segtrain.training.losses import cross_entropy
from segtrain.training.optim import build_optimizer, learning_rate

# --- The learning rate --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epoch", "global_step", "expected"),
    [
        (0, 0, 0.1 * 1 / 4),
        (0, 1, 0.1 * 2 / 4),
        (0, 3, 0.1),
        (0, 4, 0.1),
        (0, 400, 0.1),
        (1, 2, 0.1 * 3 / 4 * 0.5),  # warm-up may be longer than an epoch
        (1, 400, 0.1 * 0.5),
        (3, 400, 0.1 * 0.125),
    ],
)
def test_learning_rate_by_hand(epoch: int, global_step: int, expected: float) -> None:
    config = OptimConfig(lr=0.1, lr_decay=0.5, warmup_steps=4)
    actual = learning_rate(config, epoch=epoch, global_step=global_step)
    assert actual == pytest.approx(expected, rel=1e-12)


def test_the_default_decay_is_the_papers_factor_an_epoch_not_a_step() -> None:
    config = OptimConfig()
    done = config.warmup_steps
    rates = [learning_rate(config, epoch=epoch, global_step=done) for epoch in range(101)]
    assert rates[0] == pytest.approx(1e-3, rel=1e-12)
    assert rates[1] == pytest.approx(0.995e-3, rel=1e-12)
    assert rates[100] == pytest.approx(1e-3 * math.exp(100 * math.log(0.995)), rel=1e-9)
    assert learning_rate(config, epoch=1, global_step=done + 5000) == rates[1]


def test_without_warm_up_the_first_step_has_the_full_rate() -> None:
    assert learning_rate(OptimConfig(lr=0.3, warmup_steps=0), epoch=0, global_step=0) == 0.3


# --- The optimizer ------------------------------------------------------------------------------


def small_model() -> nn.Module:
    torch.manual_seed(2)
    return build_model("unet", base_channels=2, depth=1)


def set_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def numpy_rmsprop(
    value: np.ndarray, gradients: list[np.ndarray], config: OptimConfig, decay: float
) -> np.ndarray:
    """v = alpha v + (1 - alpha) g^2; m = momentum m + g / (sqrt(v) + eps); w = w - lr m."""
    square, buffer = np.zeros_like(value), np.zeros_like(value)
    for gradient in gradients:
        g = gradient + decay * value
        square = config.alpha * square + (1 - config.alpha) * g * g
        buffer = config.momentum * buffer + g / (np.sqrt(square) + config.eps)
        value = value - config.lr * buffer
    return value


# The last has every constant far from any default, so that each one shows.
@pytest.mark.parametrize(
    "config",
    [
        OptimConfig(),
        OptimConfig(lr=0.02, alpha=0.6, eps=0.1, momentum=0.7, weight_decay=0.3),
    ],
    ids=["defaults", "all different"],
)
def test_three_steps_equal_the_formula(config: OptimConfig) -> None:
    model = small_model()
    optimizer = build_optimizer(model, config)
    before = {k: p.detach().double().numpy().copy() for k, p in model.named_parameters()}
    gradients: dict[str, list[np.ndarray]] = {key: [] for key in before}
    for step in range(3):
        set_gradients(model, step)
        for key, parameter in model.named_parameters():
            gradients[key].append(parameter.grad.double().numpy().copy())
        optimizer.step()
    for key, parameter in model.named_parameters():
        # The L2 penalty is on the kernels: not on biases, nor on batch norm's scale and shift.
        decay = config.weight_decay if before[key].ndim == 4 else 0.0
        expected = numpy_rmsprop(before[key], gradients[key], config, decay)
        np.testing.assert_allclose(
            parameter.detach().numpy(), expected, rtol=1e-5, atol=1e-6, err_msg=key
        )


def test_the_first_update_is_about_three_times_the_rate_not_ten() -> None:
    """lr * sqrt(1 / (1 - alpha)) for any gradient; torch's alpha of 0.99 would make it 10 lr."""
    config = OptimConfig(weight_decay=0)
    model = small_model()
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    set_gradients(model, 5)
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    build_optimizer(model, config).step()
    moved = before - torch.cat([p.detach().flatten() for p in model.parameters()])
    clear = gradients.abs() > 1e-2
    expected = gradients.sign() * 1e-3 * math.sqrt(10)
    torch.testing.assert_close(moved[clear], expected[clear], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["unet", "tiramisu"])
def test_every_parameter_is_optimized_once_and_only_kernels_decay(name: str) -> None:
    with torch.device("meta"):
        model = build_model(name)
        optimizer = build_optimizer(model, OptimConfig(weight_decay=0.25))
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert len(decays) == sum(len(group["params"]) for group in optimizer.param_groups)
    expected = {
        id(parameter): 0.25 if parameter.ndim == 4 else 0.0 for parameter in model.parameters()
    }
    assert decays == expected


# --- One epoch ----------------------------------------------------------------------------------


class Line(nn.Module):
    """Person where a weighted sum of the colours is large: the smallest network that can learn."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def forward(self, image: Tensor) -> Tensor:
        return self.conv(image.float() / 255 - 0.5)


def separable_batches(sizes: list[int]) -> list[dict[str, Any]]:
    """Person is where red outshines green."""
    rng = np.random.default_rng(6)
    batches = []
    for size in sizes:
        image = rng.integers(0, 256, (size, 3, 8, 8), dtype=np.uint8)
        mask = (image[:, 0] > image[:, 1]).astype(np.uint8)
        batches.append({"image": torch.from_numpy(image), "mask": torch.from_numpy(mask)})
    return batches


def run_epoch(
    model: nn.Module,
    batches: list[dict[str, Any]],
    *,
    rate: Callable[[int], float] = lambda step: 0.05,
    **kwargs: Any,
) -> tuple[Tensor, int]:
    kwargs.setdefault("loss_fn", cross_entropy)
    kwargs.setdefault("optimizer", build_optimizer(model, OptimConfig()))
    kwargs.setdefault("global_step", 0)
    return train_one_epoch(
        model,
        batches,
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        autocast=contextlib.nullcontext,
        device=torch.device("cpu"),
        learning_rate=rate,
        **kwargs,
    )


def test_training_solves_a_separable_problem() -> None:
    model, batches = Line(), separable_batches([4] * 10)
    optimizer = build_optimizer(model, OptimConfig())
    losses = [run_epoch(model, batches, optimizer=optimizer)[0].item() for _ in range(4)]
    assert losses[0] < math.log(2)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.4
    right = [(model(b["image"]).argmax(1) == b["mask"]).float().mean() for b in batches]
    assert torch.stack(right).mean() > 0.95


def test_the_mean_loss_weights_images_not_batches() -> None:
    """Losses 1, 2 and 6 of batches of 4, 4 and 1 images."""
    values = iter([1.0, 2.0, 6.0])
    mean, _ = run_epoch(
        Line(),
        separable_batches([4, 4, 1]),
        loss_fn=lambda logits, mask: logits.sum() * 0 + next(values),
    )
    assert mean.item() == pytest.approx((4 * 1 + 4 * 2 + 1 * 6) / 9)


def test_each_step_takes_the_rate_of_its_own_number() -> None:
    taken: list[float] = []

    class Recording(torch.optim.SGD):
        def step(self, closure: None = None) -> None:
            taken.extend(group["lr"] for group in self.param_groups)

    model = Line()
    groups = [{"params": [model.conv.weight]}, {"params": [model.conv.bias]}]
    _, global_step = run_epoch(
        model,
        separable_batches([2, 2, 1]),
        optimizer=Recording(groups, lr=99.0),
        rate=lambda step: 10.0 * step,
        global_step=7,
    )
    assert taken == [70.0, 70.0, 80.0, 80.0, 90.0, 90.0]
    assert global_step == 10


def test_gradients_do_not_add_up_over_batches() -> None:
    """Two steps of plain gradient descent, by hand; afterwards no gradient is left."""
    model, by_hand = Line(), Line()
    batches = separable_batches([3, 2])
    run_epoch(
        model,
        batches,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        rate=lambda step: 0.5,
    )
    for batch in batches:
        loss = cross_entropy(by_hand(batch["image"]), batch["mask"])
        gradients = torch.autograd.grad(loss, list(by_hand.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(by_hand.parameters(), gradients, strict=True):
                parameter -= 0.5 * gradient
    torch.testing.assert_close(model.state_dict(), by_hand.state_dict())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_model_is_put_into_training() -> None:
    modes: list[bool] = []

    class Watching(Line):
        def forward(self, image: Tensor) -> Tensor:
            modes.append(self.training)
            return super().forward(image)

    run_epoch(Watching().eval(), separable_batches([1, 1]))
    assert modes == [True, True]


def test_the_forward_pass_runs_in_autocast_and_the_loss_outside() -> None:
    seen: list[tuple[torch.dtype, bool]] = []

    def loss_fn(logits: Tensor, mask: Tensor) -> Tensor:
        seen.append((logits.dtype, torch.is_autocast_enabled("cpu")))
        return cross_entropy(logits, mask)

    model = Line()
    train_one_epoch(
        model,
        separable_batches([2]),
        loss_fn=loss_fn,
        optimizer=build_optimizer(model, OptimConfig()),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        device=torch.device("cpu"),
        learning_rate=lambda step: 0.1,
        global_step=0,
    )
    assert seen == [(torch.bfloat16, False)]
    assert all(p.dtype == torch.float32 and p.abs().sum() > 0 for p in model.parameters())


def test_a_scaled_loss_is_unscaled_before_the_step() -> None:
    scaled, plain = Line(), Line()
    for model, enabled in ((scaled, True), (plain, False)):
        train_one_epoch(
            model,
            separable_batches([2, 2]),
            loss_fn=cross_entropy,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            scaler=torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled),
            autocast=contextlib.nullcontext,
            device=torch.device("cpu"),
            learning_rate=lambda step: 0.1,
            global_step=0,
        )
    assert scaled.conv.weight.abs().sum() > 0
    torch.testing.assert_close(scaled.state_dict(), plain.state_dict())


READS_FROM_THE_DEVICE = (
    "item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "nonzero"
)  # fmt: skip


def test_nothing_is_read_from_the_device_unless_on_step_asks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a GPU each of these waits until all queued work is done."""
    reads: list[str] = []
    for name in READS_FROM_THE_DEVICE:
        original = getattr(Tensor, name)

        def counting(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            reads.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(Tensor, name, counting)

    model, batches = Line(), separable_batches([2, 2, 1])
    run_epoch(model, batches, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    assert reads == []

    told: list[tuple[int, float]] = []
    mean, _ = run_epoch(
        model,
        batches,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        on_step=lambda num_images, loss: told.append((num_images, loss.item())),
    )
    assert reads == ["item"] * 3
    assert [num_images for num_images, _ in told] == [2, 2, 1]
    assert sum(n * loss for n, loss in told) / 5 == pytest.approx(mean.item(), rel=1e-6)


def test_the_loss_handed_out_holds_no_graph() -> None:
    """Kept for an epoch it would keep all activations with it."""
    kept: list[Tensor] = []
    mean, _ = run_epoch(
        Line(), separable_batches([1, 1]), on_step=lambda num_images, loss: kept.append(loss)
    )
    assert [loss.requires_grad for loss in [*kept, mean]] == [False] * 3


def test_no_batches_are_a_mean_loss_of_zero() -> None:
    mean, global_step = run_epoch(Line(), [], global_step=3)
    assert (mean.item(), global_step) == (0.0, 3)
