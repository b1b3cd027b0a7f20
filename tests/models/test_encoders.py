"""U-Net with an encoder.

Encoders are compared with torchvision and the decoder with an oracle. ImageNet weights are read
from valid and invalid files.
"""

import builtins
import copy
import hashlib
import io
import itertools
import math
import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Mapping
from email.message import Message
from pathlib import Path
from typing import Any, cast
from urllib.error import URLError

import numpy as np
import pytest
import torch
from test_models import random_image, randomize_stats
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights

from segtrain.checkpoint import Checkpoint, save_checkpoint
from segtrain.config.schema import Config, ModelConfig
from segtrain.errors import CheckpointError, ResourceError, UsageError
from segtrain.models import build_model
from segtrain.models.encoder_unet import EncoderUNet
from segtrain.models.encoders import ENCODERS, Encoder, EncoderName, read_pretrained
from segtrain.models.layers import Normalize

pytestmark = pytest.mark.usefixtures("one_thread")

# From the papers and torchvision's source: the last module at each resolution, its channels, and
# the side of its output for an image of 224 x 224.
FEATURES: dict[str, list[tuple[str, int, int]]] = {
    **{
        name: [
            (f"features.{stage}", min(64 * 2**i, 512), 224 // 2**i)
            for i, stage in enumerate(stages)
        ]
        for name, stages in {
            "vgg16": (3, 8, 15, 22, 29, 30),
            "vgg16_bn": (5, 12, 22, 32, 42, 43),
            "vgg19": (3, 8, 17, 26, 35, 36),
            "vgg19_bn": (5, 12, 25, 38, 51, 52),
        }.items()
    },
    "alexnet": [
        ("features.1", 64, 55),
        ("features.4", 192, 27),
        ("features.11", 256, 13),
        ("features.12", 256, 6),
    ],
    **{
        name: [
            ("relu", 64, 112),
            *((f"layer{i + 1}", expansion * 64 * 2**i, 56 // 2**i) for i in range(4)),
        ]
        for name, expansion in (("resnet18", 1), ("resnet34", 1), ("resnet50", 4))
    },
    "mobilenet_v3_large": [
        ("features.1", 16, 112),
        ("features.3", 24, 56),
        ("features.6", 40, 28),
        ("features.12", 112, 14),
        ("features.16", 960, 7),
    ],
    "efficientnet_b0": [
        ("features.1", 16, 112),
        ("features.2", 24, 56),
        ("features.3", 40, 28),
        ("features.5", 112, 14),
        ("features.8", 1280, 7),
    ],
    "convnext_tiny": [
        ("features.1", 96, 56),
        ("features.3", 192, 28),
        ("features.5", 384, 14),
        ("features.7", 768, 7),
    ],
}
UPS = ("transposed", "bilinear")

all_encoders = pytest.mark.parametrize("name", ENCODERS)
all_ups = pytest.mark.parametrize("up", UPS)


def init_random(model: nn.Module) -> nn.Module:
    """Fill uninitialized memory with weights that keep the signal in every layer."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if not value.is_floating_point():
                value.zero_()
            elif key.endswith("layer_scale"):  # initial values hide the block that they scale
                value.uniform_(0.5, 1.5, generator=generator)
            elif value.ndim > 1 and not key.startswith("normalize."):
                std = math.sqrt(2 / value[0].numel())
                value.uniform_(-math.sqrt(3) * std, math.sqrt(3) * std, generator=generator)
    return randomize_stats(model)


def build_meta_net(name: str) -> nn.Module:
    """torchvision's network on the meta device."""
    with torch.device("meta"):
        return cast(nn.Module, get_model(name, weights=None).eval())


def build_trunk(net: nn.Module) -> nn.Module:
    """A copy with weights, without the classifier; that of VGG has over 100 million weights."""
    net = copy.deepcopy(net)
    setattr(net, "fc" if hasattr(net, "fc") else "classifier", nn.Identity())
    return init_random(net.to_empty(device="cpu"))


def build(
    name: str, num_classes: int = 2, *, trunk: nn.Module | None = None, **kwargs: Any
) -> EncoderUNet:
    """A network with random weights in evaluation mode, built without a classifier.

    Args:
        trunk: torchvision network that shares its weights with the encoder; by default, a new one.
    """
    kwargs = {"base_channels": 2, **kwargs}
    with torch.device("meta"):
        model = build_model("unet", num_classes, encoder=name, **kwargs)
    assert isinstance(model, EncoderUNet)
    trunk = build_trunk(build_meta_net(name)) if trunk is None else trunk
    model.encoder.load_state_dict(trunk.state_dict(), assign=True)
    for part in (model.ups, model.decoders, model.head):
        init_random(part.to_empty(device="cpu"))
    model.normalize = Normalize()
    return model.requires_grad_(True).eval()


def record_features(net: nn.Module, name: str, x: Tensor) -> list[Tensor]:
    """Copy the outputs of torchvision's modules before in-place operations overwrite them."""
    features: list[Tensor] = []
    handles = [
        net.get_submodule(key).register_forward_hook(lambda _, args, y: features.append(y.clone()))
        for key, _, _ in FEATURES[name]
    ]
    net(x)
    for handle in handles:
        handle.remove()
    return features


def assert_same(actual: Tensor, expected: Tensor, within: float = 1e-5) -> None:
    """Equal except for rounding, relative to the largest value."""
    assert expected.numel() == 1 or expected.std() > 0, "expected values are constant"
    atol = within * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def copy_state(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def changed_keys(model: nn.Module, before: Mapping[str, Tensor]) -> set[str]:
    return {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}


# --- Encoders compared with torchvision ---------------------------------------------------------


@pytest.fixture(scope="module", params=ENCODERS)
def name(request: pytest.FixtureRequest) -> str:
    """One network after the other, so that only one is in memory."""
    return cast(str, request.param)


@pytest.fixture(scope="module")
def net(name: str) -> nn.Module:
    return build_meta_net(name)


@pytest.fixture(scope="module")
def trunk(net: nn.Module) -> nn.Module:
    return build_trunk(net)


@pytest.fixture(scope="module")
def model(name: str, trunk: nn.Module) -> EncoderUNet:
    return build(name, 3, trunk=trunk)


@pytest.fixture(scope="module")
def encoder(model: EncoderUNet) -> Encoder:
    """An encoder with the weights of the trunk, loaded by torchvision's names."""
    return model.encoder


def test_all_encoders_have_an_expected_value() -> None:
    assert set(FEATURES) == set(ENCODERS)


def test_weights_have_torchvisions_names_and_shapes(net: nn.Module, encoder: Encoder) -> None:
    ours, torchvision_weights = encoder.state_dict(), net.state_dict()
    expected = {
        key: value.shape
        for key, value in torchvision_weights.items()
        if not key.startswith(("classifier.", "fc."))
    }
    assert {key: value.shape for key, value in ours.items()} == expected
    assert list(ours) == list(expected)
    assert len(expected) < len(torchvision_weights)


@pytest.mark.parametrize("side", [64, 224])
def test_outputs_match_the_resolutions_of_torchvisions_modules(
    name: str, net: nn.Module, encoder: Encoder, side: int
) -> None:
    """Compared with torchvision's complete network."""
    outputs = encoder.outputs
    features = record_features(net, name, torch.empty(1, 3, side, side, device="meta"))
    assert [output.channels for output in outputs] == [feature.shape[1] for feature in features]
    if side == 224:
        shapes = [(channels, side, side) for _, channels, side in FEATURES[name]]
        assert [feature.shape[1:] for feature in features] == shapes
    levels = [output.level for output in outputs]
    assert levels == sorted(set(levels)), "not strictly increasing"
    for level, feature in zip(levels, features, strict=True):
        if name != "alexnet":
            assert feature.shape[2:] == (side // 2**level, side // 2**level)
    stages = [output.stage for output in outputs]
    assert stages == sorted(set(stages))


def test_levels_of_alexnet_are_rounded() -> None:
    with torch.device("meta"):
        encoder = Encoder("alexnet")
    assert [output.level for output in encoder.outputs] == [2, 3, 4, 5]


@pytest.mark.parametrize("size", [(64, 64), (97, 70), (65, 131)], ids=str)
def test_features_match_torchvisions_modules(
    name: str, trunk: nn.Module, encoder: Encoder, size: tuple[int, int]
) -> None:
    x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(8))
    with torch.inference_mode():
        before = x.clone()
        features = encoder(x)
        assert torch.equal(x, before)
        expected = record_features(trunk, name, x)
    assert len(features) == len(expected)
    for actual, target in zip(features, expected, strict=True):
        assert_same(actual, target, within=1e-6)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "vgg16_bn", "mobilenet_v3_large"])
def test_a_training_step_matches_torchvisions_modules(name: str) -> None:
    """Gradients and running statistics, with batch statistics."""
    trunk = build_trunk(build_meta_net(name)).requires_grad_(True)
    encoder = Encoder(cast(EncoderName, name))
    encoder.load_state_dict(trunk.state_dict())
    x = torch.randn(2, 3, 70, 65, generator=torch.Generator().manual_seed(10))
    features = encoder.train()(x)
    sum(feature.square().mean() for feature in features).backward()
    expected = record_features(trunk.train(), name, x)
    sum(feature.square().mean() for feature in expected).backward()
    torchvision_weights = dict(trunk.named_parameters())
    assert [key for key, _ in encoder.named_parameters()] == list(torchvision_weights)
    for key, parameter in encoder.named_parameters():
        assert parameter.grad is not None, key
        assert_same(parameter.grad, cast(Tensor, torchvision_weights[key].grad))
    for key, value in encoder.named_buffers():
        torch.testing.assert_close(value, trunk.get_buffer(key))


RESTORE = """
import sys
from pathlib import Path
import torch
from segtrain.checkpoint import load_checkpoint, restore_model
heavy = {"torchvision", "torch._dynamo", "torch.fx.experimental.symbolic_shapes", "sympy"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
path = Path(sys.argv[1])
with torch.inference_mode():
    logits = restore_model(load_checkpoint(path), path)(torch.zeros(1, 3, 40, 50).byte())
assert logits.shape == (1, 2, 40, 50)
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
"""


@pytest.mark.parametrize("name", ["resnet34", "vgg16"])
def test_a_checkpoint_is_restored_without_torchvision_or_torchs_compiler(
    name: str, tmp_path: Path
) -> None:
    """Importing them takes as long as importing torch, which delays `segtrain predict`."""
    kwargs = {"encoder": name, "base_channels": 1}
    save_checkpoint(
        tmp_path / "best.pt",
        Checkpoint(
            config=Config(model=ModelConfig(kwargs=kwargs)),
            weights=build_model("unet", **kwargs).state_dict(),
            epoch=0,
            global_step=0,
            metrics={},
        ),
    )
    result = subprocess.run(
        [sys.executable, "-c", RESTORE, str(tmp_path / "best.pt")], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_the_last_feature_is_the_output_of_the_trunk(
    name: str, trunk: nn.Module, encoder: Encoder
) -> None:
    x = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(9))
    with torch.inference_mode():
        if name.startswith("resnet"):
            y = trunk.maxpool(trunk.relu(trunk.bn1(trunk.conv1(x))))
            expected = trunk.layer4(trunk.layer3(trunk.layer2(trunk.layer1(y))))
        else:
            expected = trunk.features(x)
        assert_same(encoder(x)[-1], expected)


def test_min_size_is_accepted_and_half_of_it_is_not(
    name: str, trunk: nn.Module, encoder: Encoder
) -> None:
    with torch.inference_mode():
        assert min(encoder(torch.zeros(1, 3, encoder.min_size, encoder.min_size))[-1].shape) >= 1
        assert encoder.min_size % 2 ** encoder.outputs[-1].level == 0
        if encoder.min_size > 2 ** encoder.outputs[-1].level:
            with pytest.raises(RuntimeError):
                trunk(torch.zeros(1, 3, encoder.min_size // 2, encoder.min_size // 2))


@all_ups
def test_logits_are_finite_and_of_the_input_size(
    name: str, trunk: nn.Module, model: EncoderUNet, up: str
) -> None:
    if up == "bilinear":
        model = build(name, 3, up=up, trunk=trunk)
    with torch.inference_mode():
        for size in ((1, 1), (33, 70)):
            logits = model(random_image(*size))
            assert logits.shape == (2, 3, *size)
            assert logits.dtype == torch.float32
            assert logits.isfinite().all()
            assert logits.std() > 1e-3


# --- Oracle of the decoder ----------------------------------------------------------------------


def resize_matrix(old: int, new: int) -> Tensor:
    """Bilinear interpolation as a matrix: pixels are areas, constant beyond the outer centers."""
    matrix = torch.zeros(new, old, dtype=torch.float64)
    for i in range(new):
        position = min(max((i + 0.5) * old / new - 0.5, 0), old - 1)
        before = min(int(position), old - 1)
        matrix[i, before] += 1 - (position - before)
        matrix[i, min(before + 1, old - 1)] += position - before
    return matrix


def resize(x: Tensor, height: int, width: int) -> Tensor:
    across, down = resize_matrix(x.shape[3], width), resize_matrix(x.shape[2], height)
    return torch.einsum("yh,nchw,xw->ncyx", down, x, across)


def conv_oracle(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A sum of shifted, zero-padded images over the pixels of the kernel."""
    size = weight.shape[-1]
    pad = size // 2
    height, width = x.shape[-2:]
    x = torch.from_numpy(np.pad(x.numpy(), [(0, 0), (0, 0), (pad, pad), (pad, pad)]))
    y = torch.zeros(len(x), len(weight), height, width, dtype=x.dtype)
    for i, j in itertools.product(range(size), repeat=2):
        shifted = x[:, :, i : i + height, j : j + width]
        y += torch.einsum("nchw,oc->nohw", shifted, weight[:, :, i, j])
    return y if bias is None else y + bias.view(1, -1, 1, 1)


def decoder_oracle(
    state: Mapping[str, Tensor],
    features: list[Tensor],
    levels: list[int],
    *,
    norm: str,
    up: str,
) -> Tensor:
    """Upsample from the coarsest feature; at each level, concatenate the skip and the result.

    Args:
        levels: number of halvings of each feature.
    """

    def two_convs(x: Tensor, key: str) -> Tensor:
        for conv in (0, 2) if norm == "none" else (0, 3):
            x = conv_oracle(x, state[f"{key}.{conv}.weight"], state.get(f"{key}.{conv}.bias"))
            if norm == "batch":
                mean, var, weight, bias = (
                    state[f"{key}.{conv + 1}.{part}"].view(1, -1, 1, 1)
                    for part in ("running_mean", "running_var", "weight", "bias")
                )
                x = (x - mean) / (var + 1e-5).sqrt() * weight + bias
            x = x * (x > 0)
        return x

    *skips, x = features
    for step, skip in enumerate(reversed(skips)):
        scale = 2 ** (levels[-1 - step] - levels[-2 - step])
        if up == "transposed":  # each pixel becomes a square
            weight, bias = state[f"ups.{step}.weight"], state[f"ups.{step}.bias"]
            assert weight.shape[2:] == (scale, scale)
            blocks = torch.einsum("nchw,coij->nohiwj", x, weight).flatten(4, 5).flatten(2, 3)
            x = blocks + bias.view(1, -1, 1, 1)
        else:
            x = resize(x, scale * x.shape[2], scale * x.shape[3])
            x = conv_oracle(x, state[f"ups.{step}.conv.weight"], state[f"ups.{step}.conv.bias"])
        x = resize(x, *skip.shape[-2:])  # AlexNet's sizes differ by a few pixels
        x = two_convs(torch.cat([skip, x], 1), f"decoders.{step}")
    return conv_oracle(x, state["head.weight"], state["head.bias"])


def normalize_and_pad(image: Tensor, multiple: int, min_size: int) -> Tensor:
    """Normalize in float64 and repeat the edge on the right and bottom."""
    mean = torch.tensor([123.675, 116.28, 103.53]).double().view(1, 3, 1, 1)
    std = torch.tensor([58.395, 57.12, 57.375]).double().view(1, 3, 1, 1)
    sides = [max(math.ceil(side / multiple) * multiple, min_size) for side in image.shape[-2:]]
    pads = [(0, new - old) for new, old in zip(sides, image.shape[-2:], strict=True)]
    x = ((image.double() - mean) / std).numpy()
    return torch.from_numpy(np.pad(x, [(0, 0), (0, 0), *pads], mode="edge"))


@pytest.fixture(scope="module", params=["resnet18", "vgg16", "alexnet"])
def exact(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    """A name and torchvision's trunk in float64."""
    return request.param, build_trunk(build_meta_net(request.param)).double()


@all_ups
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_logits_match_torchvisions_features_and_the_decoder_oracle(
    exact: tuple[str, nn.Module], up: str, norm: str
) -> None:
    name, trunk = exact
    model = build(name, 3, up=up, norm=norm, trunk=trunk).double()
    levels = [round(math.log2(224 / side)) for _, _, side in FEATURES[name]]
    for size in ((1, 1), (20, 70 if name == "alexnet" else 40)):
        image = random_image(*size)
        x = normalize_and_pad(image, 32, 64 if name == "alexnet" else 32)
        with torch.inference_mode():
            features = record_features(trunk, name, x)
            if levels[0] > 0:  # no feature at full resolution: the first skip is the image
                skips, skip_levels = [x, *features], [0, *levels]
            else:
                skips, skip_levels = features, levels
            expected = decoder_oracle(model.state_dict(), skips, skip_levels, norm=norm, up=up)
            assert expected.shape[-2:] == x.shape[-2:]
            actual = model(image)
        assert_same(actual, expected[:, :, : size[0], : size[1]], within=1e-9)


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        # Decoder channels / base_channels from the coarsest level: 2**level, at most 2**4.
        ("vgg16", [16, 8, 4, 2, 1]),
        ("resnet18", [16, 8, 4, 2, 1]),
        ("convnext_tiny", [16, 8, 4, 1]),
        ("alexnet", [16, 8, 4, 1]),
    ],
)
def test_decoder_channels(name: str, widths: list[int]) -> None:
    with torch.device("meta"):
        model = build_model("unet", encoder=name, base_channels=3)
    assert [decoder[0].out_channels for decoder in model.decoders] == [3 * w for w in widths]
    with torch.device("meta"):
        model = build_model("unet", encoder=name)
    assert [decoder[0].out_channels for decoder in model.decoders] == [16 * w for w in widths]


def test_upsampling_channels_of_vgg16() -> None:
    with torch.device("meta"):
        model = build_model("unet", encoder="vgg16_bn", base_channels=4)
    ups = [up.weight.shape[:2] for up in model.ups]
    assert ups == [(512, 64), (64, 32), (32, 16), (16, 8), (8, 4)]


@pytest.mark.parametrize("name", ["resnet18", "alexnet"])
def test_an_exported_network_gives_the_same_logits(name: str) -> None:
    model = build(name)
    image = random_image(40, 70, num=1)
    with torch.inference_mode():
        expected = model(image)
    with torch.no_grad():
        exported = torch.export.export(model, (image,)).module()
        assert_same(exported(image), expected)
        other = random_image(40, 70, num=1, seed=3)
        assert_same(exported(other), model(other))


@pytest.mark.parametrize("name", ["mobilenet_v3_large", "alexnet"])
def test_initial_convolutions_are_he_uniform_with_zero_biases(name: str) -> None:
    """Those of encoder and decoder, built on the CPU as by a user."""
    torch.manual_seed(3)
    model = build_model("unet", encoder=name)
    convs = {
        key: module
        for key, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)
    }
    assert {key.split(".")[0] for key in convs} == {"encoder", "ups", "decoders", "head"}
    for key, conv in convs.items():
        fan_channels = (
            conv.out_channels if isinstance(conv, nn.ConvTranspose2d) else conv.in_channels
        )
        bound = math.sqrt(6 / (fan_channels // conv.groups * math.prod(conv.kernel_size)))
        num = conv.weight.numel()
        # The probability that no value exceeds the fraction 1 - 20/num of the bound is e^-20.
        assert bound * (1 - 20 / num) < conv.weight.abs().max() <= bound * (1 + 1e-6), key
        assert conv.bias is None or not conv.bias.any(), key


class ZeroDropout(nn.Module):
    """Replaces dropout: records its inputs and returns zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.inputs.append(x)
        return torch.zeros_like(x)


def test_dropout_is_applied_only_to_the_coarsest_feature() -> None:
    model = build("resnet18", drop_rate=0.5)
    image = random_image(64, 64)
    with torch.inference_mode():
        coarsest = model.encoder(model.normalize(image))[-1]
        without = build("resnet18")
        assert torch.equal(model(image), without(image))
        model.dropout.train()
        assert not torch.equal(model(image), model(image))

        model.dropout = ZeroDropout()
        dropped = model(image)
        assert len(model.dropout.inputs) == 1
        assert_same(model.dropout.inputs[0], coarsest)
        assert not torch.allclose(dropped, without(image))


def test_gradients_reach_every_parameter() -> None:
    model = build("alexnet").train()
    model(random_image(70, 40)).square().mean().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().sum() > 0, key


# --- Weight files -------------------------------------------------------------------------------


class CodeInPickle:
    """An object whose pickle creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


SMALLEST: EncoderName = "alexnet"
WITH_NORMS: EncoderName = "mobilenet_v3_large"


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Weights of the smallest encoder with torchvision's names, and one of its classifier."""
    state = build_trunk(build_meta_net(SMALLEST)).state_dict()
    return {**state, "classifier.6.bias": torch.zeros(1000)}


@pytest.fixture(scope="module")
def weights_bytes(weights: dict[str, Tensor]) -> bytes:
    stream = io.BytesIO()
    torch.save(weights, stream)
    return stream.getvalue()


@pytest.fixture
def weights_file(weights_bytes: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "weights.pth"
    path.write_bytes(weights_bytes)
    return path


@pytest.fixture
def torch_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set an empty torch cache; return its folder for weights, which does not exist yet."""
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


@pytest.fixture(autouse=True)
def _block_network(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_urlopen(monkeypatch, AssertionError("unexpected network access"))


def fake_urlopen(monkeypatch: pytest.MonkeyPatch, response: Exception | bytes) -> list[str]:
    """Return or raise `response` for every URL; return the list of requested URLs."""
    requested_urls: list[str] = []

    def urlopen(request: urllib.request.Request | str, *args: Any, **kwargs: Any) -> Any:
        requested_urls.append(request if isinstance(request, str) else request.full_url)
        if isinstance(response, Exception):
            raise response
        return UrlResponse(response)

    for module in (urllib.request, torch.hub):
        monkeypatch.setattr(module, "urlopen", urlopen)
    return requested_urls


class UrlResponse(io.BytesIO):
    """The part of the return value of urlopen that torch uses."""

    def info(self) -> Message:
        message = Message()
        message["Content-Length"] = str(len(self.getvalue()))
        return message


def default_url(name: str) -> str:
    return str(get_model_weights(name).DEFAULT.url)


def save(content: Any, path: Path, **kwargs: Any) -> Path:
    torch.save(content, path, **kwargs)
    return path


def assert_weights_equal(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Bit-identical weights, except for the classifier in `expected`."""
    assert state.keys() == {key for key in expected if not key.startswith("classifier.")}
    for key, value in state.items():
        assert value.dtype == expected[key].dtype, key
        assert torch.equal(value, expected[key]), key


@pytest.fixture(scope="module")
def norm_weights() -> dict[str, Tensor]:
    """Weights of torchvision's complete network with batch norm."""
    return dict(init_random(get_model(WITH_NORMS, weights=None)).state_dict())


def test_weights_from_a_file_are_bit_identical(
    norm_weights: dict[str, Tensor], tmp_path: Path
) -> None:
    norm_weights["features.0.1.num_batches_tracked"] = torch.tensor(12345)
    path = save(norm_weights, tmp_path / "weights.pth")
    model = build_model("unet", encoder=WITH_NORMS, pretrained=str(path))
    assert isinstance(model, EncoderUNet)
    before = copy_state(model)
    state = model.read_pretrained()
    assert state is not None
    assert_weights_equal(state, norm_weights)
    assert changed_keys(model, before) == set(), "reading changed the model"

    model.encoder.load_state_dict(state)
    assert_weights_equal(model.encoder.state_dict(), norm_weights)
    assert all(key.startswith("encoder.") for key in changed_keys(model, before))


def test_without_pretrained_nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        for kwargs in ({}, {"pretrained": False}):
            model = build_model("unet", encoder=SMALLEST, **kwargs)
            assert isinstance(model, EncoderUNet)
            assert model.read_pretrained() is None


def test_files_in_torchs_old_format_are_read(weights: dict[str, Tensor], tmp_path: Path) -> None:
    """The format before torch 1.6, which is not a zip file."""
    path = save(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_weights_equal(read_pretrained(SMALLEST, str(path)), weights)


def test_a_file_without_a_classifier_is_read(weights: dict[str, Tensor], tmp_path: Path) -> None:
    trunk = {key: value for key, value in weights.items() if not key.startswith("classifier.")}
    assert len(trunk) < len(weights)
    assert_weights_equal(
        read_pretrained(SMALLEST, str(save(trunk, tmp_path / "trunk.pth"))), weights
    )


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        # `segtrain train` checks the command on the meta device before it starts.
        pytest.param(
            "meta",
        ),
    ],
)
def test_files_without_batch_counts_are_read(
    device: str, norm_weights: dict[str, Tensor], tmp_path: Path
) -> None:
    """torch counts batches since 0.4.1; older files lack them (resnet18-5c106cde.pth).

    Batch norm with a momentum does not use the counts, and torchvision reads these files.
    """
    counts = {key for key in norm_weights if key.endswith("num_batches_tracked")}
    assert counts
    old = {key: value for key, value in norm_weights.items() if key not in counts}
    path = save(old, tmp_path / "old.pth")
    with torch.device(device):
        state = read_pretrained(WITH_NORMS, str(path))
    assert {state.pop(key).item() for key in counts} == {0}
    assert_weights_equal(state, old)


def test_a_file_saved_on_a_gpu_is_read_without_one(
    weights: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patches:
        patches.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        path = save(weights, tmp_path / "gpu.pth")
    state = read_pretrained(SMALLEST, str(path))
    assert {value.device.type for value in state.values()} == {"cpu"}
    assert_weights_equal(state, weights)


# float32 ends at 3.4e38.
INVALID_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse": lambda weight: weight.to_sparse(),
    "meta": lambda weight: weight.to("meta"),
    "quantized": lambda weight: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8),
    "too large for float32": lambda weight: weight.double() * 1e300,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind",
    INVALID_WEIGHTS,
)
def test_unsupported_tensors_are_a_checkpoint_error(
    kind: str, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    path = save({**weights, FIRST: INVALID_WEIGHTS[kind](weights[FIRST])}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError):
        read_pretrained(SMALLEST, str(path))


def test_a_too_long_file_name_is_a_checkpoint_error() -> None:
    with pytest.raises(CheckpointError):
        read_pretrained(SMALLEST, "x" * 300)


def test_weights_in_torchs_cache_are_not_downloaded(
    weights: dict[str, Tensor], weights_bytes: bytes, torch_home: Path
) -> None:
    torch_home.mkdir(parents=True)
    (torch_home / default_url(SMALLEST).rpartition("/")[2]).write_bytes(weights_bytes)
    with torch.device("meta"):
        model = build_model("unet", encoder=SMALLEST, pretrained=True)
    assert isinstance(model, EncoderUNet)
    assert_weights_equal(model.read_pretrained() or {}, weights)


def test_weights_in_a_custom_torch_hub_folder_are_found(
    weights: dict[str, Tensor],
    weights_bytes: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / default_url(SMALLEST).rpartition("/")[2]).write_bytes(weights_bytes)
    assert_weights_equal(read_pretrained(SMALLEST, True), weights)


def test_the_newest_weights_are_downloaded_once(
    weights: dict[str, Tensor],
    weights_bytes: bytes,
    torch_home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = default_url(SMALLEST)
    file_name = url.rpartition("/")[2]
    # The file name contains the start of the hash, which the test file does not have.
    expected_hash = file_name.rpartition("-")[2].removesuffix(".pth")
    whole = hashlib.sha256(weights_bytes).digest()

    class Sha256:
        def __init__(self) -> None:
            self.hash = hashlib.new("sha256")
            self.update = self.hash.update

        def hexdigest(self) -> str:
            return expected_hash if self.hash.digest() == whole else "0"

    monkeypatch.setattr(hashlib, "sha256", Sha256)
    requested_urls = fake_urlopen(monkeypatch, weights_bytes)
    for _ in range(2):
        assert_weights_equal(read_pretrained(SMALLEST, True), weights)
    assert requested_urls == [url]
    assert [path.name for path in torch_home.iterdir()] == [file_name]


@all_encoders
def test_the_download_error_gives_the_file_and_its_folder(
    name: EncoderName, torch_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requested_urls = fake_urlopen(monkeypatch, URLError("no route to host"))
    with pytest.raises(ResourceError) as caught:
        read_pretrained(name, True)
    message = str(caught.value)
    assert requested_urls == [default_url(name)]
    assert default_url(name) in message
    assert str(torch_home) in message
    assert "no route to host" in message
    assert "\n" not in message
    assert list(torch_home.iterdir()) == []


@pytest.mark.parametrize("response", [TimeoutError("timed out"), b"half of a fi"], ids=str)
def test_an_interrupted_download_is_a_resource_error_and_leaves_no_file(
    response: Exception | bytes, torch_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_urlopen(monkeypatch, response)
    with pytest.raises(ResourceError) as caught:
        read_pretrained(SMALLEST, True)
    assert "\n" not in str(caught.value)
    assert list(torch_home.iterdir()) == []


Damage = Callable[[Path, dict[str, Tensor], bytes], object]


def change_weight(key: str, change: Callable[[Tensor], Any]) -> Damage:
    def damage(path: Path, weights: dict[str, Tensor], content: bytes) -> None:
        torch.save({**weights, key: change(weights[key].clone())}, path)

    return damage


def set_last(value: float) -> Callable[[Tensor], Tensor]:
    def change(weight: Tensor) -> Tensor:
        weight.flatten()[-1] = value
        return weight

    return change


FIRST, LAST = "features.0.weight", "features.10.bias"
DAMAGES: dict[str, Damage] = {
    "missing": lambda path, weights, content: path.unlink(missing_ok=True),
    "a folder": lambda path, weights, content: path.mkdir(),
    "empty": lambda path, weights, content: path.touch(),
    "half": lambda path, weights, content: path.write_bytes(content[: len(content) // 2]),
    "cut short": lambda path, weights, content: path.write_bytes(content[:-100]),
    "text": lambda path, weights, content: path.write_text("Not found\n"),
    "code": lambda path, weights, content: torch.save(CodeInPickle(path.parent / "ran"), path),
    "weights and code": lambda path, weights, content: torch.save(
        {**weights, "more": CodeInPickle(path.parent / "ran")}, path
    ),
    "a list": lambda path, weights, content: torch.save(list(weights.values()), path),
    "one tensor": lambda path, weights, content: torch.save(weights[FIRST], path),
    "nothing by name": lambda path, weights, content: torch.save({}, path),
    "a training checkpoint": lambda path, weights, content: torch.save({"model": weights}, path),
    "other names": lambda path, weights, content: torch.save(
        {f"module.{key}": value for key, value in weights.items()}, path
    ),
    "a key missing": lambda path, weights, content: torch.save(
        {key: value for key, value in weights.items() if key != LAST}, path
    ),
    "no tensor": change_weight(FIRST, lambda weight: weight.tolist()),
    "another shape": change_weight(FIRST, lambda weight: weight[:, :1]),
    "as many in another shape": change_weight(FIRST, lambda weight: weight.flatten()),
    "NaN": change_weight(FIRST, set_last(math.nan)),
    "infinite": change_weight(LAST, set_last(-math.inf)),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_invalid_file_is_an_error_with_its_path(
    damage: str, device: str, weights: dict[str, Tensor], weights_bytes: bytes, tmp_path: Path
) -> None:
    """Also on the meta device, where a command is checked."""
    path = tmp_path / "weights.pth"
    DAMAGES[damage](path, weights, weights_bytes)
    with torch.device(device), pytest.raises(CheckpointError) as caught:
        read_pretrained(SMALLEST, str(path))
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert not (tmp_path / "ran").exists(), "code in the file was run"


@pytest.mark.parametrize("name", ["resnet18", "vgg16"])
def test_weights_of_another_encoder_are_rejected(name: EncoderName, weights_file: Path) -> None:
    with torch.device("meta"):
        model = build_model("unet", encoder=name, pretrained=str(weights_file))
    assert isinstance(model, EncoderUNet)
    with pytest.raises(CheckpointError) as caught:
        model.read_pretrained()
    assert str(weights_file) in str(caught.value)
    assert name in str(caught.value)


def test_vgg19_weights_are_rejected_for_vgg16(tmp_path: Path) -> None:
    """Both encoders share names of weights with different shapes."""
    with torch.device("meta"):
        vgg16, vgg19 = Encoder("vgg16").state_dict(), Encoder("vgg19").state_dict()
    assert vgg16.keys() < vgg19.keys() or vgg16.keys() & vgg19.keys()
    # Expanded zeros take little memory and a small file.
    content = {key: torch.zeros(()).expand(value.shape) for key, value in vgg19.items()}
    path = save(content, tmp_path / "vgg19.pth")
    with pytest.raises(CheckpointError, match="vgg16"):
        read_pretrained("vgg16", str(path))
    assert read_pretrained("vgg19", str(path)).keys() == vgg19.keys()


def test_the_error_for_a_damaged_file_in_torchs_cache_contains_its_path(torch_home: Path) -> None:
    torch_home.mkdir(parents=True)
    path = torch_home / default_url(SMALLEST).rpartition("/")[2]
    path.write_text("Not found\n")
    with pytest.raises(CheckpointError) as caught:
        read_pretrained(SMALLEST, True)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("pretrained", [True, "weights.pth"])
def test_building_a_model_accesses_neither_disk_nor_network(
    pretrained: bool | str, device: str, torch_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("weights.pth").write_text("Not weights\n")
    with torch.device("meta"):
        build_model("unet", encoder="alexnet", base_channels=1)  # imports modules

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"unexpected access: {args}")

    with monkeypatch.context() as patches:
        patches.setattr(torch, "load", fail)
        patches.setattr(torch.hub, "load_state_dict_from_url", fail)
        for module, name in ((builtins, "open"), (os, "stat"), (os, "open"), (os, "listdir")):
            patches.setattr(module, name, fail)
        with torch.device(device):
            model = build_model("unet", encoder="alexnet", base_channels=1, pretrained=pretrained)
    assert next(model.parameters()).device.type == device
    assert not torch_home.exists()


# --- A frozen encoder ---------------------------------------------------------------------------


def test_a_frozen_encoder_keeps_its_weights_and_statistics() -> None:
    model = build("resnet18").train()
    model.freeze_encoder(True)
    before = copy_state(model)
    image = random_image(64, 64)
    for restart in (False, True):  # as between epochs
        if restart:
            model.eval()
            model.train()
        assert model.training
        assert model.decoders[0][1].training
        assert not any(module.training for module in model.encoder.modules())
        model(image).square().mean().backward()
        for key, parameter in model.named_parameters():
            frozen = key.startswith("encoder.")
            assert parameter.requires_grad is not frozen, key
            assert (parameter.grad is None) is frozen, key
    torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1).step()
    keys = changed_keys(model, before)
    assert not [key for key in keys if key.startswith("encoder.")]
    # Everything else changes, including statistics, except for the constants of Normalize.
    others = {key for key in before if not key.startswith(("encoder.", "normalize."))}
    assert keys == others


def test_an_unfrozen_encoder_is_trained() -> None:
    model = build("resnet18").train()
    model.freeze_encoder(True)
    model.freeze_encoder(False)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    before = copy_state(model)
    model(random_image(64, 64)).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert changed_keys(model, before) == {
        key for key in before if not key.startswith("normalize.")
    }


@pytest.mark.parametrize("frozen", [True, False])
def test_freezing_does_not_change_the_training_mode(frozen: bool) -> None:
    model = build("resnet18")
    model.freeze_encoder(frozen)
    assert not any(module.training for module in model.modules())
    assert model.train() is model
    assert model.training
    assert model.encoder.training is not frozen
    assert model.eval() is model
    assert not any(module.training for module in model.modules())


def test_a_frozen_encoder_does_not_use_its_dropout() -> None:
    """EfficientNet randomly skips blocks in training."""
    model = build("efficientnet_b0", norm="none").train()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        assert not torch.equal(model.encoder(x)[-1], model.encoder(x)[-1])
        model.freeze_encoder(True)
        image = random_image(32, 32)
        assert torch.equal(model(image), model(image))


# --- Building by name ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "expected_text"),
    [
        ({"encoder": "resnet18", "depth": 4}, "depth"),
        ({"encoder": "resnet18", "depth": 3}, "depth"),
        ({"encoder": "resnet18", "padding": "valid"}, "padding"),
        ({"encoder": "resnet18", "padding": "valid", "norm": "none"}, "padding"),
        ({"pretrained": True}, "encoder"),
        ({"pretrained": "weights.pth"}, "encoder"),
        ({"encoder": None, "pretrained": True}, "encoder"),
        ({"encoder": "resnet19"}, "model.encoder"),
        ({"encoder": True}, "model.encoder"),
        ({"encoder": ""}, "model.encoder"),
        # Other torchvision networks, with a different structure.
        ({"encoder": "densenet121"}, "model.encoder"),
        ({"encoder": "vit_b_16"}, "model.encoder"),
        ({"encoder": "resnet18", "pretrained": None}, "model.pretrained"),
        ({"encoder": "resnet18", "pretrained": ["a.pth"]}, "model.pretrained"),
        ({"encoder": "resnet18", "base_channels": 0}, "base_channels"),
        ({"encoder": "resnet18", "drop_rate": 1.0}, "drop_rate"),
        ({"encoder": "resnet18", "norm": "layer"}, "model.norm"),
        ({"encoder": "resnet18", "up": "nearest"}, "model.up"),
    ],
    ids=str,
)
def test_invalid_arguments_are_a_usage_error_of_one_line(
    kwargs: dict[str, Any], expected_text: str
) -> None:
    with torch.device("meta"), pytest.raises(UsageError) as caught:
        build_model("unet", **kwargs)
    message = str(caught.value)
    assert expected_text in message
    assert "\n" not in message


def test_the_error_for_an_unknown_encoder_lists_the_available_ones() -> None:
    with pytest.raises(UsageError) as caught:
        build_model("unet", encoder="resnet19")
    for name in ENCODERS:
        assert name in str(caught.value)


def test_default_values_may_be_given_explicitly() -> None:
    with torch.device("meta"):
        plain = build_model("unet", encoder=None, pretrained=False)
        assert not isinstance(plain, EncoderUNet)
        model = build_model("unet", encoder="resnet18", padding="same", depth=None)
        assert isinstance(model, EncoderUNet)
        assert build_model("unet", encoder="alexnet", norm="group", up="bilinear")
