"""Encoders from torchvision: classification networks without what follows their last features."""

import copy
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args
from urllib.error import URLError

import torch
from torch import Tensor, nn

from segtrain.errors import CheckpointError, ResourceError
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

# Pictures on which the shapes of the features are looked up; a power of two tells the halvings.
_PROBE_SIZE = 256


class Feature(NamedTuple):
    """The last output of an encoder before H and W become smaller.

    stage: index of the stage that it comes out of.
    channels: its channels.
    level: number of halvings, the nearest whole one where a stride is odd.
    """

    stage: int
    channels: int
    level: int


class Encoder(nn.Module):
    """A torchvision network up to its average pooling, stage by stage.

    The weights have torchvision's own names.

    Args:
        name: one of ENCODERS.

    Attributes:
        outputs: where the features that `forward` returns come from.
        min_size: side of the smallest picture that goes through, pixels.
    """

    def __init__(self, name: EncoderName) -> None:
        from torchvision.models import get_model

        super().__init__()
        for key, child in get_model(name, weights=None).named_children():
            if key == "avgpool":
                break
            self.add_module(key, child)
        self.outputs, self.min_size = _probe(list(self.stages()))

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


def _probe(stages: list[nn.Module]) -> tuple[list[Feature], int]:
    """Where H and W become smaller, and from which size on it works at all; costs no computing."""
    shapes = _shapes(stages, _PROBE_SIZE)
    features = []
    for i, shape in enumerate(shapes):
        if i == len(shapes) - 1 or shapes[i + 1][2] < shape[2]:
            features.append(Feature(i, shape[1], round(math.log2(_PROBE_SIZE / shape[2]))))
    size = 2 ** features[-1].level
    while not _goes_through(stages, size):
        size *= 2
    return features, size


def _shapes(stages: list[nn.Module], size: int) -> list[torch.Size]:
    shapes = []
    x = torch.empty(1, 3, size, size, device="meta")
    with torch.no_grad():
        for stage in stages:
            x = copy.deepcopy(stage).to("meta").eval()(x)
            shapes.append(x.shape)
    return shapes


def _goes_through(stages: list[nn.Module], size: int) -> bool:
    try:
        _shapes(stages, size)
    except RuntimeError:  # a window is larger than what is left of the picture
        return False
    return True


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
