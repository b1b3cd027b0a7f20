"""A batch's forward and backward pass as a CUDA graph: recorded once, replayed by one launch.

A step of FC-DenseNet103 is about a thousand launches, as is one of a U-Net on ResNet-34. With small
batches a GPU waits for the host between them.
"""

from collections.abc import Callable, Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from segtrain.errors import UsageError, says_out_of_memory

# Kernels are chosen and compiled, and memory is taken, in the steps before the recording.
_NUM_WARM_UP = 3

Batch = Mapping[str, Any]


class StepGraph:
    """Replays the passes of the largest batches that it has seen; others are computed as usual.

    It holds on to the memory of a step.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._forget((), [])

    def run(
        self,
        backward: Callable[[Batch], Tensor],
        batch: Batch,
        parameters: Sequence[nn.Parameter],
    ) -> Tensor:
        """What `backward` does with the batch and returns.

        Args:
            backward: leaves the gradients of `parameters` in them, where they were None. It reads
                nothing but the batch's tensors and what is updated in place.

        Raises:
            UsageError: a pass does something that no graph can hold.
        """
        key = _shapes(batch), tuple(p.requires_grad for p in parameters)
        if not self._is_known(parameters) or (key != self._key and not self._is_smaller(key)):
            self._forget(key, parameters)
        if key != self._key:
            return backward(batch)
        if self._graph is None and self._num_warm_up < _NUM_WARM_UP:
            self._num_warm_up += 1
            return self._aside(lambda: backward(batch))
        if self._graph is None:
            self._record(backward, batch, parameters)
        assert self._graph is not None
        for name, value in self._batch.items():
            if isinstance(value, Tensor):
                value.copy_(batch[name], non_blocking=True)
        self._graph.replay()
        for parameter, grad in zip(parameters, self._grads, strict=True):
            parameter.grad = grad
        return self._result.clone()

    def _is_known(self, parameters: Sequence[nn.Parameter]) -> bool:
        known = self._parameters
        return len(parameters) == len(known) and all(map(is_, parameters, known))

    def _is_smaller(self, key: tuple[Any, ...]) -> bool:
        """Whether it is the last batch of an epoch: as recorded, but of fewer images."""
        if not self._key or key[1] != self._key[1]:
            return False
        images, most = (dict(one[0])["image"] for one in (key, self._key))
        return bool(images[1:] == most[1:] and images[0] < most[0])

    def _forget(self, key: tuple[Any, ...], parameters: Sequence[nn.Parameter]) -> None:
        # Held on to, so that no other network's can be taken for them.
        self._key, self._parameters = key, list(parameters)
        self._num_warm_up = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: dict[str, Any] = {}
        self._grads: list[Tensor | None] = []
        self._result = torch.empty(0)

    def _record(
        self,
        backward: Callable[[Batch], Tensor],
        batch: Batch,
        parameters: Sequence[nn.Parameter],
    ) -> None:
        self._batch = {
            name: value.clone() if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # A graph takes memory of its own.
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                self._result = backward(self._batch)
        except RuntimeError as error:
            if says_out_of_memory(error):
                raise
            problem = (str(error).splitlines() or ["no reason given"])[0]
            raise UsageError(
                f"the training step cannot be a CUDA graph ({problem}); drop train.cuda_graph"
            ) from error
        self._graph, self._grads = graph, [p.grad for p in parameters]

    def _aside(self, work: Callable[[], Tensor]) -> Tensor:
        """On a stream of its own, as recording will be: autograd remembers where a weight was."""
        if self._stream is None:
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = work()
        torch.cuda.current_stream().wait_stream(self._stream)
        return result


def _shapes(batch: Batch) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((k, tuple(v.shape)) for k, v in batch.items() if isinstance(v, Tensor))
