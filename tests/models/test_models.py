"""One contract for all rows of MODELS, and the networks compared with an oracle from the papers."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segtrain.errors import UsageError
from segtrain.models import MODELS, build_model

# The contract does not depend on the width, so the networks are as narrow as possible. A row of
# MODELS without an entry here is tested at its full size.
SLIM_DENSE: dict[str, Any] = {
    "growth_rate": 3,
    "down_blocks": [1, 2, 1],
    "bottleneck": 2,
    "up_blocks": [1, 2, 1],
    "stem_channels": 4,
}
SLIM: dict[str, dict[str, Any]] = {
    "unet": {"base_channels": 4, "depth": 3},
    "tiramisu": SLIM_DENSE,
    "fc_densenet103": SLIM_DENSE,
    "fc_densenet67": SLIM_DENSE,
    "fc_densenet56": SLIM_DENSE,
}
# More networks for the same contract: name → row of MODELS and arguments.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "unet valid": ("unet", {**SLIM["unet"], "padding": "valid", "norm": "none"}),
    "unet valid bilinear": ("unet", {**SLIM["unet"], "padding": "valid", "up": "bilinear"}),
    "unet group bilinear": ("unet", {**SLIM["unet"], "norm": "group", "up": "bilinear"}),
    "unet resnet18": ("unet", {"encoder": "resnet18", "base_channels": 4}),
    "unet alexnet bilinear": ("unet", {"encoder": "alexnet", "base_channels": 4, "up": "bilinear"}),
    "tiramisu plain": ("tiramisu", {**SLIM_DENSE, "memory_efficient": False}),
}
NETWORKS = [*MODELS, *VARIANTS]
ODD_SIZES = [(1, 1), (1, 7), (33, 47), (64, 48), (65, 31)]

all_models = pytest.mark.parametrize("name", NETWORKS)
all_sizes = pytest.mark.parametrize("size", ODD_SIZES, ids=lambda size: f"{size[0]}x{size[1]}")


def slim_model(name: str, num_classes: int = 2, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    row, slim = VARIANTS.get(name, (name, SLIM.get(name, {})))
    return build_model(row, num_classes, **slim, **kwargs)


def randomize_stats(model: nn.Module) -> nn.Module:
    """Set batch norm and biases to random values, as in a trained network; evaluation mode.

    Initial values (mean 0, variance 1, bias 0) would hide a layer that skips or swaps them.
    """
    generator = torch.Generator().manual_seed(1)
    for key, value in model.state_dict().items():
        if not value.is_floating_point() or key.startswith("normalize."):
            continue
        if key.endswith("running_var") or (value.ndim == 1 and key.endswith("weight")):
            value.uniform_(0.5, 1.5, generator=generator)
        elif value.ndim == 1:
            value.uniform_(-0.5, 0.5, generator=generator)
    return model.eval()


def random_image(height: int, width: int, num: int = 2, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num, 3, height, width), dtype=torch.uint8, generator=generator)


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """Equal except for summation order, which depends on memory layout and batch size."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@all_models
@all_sizes
def test_logits_are_finite_float_and_of_the_input_size(name: str, size: tuple[int, int]) -> None:
    model = randomize_stats(slim_model(name))
    with torch.inference_mode():
        logits = model(random_image(*size))
    assert logits.shape == (2, 2, *size)
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()
    # Not probabilities, which sum to one over the classes.
    assert not torch.allclose(logits.sum(dim=1), torch.ones(()))


@all_models
def test_uint8_and_float_of_the_same_image_give_the_same_logits(name: str) -> None:
    model = randomize_stats(slim_model(name))
    image = random_image(17, 23)
    with torch.inference_mode():
        assert torch.equal(model(image), model(image.float()))


@all_models
def test_evaluation_is_deterministic(name: str) -> None:
    model = randomize_stats(slim_model(name))
    image = random_image(17, 23)
    with torch.inference_mode():
        assert torch.equal(model(image), model(image))


@all_models
def test_gradients_reach_every_parameter(name: str) -> None:
    model = slim_model(name).train()
    model(random_image(33, 47)).square().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().sum() > 0, key


@all_models
def test_state_dict_contains_the_whole_network(name: str) -> None:
    model = randomize_stats(slim_model(name))
    other = slim_model(name).eval()
    with torch.no_grad():
        for value in [*other.parameters(), *other.buffers()]:
            value.zero_()
    other.load_state_dict(model.state_dict())
    image = random_image(17, 23)
    with torch.inference_mode():
        assert torch.equal(model(image), other(image))


@all_models
def test_bf16_autocast_stays_near_fp32(name: str) -> None:
    model = randomize_stats(slim_model(name))
    image = random_image(33, 47)
    with torch.inference_mode():
        exact = model(image)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = model(image)
    assert half.dtype == torch.bfloat16
    # bf16 has 8 significant bits; a few layers deviate by a few percent of the logits' range.
    assert (half.float() - exact).abs().max() < 0.05 * (exact.max() - exact.min())


@all_models
def test_channels_last_gives_the_same_logits(name: str) -> None:
    model = randomize_stats(slim_model(name))
    image = random_image(33, 47)
    with torch.inference_mode():
        expected = model(image)
        model.to(memory_format=torch.channels_last)
        actual = model(image.contiguous(memory_format=torch.channels_last))
    assert_near(actual, expected)


@all_models
@pytest.mark.parametrize("num_classes", [1, 2, 5])
def test_num_classes_is_the_number_of_logits(name: str, num_classes: int) -> None:
    model = slim_model(name, num_classes).eval()
    with torch.inference_mode():
        assert model(random_image(8, 8, num=1)).shape == (1, num_classes, 8, 8)


@all_models
def test_an_image_does_not_depend_on_the_other_images_of_the_batch(name: str) -> None:
    model = randomize_stats(slim_model(name))
    image = random_image(33, 47, num=3)
    with torch.inference_mode():
        together = model(image)
        for i in range(3):
            assert_near(together[i], model(image[i : i + 1])[0])


@pytest.mark.parametrize("name", [name for name in NETWORKS if "valid" not in name])
def test_padding_repeats_the_edge_on_the_right_and_bottom(name: str) -> None:
    """Manual padding from 31x63 to 32x64, a multiple for all networks, gives the same logits."""
    model = randomize_stats(slim_model(name))
    image = random_image(31, 63)
    padded = torch.cat([image, image[:, :, :, -1:]], dim=3)
    padded = torch.cat([padded, padded[:, :, -1:]], dim=2)
    with torch.inference_mode():
        assert_near(model(padded)[..., :31, :63], model(image))


@all_models
def test_the_exported_graph_computes_the_same(name: str) -> None:
    """The network has no Python control flow that depends on data."""
    model = randomize_stats(slim_model(name))
    image = random_image(33, 47)
    exported = torch.export.export(model, (image,)).module()
    with torch.inference_mode():
        assert_near(exported(image), model(image))


@all_models
def test_brightness_matters(name: str) -> None:
    """The input is not scaled or clamped twice."""
    model = randomize_stats(slim_model(name))
    dark, bright = (torch.full((1, 3, 8, 8), v, dtype=torch.uint8) for v in (40, 220))
    with torch.inference_mode():
        assert (model(dark) - model(bright)).abs().max() > 1e-3


@all_models
def test_normalization_uses_imagenets_mean_and_deviation(name: str) -> None:
    """Mean (0.485, 0.456, 0.406) and deviation (0.229, 0.224, 0.225), scaled to 0..255."""
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1) * 255
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1) * 255
    image = random_image(4, 5)
    torch.testing.assert_close(slim_model(name).normalize(image), (image.float() - mean) / std)


@pytest.mark.parametrize(
    ("name", "num_classes", "expected"),
    [
        ("unet", 2, 31_037_698),
        ("tiramisu", 2, 9_319_778),
        ("fc_densenet103", 2, 9_319_778),
        ("fc_densenet103", 11, 9_322_091),
        ("fc_densenet67", 2, 3_460_642),
        ("fc_densenet56", 2, 1_375_058),
    ],
)
def test_parameter_counts(name: str, num_classes: int, expected: int) -> None:
    with torch.device("meta"):
        model = build_model(name, num_classes)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


# --- Oracles from the papers, computed on the state dict -----------------------------------------


class Weights:
    """Convolution and batch norm in evaluation mode, with the weights of a state_dict key."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state

    def conv(self, x: Tensor, key: str) -> Tensor:
        weight = self.state[f"{key}.weight"]
        bias = self.state.get(f"{key}.bias")
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)

    def norm(self, x: Tensor, key: str) -> Tensor:
        mean, var, weight, bias = (
            self.state[f"{key}.{part}"].view(1, -1, 1, 1)
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def norm_relu_conv(self, x: Tensor, key: str) -> Tensor:
        return self.conv(self.norm(x, f"{key}.norm").clamp(min=0), f"{key}.conv")


def normalize_and_pad(image: Tensor, multiple: int) -> Tensor:
    mean = torch.tensor([123.675, 116.28, 103.53], dtype=torch.float64).view(1, 3, 1, 1)
    std = torch.tensor([58.395, 57.12, 57.375], dtype=torch.float64).view(1, 3, 1, 1)
    rows = torch.arange(math.ceil(image.shape[2] / multiple) * multiple)
    columns = torch.arange(math.ceil(image.shape[3] / multiple) * multiple)
    rows, columns = rows.clamp(max=image.shape[2] - 1), columns.clamp(max=image.shape[3] - 1)
    return ((image.double() - mean) / std)[:, :, rows][:, :, :, columns]


def unet_oracle(state: dict[str, Tensor], image: Tensor, depth: int) -> Tensor:
    """Ronneberger et al. 2015, figure 1, with batch norm after each convolution."""
    w = Weights(state)

    def two_convs(x: Tensor, key: str) -> Tensor:
        for conv, norm in ((0, 1), (3, 4)):
            x = w.norm(w.conv(x, f"{key}.{conv}"), f"{key}.{norm}").clamp(min=0)
        return x

    x = normalize_and_pad(image, 2**depth)
    skips = []
    for level in range(depth):
        skips.append(two_convs(x, f"encoders.{level}"))
        x = F.max_pool2d(skips[-1], 2)
    x = two_convs(x, "bottleneck")
    for level in range(depth):
        up = F.conv_transpose2d(x, state[f"ups.{level}.weight"], state[f"ups.{level}.bias"], 2)
        x = two_convs(torch.cat([skips[-1 - level], up], 1), f"decoders.{level}")
    return w.conv(x, "head")[..., : image.shape[2], : image.shape[3]]


def fc_densenet_oracle(
    state: dict[str, Tensor], image: Tensor, down: list[int], bottleneck: int, up: list[int]
) -> Tensor:
    """Jégou et al. 2017: table 1 and figure 1; only the last block keeps its input."""
    w = Weights(state)

    def block(x: Tensor, key: str, num_layers: int) -> tuple[Tensor, Tensor]:
        """All features including the input, and the new features alone."""
        channels = x.shape[1]
        for i in range(num_layers):
            x = torch.cat([x, w.norm_relu_conv(x, f"{key}.layers.{i}")], 1)
        return x, x[:, channels:]

    x = w.conv(normalize_and_pad(image, 2 ** len(down)), "stem")
    skips = []
    for level, num_layers in enumerate(down):
        skip, _ = block(x, f"down_blocks.{level}", num_layers)
        skips.append(skip)
        x = F.max_pool2d(w.norm_relu_conv(skip, f"downs.{level}"), 2)
    features, new = block(x, "bottleneck", bottleneck)
    for level, num_layers in enumerate(up):
        key = f"ups.{level}.conv"
        new = F.conv_transpose2d(
            new, state[f"{key}.weight"], state[f"{key}.bias"], 2, padding=1, output_padding=1
        )
        x = torch.cat([new, skips[-1 - level]], 1)
        features, new = block(x, f"up_blocks.{level}", num_layers)
    return w.conv(features, "head")[..., : image.shape[2], : image.shape[3]]


@all_sizes
@pytest.mark.parametrize("depth", [1, 3])
def test_unet_computes_what_the_paper_describes(size: tuple[int, int], depth: int) -> None:
    torch.manual_seed(0)
    model = randomize_stats(build_model("unet", 3, base_channels=4, depth=depth)).double()
    image = random_image(*size)
    with torch.inference_mode():
        expected = unet_oracle(model.state_dict(), image, depth)
        torch.testing.assert_close(model(image), expected, rtol=1e-5, atol=1e-5)


@all_sizes
@pytest.mark.parametrize(("down", "bottleneck", "up"), [([2], 1, [3]), ([1, 2, 2], 3, [3, 1, 2])])
def test_tiramisu_computes_what_the_paper_describes(
    size: tuple[int, int], down: list[int], bottleneck: int, up: list[int]
) -> None:
    blocks = {"down_blocks": down, "bottleneck": bottleneck, "up_blocks": up}
    torch.manual_seed(0)
    model = build_model("tiramisu", 3, growth_rate=3, stem_channels=5, **blocks)
    model = randomize_stats(model).double()  # float64: only a wrong formula can cause a difference
    image = random_image(*size)
    with torch.inference_mode():
        expected = fc_densenet_oracle(model.state_dict(), image, down, bottleneck, up)
        torch.testing.assert_close(model(image), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "down", "bottleneck"),
    [
        ("fc_densenet103", [4, 5, 7, 10, 12], 15),
        ("fc_densenet67", [5] * 5, 5),
        ("fc_densenet56", [4] * 5, 4),
    ],
)
def test_the_networks_of_the_paper_at_full_size(
    name: str, down: list[int], bottleneck: int
) -> None:
    """Table 2 of the paper for 103, section 4.1 for the others."""
    torch.manual_seed(0)
    model = randomize_stats(build_model(name)).double()
    image = random_image(33, 40, num=1)
    with torch.inference_mode():
        expected = fc_densenet_oracle(model.state_dict(), image, down, bottleneck, down[::-1])
        torch.testing.assert_close(model(image), expected, rtol=1e-5, atol=1e-5)


# --- Initial weights and dropout ----------------------------------------------------------------

# Wide enough for the statistical bounds below.
WIDER: dict[str, dict[str, Any]] = {
    "unet": {"base_channels": 16, "depth": 2},
    "tiramisu": {"down_blocks": [2], "bottleneck": 2, "up_blocks": [2]},
}


@pytest.mark.parametrize("name", WIDER)
def test_initial_convolutions_are_he_uniform_with_zero_biases(name: str) -> None:
    torch.manual_seed(3)
    model = build_model(name, **WIDER[name])
    convs = {
        key: module
        for key, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)
    }
    assert any(isinstance(conv, nn.ConvTranspose2d) for conv in convs.values())
    for key, conv in convs.items():
        # torch and Keras use the output channels of a transposed convolution.
        fan_channels = (
            conv.out_channels if isinstance(conv, nn.ConvTranspose2d) else conv.in_channels
        )
        bound = math.sqrt(6 / (fan_channels * conv.kernel_size[0] * conv.kernel_size[1]))
        num = conv.weight.numel()
        largest, std = conv.weight.abs().max().item(), conv.weight.std().item()
        # The probability that no value exceeds the fraction 1 - 20/num of the bound is e^-20.
        assert bound * (1 - 20 / num) < largest <= bound * (1 + 1e-6), key
        # The standard error of the std of a uniform distribution is below its std / sqrt(num).
        assert std == pytest.approx(bound / math.sqrt(3), rel=6 / math.sqrt(num)), key
        assert conv.bias is None or not conv.bias.any(), key


def test_the_seed_determines_the_weights() -> None:
    def first_weight(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return next(build_model("unet", base_channels=2, depth=1).parameters())

    assert torch.equal(first_weight(1), first_weight(1))
    assert not torch.equal(first_weight(1), first_weight(2))


def dropout_layers(name: str = "tiramisu", **kwargs: Any) -> list[nn.Module]:
    model = slim_model(name, **kwargs).train()
    return [module for key, module in model.named_modules() if key.endswith("dropout")]


def test_dropout_drops_single_values_not_whole_channels() -> None:
    """Dropout2d trains 4 to 9 points worse than the paper."""
    layers = dropout_layers()
    # One per dense layer, (1+2+1) + 2 + (1+2+1), and one per transition down, 3.
    assert len(layers) == 13
    for layer in layers:
        torch.manual_seed(4)
        dropped = layer(torch.ones(2, 8, 50, 50)) == 0
        for channel in dropped.flatten(0, 1):
            assert 0.1 < channel.float().mean() < 0.3  # 0.2 of 2,500 values, within 12 sigma


def test_drop_rate_reaches_every_dropout() -> None:
    for rate in (0.0, 0.75):
        torch.manual_seed(5)
        for dropout in dropout_layers(drop_rate=rate):
            fraction = (dropout(torch.ones(1, 1, 100, 100)) == 0).float().mean().item()
            assert fraction == pytest.approx(rate, abs=0.05)


def test_dropout_is_active_only_in_training() -> None:
    model = slim_model("tiramisu").train()
    image = random_image(16, 16)
    torch.manual_seed(6)
    assert not torch.equal(model(image), model(image))
    model.eval()
    assert torch.equal(model(image), model(image))


# --- Building by name ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kwargs", "expected_text"),
    [
        ("vnet", {}, "vnet"),
        ("unet", {"growth_rate": 16}, "growth_rate"),
        ("tiramisu", {"base_channels": 16}, "base_channels"),
        ("unet", {"base_channels": "many"}, "base_channels"),
        ("unet", {"base_channels": 1.5}, "base_channels"),
        ("unet", {"base_channels": 0}, "base_channels"),
        ("unet", {"depth": 0}, "depth"),
        ("unet", {"depth": -1}, "depth"),
        ("unet", {"depth": 9}, "depth"),
        ("tiramisu", {"drop_rate": 1.5}, "drop"),
        ("tiramisu", {"drop_rate": -0.1}, "drop"),
        ("tiramisu", {"drop_rate": float("nan")}, "drop"),
        ("tiramisu", {"down_blocks": "four"}, "down_blocks"),
        ("tiramisu", {"down_blocks": [4]}, "down_blocks"),
        ("tiramisu", {"down_blocks": [], "up_blocks": []}, "down_blocks"),
        ("tiramisu", {"down_blocks": [0], "up_blocks": [1]}, "layer counts"),
        ("tiramisu", {"bottleneck": 0}, "layer counts"),
        ("tiramisu", {"bottleneck": None}, "bottleneck"),
        # An untrusted checkpoint can contain these. Each halving doubles the padded size, and a
        # billion layers would fill the memory. Without the check, 2000 layers could be built.
        ("tiramisu", {"down_blocks": [1] * 9, "up_blocks": [1] * 9}, "down_blocks"),
        ("tiramisu", {"bottleneck": 2000, "growth_rate": 1}, "layer"),
    ],
)
def test_invalid_arguments_are_a_usage_error_of_one_line(
    name: str, kwargs: dict[str, Any], expected_text: str
) -> None:
    with pytest.raises(UsageError) as caught:
        build_model(name, **kwargs)
    message = str(caught.value)
    assert expected_text in message
    assert "\n" not in message


def test_the_error_for_an_unknown_model_lists_the_available_ones() -> None:
    with pytest.raises(UsageError) as caught:
        build_model("vnet")
    for name in MODELS:
        assert name in str(caught.value)


def test_strings_are_converted_to_the_type_of_the_argument() -> None:
    model = build_model("unet", base_channels="4", depth="1")
    assert next(model.parameters()).shape[0] == 4
    rates = {layer.p for layer in dropout_layers(drop_rate="0.1")}
    assert rates == {0.1}


def test_adding_a_model_takes_one_function_and_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def per_pixel(num_classes: int = 2, *, gain: float = 1.0) -> nn.Module:
        head = nn.Conv2d(3, num_classes, 1)
        nn.init.constant_(head.weight, gain)
        return head

    monkeypatch.setitem(MODELS, "per_pixel", per_pixel)
    model = build_model("per_pixel", 4, gain="2.5")
    assert model.weight.shape == (4, 3, 1, 1)
    assert model.weight[0, 0, 0, 0] == 2.5
    with pytest.raises(UsageError, match="gain"):
        build_model("per_pixel", loss=1)
