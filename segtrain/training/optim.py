"""The optimizers and their learning rate."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from segtrain.config import OptimConfig

# So many steps done that nothing is left of Adam's correction for its first ones.
_MANY_STEPS = 1e6


class RMSprop(torch.optim.Adam):
    """RMSProp (Tieleman and Hinton 2012) by torch's fused Adam.

    It is Adam without a mean of the gradients and without its correction for the first steps. torch
    has one kernel for all weights for Adam and none for RMSProp; that kernel also leaves a step out
    on the device itself, so nobody waits to hear whether the gradients are finite.
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
    """The state that torch makes in the first step, made now.

    So the memory of the first step and the size of the first checkpoint are those of all others.
    """
    for group in optimizer.param_groups:
        for weight in group["params"]:
            # A fused kernel counts the steps on the device.
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
        # torch would make it of the first gradient, also of one that is left out.
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
    """The configured optimizer; weight decay is for convolution weights only, not for biases and
    batch norm."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": weights, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return OPTIMIZERS[config.name]([group for group in groups if group["params"]], config)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where in a stage of the training the next step is.

    epoch: epochs of the stage that are done.
    step, num_steps: optimizer steps of the stage that are done, and all of them.
    ious: validation IoU after each epoch of the stage.
    """

    epoch: int
    step: int
    num_steps: int
    ious: Sequence[float] = ()


def learning_rate(config: OptimConfig, place: Place) -> float:
    """The rate of one optimizer step: linear warm-up, then the schedule."""
    warmup = min(1.0, (place.step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    return warmup * SCHEDULES[config.schedule](config, place)


def _exponential(config: OptimConfig, place: Place) -> float:
    """Jegou et al. 2017 (arXiv 1611.09326), section 4.1: a factor an epoch."""
    return float(config.lr * config.lr_decay**place.epoch)


def _inverse_time(config: OptimConfig, place: Place) -> float:
    return config.lr / (1.0 + config.decay_per_step * place.step)


def _cosine(config: OptimConfig, place: Place) -> float:
    """Loshchilov and Hutter 2017 (arXiv 1608.03983), equation 5, without restarts."""
    half_wave = (1 + math.cos(math.pi * (1 - _share_left(config, place)))) / 2
    return config.final_lr + (config.lr - config.final_lr) * half_wave


def _poly(config: OptimConfig, place: Place) -> float:
    """Chen et al. 2017 (DeepLab, arXiv 1606.00915), section 4.1."""
    share: float = _share_left(config, place) ** config.poly_power
    return config.final_lr + (config.lr - config.final_lr) * share


def _plateau(config: OptimConfig, place: Place) -> float:
    """Smaller by a factor after each `plateau_patience` epochs that brought nothing better."""
    num_falls, best, waited = 0, -math.inf, 0
    for iou in place.ious:
        waited = 0 if iou > best else waited + 1
        best = max(best, iou)
        if waited == config.plateau_patience:
            num_falls, waited = num_falls + 1, 0
    return config.lr * config.plateau_factor**num_falls


def _constant(config: OptimConfig, place: Place) -> float:
    return config.lr


SCHEDULES: dict[str, Callable[[OptimConfig, Place], float]] = {
    "exponential": _exponential,
    "inverse_time": _inverse_time,
    "cosine": _cosine,
    "poly": _poly,
    "plateau": _plateau,
    "constant": _constant,
}


def _share_left(config: OptimConfig, place: Place) -> float:
    """1 where warm-up ends, 0 at the last step."""
    falling = max(place.num_steps - 1 - config.warmup_steps, 1)
    return 1 - min(max((place.step - config.warmup_steps) / falling, 0.0), 1.0)
