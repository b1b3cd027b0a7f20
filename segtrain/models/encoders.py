"""Encoders: classification networks, torchvision's, without what follows their last features."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args
from urllib.error import URLError

import torch
from torch import Tensor, nn

from segtrain.errors import CheckpointError, ResourceError
from segtrain.models.resnet import resnet
from segtrain.models.vgg import alexnet, vgg
from segtrain.stopping import at_once

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
    """The last output of an encoder before H and W become smaller.

    stage: index of the stage that it comes out of.
    channels: its channels.
    level: number of halvings, the nearest whole one where a stride is odd.
    """

    stage: int
    channels: int
    level: int


# Written down, for a pass without memory, on torch's meta device, imports half of its compiler. The
# tests find the same in torchvision's networks.
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

# Ours, which do without torchvision: importing that takes as long as importing torch.
_OURS: dict[EncoderName, Callable[[], nn.Module]] = {
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
    """A classification network up to its average pooling, stage by stage.

    The weights have torchvision's names.

    Args:
        name: one of ENCODERS.

    Attributes:
        outputs: where the features that `forward` returns come from.
        min_size: side of the smallest picture that goes through, pixels.
    """

    def __init__(self, name: EncoderName) -> None:
        super().__init__()
        for key, child in _network(name).named_children():
            if key == "avgpool":
                break
            self.add_module(key, child)
        self.outputs = [Feature(*feature) for feature in _FEATURES[name]]
        # AlexNet's pooling has windows wider than their stride, and they must fit.
        self.min_size = 64 if name == "alexnet" else 32

    def stages(self) -> Iterator[nn.Module]:
        """What is applied one after another."""
        for child in self.children():
            yield from child if isinstance(child, nn.Sequential) else [child]

    def forward(self, x: Tensor) -> list[Tensor]:
        """N 3 H W, normalised → the features, from the finest to the coarsest."""
        wanted = {feature.stage for feature in self.outputs}
        features = []
        for i, stage in enumerate(self.stages()):
            x = stage(x)
            if i in wanted:
                features.append(x)
        return features


def _network(name: EncoderName) -> nn.Module:
    if name in _OURS:
        return _OURS[name]()
    from torchvision.models import get_model

    return get_model(name, weights=None)  # type: ignore[no-any-return]


def read_pretrained(name: EncoderName, pretrained: Literal[True] | str) -> dict[str, Tensor]:
    """ImageNet weights for an encoder, by torchvision's names.

    Args:
        pretrained: True takes torchvision's newest, downloaded once into torch's cache; text names
            a file of torchvision weights, `.pth`.

    Raises:
        ResourceError: there is no network; the message says which file to put where.
        CheckpointError: the file is missing, damaged, or not for this encoder.
    """
    path = _downloaded(name) if pretrained is True else Path(pretrained)
    try:
        if not path.is_file():
            raise CheckpointError(
                f"there is no file {path}; model.pretrained is true, false or a file"
            )
        found = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # damaged files raise anything
        raise CheckpointError(
            f"{path} is damaged or holds more than weights; nothing in it was run; get it anew"
        ) from error
    with torch.device("meta"):
        wanted = Encoder(name).state_dict()
    if isinstance(found, dict):
        # Older files, some of torchvision's among them, do not count batches; nothing needs it.
        zero = torch.tensor(0, device="cpu")
        found = {key: zero for key in wanted if key.endswith("num_batches_tracked")} | found
    _check_weights(found, wanted, path, name)
    return {key: found[key] for key in wanted}


def _downloaded(name: EncoderName) -> Path:
    from torchvision.models import get_model_weights

    weights: Any = get_model_weights(name).DEFAULT
    path = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    if not path.is_file():
        try:
            with at_once():
                weights.get_state_dict(progress=True, check_hash=True)
        except (URLError, OSError, RuntimeError) as error:
            reason = getattr(error, "reason", error)
            raise ResourceError(
                f"cannot download {weights.url} ({reason}); put that file into {path.parent} or "
                "set model.pretrained=FILE"
            ) from error
    return path


def _check_weights(found: Any, wanted: Mapping[str, Tensor], path: Path, name: str) -> None:
    """A file from elsewhere: every weight there, of the right shape, and a number."""
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds no weights by name; give torchvision's file of {name}")
    for key, weight in wanted.items():
        value: Any = found.get(key)
        usable = isinstance(value, Tensor) and value.is_cpu and value.layout == torch.strided
        usable = usable and value.is_floating_point() == weight.is_floating_point()
        if not usable or value.shape != weight.shape:
            raise CheckpointError(
                f"{path} does not fit {name}: it has no {key} of shape {tuple(weight.shape)}; "
                f"give torchvision's file of {name}"
            )
        if not bool(value.to(weight.dtype).isfinite().all()):
            raise CheckpointError(f"{path}: {key} holds NaN or infinite numbers; get it anew")
