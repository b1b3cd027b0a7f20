"""A moving average of a network's weights, which validates better than the last weights do."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class AveragedModel:
    """Exponential moving average of weights and batch norm statistics (Polyak and Juditsky 1992).

    The first steps count more, for the average has nothing to remember yet: the decay of step n is
    the smaller of `decay` and (1 + n) / (10 + n).

    Args:
        model: is followed; the average begins as its copy.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay = decay
        followed = model.state_dict(keep_vars=True).values()
        pairs = list(zip(self.model.state_dict().values(), followed, strict=True))
        self._mixed = [pair for pair in pairs if pair[0].is_floating_point()]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, num_steps: int) -> None:
        """Mix in the weights after optimizer step number `num_steps`, counted from 1."""
        share = 1 - min(self.decay, (1 + num_steps) / (10 + num_steps))
        averages, values = ([pair[side] for pair in self._mixed] for side in (0, 1))
        torch._foreach_lerp_(averages, values, share)
        for average, value in self._copied:
            average.copy_(value)


class StatisticsGuard:
    """Keeps batch norm's statistics finite where a forward pass overflowed.

    Leaving the step out saves the weights, but the statistics were mixed in the forward pass. In
    training nobody reads them, so it is early enough to put them right at the next look.
    """

    def __init__(self, *models: nn.Module) -> None:
        self._buffers = [
            buffer
            for model in models
            for buffer in model.buffers()
            if buffer.is_floating_point() and buffer.numel()
        ]
        self._sizes = [buffer.numel() for buffer in self._buffers]
        self._good = self._flat()

    @torch.no_grad()
    def look(self) -> None:
        """Put back each value that is not finite, and remember all of them."""
        if not self._buffers:
            return
        # As one tensor: a GPU would take longer to start a kernel for each buffer than to compute.
        now = self._flat()
        self._good = torch.where(now.isfinite(), now, self._good)
        good = zip(torch.split(self._good, self._sizes), self._buffers, strict=True)
        torch._foreach_copy_(self._buffers, [part.view_as(buffer) for part, buffer in good])

    def _flat(self) -> Tensor:
        parts = [buffer.flatten() for buffer in self._buffers]
        return torch.cat(parts) if parts else torch.empty(0)

    @contextmanager
    def leaving_good_ones(self) -> Iterator[None]:
        """Whatever ends what is done within, statistics that are not finite are put back."""
        try:
            yield
        finally:
            self.look()
