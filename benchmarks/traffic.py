"""Count the memory traffic of a training step on a GPU, with meta tensors (used by models, train).

Every distinct input of an operator is read once, and every output is written once; batch norm and
the backward passes of convolutions read their input more than once. Views move nothing. Caches are
ignored, so this is the least that a GPU moves whose caches hold nothing from one operator to the
next. Triton kernels are not torch operators; their traffic is written down here.
"""

from collections.abc import Callable, Sequence
from math import ceil
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from segtrain.models import dense_block_fused
from segtrain.models.dense_block import DenseBlock
from segtrain.models.dense_block_fused import (
    LayerPlan,
    LayerWeights,
    Moments,
    empty_channels_last,
)

_FREE = frozenset(
    {
        *("view", "_unsafe_view", "view_as", "_reshape_alias", "as_strided", "alias", "detach"),
        *("slice", "select", "narrow", "split", "split_with_sizes", "unbind", "expand", "t"),
        *("permute", "transpose", "unsqueeze", "squeeze", "lift_fresh"),
        *("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"),
    }
)
_WRITE_ONLY = {"fill_", "zero_", "random_", "bernoulli_", "uniform_"}


class Traffic(TorchDispatchMode):
    """Within, count bytes and operators."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.num_operators = 0.0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if name in _FREE:
            return out
        self.num_operators += 1
        self.bytes += num_bytes(out)
        if name not in _WRITE_ONLY:
            self.bytes += num_bytes((args, kwargs))
        if name == "native_batch_norm" and args[5]:  # once for the statistics, once for the values
            self.bytes += num_bytes(args[0])
        if name in {"native_batch_norm_backward", "convolution_backward"}:
            self.bytes += 2 * num_bytes(args[0])
        return out


def num_bytes(values: Any) -> int:
    """Bytes of all tensors in a tree of values."""
    tensors = [x for x in tree_leaves(values) if isinstance(x, Tensor) and x.is_meta]
    return sum(x.numel() * x.element_size() for x in tensors)


class CountedKernels:
    """Replaces `dense_layer_triton`: only counts the bytes that its kernels read and write."""

    def __init__(self, traffic: Traffic) -> None:
        self.traffic = traffic

    def draw_dropout(self, layers: Sequence[LayerPlan], features: Tensor) -> list[Tensor | None]:
        seed = torch.randint(2**62, (1,), device=features.device)
        return [seed for _ in layers]

    def forward_layer(
        self, layer: LayerPlan, features: Tensor, moments: Moments, weights: LayerWeights,
        dropout: Tensor | None, *, recompute: bool,
    ) -> list[Tensor]:  # fmt: skip
        num_pixels, size = count_pixels(features), features.element_size()
        read = num_pixels * size * layer.old.stop + num_bytes(weights)
        written = num_pixels * size * count_new_channels(layer)
        # Mean and spread of each tile of 8 x 16 pixels.
        tiles = 2 * 4 * count_new_channels(layer) * num_pixels / 128
        self.traffic.bytes += read + written + 2 * tiles
        self.traffic.num_operators += 2
        return []

    def backward_layer(
        self, layer: LayerPlan, features: Tensor, moments: Moments, weights: LayerWeights,
        dropout: Tensor | None, saved: list[Tensor], grad: Tensor, moment_grads: Moments,
    ) -> LayerWeights:  # fmt: skip
        num_pixels, size = count_pixels(features), features.element_size()
        num_old, channel_blocks = layer.old.stop, ceil(layer.old.stop / 64)
        grad_y = num_pixels * size * 16
        values = num_pixels * size * (3 * num_old + 2 * count_new_channels(layer))
        # On a GPU with 132 multiprocessors, as `dense_layer_triton._num_splits`.
        num_splits = max(1, min(ceil(num_pixels / 64) // 4, 2 * 132 // channel_blocks))
        partials = 4 * num_splits * (9 * 16 + 2) * num_old
        self.traffic.bytes += values + (1 + channel_blocks) * grad_y + 2 * partials
        self.traffic.bytes += 2 * num_bytes(weights)
        self.traffic.num_operators += 3
        return LayerWeights(*map(torch.empty_like, weights))

    def input_grads(
        self, features: Tensor, moments: Moments, grad: Tensor, moment_grads: Moments,
        part_channels: Sequence[int],
    ) -> list[Tensor]:  # fmt: skip
        self.traffic.bytes += (
            3 * count_pixels(features) * features.element_size() * sum(part_channels)
        )
        self.traffic.num_operators += len(part_channels)
        return [empty_channels_last(features, c) for c in part_channels]


def count_pixels(features: Tensor) -> int:
    return features.numel() // features.shape[1]


def count_new_channels(layer: LayerPlan) -> int:
    return layer.new.stop - layer.new.start


def step_traffic(
    make_model: Callable[[], nn.Module], batch_size: int, side: int, dtype: torch.dtype
) -> tuple[float, int]:
    """Bytes and operators of a forward and backward pass.

    Args:
        make_model: dense blocks with memory_efficient use the Triton kernels.
        dtype: of weights and features. Autocast adds casts of the weights, which are few bytes.
    """
    traffic = Traffic()
    kernels = CountedKernels(traffic)
    with torch.device("meta"):
        model = make_model().to("meta", dtype, memory_format=torch.channels_last).train()
        image = torch.zeros(batch_size, side, side, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        mask = torch.zeros(batch_size, side, side, dtype=torch.long)

        def forward(block: DenseBlock, *parts: Tensor) -> Tensor:
            if not block.memory_efficient:
                return block.forward_plain(*parts)
            features, moments = block.train_fused(kernels, list(parts))
            block._update_running_stats(moments, count_pixels(features))
            return features

        def channel_moments(x: Tensor) -> Moments:  # torch's operator does not support meta tensors
            traffic.bytes += num_bytes(x)
            traffic.num_operators += 1
            return Moments(*x.new_empty(2, x.shape[1], dtype=torch.float32))

        with (
            patch.object(DenseBlock, "forward", forward),
            patch.object(dense_block_fused, "channel_moments", channel_moments),
            traffic,
        ):
            logits = model(image)
            F.cross_entropy(logits.float(), mask).backward()
    return traffic.bytes, traffic.num_operators
