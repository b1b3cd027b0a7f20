"""Forward and backward pass of a batch as a CUDA graph: captured once, replayed by one launch.

A step of FC-DenseNet103 has about a thousand kernel launches, and so has one of a U-Net on
ResNet-34. With small batches, the GPU waits for the host between them.
"""

from collections.abc import Callable, Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from segtrain.errors import UsageError, is_memory_error

# In the steps before the capture, kernels are chosen and compiled, and memory is allocated.
_NUM_WARM_UP = 3


class StepGraph:
    """Replays the passes of the largest batches seen so far; other batches run without a graph.

    It keeps the memory of a step allocated.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._reset((), [])

    def run(
        self,
        backward: Callable[[Mapping[str, Any]], Tensor],
        batch: Mapping[str, Any],
        parameters: Sequence[nn.Parameter],
    ) -> Tensor:
        """Return `backward(batch)`, replayed from the graph if possible.

        Args:
            backward: sets the gradients of `parameters`, which are None before. It reads only the
                tensors of the batch and tensors that are updated in place.

        Raises:
            UsageError: the passes contain an operation that cannot be captured.
        """
        key = _shapes(batch), tuple(p.requires_grad for p in parameters)
        if not self._has_parameters(parameters) or (key != self._key and not self._is_smaller(key)):
            self._reset(key, parameters)
        if key != self._key:
            return backward(batch)
        if self._graph is None and self._num_warm_up < _NUM_WARM_UP:
            self._num_warm_up += 1
            return self._run_on_side_stream(lambda: backward(batch))
        if self._graph is None:
            self._capture(backward, batch, parameters)
        assert self._graph is not None
        for name, value in self._batch.items():
            if isinstance(value, Tensor):
                value.copy_(batch[name], non_blocking=True)
        self._graph.replay()
        for parameter, grad in zip(parameters, self._grads, strict=True):
            parameter.grad = grad
        return self._result.clone()

    def _has_parameters(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Whether the graph is for exactly these parameters."""
        own = self._parameters
        return len(parameters) == len(own) and all(map(is_, parameters, own))

    def _is_smaller(self, key: tuple[Any, ...]) -> bool:
        """Whether a batch has the captured shapes, but fewer images: the last one of an epoch."""
        if not self._key or key[1] != self._key[1]:
            return False
        shape, own_shape = (dict(shapes)["image"] for shapes, _ in (key, self._key))
        return bool(shape[1:] == own_shape[1:] and shape[0] < own_shape[0])

    def _reset(self, key: tuple[Any, ...], parameters: Sequence[nn.Parameter]) -> None:
        # A reference to the parameters prevents another model from reusing their identities.
        self._key, self._parameters = key, list(parameters)
        self._num_warm_up = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: dict[str, Any] = {}
        self._grads: list[Tensor | None] = []
        self._result = torch.empty(0)

    def _capture(
        self,
        backward: Callable[[Mapping[str, Any]], Tensor],
        batch: Mapping[str, Any],
        parameters: Sequence[nn.Parameter],
    ) -> None:
        self._batch = {
            name: value.clone() if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # a graph allocates memory of its own
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                self._result = backward(self._batch)
        except RuntimeError as error:
            if is_memory_error(error):
                raise
            reason = (str(error).splitlines() or ["no reason given"])[0]
            raise UsageError(
                f"the training step cannot be a CUDA graph ({reason})", "drop train.cuda_graph"
            ) from error
        self._graph, self._grads = graph, [p.grad for p in parameters]

    def _run_on_side_stream(self, run: Callable[[], Tensor]) -> Tensor:
        """Run on the stream of the later capture: autograd remembers the stream of each weight."""
        if self._stream is None:
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = run()
        torch.cuda.current_stream().wait_stream(self._stream)
        return result


def _shapes(batch: Mapping[str, Any]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((k, tuple(v.shape)) for k, v in batch.items() if isinstance(v, Tensor))
