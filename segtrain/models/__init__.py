"""The networks by name. A new one is one new factory and one new row.

Every network takes N 3 H W RGB (uint8, or float in 0..255) of any H and W and returns logits
N num_classes H W, without a softmax; normalisation, padding and cropping happen inside.
"""

import inspect
from collections.abc import Callable
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import nn

from segtrain.errors import UsageError
from segtrain.models.encoder_unet import unet
from segtrain.models.tiramisu import fc_densenet56, fc_densenet67, fc_densenet103

MODELS: dict[str, Callable[..., nn.Module]] = {
    "unet": unet,
    "tiramisu": fc_densenet103,
    "fc_densenet103": fc_densenet103,
    "fc_densenet67": fc_densenet67,
    "fc_densenet56": fc_densenet56,
}


def build_model(name: str, num_classes: int = 2, **kwargs: Any) -> nn.Module:
    """Make the network `name` with He-uniform weights, in float32 on the CPU.

    Args:
        name: a key of MODELS.
        num_classes: channels of the logits; class 0 is background, 1 is person.
        kwargs: arguments of the factory; text such as "0.1" is read by the argument's type.

    Raises:
        UsageError: no such network, no such argument, or a value the network cannot take.
    """
    if name not in MODELS:
        raise UsageError(f"there is no model {name!r}; known are {', '.join(MODELS)}")
    factory = MODELS[name]
    parameters = dict(inspect.signature(factory).parameters)
    parameters.pop("num_classes")
    checked = {}
    for key, value in kwargs.items():
        if key not in parameters:
            raise UsageError(
                f"model {name} has no argument {key!r}; it takes {', '.join(parameters)}"
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
