"""Training steps without the rest of the command."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from segtrain.runtime.devices import prefetch
from segtrain.training.optim import set_lr
from segtrain.training.step import StepResult, StepStats, train_step


def training_steps(
    network: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    stats: StepStats,
    *,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    lr: float | Callable[[], float] = 1e-3,
    **options: Any,
) -> Iterator[StepResult]:
    """Take one step per batch and add it to `stats`; `options` go to `train_step`."""
    for batch in prefetch(batches, device):
        set_lr(optimizer, lr() if callable(lr) else lr)
        result = train_step(network, batch, optimizer, **options)
        stats.add(result)
        yield result
