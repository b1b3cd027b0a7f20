"""Optimizers and learning rates, each against a second implementation in numpy or by hand."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from segtrain.config.schema import OptimConfig
from segtrain.models import build_model
from segtrain.training.optim import (
    OPTIMIZERS,
    SCHEDULES,
    SchedulePosition,
    build_optimizer,
    learning_rate,
)

# --- The learning rate --------------------------------------------------------------------------


def learning_rates(
    config: OptimConfig, *, num_steps: int, steps_per_epoch: int = 10
) -> list[float]:
    """The learning rate of every step of a stage."""
    return [
        learning_rate(
            config, SchedulePosition(epoch=step // steps_per_epoch, step=step, num_steps=num_steps)
        )
        for step in range(num_steps)
    ]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_starts_with_the_warm_up(schedule: str) -> None:
    config = OptimConfig(lr=0.1, schedule=schedule, warmup_steps=4, decay_per_step=0.0)  # type: ignore[arg-type]

    first = learning_rates(config, num_steps=100)[:5]

    assert first == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1], rel=1e-12)


def test_exponential_decays_by_epochs_not_by_steps() -> None:
    rates = learning_rates(OptimConfig(lr=0.1, lr_decay=0.5, warmup_steps=0), num_steps=30)

    assert rates == [0.1] * 10 + [0.05] * 10 + [0.025] * 10


def test_the_default_decay_is_the_factor_per_epoch_of_the_paper() -> None:
    position = SchedulePosition(epoch=100, step=5000, num_steps=10**6)

    assert learning_rate(OptimConfig(), position) == pytest.approx(
        1e-3 * math.exp(100 * math.log(0.995)), rel=1e-9
    )


def test_inverse_time_is_the_decay_of_keras() -> None:
    config = OptimConfig(lr=0.1, schedule="inverse_time", decay_per_step=0.01, warmup_steps=0)

    rates = learning_rates(config, num_steps=301)

    assert rates[0] == 0.1
    assert rates[100] == pytest.approx(0.05)
    assert rates[300] == pytest.approx(0.025)


def test_cosine_reaches_its_final_rate_by_half_a_wave() -> None:
    config = OptimConfig(lr=0.1, schedule="cosine", final_lr=0.02, warmup_steps=20)

    rates = learning_rates(config, num_steps=121)

    assert rates[20] == pytest.approx(0.1)
    assert rates[70] == pytest.approx(0.06)  # half way
    assert rates[45] == pytest.approx(0.02 + 0.08 * (1 + math.sqrt(0.5)) / 2)
    assert rates[120] == pytest.approx(0.02)
    assert rates[20:] == sorted(rates[20:], reverse=True)


def test_poly_is_a_power_of_the_fraction_of_steps_left() -> None:
    config = OptimConfig(lr=0.1, schedule="poly", poly_power=2.0, warmup_steps=0)

    rates = learning_rates(config, num_steps=101)

    assert rates[50] == pytest.approx(0.1 * 0.25)
    assert rates[90] == pytest.approx(0.1 * 0.01)
    assert rates[100] == 0


def test_constant_does_not_change() -> None:
    config = OptimConfig(lr=0.1, schedule="constant", warmup_steps=0)

    assert set(learning_rates(config, num_steps=50)) == {0.1}


@pytest.mark.parametrize(
    ("ious", "num_drops"),
    [
        ([], 0),
        ([0.1, 0.2, 0.3], 0),
        ([0.3, 0.2, 0.1], 1),
        ([0.3, 0.2, 0.4, 0.1], 0),
        ([0.3, 0.3, 0.3], 1),  # an equal IoU is not better
        ([0.3, 0.2, 0.1, 0.2, 0.1], 2),
        ([0.3, 0.2, 0.1, 0.4, 0.1], 1),
    ],
)
def test_plateau_drops_after_two_epochs_without_a_better_iou(
    ious: list[float], num_drops: int
) -> None:
    config = OptimConfig(
        lr=0.8, schedule="plateau", plateau_factor=0.5, plateau_patience=2, warmup_steps=0
    )

    position = SchedulePosition(epoch=len(ious), step=100, num_steps=1000, ious=ious)

    assert learning_rate(config, position) == 0.8 * 0.5**num_drops


def test_a_warm_up_longer_than_training_does_not_divide_by_zero() -> None:
    config = OptimConfig(lr=0.1, schedule="cosine", warmup_steps=10)

    assert learning_rates(config, num_steps=3) == pytest.approx([0.01, 0.02, 0.03])


# --- The optimizer ------------------------------------------------------------------------------


def build_small_model() -> nn.Module:
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


# In the last, every constant is far from its default, so that each of them has an effect.
@pytest.mark.parametrize(
    "config",
    [
        OptimConfig(),
        OptimConfig(lr=0.02, alpha=0.6, eps=0.1, momentum=0.7, weight_decay=0.3),
    ],
    ids=["defaults", "no defaults"],
)
def test_three_steps_equal_the_formula(config: OptimConfig) -> None:
    model = build_small_model()
    optimizer = build_optimizer(model, config)
    before = {k: p.detach().double().numpy().copy() for k, p in model.named_parameters()}
    gradients: dict[str, list[np.ndarray]] = {key: [] for key in before}
    for step in range(3):
        set_gradients(model, step)
        for key, parameter in model.named_parameters():
            gradients[key].append(parameter.grad.double().numpy().copy())
        optimizer.step()
    for key, parameter in model.named_parameters():
        # The L2 penalty applies to kernels, not to biases or the scale and shift of batch norm.
        decay = config.weight_decay if before[key].ndim == 4 else 0.0
        expected = numpy_rmsprop(before[key], gradients[key], config, decay)
        np.testing.assert_allclose(
            parameter.detach().numpy(), expected, rtol=1e-5, atol=1e-6, err_msg=key
        )


def test_the_first_update_is_about_three_times_the_learning_rate() -> None:
    """lr * sqrt(1 / (1 - alpha)) for any gradient; with torch's default alpha of 0.99, 10 lr."""
    config = OptimConfig(weight_decay=0)
    model = build_small_model()
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    set_gradients(model, 5)
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    build_optimizer(model, config).step()
    update = before - torch.cat([p.detach().flatten() for p in model.parameters()])
    is_large = gradients.abs() > 1e-2
    expected = gradients.sign() * 1e-3 * math.sqrt(10)
    torch.testing.assert_close(update[is_large], expected[is_large], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["unet", "tiramisu"])
def test_every_parameter_is_optimized_once_and_only_kernels_have_weight_decay(name: str) -> None:
    model = build_model(name, **({"base_channels": 2} if name == "unet" else {}))
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.25))
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert len(decays) == sum(len(group["params"]) for group in optimizer.param_groups)
    expected = {
        id(parameter): 0.25 if parameter.ndim == 4 else 0.0 for parameter in model.parameters()
    }
    assert decays == expected


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_first_step_adds_nothing_to_the_state(name: str, momentum: float) -> None:
    """Otherwise it could run out of memory after a dry run did not, and checkpoints would grow."""
    model = build_small_model()
    optimizer = build_optimizer(model, OptimConfig(name=name, momentum=momentum))  # type: ignore[arg-type]

    def sizes() -> dict[tuple[int, str], tuple[torch.Size, torch.dtype]]:
        return {
            (number, key): (value.shape, value.dtype)
            for number, state in optimizer.state_dict()["state"].items()
            for key, value in state.items()
        }

    before = sizes()
    set_gradients(model, 1)
    optimizer.step()

    assert before == sizes()
    assert bool(before) == (name != "sgd" or momentum > 0)


# --- All optimizers -----------------------------------------------------------------------------

# The optimizers of torch, in their simplest implementation.
REFERENCES = {
    "rmsprop": lambda p, c: torch.optim.RMSprop(
        p, c.lr, alpha=c.alpha, eps=c.eps, weight_decay=c.weight_decay, foreach=False
    ),
    "sgd": lambda p, c: torch.optim.SGD(
        p, c.lr, momentum=c.momentum, weight_decay=c.weight_decay, foreach=False
    ),
    "adam": lambda p, c: torch.optim.Adam(
        p, c.lr, c.betas, eps=c.eps, weight_decay=c.weight_decay, foreach=False
    ),
    "adamw": lambda p, c: torch.optim.AdamW(
        p, c.lr, c.betas, eps=c.eps, weight_decay=c.weight_decay, foreach=False
    ),
}


def build_conv() -> nn.Conv2d:
    torch.manual_seed(3)
    return nn.Conv2d(5, 7, 3, bias=False)


def optim_config(name: str) -> OptimConfig:
    momentum = 0.8 if name == "sgd" else 0.0
    return OptimConfig(name=name, lr=0.02, momentum=momentum, weight_decay=0.01, betas=(0.8, 0.9))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_forty_steps_equal_the_simple_optimizer_of_torch(name: str) -> None:
    config, model, reference = optim_config(name), build_conv(), build_conv()
    optimizers = build_optimizer(model, config), REFERENCES[name](reference.parameters(), config)

    for step in range(40):
        torch.manual_seed(step)
        gradient = torch.randn_like(model.weight) * 10.0 ** (step % 5 - 3)
        for module, optimizer in zip((model, reference), optimizers, strict=True):
            module.weight.grad = gradient.clone()
            optimizer.step()

    change = (reference.weight - build_conv().weight).abs().max()
    assert change > 0.01
    assert (model.weight - reference.weight).abs().max() < 1e-5 * change


@pytest.mark.parametrize("bad_step", [0, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_skipped_on_the_device_changes_nothing(name: str, bad_step: int) -> None:
    """Not even the first, in which optimizers create their state from the gradient."""
    config, model, reference = optim_config(name), build_conv(), build_conv()
    for module, skipped_step in ((model, bad_step), (reference, None)):
        optimizer = build_optimizer(module, config)
        for step in range(6):
            torch.manual_seed(step)
            if step == bad_step:
                if skipped_step is None:
                    continue
                module.weight.grad = torch.full_like(module.weight, math.nan)
            else:
                module.weight.grad = torch.randn_like(module.weight)
            optimizer.found_inf = torch.tensor(float(step == skipped_step))  # type: ignore[attr-defined]
            optimizer.step()

    assert model.weight.isfinite().all()
    assert torch.equal(model.weight, reference.weight)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_can_be_restored_from_plain_types(name: str) -> None:
    """As checkpoints store it: lists instead of tuples, tensors that do not share memory."""
    config, uninterrupted, restored = optim_config(name), build_conv(), build_conv()
    first, second = build_optimizer(uninterrupted, config), build_optimizer(restored, config)
    for step in range(6):
        if step == 3:
            saved = copy.deepcopy(second.state_dict())
            for group in saved["param_groups"]:
                group.update({k: list(v) for k, v in group.items() if isinstance(v, tuple)})
            second = build_optimizer(restored, config)
            second.load_state_dict(saved)
        for module, optimizer in ((uninterrupted, first), (restored, second)):
            torch.manual_seed(step)
            module.weight.grad = torch.randn_like(module.weight)
            optimizer.step()

    assert torch.equal(uninterrupted.weight, restored.weight)
