"""Model registry. To add a model, write a factory and add a row to `MODELS`.

Every model takes N 3 H W RGB images (uint8, or float in 0..255) of any H and W. It returns logits
N num_classes H W without a softmax. Normalization, padding, and cropping are part of the model.
"""

import inspect
from collections.abc import Callable
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import nn

from segtrain.errors import UsageError
from segtrain.models.encoder_unet import EncoderUNet
from segtrain.models.encoders import EncoderName
from segtrain.models.fc_densenet import fc_densenet56, fc_densenet67, fc_densenet103
from segtrain.models.unet import NormKind, Padding, UNet, UpKind
from segtrain.models.valid_unet import ValidUNet


def unet(
    num_classes: int = 2,
    *,
    encoder: EncoderName | None = None,
    pretrained: bool | str = False,
    padding: Padding = "same",
    norm: NormKind = "batch",
    up: UpKind = "transposed",
    base_channels: int | None = None,
    depth: int | None = None,
    drop_rate: float = 0.0,
) -> nn.Module:
    """Build a U-Net: `UNet`, `ValidUNet` for padding="valid", or `EncoderUNet` for an encoder.

    Args:
        num_classes, norm, up, drop_rate: see these classes.
        encoder, pretrained: see `EncoderUNet`.
        padding, depth: only without an encoder; `depth` defaults to 4.
        base_channels: defaults to 64 without an encoder and to 16 with one.

    Raises:
        ValueError: an argument is out of range, or two arguments exclude each other.
    """
    if encoder is None:
        if pretrained is not False:
            raise ValueError("pretrained requires an encoder, e.g. model.encoder=resnet34")
        model_class = ValidUNet if padding == "valid" else UNet
        return model_class(
            num_classes,
            norm=norm,
            up=up,
            base_channels=64 if base_channels is None else base_channels,
            depth=4 if depth is None else depth,
            drop_rate=drop_rate,
        )
    if depth is not None or padding != "same":
        raise ValueError("depth and padding cannot be changed with an encoder; drop these options")
    return EncoderUNet(
        num_classes,
        encoder=encoder,
        pretrained=pretrained,
        norm=norm,
        up=up,
        base_channels=16 if base_channels is None else base_channels,
        drop_rate=drop_rate,
    )


MODELS: dict[str, Callable[..., nn.Module]] = {
    "unet": unet,
    "tiramisu": fc_densenet103,
    "fc_densenet103": fc_densenet103,
    "fc_densenet67": fc_densenet67,
    "fc_densenet56": fc_densenet56,
}


def build_model(name: str, num_classes: int = 2, **kwargs: Any) -> nn.Module:
    """Build a model with He-uniform weights, in float32 on the CPU.

    Args:
        name: a key of `MODELS`.
        num_classes: channels of the logits; class 0 is background, class 1 is person.
        kwargs: arguments of the factory; strings such as "0.1" are converted to the argument's
            type.

    Raises:
        UsageError: the model or an argument is unknown, or a value is invalid.
    """
    if name not in MODELS:
        raise UsageError(f"unknown model {name!r}", f"available: {', '.join(MODELS)}")
    factory = MODELS[name]
    parameters = dict(inspect.signature(factory).parameters)
    parameters.pop("num_classes")
    checked = {}
    for key, value in kwargs.items():
        if key not in parameters:
            raise UsageError(
                f"model {name} has no argument {key!r}", f"available: {', '.join(parameters)}"
            )
        try:
            checked[key] = TypeAdapter(parameters[key].annotation).validate_python(value)
        except ValidationError as error:
            problem = error.errors()[0]["msg"].lower()
            raise UsageError(f"model.{key}: {problem}, but it is {value!r}") from None
    try:
        return factory(num_classes, **checked)
    except ValueError as error:
        raise UsageError(f"model {name}: {error}") from None
