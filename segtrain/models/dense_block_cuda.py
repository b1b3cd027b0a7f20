"""Choice between the plain and the fused form when a GPU trains a dense block.

The Triton kernels read the features a few times where the plain form reads them twenty times, and
they keep only a fifth of the values for the backward pass. They support the half precisions, whose
matrix products run on tensor cores; in float32 they would need more registers than a GPU has.
They are compiled on the user's machine, for any GPU and Triton version. Therefore the first
training step compares the kernels of each block with torch's operators, and uses them if they
agree and are faster.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from segtrain.models import dense_layer_aten
from segtrain.models.dense_block_fused import MAX_GROWTH, LayerOps, autocast_dtype

if TYPE_CHECKING:
    from segtrain.models.dense_block import DenseBlock

log = logging.getLogger(__name__)

# The kernels use 32-bit indices within an image and over the new features of a batch.
_MAX_VALUES = 2**31 - 1
# Height and width of the crop that the kernels are checked on.
_CHECK_SIZE = 32
# Largest accepted deviation of the cosine from 1 between the kernels' results and torch's. It is
# 0.0001 if they differ by one percent, as in bfloat16, and 0.0045 if one is ten percent longer.
_TOLERANCE = 0.003
_NUM_TIMED = 3

_checked_kernels: "WeakKeyDictionary[DenseBlock, dict[torch.dtype, LayerOps | None]]" = (
    WeakKeyDictionary()
)
_faster_kernels: "WeakKeyDictionary[DenseBlock, dict[torch.dtype, bool]]" = WeakKeyDictionary()


def training_ops(block: "DenseBlock", parts: Sequence[Tensor]) -> LayerOps | None:
    """Choose the implementation of the fused form for training; None means the plain form."""
    if block.memory_efficient is False:
        return None
    kernels = _supported_kernels(block, parts)
    if block.memory_efficient == "auto":
        return kernels if kernels and _is_faster(block, parts, kernels) else None
    return kernels or dense_layer_aten


def _supported_kernels(block: "DenseBlock", parts: Sequence[Tensor]) -> LayerOps | None:
    """The Triton kernels if they support the input and have passed the check, else None."""
    n, _, height, width = parts[0].shape
    dtype = autocast_dtype(parts[0])
    in_image, in_batch = height * width * block.out_channels, n * height * width * MAX_GROWTH
    if (
        dtype not in {torch.float16, torch.bfloat16}
        or block.growth_rate > MAX_GROWTH
        or max(in_image, in_batch) > _MAX_VALUES
    ):
        return None
    by_dtype = _checked_kernels.setdefault(block, {})
    if dtype not in by_dtype:
        by_dtype[dtype] = _check_kernels(block, parts)
    return by_dtype[dtype]


def _check_kernels(block: "DenseBlock", parts: Sequence[Tensor]) -> LayerOps | None:
    try:
        from segtrain.models import dense_layer_triton

        if _agrees_with_torch(block, parts, dense_layer_triton):
            return dense_layer_triton
        problem = "their results differ from torch's"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of the compiler, or of an unusual GPU when it runs the kernels
        problem = (str(error).splitlines() or [type(error).__name__])[0]
    _warn_once(problem)
    return None


@cache
def _warn_once(problem: str) -> None:
    """Warn once per problem, not once per block."""
    log.warning("not using the Triton kernels for dense blocks: %s", problem)


def _agrees_with_torch(block: "DenseBlock", parts: Sequence[Tensor], kernels: LayerOps) -> bool:
    """Whether the kernels compute the same features and gradients as torch on a crop.

    The kernels draw their own dropout masks. The plain form drops the values that are zero in the
    features of the kernels.
    """
    crops = [p.detach()[:2, :, :_CHECK_SIZE, :_CHECK_SIZE].contiguous() for p in parts]
    with torch.enable_grad(), _state_preserved(block):
        inputs = [crop.requires_grad_() for crop in crops]
        features = _forward_fused(block, kernels, inputs)
        expected = _forward_plain_with_dropout_of(features.detach(), block, inputs)
        grad = torch.randn_like(features)
        actual_grads = torch.autograd.grad(features, [*inputs, *block.parameters()], grad)
        expected_grads = torch.autograd.grad(expected, [*inputs, *block.parameters()], grad)
    cosines = [_cosine([features], [expected])]
    # The inputs, and each of the four weights of a layer over all layers.
    n = len(inputs)
    cosines += [_cosine(actual_grads[:n], expected_grads[:n])]
    cosines += [_cosine(actual_grads[n + i :: 4], expected_grads[n + i :: 4]) for i in range(4)]
    # This comparison is false for NaN.
    return all(cosine > 1 - _TOLERANCE for cosine in cosines)


def _forward_plain_with_dropout_of(
    features: Tensor, block: "DenseBlock", parts: Sequence[Tensor]
) -> Tensor:
    """The plain form, where dropout drops the values that are zero in `features`."""
    x = torch.cat(list(parts), dim=1)
    for layer, (_, new) in zip(block.layers, block.channels(), strict=True):
        y = layer.conv(torch.relu(layer.norm(x)))
        if layer.dropout.p:
            y = torch.where(features[:, new] != 0, y / (1 - layer.dropout.p), 0)
        x = torch.cat([x, y], dim=1)
    return x


def _cosine(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Cosine similarity of two lists of tensors, lowered by a difference in length as well."""
    a, b = (torch.cat([t.detach().double().flatten() for t in ts]) for ts in (actual, expected))
    return float(2 * (a @ b) / (a @ a + b @ b))


def _is_faster(block: "DenseBlock", parts: Sequence[Tensor], kernels: LayerOps) -> bool:
    """Whether a training step with the kernels is faster than the plain form; measured once."""
    dtype = autocast_dtype(parts[0])
    by_dtype = _faster_kernels.setdefault(block, {})
    if dtype not in by_dtype:
        with torch.enable_grad(), _state_preserved(block):
            inputs = [part.detach().requires_grad_() for part in parts]
            try:
                fused = _milliseconds(lambda: _forward_fused(block, kernels, inputs), inputs, block)
                plain = _milliseconds(lambda: block.forward_plain(*inputs), inputs, block)
                by_dtype[dtype] = fused < plain
            except torch.OutOfMemoryError:
                by_dtype[dtype] = True  # The kernels need less memory.
    return by_dtype[dtype]


def _milliseconds(
    forward: Callable[[], Tensor], inputs: list[Tensor], block: "DenseBlock"
) -> float:
    """The shortest of several forward and backward passes, after one warm-up pass."""
    grad = torch.ones_like(forward())
    times = []
    for _ in range(1 + _NUM_TIMED):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        torch.autograd.grad(forward(), [*inputs, *block.parameters()], grad)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return float(min(times[1:]))


def _forward_fused(block: "DenseBlock", kernels: LayerOps, parts: Sequence[Tensor]) -> Tensor:
    dtype = autocast_dtype(parts[0])
    with torch.autocast(parts[0].device.type, enabled=False):
        return block.train_fused(kernels, [part.to(dtype) for part in parts])[0]


@contextmanager
def _state_preserved(block: "DenseBlock") -> Iterator[None]:
    """Enable all gradients inside; leave running statistics and the random state unchanged."""
    norms = [layer.norm for layer in block.layers]
    frozen = [p for p in block.parameters() if not p.requires_grad]
    for norm in norms:
        norm.track_running_stats = False
    for p in frozen:
        p.requires_grad_(True)
    device = next(block.parameters()).device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
        for p in frozen:
            p.requires_grad_(False)
