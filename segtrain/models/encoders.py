"""Encoders: torchvision's classification networks without pooling and classifier."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args
from urllib.error import URLError

import torch
from torch import Tensor, nn

from segtrain.errors import CheckpointError, ResourceError
from segtrain.models.backbones import alexnet, resnet, vgg
from segtrain.runtime.signals import interrupt_immediately

EncoderName = Literal[
    "vgg16",
    "vgg16_bn",
    "vgg19",
    "vgg19_bn",
    "alexnet",
    "resnet18",
    "resnet34",
    "resnet50",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "convnext_tiny",
]
ENCODERS: tuple[str, ...] = get_args(EncoderName)


class Feature(NamedTuple):
    """The last output of an encoder at one resolution.

    stage: index of the stage that outputs it.
    channels: number of channels.
    level: number of halvings; rounded where the sizes are not exact halvings, as in AlexNet.
    """

    stage: int
    channels: int
    level: int


# Constants, because a forward pass on torch's meta device, which could find them, imports half of
# torch's compiler. Tests compare them with torchvision's networks.
_FEATURES: dict[EncoderName, list[tuple[int, int, int]]] = {
    "vgg16": [(3, 64, 0), (8, 128, 1), (15, 256, 2), (22, 512, 3), (29, 512, 4), (30, 512, 5)],
    "vgg16_bn": [(5, 64, 0), (12, 128, 1), (22, 256, 2), (32, 512, 3), (42, 512, 4), (43, 512, 5)],
    "vgg19": [(3, 64, 0), (8, 128, 1), (17, 256, 2), (26, 512, 3), (35, 512, 4), (36, 512, 5)],
    "vgg19_bn": [(5, 64, 0), (12, 128, 1), (25, 256, 2), (38, 512, 3), (51, 512, 4), (52, 512, 5)],
    "alexnet": [(1, 64, 2), (4, 192, 3), (11, 256, 4), (12, 256, 5)],
    "resnet18": [(2, 64, 1), (5, 64, 2), (7, 128, 3), (9, 256, 4), (11, 512, 5)],
    "resnet34": [(2, 64, 1), (6, 64, 2), (10, 128, 3), (16, 256, 4), (19, 512, 5)],
    "resnet50": [(2, 64, 1), (6, 256, 2), (10, 512, 3), (16, 1024, 4), (19, 2048, 5)],
    "mobilenet_v3_large": [(1, 16, 1), (3, 24, 2), (6, 40, 3), (12, 112, 4), (16, 960, 5)],
    "efficientnet_b0": [(1, 16, 1), (2, 24, 2), (3, 40, 3), (5, 112, 4), (8, 1280, 5)],
    "convnext_tiny": [(1, 96, 2), (3, 192, 3), (5, 384, 4), (7, 768, 5)],
}

# These do not need torchvision, whose import takes as long as that of torch.
_BACKBONES: dict[EncoderName, Callable[[], nn.Module]] = {
    "vgg16": partial(vgg, (2, 2, 3, 3, 3), norm=False),
    "vgg16_bn": partial(vgg, (2, 2, 3, 3, 3), norm=True),
    "vgg19": partial(vgg, (2, 2, 4, 4, 4), norm=False),
    "vgg19_bn": partial(vgg, (2, 2, 4, 4, 4), norm=True),
    "alexnet": alexnet,
    "resnet18": partial(resnet, (2, 2, 2, 2), bottleneck=False),
    "resnet34": partial(resnet, (3, 4, 6, 3), bottleneck=False),
    "resnet50": partial(resnet, (3, 4, 6, 3), bottleneck=True),
}


class Encoder(nn.Module):
    """A classification network up to its average pooling.

    The `state_dict` keys are torchvision's.

    Args:
        name: one of `ENCODERS`.

    Attributes:
        outputs: the features that `forward` returns.
        min_size: smallest H and W that the network accepts, in pixels.
    """

    def __init__(self, name: EncoderName) -> None:
        super().__init__()
        for key, child in _build_backbone(name).named_children():
            if key == "avgpool":
                break
            self.add_module(key, child)
        self.outputs = [Feature(*feature) for feature in _FEATURES[name]]
        # AlexNet's pooling windows are wider than their stride and must fit into the image.
        self.min_size = 64 if name == "alexnet" else 32

    def stages(self) -> Iterator[nn.Module]:
        """The modules that `forward` applies, in order."""
        for child in self.children():
            yield from child if isinstance(child, nn.Sequential) else [child]

    def forward(self, x: Tensor) -> list[Tensor]:
        """N 3 H W, normalized → features from the finest to the coarsest."""
        output_stages = {feature.stage for feature in self.outputs}
        features = []
        for i, stage in enumerate(self.stages()):
            x = stage(x)
            if i in output_stages:
                features.append(x)
        return features


def _build_backbone(name: EncoderName) -> nn.Module:
    if name in _BACKBONES:
        return _BACKBONES[name]()
    from torchvision.models import get_model

    return get_model(name, weights=None)  # type: ignore[no-any-return]


def read_pretrained(name: EncoderName, pretrained: Literal[True] | str) -> dict[str, Tensor]:
    """Read ImageNet weights for an encoder as a `state_dict` with torchvision's keys.

    Args:
        pretrained: True for torchvision's newest weights, downloaded once into torch's cache; or
            the path of a `.pth` file with torchvision weights.

    Raises:
        ResourceError: the download failed; the message gives the file and where to put it.
        CheckpointError: the file is missing, damaged, or does not match the encoder.
    """
    path = _download(name) if pretrained is True else Path(pretrained)
    try:
        if not path.is_file():
            raise CheckpointError(
                f"{path}: no such file", "set model.pretrained to true, false, or a weights file"
            )
        state = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise CheckpointError(
            f"{path} is damaged or contains more than weights (no code in it was run)",
            "download it again",
        ) from error
    with torch.device("meta"):
        expected = Encoder(name).state_dict()
    if isinstance(state, dict):
        # Older files, some of torchvision's among them, lack the batch counts. Nothing needs them.
        zero = torch.tensor(0, device="cpu")
        state = {key: zero for key in expected if key.endswith("num_batches_tracked")} | state
    _check_weights(state, expected, path, name)
    return {key: state[key] for key in expected}


def _download(name: EncoderName) -> Path:
    """Download torchvision's newest weights into torch's cache if they are not there."""
    from torchvision.models import get_model_weights

    weights: Any = get_model_weights(name).DEFAULT
    path = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    if not path.is_file():
        try:
            with interrupt_immediately():
                weights.get_state_dict(progress=True, check_hash=True)
        except (URLError, OSError, RuntimeError) as error:
            reason = getattr(error, "reason", error)
            raise ResourceError(
                f"cannot download {weights.url} ({reason})",
                f"put that file into {path.parent} or set model.pretrained=FILE",
            ) from error
    return path


def _check_weights(state: Any, expected: Mapping[str, Tensor], path: Path, name: str) -> None:
    """Check an untrusted file: all weights are present, of the right shape, and finite."""
    hint = f"use torchvision's weights file for {name}"
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} does not contain a state dict", hint)
    for key, weight in expected.items():
        value: Any = state.get(key)
        usable = isinstance(value, Tensor) and value.is_cpu and value.layout == torch.strided
        usable = usable and value.is_floating_point() == weight.is_floating_point()
        if not usable or value.shape != weight.shape:
            raise CheckpointError(
                f"{path} does not match {name}: no {key} of shape {tuple(weight.shape)}", hint
            )
        if not bool(value.to(weight.dtype).isfinite().all()):
            raise CheckpointError(
                f"{path}: {key} contains NaN or infinite values", "download it again"
            )
