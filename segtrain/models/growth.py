"""The arithmetic of a dense block without most of the traffic and memory of its textbook form.

In a dense block every layer normalises all features made before it. Written down plainly, each
layer copies them (concatenation) and measures them again (batch norm). Here a block's features
live in one tensor that every layer reads from and writes its share into, and a feature map is
measured once, when it is made: all later layers see the same map, so the same mean and variance.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from segtrain.models.layers import Dropout

# What a sweep over features should leave in a CPU's caches for the next: in the second level where
# only the rows around a pixel matter, in the last one where whole images do.
_STRIP_BYTES = 5 * 2**19
_PORTION_BYTES = 16 * 2**20

_aten = torch.ops.aten


class Plan(NamedTuple):
    """What a block's layers are, beside their weights.

    channels: for each layer the channels that it reads and those that it writes.
    eps: of all batch norms.
    dropouts: one a layer.
    recompute: make BN and ReLU anew in the backward pass instead of keeping their results.
    """

    channels: list[tuple[slice, slice]]
    eps: float
    dropouts: list[Dropout]
    recompute: bool


class Norm(NamedTuple):
    """Batch norm over channels with these moments, a value a channel each."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor
    eps: float

    @property
    def rstd(self) -> Tensor:
        return (self.var + self.eps).rsqrt()

    @property
    def scale(self) -> Tensor:
        return self.weight * self.rstd

    def relu(self, x: Tensor) -> Tensor:
        """Batch norm and ReLU of contiguous N C H W, with the moments' precision inside."""
        a = F.batch_norm(x, self.mean, self.var, self.weight, self.bias, eps=self.eps)
        return a.relu_()


class Growth(torch.autograd.Function):
    """A dense block in training mode, forward and backward.

    The gradient of a feature map is a sum over the layers that read it. It reaches them by three
    ways: its values, and the mean and the variance that all of them share. What comes by the latter
    two is summed up a channel and goes down once, when all readers are done.
    """

    @staticmethod
    def forward(ctx: Any, plan: Plan, num_parts: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Parts of the input, four weights a layer → features, their mean and biased variance.

        A layer's weights are those of batch norm (weight, bias) and convolution (weight, bias).
        """
        parts, weights = tensors[:num_parts], tensors[num_parts:]
        num_channels = plan.channels[-1][1].stop
        features = join(parts, num_channels)
        mean, var = measure_parts(parts, num_channels)
        masks, kept = [], []
        for i, (old, new) in enumerate(plan.channels):
            *norm_weights, weight, bias = weights[4 * i : 4 * i + 4]
            norm = _norm_by(norm_weights, mean[old], var[old], plan.eps)
            activations: list[Tensor] | None = None if plan.recompute else []
            y = new_features(features[:, old], norm, weight, bias, keep=activations)
            mask = plan.dropouts[i].draw(y)
            y = plan.dropouts[i].masked(y, mask)
            features[:, new] = y
            mean[new], var[new] = measure(y)
            masks.append(mask)
            kept.append(activations or [])
        ctx.plan, ctx.part_channels = plan, [part.shape[1] for part in parts]
        ctx.num_kept = [len(activations) for activations in kept]
        ctx.save_for_backward(features, mean, var, *weights, *masks, *chain.from_iterable(kept))
        ctx.mark_non_differentiable(mean, var)
        return features, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_features: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of what `forward` took."""
        plan: Plan = ctx.plan
        n = len(plan.channels)
        features, mean, var, *saved = ctx.saved_tensors
        weights, masks, kept = saved[: 4 * n], saved[4 * n : 5 * n], saved[5 * n :]
        # What comes in belongs to others; this copy goes on to collect the readers' shares.
        grad = grad_features.clone(memory_format=torch.channels_last)
        grad_mean, grad_var = torch.zeros_like(mean), torch.zeros_like(var)

        def complete(part: slice) -> Tensor:
            moment_grads = grad_mean[part], grad_var[part]
            return _add_moment_grads(grad[:, part], features[:, part], mean[part], *moment_grads)

        weight_grads: list[Tensor] = []
        for i, (old, new) in reversed(list(enumerate(plan.channels))):
            *norm_weights, weight, _ = weights[4 * i : 4 * i + 4]
            norm = _norm_by(norm_weights, mean[old], var[old], plan.eps)
            activations = [kept.pop() for _ in range(ctx.num_kept[i])][::-1]
            grad_y = plan.dropouts[i].masked(complete(new), masks[i])
            layer_grads = _backward_of_new_features(
                grad_y, features[:, old], norm, weight, kept=activations, grad_x=grad[:, old]
            )
            weight_grads[:0] = layer_grads
            grad_norm_weight, grad_norm_bias = layer_grads[:2]
            grad_mean[old] -= norm.scale * grad_norm_bias
            grad_var[old] -= norm.scale * norm.rstd * grad_norm_weight / 2
        first = slice(0, plan.channels[0][0].stop)
        part_grads = torch.split(complete(first), ctx.part_channels, dim=1)
        return None, None, *part_grads, *weight_grads


def join(parts: tuple[Tensor, ...] | list[Tensor], num_channels: int) -> Tensor:
    """Room for all features of a block, channels_last, with its input written at the front."""
    features = _room(parts[0], num_channels)
    torch.cat(parts, dim=1, out=features[:, : sum(part.shape[1] for part in parts)])
    return features


def measure(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, in float32 for the half precisions."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    mean, var = torch.zeros(2, x.shape[1], dtype=dtype, device=x.device)
    # Handed in only to say the precision; nothing is mixed into them.
    return torch.batch_norm_update_stats(x, mean, var, momentum=0.0)


def measure_parts(
    parts: tuple[Tensor, ...] | list[Tensor], num_channels: int
) -> tuple[Tensor, Tensor]:
    """Moments of a block's input, with room behind them for those of the new features."""
    moments = torch.cat([torch.stack(measure(part)) for part in parts], dim=1)
    mean, var = F.pad(moments, (0, num_channels - moments.shape[1]))
    return mean, var


def running_norm(norm: nn.BatchNorm2d) -> Norm:
    """Batch norm by its running statistics."""
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None
    assert var is not None
    return _norm_by([norm.weight, norm.bias], mean, var, norm.eps)


def _norm_by(weights: Sequence[Tensor], mean: Tensor, var: Tensor, eps: float) -> Norm:
    """Batch norm with a weight and a bias, in the precision of the moments."""
    weight, bias = (vector.to(mean.dtype) for vector in weights)
    return Norm(weight, bias, mean, var, eps)


def new_features(
    x: Tensor, norm: Norm, weight: Tensor, bias: Tensor, *, keep: list[Tensor] | None = None
) -> Tensor:
    """Batch norm, ReLU and 3x3 convolution of N C H W, as a rule a slice of a block's features.

    Args:
        keep: takes what goes into the convolution, portion by portion.
    """
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    y = _room(x, weight.shape[0])
    for images in _portions(x, _STRIP_BYTES if keep is None else _PORTION_BYTES):
        strips = _strips(x[images]) if keep is None else [slice(0, x.shape[2])]
        for rows in strips:
            # The strip needs a row of its neighbours on either side; their results are dropped.
            first, last = max(rows.start - 1, 0), min(rows.stop + 1, x.shape[2])
            a = norm.relu(_copy(x[images, :, first:last]))
            strip = F.conv2d(a, weight, bias, padding=1)
            y[images, :, rows] = strip[:, :, rows.start - first : rows.stop - first]
            if keep is not None:
                keep.append(a)
    return y


def _backward_of_new_features(
    grad_y: Tensor, x: Tensor, norm: Norm, weight: Tensor, *, kept: list[Tensor], grad_x: Tensor
) -> list[Tensor]:
    """Adds the share of x's values (not of its moments) to `grad_x`.

    Args:
        kept: what went into the convolution, portion by portion; made anew where it is empty.

    Returns:
        The gradients of the weights: batch norm's weight and bias, the convolution's.
    """
    totals: list[Tensor] = []
    for i, rows in enumerate(_portions(x, _PORTION_BYTES)):
        x_rows = _copy(x[rows])
        a = kept[i] if kept else norm.relu(x_rows)
        grad_a, *conv_grads = _conv_backward(grad_y[rows], a, weight)
        _aten.threshold_backward.grad_input(grad_a, a, 0, grad_input=grad_a)
        # The sums over pixels of grad_a * (x - mean) * rstd and of grad_a.
        _, *norm_grads = _aten.native_batch_norm_backward(
            *(grad_a, x_rows, norm.weight, norm.mean, norm.var, *_no_saved_moments(norm.mean)),
            *(False, norm.eps, [False, True, True]),
        )
        grad_x[rows].addcmul_(grad_a, _per_channel(norm.scale, grad_a))
        grads = [*norm_grads, *conv_grads]
        totals = [a + b for a, b in zip(totals, grads, strict=True)] if totals else grads
    return totals


def _conv_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias of the padded 3x3 convolution."""
    once = [1, 1]
    grad_x, grad_weight, grad_bias = _aten.convolution_backward(
        *(grad, x, weight.to(x.dtype), [weight.shape[0]], once, once, once, False, [0, 0], 1),
        [True, True, True],
    )
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def _add_moment_grads(
    grad: Tensor, x: Tensor, mean: Tensor, grad_mean: Tensor, grad_var: Tensor
) -> Tensor:
    """The gradient of feature maps, with what reaches them by their mean and biased variance."""
    num_values = x.numel() // x.shape[1]
    # (grad_mean + 2 grad_var (x - mean)) / num_values: to torch that is a batch norm, too. Called
    # by its inner name, for the outer one refuses an epsilon of 0 before torch 2.13.
    one = torch.ones_like(mean)
    slope, offset = 2 / num_values * grad_var, grad_mean / num_values
    moments = mean, one, False, 0.0, 0.0
    return grad + torch.batch_norm(_copy(x), slope, offset, *moments, torch.backends.cudnn.enabled)


def _no_saved_moments(like: Tensor) -> tuple[Tensor, Tensor]:
    """For batch norm by given moments; CUDA's kernel insists on tensors."""
    return like.new_empty(0), like.new_empty(0)


def _room(x: Tensor, num_channels: int) -> Tensor:
    """An uninitialised tensor like `x` but with so many channels, channels_last."""
    n, _, h, w = x.shape
    return x.new_empty(n, h, w, num_channels).permute(0, 3, 1, 2)


def _copy(x: Tensor) -> Tensor:
    return _room(x, x.shape[1]).copy_(x)


def _per_channel(vector: Tensor, x: Tensor) -> Tensor:
    return vector.to(x.dtype).view(1, -1, 1, 1)


def _portions(x: Tensor, num_bytes: int) -> Iterator[slice]:
    """On a CPU at least one and no more images at a time than make so many bytes.

    Memory for smaller pieces is also used again, where large ones are fresh from the system.
    """
    num_images = x.shape[0]
    step = num_images
    if x.device.type == "cpu":
        step = max(1, int(num_bytes / _bytes_an_image(x)))
    return (slice(start, start + step) for start in range(0, num_images, step))


def _strips(x: Tensor) -> Iterator[slice]:
    """On a CPU the rows of large images, in equal parts that fit into the cache one by one."""
    height = x.shape[2]
    step = height
    if x.device.type == "cpu":
        num_strips = max(1, round(_bytes_an_image(x) / _STRIP_BYTES))
        step = -(-height // num_strips)
    return (slice(start, min(start + step, height)) for start in range(0, height, step))


def _bytes_an_image(x: Tensor) -> int:
    return max(1, x[:1].numel() * x.element_size())
