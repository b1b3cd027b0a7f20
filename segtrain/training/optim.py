"""Optimizers and learning-rate schedules."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from segtrain.config.schema import OptimConfig

# Adam's bias correction is 1 in float32 after this many steps.
_MANY_STEPS = 1e6


class RMSprop(torch.optim.Adam):
    """RMSProp (Tieleman and Hinton 2012) computed by torch's fused Adam.

    RMSProp is Adam without the mean of the gradients and without bias correction. torch has a fused
    kernel over all weights for Adam, but not for RMSProp. The kernel also skips a step on the
    device, so the host does not wait to check whether the gradients are finite.
    """

    def __init__(self, params: Any, *, lr: float, alpha: float, eps: float) -> None:
        super().__init__(params, lr=lr, betas=(0.0, alpha), eps=eps, fused=True)
        for group in self.param_groups:
            for weight in group["params"]:
                step = torch.tensor(_MANY_STEPS, device=weight.device)
                zeros = (torch.zeros_like(weight) for _ in range(2))
                self.state[weight] = dict(
                    zip(("step", "exp_avg", "exp_avg_sq"), (step, *zeros), strict=True)
                )


def _with_state(optimizer: torch.optim.Optimizer, *names: str) -> torch.optim.Optimizer:
    """Create the state that torch would otherwise create in the first step.

    The first step then needs as much memory as every other one, and the first checkpoint is as
    large.
    """
    for group in optimizer.param_groups:
        for weight in group["params"]:
            # Fused kernels keep their step count on the device.
            device = weight.device if group.get("fused") else "cpu"
            step = torch.zeros((), dtype=torch.float32, device=device)
            zeros = {name: torch.zeros_like(weight) for name in names}
            optimizer.state[weight] = {"step": step, **zeros}
    return optimizer


def _rmsprop(groups: Any, config: OptimConfig) -> torch.optim.Optimizer:
    if config.momentum:
        options: dict[str, Any] = {
            "alpha": config.alpha,
            "eps": config.eps,
            "momentum": config.momentum,
        }
        optimizer = torch.optim.RMSprop(groups, lr=config.lr, **options)
        return _with_state(optimizer, "square_avg", "momentum_buffer")
    return RMSprop(groups, lr=config.lr, alpha=config.alpha, eps=config.eps)


def _sgd(groups: Any, config: OptimConfig) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)
    if config.momentum:
        # torch would initialize it with the first gradient, even if that step is skipped.
        for group in optimizer.param_groups:
            for weight in group["params"]:
                optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    return optimizer


def _adam(groups: Any, config: OptimConfig) -> torch.optim.Optimizer:
    options: dict[str, Any] = {"betas": config.betas, "eps": config.eps, "fused": True}
    return _with_state(torch.optim.Adam(groups, lr=config.lr, **options), "exp_avg", "exp_avg_sq")


def _adamw(groups: Any, config: OptimConfig) -> torch.optim.Optimizer:
    options: dict[str, Any] = {"betas": config.betas, "eps": config.eps, "fused": True}
    return _with_state(torch.optim.AdamW(groups, lr=config.lr, **options), "exp_avg", "exp_avg_sq")


OPTIMIZERS: dict[str, Callable[[Any, OptimConfig], torch.optim.Optimizer]] = {
    "rmsprop": _rmsprop,
    "sgd": _sgd,
    "adam": _adam,
    "adamw": _adamw,
}


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Build the configured optimizer.

    Weight decay applies to convolution weights only, not to biases and batch norm.
    """
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": weights, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return OPTIMIZERS[config.name]([group for group in groups if group["params"]], config)


@dataclass(frozen=True, kw_only=True)
class SchedulePosition:
    """Position of the next step within a stage.

    epoch: completed epochs of the stage.
    step, num_steps: completed and total optimizer steps of the stage.
    ious: validation IoU after each epoch of the stage.
    """

    epoch: int
    step: int
    num_steps: int
    ious: Sequence[float] = ()


def learning_rate(config: OptimConfig, position: SchedulePosition) -> float:
    """Learning rate of one optimizer step: linear warm-up, then the schedule."""
    warmup = min(1.0, (position.step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    return warmup * SCHEDULES[config.schedule](config, position)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def _exponential(config: OptimConfig, position: SchedulePosition) -> float:
    """Jegou et al. 2017 (arXiv 1611.09326), section 4.1: a factor per epoch."""
    return float(config.lr * config.lr_decay**position.epoch)


def _inverse_time(config: OptimConfig, position: SchedulePosition) -> float:
    return config.lr / (1.0 + config.decay_per_step * position.step)


def _cosine(config: OptimConfig, position: SchedulePosition) -> float:
    """Loshchilov and Hutter 2017 (arXiv 1608.03983), equation 5, without restarts."""
    factor = (1 + math.cos(math.pi * (1 - _fraction_left(config, position)))) / 2
    return config.final_lr + (config.lr - config.final_lr) * factor


def _poly(config: OptimConfig, position: SchedulePosition) -> float:
    """Chen et al. 2017 (DeepLab, arXiv 1606.00915), section 4.1."""
    factor: float = _fraction_left(config, position) ** config.poly_power
    return config.final_lr + (config.lr - config.final_lr) * factor


def _plateau(config: OptimConfig, position: SchedulePosition) -> float:
    """Multiply by a factor after every `plateau_patience` epochs without a better IoU."""
    num_drops, best, waited = 0, -math.inf, 0
    for iou in position.ious:
        waited = 0 if iou > best else waited + 1
        best = max(best, iou)
        if waited == config.plateau_patience:
            num_drops, waited = num_drops + 1, 0
    return config.lr * config.plateau_factor**num_drops


def _constant(config: OptimConfig, position: SchedulePosition) -> float:
    return config.lr


SCHEDULES: dict[str, Callable[[OptimConfig, SchedulePosition], float]] = {
    "exponential": _exponential,
    "inverse_time": _inverse_time,
    "cosine": _cosine,
    "poly": _poly,
    "plateau": _plateau,
    "constant": _constant,
}


def _fraction_left(config: OptimConfig, position: SchedulePosition) -> float:
    """Linear from 1 at the end of warm-up to 0 at the last step."""
    num_decay_steps = max(position.num_steps - 1 - config.warmup_steps, 1)
    return 1 - min(max((position.step - config.warmup_steps) / num_decay_steps, 0.0), 1.0)
