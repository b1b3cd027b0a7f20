"""The exported module: a model from uint8 images to probabilities, in a form that can be traced."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from segtrain.config.schema import BnEval
from segtrain.errors import UsageError
from segtrain.models.valid_unet import ValidUNet
from segtrain.types import PERSON

# No side is a multiple of the strides of a network, 1, or equal to another side: the tracer would
# specialize on such a coincidence.
_EXAMPLE_SHAPE = (2, 75, 89, 3)


class ExportModule(nn.Module):
    """A model that takes decoded images and returns probabilities.

    Args:
        model: as returned by `segtrain.checkpoint.restore_model`; modified in place.
        bn_eval: with "batch", batch norm uses the statistics of each image, also within a batch.

    Raises:
        UsageError: the model cannot be traced.
    """

    def __init__(self, model: nn.Module, bn_eval: BnEval) -> None:
        if isinstance(model, ValidUNet):
            raise UsageError(
                "cannot trace a U-Net with padding=valid, because its number of tiles depends on "
                "the image size",
                "use --format safetensors",
            )
        super().__init__()
        self.model = model
        if bn_eval == "batch":
            _replace_batch_norm(model)

    def forward(self, image: Tensor) -> Tensor:
        """N H W 3 uint8 RGB → N H W float32 in 0..1, the probability of person."""
        logits = self.model(image.permute(0, 3, 1, 2))
        return logits.float().softmax(dim=1)[:, PERSON]  # type: ignore[no-any-return]


class PerImageNorm(nn.Module):
    """Batch norm with the statistics of each single image, as the Tiramisu paper evaluates.

    Batch norm on a batch of one image uses that image's statistics. This module normalizes every
    image of a batch as if it were alone.
    """

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """N C H W → the same. The statistics are computed in float32."""
        normed = torch.instance_norm(
            *(x.float(), self.weight.float(), self.bias.float(), None, None),
            use_input_stats=True,
            momentum=0.0,
            eps=self.eps,
            cudnn_enabled=False,
        )
        return normed.to(x.dtype)


def _replace_batch_norm(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, PerImageNorm(child))
        else:
            _replace_batch_norm(child)


def trace(module: ExportModule) -> torch.export.ExportedProgram:
    """The module as a graph with dynamic N, H and W."""
    dynamic: Any = torch.export.Dim.DYNAMIC
    example = torch.zeros(_EXAMPLE_SHAPE, dtype=torch.uint8)
    with torch.no_grad(), suppress_warnings():
        return torch.export.export(
            module.eval(), (example,), dynamic_shapes=({0: dynamic, 1: dynamic, 2: dynamic},)
        )


@contextmanager
def suppress_warnings() -> Iterator[None]:
    """Within, hide warnings, and all log records below ERROR."""
    level, handlers = logging.root.manager.disable, logging.root.handlers[:]
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        # onnxruntime logs with `logging.info`, which adds a handler to a root logger without any.
        logging.root.handlers[:] = handlers
