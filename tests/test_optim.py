"""Optimizers and learning rates, each written a second time in numpy or by hand."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from segtrain.config import OptimConfig
from segtrain.models import build_model
from segtrain.training.optim import OPTIMIZERS, SCHEDULES, Place, build_optimizer, learning_rate

# --- The learning rate --------------------------------------------------------------------------


def rates(config: OptimConfig, *, num_steps: int, steps_an_epoch: int = 10) -> list[float]:
    """The rate of every step of a stage."""
    return [
        learning_rate(config, Place(epoch=step // steps_an_epoch, step=step, num_steps=num_steps))
        for step in range(num_steps)
    ]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_begins_with_the_warm_up(schedule: str) -> None:
    config = OptimConfig(lr=0.1, schedule=schedule, warmup_steps=4, decay_per_step=0.0)  # type: ignore[arg-type]

    first = rates(config, num_steps=100)[:5]

    assert first == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1], rel=1e-12)


def test_exponential_falls_by_epochs_not_by_steps() -> None:
    taken = rates(OptimConfig(lr=0.1, lr_decay=0.5, warmup_steps=0), num_steps=30)

    assert taken == [0.1] * 10 + [0.05] * 10 + [0.025] * 10


def test_the_default_decay_is_the_papers_factor_an_epoch() -> None:
    place = Place(epoch=100, step=5000, num_steps=10**6)

    assert learning_rate(OptimConfig(), place) == pytest.approx(
        1e-3 * math.exp(100 * math.log(0.995)), rel=1e-9
    )


def test_inverse_time_is_kerass_decay() -> None:
    config = OptimConfig(lr=0.1, schedule="inverse_time", decay_per_step=0.01, warmup_steps=0)

    taken = rates(config, num_steps=301)

    assert taken[0] == 0.1
    assert taken[100] == pytest.approx(0.05)
    assert taken[300] == pytest.approx(0.025)


def test_cosine_comes_down_to_its_final_rate_by_half_a_wave() -> None:
    config = OptimConfig(lr=0.1, schedule="cosine", final_lr=0.02, warmup_steps=20)

    taken = rates(config, num_steps=121)

    assert taken[20] == pytest.approx(0.1)
    assert taken[70] == pytest.approx(0.06)  # half way
    assert taken[45] == pytest.approx(0.02 + 0.08 * (1 + math.sqrt(0.5)) / 2)
    assert taken[120] == pytest.approx(0.02)
    assert taken[20:] == sorted(taken[20:], reverse=True)


def test_poly_is_the_power_of_the_share_that_is_left() -> None:
    config = OptimConfig(lr=0.1, schedule="poly", poly_power=2.0, warmup_steps=0)

    taken = rates(config, num_steps=101)

    assert taken[50] == pytest.approx(0.1 * 0.25)
    assert taken[90] == pytest.approx(0.1 * 0.01)
    assert taken[100] == 0


def test_constant_stays() -> None:
    config = OptimConfig(lr=0.1, schedule="constant", warmup_steps=0)

    assert set(rates(config, num_steps=50)) == {0.1}


@pytest.mark.parametrize(
    ("ious", "falls"),
    [
        ([], 0),
        ([0.1, 0.2, 0.3], 0),
        ([0.3, 0.2, 0.1], 1),
        ([0.3, 0.2, 0.4, 0.1], 0),
        ([0.3, 0.3, 0.3], 1),  # no better is not better
        ([0.3, 0.2, 0.1, 0.2, 0.1], 2),
        ([0.3, 0.2, 0.1, 0.4, 0.1], 1),
    ],
)
def test_plateau_falls_after_two_epochs_that_bring_nothing(ious: list[float], falls: int) -> None:
    config = OptimConfig(
        lr=0.8, schedule="plateau", plateau_factor=0.5, plateau_patience=2, warmup_steps=0
    )

    place = Place(epoch=len(ious), step=100, num_steps=1000, ious=ious)

    assert learning_rate(config, place) == 0.8 * 0.5**falls


def test_a_warm_up_longer_than_the_training_is_no_division_by_zero() -> None:
    config = OptimConfig(lr=0.1, schedule="cosine", warmup_steps=10)

    assert rates(config, num_steps=3) == pytest.approx([0.01, 0.02, 0.03])


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
    """Else it could run out of memory where a rehearsal had not, and checkpoints would grow."""
    model = small_model()
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


# --- All of them --------------------------------------------------------------------------------

# torch's own optimizers, in their plainest form.
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


def kernel() -> nn.Conv2d:
    torch.manual_seed(3)
    return nn.Conv2d(5, 7, 3, bias=False)


def config_of(name: str) -> OptimConfig:
    momentum = 0.8 if name == "sgd" else 0.0
    return OptimConfig(name=name, lr=0.02, momentum=momentum, weight_decay=0.01, betas=(0.8, 0.9))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_forty_steps_equal_torchs_plain_optimizer(name: str) -> None:
    config, ours, plain = config_of(name), kernel(), kernel()
    optimizers = build_optimizer(ours, config), REFERENCES[name](plain.parameters(), config)

    for step in range(40):
        torch.manual_seed(step)
        gradient = torch.randn_like(ours.weight) * 10.0 ** (step % 5 - 3)
        for module, optimizer in zip((ours, plain), optimizers, strict=True):
            module.weight.grad = gradient.clone()
            optimizer.step()

    moved = (plain.weight - kernel().weight).abs().max()
    assert moved > 0.01
    assert (ours.weight - plain.weight).abs().max() < 1e-5 * moved


@pytest.mark.parametrize("when", [0, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_left_out_on_the_device_changes_nothing(name: str, when: int) -> None:
    """Not even the first, where optimizers make their state of the gradient."""
    config, ours, without = config_of(name), kernel(), kernel()
    for module, left_out in ((ours, when), (without, None)):
        optimizer = build_optimizer(module, config)
        for step in range(6):
            torch.manual_seed(step)
            if step == when:
                if left_out is None:
                    continue
                module.weight.grad = torch.full_like(module.weight, math.nan)
            else:
                module.weight.grad = torch.randn_like(module.weight)
            optimizer.found_inf = torch.tensor(float(step == left_out))  # type: ignore[attr-defined]
            optimizer.step()

    assert ours.weight.isfinite().all()
    assert torch.equal(ours.weight, without.weight)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_travels_through_plain_types(name: str) -> None:
    """As checkpoints hold it: lists for tuples, tensors that share no memory."""
    config, straight, moved = config_of(name), kernel(), kernel()
    first, second = build_optimizer(straight, config), build_optimizer(moved, config)
    for step in range(6):
        if step == 3:
            saved = copy.deepcopy(second.state_dict())
            for group in saved["param_groups"]:
                group.update({k: list(v) for k, v in group.items() if isinstance(v, tuple)})
            second = build_optimizer(moved, config)
            second.load_state_dict(saved)
        for module, optimizer in ((straight, first), (moved, second)):
            torch.manual_seed(step)
            module.weight.grad = torch.randn_like(module.weight)
            optimizer.step()

    assert torch.equal(straight.weight, moved.weight)
