"""U-Net in all its variants against the paper (arXiv 1505.04597), written once more from it.

The oracles work on the bare state dict and by other means than the network: sums of shifted
pictures, matrices and numpy's own mirror in place of torch's layers.
"""

import importlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from test_models import random_image, trained_look
from torch import Tensor, nn

from segtrain.errors import UsageError
from segtrain.models import build_model
from segtrain.models.layers import pad_to_multiple
from segtrain.models.unet import UNet

pytestmark = pytest.mark.usefixtures("one_thread")

# `segtrain.models.unet` is also a function's name.
unet_module = importlib.import_module("segtrain.models.unet")

PADDINGS, NORMS, UPS = ("same", "valid"), ("batch", "group", "none"), ("transposed", "bilinear")
VARIANTS = [
    {"padding": padding, "norm": norm, "up": up}
    for padding, norm, up in itertools.product(PADDINGS, NORMS, UPS)
    if (padding, norm) != ("valid", "group")
]
VALID = [variant for variant in VARIANTS if variant["padding"] == "valid"]


def variant_name(variant: Mapping[str, Any]) -> str:
    return "-".join(map(str, variant.values()))


every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=variant_name)
every_valid = pytest.mark.parametrize("variant", VALID, ids=variant_name)


def slim(num_classes: int = 3, **kwargs: Any) -> UNet:
    """A narrow network with the uneven weights of a trained one, in float64, in evaluation mode."""
    torch.manual_seed(0)
    kwargs = {"base_channels": 3, "depth": 2, **kwargs}
    model = trained_look(build_model("unet", num_classes, **kwargs)).double()
    assert isinstance(model, UNet)
    return model


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal but for the order of sums; the logits here are of the order of one."""
    assert expected.std() > 1e-2, "nothing to see"
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


@contextmanager
def inputs_of(module: nn.Module) -> Iterator[list[tuple[int, ...]]]:
    """The shapes of what goes into a module."""
    shapes: list[tuple[int, ...]] = []
    handle = module.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    yield shapes
    handle.remove()


# --- The paper once more, over the bare state dict ----------------------------------------------


def conv_oracle(x: Tensor, weight: Tensor, bias: Tensor | None, pad: int) -> Tensor:
    """A sum over the kernel's pixels of the picture shifted by as much."""
    x = torch.from_numpy(np.pad(x.numpy(), [(0, 0), (0, 0), (pad, pad), (pad, pad)]))
    size = weight.shape[-1]
    height, width = x.shape[2] - size + 1, x.shape[3] - size + 1
    y = torch.zeros(len(x), len(weight), height, width, dtype=x.dtype)
    for i, j in itertools.product(range(size), repeat=2):
        seen = x[:, :, i : i + height, j : j + width]
        y += torch.einsum("nchw,oc->nohw", seen, weight[:, :, i, j])
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


def doubling(length: int) -> Tensor:
    """Bilinear: of a pixel's two halves, each is 3/4 that pixel and 1/4 the next on its side."""
    matrix = torch.zeros(2 * length, length, dtype=torch.float64)
    for i in range(length):
        matrix[2 * i, i] += 0.75
        matrix[2 * i, max(i - 1, 0)] += 0.25
        matrix[2 * i + 1, i] += 0.75
        matrix[2 * i + 1, min(i + 1, length - 1)] += 0.25
    return matrix


def up_oracle(x: Tensor, state: Mapping[str, Tensor], key: str, *, up: str, padding: str) -> Tensor:
    if up == "transposed":  # each pixel is painted as a square of two by two
        weight, bias = state[f"{key}.weight"], state[f"{key}.bias"]
        painted = torch.einsum("nchw,coij->nohiwj", x, weight)
        return painted.flatten(4, 5).flatten(2, 3) + bias.view(1, -1, 1, 1)
    x = torch.einsum("yh,nchw,xw->ncyx", doubling(x.shape[2]), x, doubling(x.shape[3]))
    if padding == "valid":  # the outermost pixels would need what lies beyond the border
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
            too_many = skip.shape[dim] - x.shape[dim]
            assert too_many % 2 == 0
            skip = skip.narrow(dim, too_many // 2, x.shape[dim])
        x = two_convs(torch.cat([skip, x], 1), f"decoders.{level}")
    return conv_oracle(x, state["head.weight"], state["head.bias"], 0)


def margins(wanted: int, depth: int, up: str) -> tuple[int, int]:
    """What a valid network sees before and behind at least `wanted` pixels, output in the middle.

    The sizes of figure 1, counted layer by layer from ever larger bottlenecks.
    """
    for bottleneck in itertools.count(5):
        num_in, num_out = bottleneck, bottleneck - 4
        for _ in range(depth):
            num_in = 2 * num_in + 4
            num_out = 2 * num_out - (2 if up == "bilinear" else 0) - 4
        if num_out >= wanted:
            before = (num_in - num_out) // 2
            return before, num_in - wanted - before
    raise AssertionError("endless")


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
    """The whole picture at once, its surroundings mirrored (valid) or its edge repeated (same)."""
    height, width = image.shape[-2:]
    # As float32, the precision in which the network keeps them.
    mean = torch.tensor([123.675, 116.28, 103.53]).double().view(1, 3, 1, 1)
    std = torch.tensor([58.395, 57.12, 57.375]).double().view(1, 3, 1, 1)
    x = (image.double() - mean) / std
    if padding == "same":
        beyond = [(0, -height % 2**depth), (0, -width % 2**depth)]
    else:
        beyond = [margins(height, depth, up), margins(width, depth, up)]
    mode: Any = "edge" if padding == "same" else "reflect"
    x = torch.from_numpy(np.pad(x.numpy(), [(0, 0), (0, 0), *beyond], mode=mode))
    logits = paths_oracle(state, x, depth=depth, padding=padding, norm=norm, up=up, **kwargs)
    return logits[:, :, :height, :width]


@every_variant
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 2), (23, 18)], ids=str)
def test_every_variant_computes_what_the_paper_describes(
    size: tuple[int, int], depth: int, variant: dict[str, Any]
) -> None:
    model = slim(depth=depth, **variant)
    image = random_image(*size)
    with torch.inference_mode():
        expected = unet_oracle(model.state_dict(), image, depth=depth, **variant)
        assert_same(model(image), expected)


@every_variant
def test_the_papers_depth_computes_what_the_paper_describes(variant: dict[str, Any]) -> None:
    model = slim(depth=4, **variant)
    image = random_image(17, 6, num=1)
    with torch.inference_mode():
        assert_same(model(image), unet_oracle(model.state_dict(), image, depth=4, **variant))


@pytest.mark.parametrize(
    ("base_channels", "expected"), [(24, [8, 16, 32]), (8, [4, 8, 16]), (1, [1, 1, 2])]
)
def test_group_norm_takes_at_most_32_groups_of_at_least_two_channels(
    base_channels: int, expected: list[int]
) -> None:
    """Wu and He 2018 take 32; one channel alone has no variance where H and W are 1."""
    variant = {"padding": "same", "norm": "group", "up": "transposed"}
    model = slim(base_channels=base_channels, **variant)
    groups = [m.num_groups for m in model.modules() if isinstance(m, nn.GroupNorm)]
    assert groups == [num for num in (*expected, *expected[-2::-1]) for _ in (0, 1)]
    image = random_image(6, 9)
    with torch.inference_mode():
        assert_same(model(image), unet_oracle(model.state_dict(), image, depth=2, **variant))


# --- The paper's numbers ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"padding": "valid", "norm": "none"}, 31_031_810),
        ({"padding": "same", "norm": "none"}, 31_031_810),
        ({"padding": "same", "norm": "batch"}, 31_037_698),
        ({}, 31_037_698),
        ({"padding": "valid", "norm": "batch"}, 31_037_698),
        ({"norm": "group"}, 31_037_698),
        # 1x1 in place of 2x2 from 2c to c channels: three times 2c * c fewer.
        ({"norm": "none", "up": "bilinear"}, 31_031_810 - 6 * (512**2 + 256**2 + 128**2 + 64**2)),
    ],
    ids=str,
)
def test_parameter_counts(kwargs: dict[str, Any], expected: int) -> None:
    with torch.device("meta"):
        model = build_model("unet", 2, **kwargs)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_sizes_and_channels_are_those_of_figure_1() -> None:
    with torch.device("meta"):
        model = build_model("unet", 2, padding="valid", norm="none").eval()
        assert isinstance(model, UNet)
        seen: dict[str, tuple[int, ...]] = {}
        for key, module in model.named_modules():
            module.register_forward_hook(
                lambda _, args, output, key=key: seen.update({key: tuple(output.shape[1:])})
            )
        logits = model._paths(torch.empty(1, 3, 572, 572))
    assert logits.shape == (1, 2, 388, 388)
    sizes = {"encoders": (568, 280, 136, 64), "ups": (56, 104, 200, 392)}
    sizes["decoders"] = (52, 100, 196, 388)
    for path, sides in sizes.items():
        channels = (64, 128, 256, 512) if path == "encoders" else (512, 256, 128, 64)
        for i, (side, width) in enumerate(zip(sides, channels, strict=True)):
            assert seen[f"{path}.{i}"] == (width, side, side)
    assert seen["bottleneck"] == (1024, 28, 28)


def test_a_tile_of_388_pixels_is_made_from_572() -> None:
    """Figure 2: 92 pixels on each side."""
    model = slim(padding="valid", norm="none", base_channels=1, depth=4)
    assert margins(388, 4, "transposed") == (92, 92)
    with inputs_of(model.encoders[0]) as shapes, torch.inference_mode():
        model.train()(random_image(388, 388, num=1))
    assert shapes == [(1, 3, 572, 572)]


def test_tiles_are_as_large_as_the_papers() -> None:
    """388 is no multiple of 16, so a tile shows 384 pixels; it is made from the paper's 572."""
    model = slim(padding="valid", norm="none", base_channels=1, depth=4).eval()
    with inputs_of(model.encoders[0]) as shapes, torch.inference_mode():
        assert model(random_image(2, 385, num=1)).shape == (1, 3, 2, 385)
    assert [shape[3] for shape in shapes] == [572, 188]
    assert [shape[2] for shape in shapes] == [188, 188]


# --- Mirrored pictures and tiles ----------------------------------------------------------------


def bounced(index: int, length: int) -> int:
    """Where a walker ends who turns round at the first and last pixel of a side."""
    if length == 1:
        return 0
    place, step = 0, 1
    for _ in range(abs(index)):  # the walk to the left is the same, mirrored at 0
        if not 0 <= place + step < length:
            step = -step
        place += step
    return place


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8])
def test_the_picture_is_mirrored_without_repeating_its_edge(length: int) -> None:
    indices = range(-4 * length - 3, 5 * length + 3)
    mirrored = unet_module._mirrored(indices, length, torch.device("cpu"))
    assert mirrored.tolist() == [bounced(index, length) for index in indices]


WHOLE = 10_000


def at_tile_size(
    model: nn.Module, image: Tensor, side: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, list[tuple[int, ...]]]:
    """Logits by tiles of this side, and the shapes that went into the first level."""
    monkeypatch.setattr(unet_module, "_TILE", side)
    with inputs_of(model.encoders[0]) as shapes, torch.inference_mode():
        return model(image), shapes


@every_valid
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("size", [(29, 13), (1, 33), (16, 17), (8, 8)], ids=str)
def test_tiles_and_whole_give_the_same_logits(
    size: tuple[int, int], depth: int, variant: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = slim(depth=depth, **variant)
    image = random_image(*size)
    whole, shapes = at_tile_size(model, image, WHOLE, monkeypatch)
    assert len(shapes) == 1
    assert_same(whole, unet_oracle(model.state_dict(), image, depth=depth, **variant))
    for side in (1, 8, 13):
        tiled, shapes = at_tile_size(model, image, side, monkeypatch)
        # Rounded down to where all tiles halve at the same pixels, but at least once.
        step = max(side - side % 2**depth, 2**depth)
        assert len(shapes) == math.ceil(size[0] / step) * math.ceil(size[1] / step)
        assert_same(tiled, whole)


@every_valid
def test_no_tensor_is_as_large_as_the_whole_picture(
    variant: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = slim(num_classes=1, **variant)
    image = random_image(120, 200, num=1)
    made: list[int] = []
    for module in model.modules():
        if module is not model:
            module.register_forward_hook(lambda _, args, y: made.append(y.numel()))
    at_tile_size(model, image, WHOLE, monkeypatch)
    level = 3 * 120 * 200  # channels of the first level on every pixel of the picture
    assert max(made) > level
    made.clear()
    _, shapes = at_tile_size(model, image, 16, monkeypatch)
    side = 16 + sum(margins(16, 2, variant["up"]))
    assert max(shape[2] for shape in shapes) == max(shape[3] for shape in shapes) == side
    assert max(made) <= 3 * side**2 < level / 5


@every_valid
def test_training_sees_the_whole_picture_and_reaches_every_parameter(
    variant: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unet_module, "_TILE", 8)
    model = slim(**variant).train()
    with inputs_of(model.encoders[0]) as shapes:
        logits = model(random_image(19, 30))
    assert len(shapes) == 1
    assert logits.shape == (2, 3, 19, 30)
    logits.square().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize("up", UPS)
def test_statistics_of_the_batch_are_those_of_the_whole_picture(
    up: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms in training mode within a network in evaluation mode, as a Tiramisu is judged."""
    image = random_image(21, 12)
    results = []
    for side in (4, WHOLE):
        model = slim(padding="valid", norm="batch", up=up)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.train()
        logits, shapes = at_tile_size(model, image, side, monkeypatch)
        assert len(shapes) == 1
        results.append((logits, model.encoders[0][1]))
    assert_same(results[0][0], results[1][0])

    first, norm = model.encoders[0][0], results[0][1]
    assert norm.num_batches_tracked == 1
    before = slim(padding="valid", norm="batch", up=up).encoders[0][1].running_mean
    beyond = [margins(21, 2, up), margins(12, 2, up)]
    pixels = np.pad(image.double().numpy(), [(0, 0), (0, 0), *beyond], mode="reflect")
    seen = conv_oracle(model.normalize(torch.from_numpy(pixels)), first.weight.detach(), None, 0)
    assert_same(norm.running_mean, 0.9 * before + 0.1 * seen.mean((0, 2, 3)))


@every_valid
def test_a_valid_network_takes_what_every_network_takes(variant: dict[str, Any]) -> None:
    """Bytes or floats, and a picture does not feel its neighbours in the batch."""
    model = slim(**variant)
    image = random_image(9, 14, num=3)
    with torch.inference_mode():
        together = model(image)
        assert torch.equal(model(image.double()), together)
        for i in range(3):
            assert_same(model(image[i : i + 1])[0], together[i])


# --- Dropout ------------------------------------------------------------------------------------


class Sieve(nn.Module):
    """Stands in for dropout: which values it drops depends on nothing but the place and count."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        generator = torch.Generator().manual_seed(self.calls)
        return x * (torch.rand(x.shape, generator=generator) < 0.5)


@every_variant
@pytest.mark.parametrize("depth", [1, 3])
def test_dropout_falls_on_the_last_level_with_its_skip_and_on_the_bottleneck(
    depth: int, variant: dict[str, Any]
) -> None:
    model = slim(depth=depth, drop_rate=0.5, **variant)
    image = random_image(9, 14)
    model.dropout = Sieve()
    with torch.inference_mode():
        expected = unet_oracle(model.state_dict(), image, depth=depth, drop=Sieve(), **variant)
        assert_same(model(image), expected)
    assert model.dropout.calls == 2


@every_variant
def test_dropout_is_drawn_anew_for_every_value_and_keeps_the_mean(variant: dict[str, Any]) -> None:
    model = slim(drop_rate=0.25, base_channels=4, **variant).train()
    dropped: list[Tensor] = []

    def look(_: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        x = args[0]
        kept = y != 0
        torch.testing.assert_close(y[kept], x[kept] / 0.75)
        for channel, alive in zip((~kept).flatten(0, 1), (x > 0).flatten(0, 1), strict=True):
            num = int(alive.sum())
            if num >= 200:  # within 6 standard deviations
                share = (channel & alive).sum().item() / num
                assert share == pytest.approx(0.25, abs=6 * math.sqrt(0.25 * 0.75 / num))
                dropped.append(channel)

    model.dropout.register_forward_hook(look)
    with torch.no_grad():
        model(random_image(90, 84))
    assert len(dropped) > 20
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(dropped, 2))


@pytest.mark.parametrize("padding", PADDINGS)
def test_dropout_is_part_of_training_and_not_of_evaluation(padding: str) -> None:
    image = random_image(16, 16)
    model = slim(padding=padding, norm="none", drop_rate=0.5)
    without = slim(padding=padding, norm="none")
    with torch.no_grad():
        assert torch.equal(model(image), without(image))
        model.train()
        without.train()
        assert torch.equal(without(image), without(image))
        assert not torch.equal(model(image), model(image))
        assert not torch.equal(model(image), without(image))


# --- Fresh weights ------------------------------------------------------------------------------


@every_variant
def test_fresh_convolutions_are_he_uniform_with_zero_biases(variant: dict[str, Any]) -> None:
    torch.manual_seed(3)
    model = build_model("unet", base_channels=16, depth=2, **variant)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    # Two a block, one for each doubling, the head.
    assert len(convs) == 2 * 5 + 2 + 1
    for conv in convs:
        # Of a transposed convolution torch and Keras both count the output channels.
        ins = conv.out_channels if isinstance(conv, nn.ConvTranspose2d) else conv.in_channels
        bound = math.sqrt(6 / (ins * math.prod(conv.kernel_size)))
        num = conv.weight.numel()
        # P(no value of num lies above the share 1 - 20/num of the bound) = e^-20.
        assert bound * (1 - 20 / num) < conv.weight.abs().max() <= bound * (1 + 1e-6), conv
        assert conv.weight.std().item() == pytest.approx(
            bound / math.sqrt(3), rel=6 / math.sqrt(num)
        ), conv
        followed_by_norm = variant["norm"] != "none" and conv.kernel_size == (3, 3)
        assert (conv.bias is None) == followed_by_norm, conv
        assert conv.bias is None or not conv.bias.any(), conv


# --- Padding to a multiple ----------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (3, 8), (8, 8), (9, 16), (17, 5)], ids=str)
@pytest.mark.parametrize(("multiple", "at_least"), [(1, 1), (4, 1), (8, 8), (8, 16), (4, 64)])
def test_padding_grows_to_the_right_and_below_by_the_edge(
    size: tuple[int, int], multiple: int, at_least: int
) -> None:
    x = torch.rand(2, 3, *size)
    grown = [next(n for n in itertools.count(max(s, at_least)) if n % multiple == 0) for s in size]
    beyond = [(0, 0), (0, 0), (0, grown[0] - size[0]), (0, grown[1] - size[1])]
    padded = pad_to_multiple(x, multiple, at_least=at_least)
    assert torch.equal(padded, torch.from_numpy(np.pad(x.numpy(), beyond, mode="edge")))
    if at_least == 1:
        assert torch.equal(pad_to_multiple(x, multiple), padded)


def test_what_is_added_learns_through_the_edge() -> None:
    x = torch.ones(1, 1, 1, 3, requires_grad=True)
    pad_to_multiple(x, 4).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[[[4.0, 4.0, 8.0]]]]


# --- Building by name ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "must_say"),
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
def test_what_cannot_be_built_is_a_usage_error_of_one_line(
    kwargs: dict[str, Any], must_say: str
) -> None:
    with pytest.raises(UsageError) as caught:
        build_model("unet", **{"base_channels": 2, "depth": 1, **kwargs})
    message = str(caught.value)
    assert must_say in message
    assert "\n" not in message


def test_the_refusal_of_group_norm_says_what_goes_instead() -> None:
    with pytest.raises(UsageError, match="norm=batch or norm=none"):
        build_model("unet", padding="valid", norm="group")


@pytest.mark.parametrize("depth", [1, 8])
def test_depths_from_1_to_8_can_be_built(depth: int) -> None:
    with torch.device("meta"):
        model = build_model("unet", base_channels=1, depth=str(depth), padding="valid", norm="none")
    assert len(model.encoders) == len(model.ups) == depth
