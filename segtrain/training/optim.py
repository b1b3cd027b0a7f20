"""The optimizer and its learning rate."""

import torch
from torch import nn

from segtrain.config import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """RMSProp with the L2 penalty on convolution weights only, not on biases and batch norm."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return torch.optim.RMSprop(
        [
            {"params": weights, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=config.lr,
        alpha=config.alpha,
        eps=config.eps,
        momentum=config.momentum,
    )


def learning_rate(config: OptimConfig, *, epoch: int, global_step: int) -> float:
    """The rate of one optimizer step: linear warm-up, times `lr_decay` for each epoch done.

    Args:
        epoch: counted from 0.
        global_step: optimizer steps done before this one.
    """
    warmup = min(1.0, (global_step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    return config.lr * warmup * config.lr_decay**epoch
