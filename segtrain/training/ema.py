"""Exponential moving average of model weights, which validates better than the latest weights."""

import copy

import torch
from torch import nn


class AveragedModel:
    """Exponential moving average of weights and batch-norm statistics (Polyak and Juditsky 1992).

    The first steps have a larger weight, because the average starts from untrained weights: the
    decay of step n is the smaller of `decay` and (1 + n) / (10 + n).

    Args:
        model: the model to average; the average starts as a copy of it.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay = decay
        values = model.state_dict(keep_vars=True).values()
        pairs = list(zip(self.model.state_dict().values(), values, strict=True))
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, num_steps: int) -> None:
        """Update the average after optimizer step number `num_steps`, counted from 1."""
        weight = 1 - min(self.decay, (1 + num_steps) / (10 + num_steps))
        averages, values = ([pair[side] for pair in self._averaged] for side in (0, 1))
        torch._foreach_lerp_(averages, values, weight)
        for average, value in self._copied:
            average.copy_(value)
