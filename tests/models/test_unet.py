"""All variants of the U-Net, compared with an oracle written from the paper (arXiv 1505.04597).

The oracles use only the state dict. Instead of torch's layers they use sums of shifted images,
matrices, and numpy's padding.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from test_models import random_image, randomize_stats
from torch import Tensor, nn

from segtrain.errors import UsageError
from segtrain.models import build_model
from segtrain.models.layers import pad_to_multiple
from segtrain.models.unet import UNet
from segtrain.models.valid_unet import _reflect

pytestmark = pytest.mark.usefixtures("one_thread")


PADDINGS, NORMS, UPS = ("same", "valid"), ("batch", "group", "none"), ("transposed", "bilinear")
VARIANTS = [
    {"padding": padding, "norm": norm, "up": up}
    for padding, norm, up in itertools.product(PADDINGS, NORMS, UPS)
    if (padding, norm) != ("valid", "group")
]
VALID = [variant for variant in VARIANTS if variant["padding"] == "valid"]


def variant_name(variant: Mapping[str, Any]) -> str:
    return "-".join(map(str, variant.values()))


all_variants = pytest.mark.parametrize("variant", VARIANTS, ids=variant_name)
valid_variants = pytest.mark.parametrize("variant", VALID, ids=variant_name)


def build_slim(num_classes: int = 3, **kwargs: Any) -> UNet:
    """A narrow network with random batch norm and biases, float64, in evaluation mode."""
    torch.manual_seed(0)
    kwargs = {"base_channels": 3, "depth": 2, **kwargs}
    model = randomize_stats(build_model("unet", num_classes, **kwargs)).double()
    assert isinstance(model, UNet)
    return model


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal except for summation order; the logits have a magnitude of about one."""
    assert expected.std() > 1e-2, "expected values are constant"
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


@contextmanager
def record_input_shapes(module: nn.Module) -> Iterator[list[tuple[int, ...]]]:
    """Record the input shapes of a module."""
    shapes: list[tuple[int, ...]] = []
    handle = module.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    yield shapes
    handle.remove()


# --- Oracle from the paper, computed on the state dict -------------------------------------------


def conv_oracle(x: Tensor, weight: Tensor, bias: Tensor | None, pad: int) -> Tensor:
    """A sum of shifted images over the pixels of the kernel."""
    x = torch.from_numpy(np.pad(x.numpy(), [(0, 0), (0, 0), (pad, pad), (pad, pad)]))
    size = weight.shape[-1]
    height, width = x.shape[2] - size + 1, x.shape[3] - size + 1
    y = torch.zeros(len(x), len(weight), height, width, dtype=x.dtype)
    for i, j in itertools.product(range(size), repeat=2):
        shifted = x[:, :, i : i + height, j : j + width]
        y += torch.einsum("nchw,oc->nohw", shifted, weight[:, :, i, j])
    return y if bias is None else y + bias.view(1, -1, 1, 1)


def norm_oracle(x: Tensor, state: Mapping[str, Tensor], key: str, norm: str) -> Tensor:
    weight, bias = (state[f"{key}.{part}"].view(1, -1, 1, 1) for part in ("weight", "bias"))
    if norm == "batch":
        mean, var = (state[f"{key}.running_{p}"].view(1, -1, 1, 1) for p in ("mean", "var"))
    else:  # up to 32 groups, a power of two, of at least two channels
        channels = x.shape[1]
        fitting = (g for g in (2, 4, 8, 16, 32) if channels % g == 0 and channels // g >= 2)
        num = max(fitting, default=1)
        groups = x.reshape(len(x), num, -1)
        mean, var = (
            value.repeat_interleave(channels // num, dim=1)[:, :, None, None]
            for value in (groups.mean(2), groups.var(2, unbiased=False))
        )
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def upsample_matrix(length: int) -> Tensor:
    """Bilinear by 2: each half of a pixel is 3/4 that pixel and 1/4 the neighbor on its side."""
    matrix = torch.zeros(2 * length, length, dtype=torch.float64)
    for i in range(length):
        matrix[2 * i, i] += 0.75
        matrix[2 * i, max(i - 1, 0)] += 0.25
        matrix[2 * i + 1, i] += 0.75
        matrix[2 * i + 1, min(i + 1, length - 1)] += 0.25
    return matrix


def up_oracle(x: Tensor, state: Mapping[str, Tensor], key: str, *, up: str, padding: str) -> Tensor:
    if up == "transposed":  # each pixel becomes 2 x 2 pixels
        weight, bias = state[f"{key}.weight"], state[f"{key}.bias"]
        blocks = torch.einsum("nchw,coij->nohiwj", x, weight)
        return blocks.flatten(4, 5).flatten(2, 3) + bias.view(1, -1, 1, 1)
    x = torch.einsum(
        "yh,nchw,xw->ncyx", upsample_matrix(x.shape[2]), x, upsample_matrix(x.shape[3])
    )
    if padding == "valid":  # the outermost pixels depend on pixels beyond the border
        x = x[:, :, 1:-1, 1:-1]
    return conv_oracle(x, state[f"{key}.conv.weight"], state[f"{key}.conv.bias"], 0)


def paths_oracle(
    state: Mapping[str, Tensor],
    x: Tensor,
    *,
    depth: int,
    padding: str,
    norm: str,
    up: str,
    drop: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """Figure 1 of the paper; `drop` at the end of the contracting path (section 3.1)."""

    def two_convs(x: Tensor, key: str) -> Tensor:
        for conv in (0, 2) if norm == "none" else (0, 3):
            bias = state[f"{key}.{conv}.bias"] if norm == "none" else None
            x = conv_oracle(x, state[f"{key}.{conv}.weight"], bias, int(padding == "same"))
            if norm != "none":
                x = norm_oracle(x, state, f"{key}.{conv + 1}", norm)
            x = x * (x > 0)
        return x

    skips = []
    for level in range(depth):
        x = two_convs(x, f"encoders.{level}")
        if level == depth - 1:
            x = drop(x)
        skips.append(x)
        x = torch.stack([x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]).amax(0)
    x = drop(two_convs(x, "bottleneck"))
    for level in range(depth):
        x = up_oracle(x, state, f"ups.{level}", up=up, padding=padding)
        skip = skips[depth - 1 - level]
        for dim in (2, 3):
            excess = skip.shape[dim] - x.shape[dim]
            assert excess % 2 == 0
            skip = skip.narrow(dim, excess // 2, x.shape[dim])
        x = two_convs(torch.cat([skip, x], 1), f"decoders.{level}")
    return conv_oracle(x, state["head.weight"], state["head.bias"], 0)


def margins(num_pixels: int, depth: int, up: str) -> tuple[int, int]:
    """Margins that a valid network reads before and after at least `num_pixels` output pixels.

    Sizes as in figure 1, counted layer by layer, for increasing bottleneck sizes.
    """
    for bottleneck in itertools.count(5):
        num_in, num_out = bottleneck, bottleneck - 4
        for _ in range(depth):
            num_in = 2 * num_in + 4
            num_out = 2 * num_out - (2 if up == "bilinear" else 0) - 4
        if num_out >= num_pixels:
            before = (num_in - num_out) // 2
            return before, num_in - num_pixels - before
    raise AssertionError("unreachable")


def unet_oracle(
    state: Mapping[str, Tensor],
    image: Tensor,
    *,
    depth: int,
    padding: str,
    norm: str,
    up: str,
    **kwargs: Any,
) -> Tensor:
    """The whole image at once, mirrored beyond its border (valid) or edge-padded (same)."""
    height, width = image.shape[-2:]
    # float32, like the buffers of the network.
    mean = torch.tensor([123.675, 116.28, 103.53]).double().view(1, 3, 1, 1)
    std = torch.tensor([58.395, 57.12, 57.375]).double().view(1, 3, 1, 1)
    x = (image.double() - mean) / std
    if padding == "same":
        pads = [(0, -height % 2**depth), (0, -width % 2**depth)]
    else:
        pads = [margins(height, depth, up), margins(width, depth, up)]
    mode: Any = "edge" if padding == "same" else "reflect"
    x = torch.from_numpy(np.pad(x.numpy(), [(0, 0), (0, 0), *pads], mode=mode))
    logits = paths_oracle(state, x, depth=depth, padding=padding, norm=norm, up=up, **kwargs)
    return logits[:, :, :height, :width]


@all_variants
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 2), (23, 18)], ids=str)
def test_every_variant_computes_what_the_paper_describes(
    size: tuple[int, int], depth: int, variant: dict[str, Any]
) -> None:
    model = build_slim(depth=depth, **variant)
    image = random_image(*size)
    with torch.inference_mode():
        expected = unet_oracle(model.state_dict(), image, depth=depth, **variant)
        assert_same(model(image), expected)


@all_variants
def test_the_depth_of_the_paper_computes_what_the_paper_describes(variant: dict[str, Any]) -> None:
    model = build_slim(depth=4, **variant)
    image = random_image(17, 6, num=1)
    with torch.inference_mode():
        assert_same(model(image), unet_oracle(model.state_dict(), image, depth=4, **variant))


@pytest.mark.parametrize(
    ("base_channels", "expected"), [(24, [8, 16, 32]), (8, [4, 8, 16]), (1, [1, 1, 2])]
)
def test_group_norm_has_at_most_32_groups_of_at_least_two_channels(
    base_channels: int, expected: list[int]
) -> None:
    """Wu and He 2018 use 32; a single channel has no variance if H and W are 1."""
    variant = {"padding": "same", "norm": "group", "up": "transposed"}
    model = build_slim(base_channels=base_channels, **variant)
    groups = [m.num_groups for m in model.modules() if isinstance(m, nn.GroupNorm)]
    assert groups == [num for num in (*expected, *expected[-2::-1]) for _ in (0, 1)]
    image = random_image(6, 9)
    with torch.inference_mode():
        assert_same(model(image), unet_oracle(model.state_dict(), image, depth=2, **variant))


# --- Sizes in the paper -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"padding": "valid", "norm": "none"}, 31_031_810),
        ({"padding": "same", "norm": "none"}, 31_031_810),
        ({"padding": "same", "norm": "batch"}, 31_037_698),
        ({}, 31_037_698),
        ({"padding": "valid", "norm": "batch"}, 31_037_698),
        ({"norm": "group"}, 31_037_698),
        # 1x1 instead of 2x2 from 2c to c channels: fewer by three times 2c * c.
        ({"norm": "none", "up": "bilinear"}, 31_031_810 - 6 * (512**2 + 256**2 + 128**2 + 64**2)),
    ],
    ids=str,
)
def test_parameter_counts(kwargs: dict[str, Any], expected: int) -> None:
    with torch.device("meta"):
        model = build_model("unet", 2, **kwargs)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_sizes_and_channels_match_figure_1() -> None:
    with torch.device("meta"):
        model = build_model("unet", 2, padding="valid", norm="none").eval()
        assert isinstance(model, UNet)
        shapes: dict[str, tuple[int, ...]] = {}
        for key, module in model.named_modules():
            module.register_forward_hook(
                lambda _, args, output, key=key: shapes.update({key: tuple(output.shape[1:])})
            )
        logits = model.forward_paths(torch.empty(1, 3, 572, 572))
    assert logits.shape == (1, 2, 388, 388)
    sizes = {"encoders": (568, 280, 136, 64), "ups": (56, 104, 200, 392)}
    sizes["decoders"] = (52, 100, 196, 388)
    for path, sides in sizes.items():
        channels = (64, 128, 256, 512) if path == "encoders" else (512, 256, 128, 64)
        for i, (side, width) in enumerate(zip(sides, channels, strict=True)):
            assert shapes[f"{path}.{i}"] == (width, side, side)
    assert shapes["bottleneck"] == (1024, 28, 28)


def test_an_output_of_388_pixels_requires_an_input_of_572() -> None:
    """Figure 2: 92 pixels on each side."""
    model = build_slim(padding="valid", norm="none", base_channels=1, depth=4)
    assert margins(388, 4, "transposed") == (92, 92)
    with record_input_shapes(model.encoders[0]) as shapes, torch.inference_mode():
        model.train()(random_image(388, 388, num=1))
    assert shapes == [(1, 3, 572, 572)]


def test_tiles_have_the_size_of_the_paper() -> None:
    """388 is not a multiple of 16, so a tile has 384 output pixels and the paper's 572 inputs."""
    model = build_slim(padding="valid", norm="none", base_channels=1, depth=4).eval()
    with record_input_shapes(model.encoders[0]) as shapes, torch.inference_mode():
        assert model(random_image(2, 385, num=1)).shape == (1, 3, 2, 385)
    assert [shape[3] for shape in shapes] == [572, 188]
    assert [shape[2] for shape in shapes] == [188, 188]


# --- Reflection and tiles ---------------------------------------------------------------------


def reflect_index(index: int, length: int) -> int:
    """Walk `index` pixels along a side and turn around at its first and last pixel."""
    if length == 1:
        return 0
    position, step = 0, 1
    for _ in range(abs(index)):  # negative indices mirror the walk at 0
        if not 0 <= position + step < length:
            step = -step
        position += step
    return position


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8])
def test_reflection_does_not_repeat_the_edge(length: int) -> None:
    indices = range(-4 * length - 3, 5 * length + 3)
    reflected = _reflect(indices, length, torch.device("cpu"))
    assert reflected.tolist() == [reflect_index(index, length) for index in indices]


WHOLE = 10_000


def forward_with_tiles(
    model: nn.Module, image: Tensor, side: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, list[tuple[int, ...]]]:
    """Logits computed with tiles of this side, and the input shapes of the first level."""
    monkeypatch.setattr("segtrain.models.valid_unet._TILE", side)
    with record_input_shapes(model.encoders[0]) as shapes, torch.inference_mode():
        return model(image), shapes


@valid_variants
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("size", [(29, 13), (1, 33), (16, 17), (8, 8)], ids=str)
def test_tiles_do_not_change_the_logits(
    size: tuple[int, int], depth: int, variant: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_slim(depth=depth, **variant)
    image = random_image(*size)
    expected, shapes = forward_with_tiles(model, image, WHOLE, monkeypatch)
    assert len(shapes) == 1
    assert_same(expected, unet_oracle(model.state_dict(), image, depth=depth, **variant))
    for side in (1, 8, 13):
        tiled, shapes = forward_with_tiles(model, image, side, monkeypatch)
        # Rounded down to a multiple of 2**depth, but not to 0.
        step = max(side - side % 2**depth, 2**depth)
        assert len(shapes) == math.ceil(size[0] / step) * math.ceil(size[1] / step)
        assert_same(tiled, expected)


@valid_variants
def test_with_tiles_no_tensor_is_as_large_as_the_image(
    variant: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_slim(num_classes=1, **variant)
    image = random_image(120, 200, num=1)
    output_sizes: list[int] = []
    for module in model.modules():
        if module is not model:
            module.register_forward_hook(lambda _, args, y: output_sizes.append(y.numel()))
    forward_with_tiles(model, image, WHOLE, monkeypatch)
    level = 3 * 120 * 200  # values of the first level for the whole image
    assert max(output_sizes) > level
    output_sizes.clear()
    _, shapes = forward_with_tiles(model, image, 16, monkeypatch)
    side = 16 + sum(margins(16, 2, variant["up"]))
    assert max(shape[2] for shape in shapes) == max(shape[3] for shape in shapes) == side
    assert max(output_sizes) <= 3 * side**2 < level / 5


@valid_variants
def test_training_uses_the_whole_image_and_reaches_every_parameter(
    variant: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("segtrain.models.valid_unet._TILE", 8)
    model = build_slim(**variant).train()
    with record_input_shapes(model.encoders[0]) as shapes:
        logits = model(random_image(19, 30))
    assert len(shapes) == 1
    assert logits.shape == (2, 3, 19, 30)
    logits.square().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize("up", UPS)
def test_batch_statistics_are_those_of_the_whole_image(
    up: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms in training mode in a network in evaluation mode, as for bn_eval=batch."""
    image = random_image(21, 12)
    results = []
    for side in (4, WHOLE):
        model = build_slim(padding="valid", norm="batch", up=up)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.train()
        logits, shapes = forward_with_tiles(model, image, side, monkeypatch)
        assert len(shapes) == 1
        results.append((logits, model.encoders[0][1]))
    assert_same(results[0][0], results[1][0])

    first, norm = model.encoders[0][0], results[0][1]
    assert norm.num_batches_tracked == 1
    before = build_slim(padding="valid", norm="batch", up=up).encoders[0][1].running_mean
    pads = [margins(21, 2, up), margins(12, 2, up)]
    pixels = np.pad(image.double().numpy(), [(0, 0), (0, 0), *pads], mode="reflect")
    conv = conv_oracle(model.normalize(torch.from_numpy(pixels)), first.weight.detach(), None, 0)
    assert_same(norm.running_mean, 0.9 * before + 0.1 * conv.mean((0, 2, 3)))


@valid_variants
def test_a_valid_network_accepts_bytes_floats_and_batches(variant: dict[str, Any]) -> None:
    """An image does not depend on the other images of the batch."""
    model = build_slim(**variant)
    image = random_image(9, 14, num=3)
    with torch.inference_mode():
        together = model(image)
        assert torch.equal(model(image.double()), together)
        for i in range(3):
            assert_same(model(image[i : i + 1])[0], together[i])


# --- Dropout ------------------------------------------------------------------------------------


class FakeDropout(nn.Module):
    """Replaces dropout; the dropped values depend only on their position and the call number."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        generator = torch.Generator().manual_seed(self.calls)
        return x * (torch.rand(x.shape, generator=generator) < 0.5)


@all_variants
@pytest.mark.parametrize("depth", [1, 3])
def test_dropout_is_applied_to_the_last_level_with_its_skip_and_to_the_bottleneck(
    depth: int, variant: dict[str, Any]
) -> None:
    model = build_slim(depth=depth, drop_rate=0.5, **variant)
    image = random_image(9, 14)
    model.dropout = FakeDropout()
    with torch.inference_mode():
        expected = unet_oracle(
            model.state_dict(), image, depth=depth, drop=FakeDropout(), **variant
        )
        assert_same(model(image), expected)
    assert model.dropout.calls == 2


@all_variants
def test_dropout_drops_single_values_independently_and_scales_the_others(
    variant: dict[str, Any],
) -> None:
    model = build_slim(drop_rate=0.25, base_channels=4, **variant).train()
    dropped: list[Tensor] = []

    def check(_: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        x = args[0]
        kept = y != 0
        torch.testing.assert_close(y[kept], x[kept] / 0.75)
        for channel, active in zip((~kept).flatten(0, 1), (x > 0).flatten(0, 1), strict=True):
            num = int(active.sum())
            if num >= 200:  # within 6 standard deviations
                rate = (channel & active).sum().item() / num
                assert rate == pytest.approx(0.25, abs=6 * math.sqrt(0.25 * 0.75 / num))
                dropped.append(channel)

    model.dropout.register_forward_hook(check)
    with torch.no_grad():
        model(random_image(90, 84))
    assert len(dropped) > 20
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(dropped, 2))


@pytest.mark.parametrize("padding", PADDINGS)
def test_dropout_is_active_only_in_training(padding: str) -> None:
    image = random_image(16, 16)
    model = build_slim(padding=padding, norm="none", drop_rate=0.5)
    without = build_slim(padding=padding, norm="none")
    with torch.no_grad():
        assert torch.equal(model(image), without(image))
        model.train()
        without.train()
        assert torch.equal(without(image), without(image))
        assert not torch.equal(model(image), model(image))
        assert not torch.equal(model(image), without(image))


# --- Initial weights ----------------------------------------------------------------------------


@all_variants
def test_initial_convolutions_are_he_uniform_with_zero_biases(variant: dict[str, Any]) -> None:
    torch.manual_seed(3)
    model = build_model("unet", base_channels=16, depth=2, **variant)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    # Two per block, one per upsampling layer, and the head.
    assert len(convs) == 2 * 5 + 2 + 1
    for conv in convs:
        # torch and Keras use the output channels of a transposed convolution.
        fan_channels = (
            conv.out_channels if isinstance(conv, nn.ConvTranspose2d) else conv.in_channels
        )
        bound = math.sqrt(6 / (fan_channels * math.prod(conv.kernel_size)))
        num = conv.weight.numel()
        # The probability that no value exceeds the fraction 1 - 20/num of the bound is e^-20.
        assert bound * (1 - 20 / num) < conv.weight.abs().max() <= bound * (1 + 1e-6), conv
        assert conv.weight.std().item() == pytest.approx(
            bound / math.sqrt(3), rel=6 / math.sqrt(num)
        ), conv
        followed_by_norm = variant["norm"] != "none" and conv.kernel_size == (3, 3)
        assert (conv.bias is None) == followed_by_norm, conv
        assert conv.bias is None or not conv.bias.any(), conv


# --- Padding to a multiple ----------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (3, 8), (8, 8), (9, 16), (17, 5)], ids=str)
@pytest.mark.parametrize(("multiple", "min_size"), [(1, 1), (4, 1), (8, 8), (8, 16), (4, 64)])
def test_padding_repeats_the_edge_on_the_right_and_bottom(
    size: tuple[int, int], multiple: int, min_size: int
) -> None:
    x = torch.rand(2, 3, *size)
    target = [next(n for n in itertools.count(max(s, min_size)) if n % multiple == 0) for s in size]
    pads = [(0, 0), (0, 0), (0, target[0] - size[0]), (0, target[1] - size[1])]
    padded = pad_to_multiple(x, multiple, min_size=min_size)
    assert torch.equal(padded, torch.from_numpy(np.pad(x.numpy(), pads, mode="edge")))
    if min_size == 1:
        assert torch.equal(pad_to_multiple(x, multiple), padded)


def test_gradients_of_the_padding_reach_the_edge() -> None:
    x = torch.ones(1, 1, 1, 3, requires_grad=True)
    pad_to_multiple(x, 4).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[[[4.0, 4.0, 8.0]]]]


# --- Building by name ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "expected_text"),
    [
        ({"padding": "valid", "norm": "group"}, "group"),
        ({"padding": "valid", "norm": "group", "up": "bilinear"}, "valid"),
        ({"padding": "mirror"}, "model.padding"),
        ({"padding": None}, "model.padding"),
        ({"norm": "layer"}, "model.norm"),
        ({"norm": None}, "model.norm"),
        ({"up": "nearest"}, "model.up"),
        ({"base_channels": 0}, "base_channels"),
        ({"base_channels": -4}, "base_channels"),
        ({"base_channels": 2.5}, "model.base_channels"),
        ({"depth": 0}, "depth"),
        ({"depth": 9}, "depth"),
        ({"depth": "deep"}, "model.depth"),
        ({"drop_rate": 1}, "drop_rate"),
        ({"drop_rate": -0.1}, "drop_rate"),
        ({"drop_rate": math.nan}, "drop_rate"),
        ({"drop_rate": "half"}, "model.drop_rate"),
        ({"tile": 388}, "tile"),
    ],
    ids=str,
)
def test_invalid_arguments_are_a_usage_error_of_one_line(
    kwargs: dict[str, Any], expected_text: str
) -> None:
    with pytest.raises(UsageError) as caught:
        build_model("unet", **{"base_channels": 2, "depth": 1, **kwargs})
    message = str(caught.value)
    assert expected_text in message
    assert "\n" not in message


def test_the_error_for_group_norm_lists_the_supported_norms() -> None:
    with pytest.raises(UsageError, match="norm=batch or norm=none"):
        build_model("unet", padding="valid", norm="group")


@pytest.mark.parametrize("depth", [1, 8])
def test_depths_from_1_to_8_can_be_built(depth: int) -> None:
    with torch.device("meta"):
        model = build_model("unet", base_channels=1, depth=str(depth), padding="valid", norm="none")
    assert len(model.encoders) == len(model.ups) == depth
