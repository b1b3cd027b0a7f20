"""Which form of a dense block a GPU trains: checked, timed, and remembered.

Triton's kernels read the features a few times where the paper's form reads them twenty times, and
they keep a fifth for the backward pass. They are for the half precisions, whose products tensor
cores compute; in float32 they would need more registers than there are. And they are compiled on
the user's machine, for whatever GPU and Triton are there. So the first training step compares each
block's kernels with torch's own operators, and takes them where they agree and are faster.
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

_log = logging.getLogger(__name__)

# The kernels count in 32 bits within an image, and over the new features of a batch.
_MAX_VALUES = 2**31 - 1
# Rows and columns of the crop that the kernels are checked on.
_CHECKED_SIDE = 32
# How far from 1 the cosine between the kernels' results and torch's may be: it is 0.0001 where they
# differ by a percent, as bfloat16 makes them, and 0.0045 where one is ten percent longer.
_TOLERANCE = 0.003
_NUM_TIMED = 3

_checked: "WeakKeyDictionary[DenseBlock, dict[torch.dtype, LayerOps | None]]" = WeakKeyDictionary()
_timed: "WeakKeyDictionary[DenseBlock, dict[torch.dtype, bool]]" = WeakKeyDictionary()


def training_ops(block: "DenseBlock", parts: Sequence[Tensor]) -> LayerOps | None:
    """What to compute the fused form of a training step with; None: take the paper's form."""
    if block.memory_efficient is False:
        return None
    kernels = _kernels(block, parts)
    if block.memory_efficient == "auto":
        return kernels if kernels and _is_faster(block, parts, kernels) else None
    return kernels or dense_layer_aten


def _kernels(block: "DenseBlock", parts: Sequence[Tensor]) -> LayerOps | None:
    """Triton's kernels where they can do this and have been found to be right, else None."""
    n, _, height, width = parts[0].shape
    dtype = autocast_dtype(parts[0])
    in_image, in_batch = height * width * block.out_channels, n * height * width * MAX_GROWTH
    if (
        dtype not in {torch.float16, torch.bfloat16}
        or block.growth_rate > MAX_GROWTH
        or max(in_image, in_batch) > _MAX_VALUES
    ):
        return None
    known = _checked.setdefault(block, {})
    if dtype not in known:
        known[dtype] = _checked_kernels(block, parts)
    return known[dtype]


def _checked_kernels(block: "DenseBlock", parts: Sequence[Tensor]) -> LayerOps | None:
    try:
        from segtrain.models import dense_layer_triton

        if _agree(block, parts, dense_layer_triton):
            return dense_layer_triton
        problem = "they compute something else"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler's own, and whatever a strange GPU makes of its code
        problem = (str(error).splitlines() or [type(error).__name__])[0]
    _report(problem)
    return None


@cache
def _report(problem: str) -> None:
    """Once, not for every block."""
    _log.warning("Triton's kernels for dense blocks are not used: %s", problem)


def _agree(block: "DenseBlock", parts: Sequence[Tensor], kernels: LayerOps) -> bool:
    """Whether they compute features and gradients like torch's operators on a crop.

    Dropout's draws are the kernels' own; torch's operators get what is zero in their features.
    """
    crops = [p.detach()[:2, :, :_CHECKED_SIDE, :_CHECKED_SIDE].contiguous() for p in parts]
    with torch.enable_grad(), _apart(block):
        inputs = [crop.requires_grad_() for crop in crops]
        features = _fused(block, kernels, inputs)
        expected = _with_dropout_of(features.detach(), block, inputs)
        grad = torch.randn_like(features)
        actual_grads = torch.autograd.grad(features, [*inputs, *block.parameters()], grad)
        expected_grads = torch.autograd.grad(expected, [*inputs, *block.parameters()], grad)
    cosines = [_cosine([features], [expected])]
    # Inputs, and each of a layer's four weights over all layers.
    n = len(inputs)
    cosines += [_cosine(actual_grads[:n], expected_grads[:n])]
    cosines += [_cosine(actual_grads[n + i :: 4], expected_grads[n + i :: 4]) for i in range(4)]
    # Written so that NaN does not agree.
    return all(cosine > 1 - _TOLERANCE for cosine in cosines)


def _with_dropout_of(features: Tensor, block: "DenseBlock", parts: Sequence[Tensor]) -> Tensor:
    """The paper's form, where dropout drops what is zero in `features`."""
    x = torch.cat(list(parts), dim=1)
    for layer, (_, new) in zip(block.layers, block.channels(), strict=True):
        y = layer.conv(torch.relu(layer.norm(x)))
        if layer.dropout.p:
            y = torch.where(features[:, new] != 0, y / (1 - layer.dropout.p), 0)
        x = torch.cat([x, y], dim=1)
    return x


def _cosine(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Of two vectors of tensors; a difference in length counts as one in direction."""
    a, b = (torch.cat([t.detach().double().flatten() for t in ts]) for ts in (actual, expected))
    return float(2 * (a @ b) / (a @ a + b @ b))


def _is_faster(block: "DenseBlock", parts: Sequence[Tensor], kernels: LayerOps) -> bool:
    """Whether a step with the kernels is faster than one of the paper's form; measured once."""
    dtype = autocast_dtype(parts[0])
    known = _timed.setdefault(block, {})
    if dtype not in known:
        with torch.enable_grad(), _apart(block):
            inputs = [part.detach().requires_grad_() for part in parts]
            try:
                ours = _milliseconds(lambda: _fused(block, kernels, inputs), inputs, block)
                paper = _milliseconds(lambda: block.as_in_the_paper(*inputs), inputs, block)
                known[dtype] = ours < paper
            except torch.OutOfMemoryError:
                known[dtype] = True  # The kernels keep less.
    return known[dtype]


def _milliseconds(run: Callable[[], Tensor], inputs: list[Tensor], block: "DenseBlock") -> float:
    """The shortest of some forward and backward passes, after one to warm up."""
    grad = torch.ones_like(run())
    times = []
    for _ in range(1 + _NUM_TIMED):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        torch.autograd.grad(run(), [*inputs, *block.parameters()], grad)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return float(min(times[1:]))


def _fused(block: "DenseBlock", kernels: LayerOps, parts: Sequence[Tensor]) -> Tensor:
    dtype = autocast_dtype(parts[0])
    with torch.autocast(parts[0].device.type, enabled=False):
        return block.train_fused(kernels, [part.to(dtype) for part in parts])[0]


@contextmanager
def _apart(block: "DenseBlock") -> Iterator[None]:
    """Within, nothing is left behind: no running statistics and no random numbers are used up."""
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
