"""What is written to a file: the network from bytes to probabilities, in a form that traces."""

from typing import Any

import torch
from torch import Tensor, nn

from segtrain.classes import PERSON
from segtrain.config import BnEval
from segtrain.errors import UsageError
from segtrain.export.hints import hints_hidden
from segtrain.models.unet import UNet

# No side is a multiple of what networks halve to, nor 1, nor equal to another: the tracer would
# take such a coincidence for a rule.
_EXAMPLE = (2, 75, 89, 3)


class Exportable(nn.Module):
    """A network that takes pictures as they are decoded and answers with probabilities.

    Args:
        model: as `segtrain.checkpoint.restore_model` makes it; changed in place.
        bn_eval: "batch" lets batch norm go by the statistics of each picture, also within a batch.

    Raises:
        UsageError: the network cannot be traced.
    """

    def __init__(self, model: nn.Module, bn_eval: BnEval) -> None:
        if isinstance(model, UNet) and model.padding == "valid":
            raise UsageError(
                "a U-Net with padding=valid sees pictures in tiles whose number is not fixed, "
                "which a traced network cannot; --format safetensors can hold it"
            )
        super().__init__()
        self.model = model
        if bn_eval == "batch":
            _norm_by_picture(model)

    def forward(self, image: Tensor) -> Tensor:
        """N H W 3 uint8 RGB → N H W float32 in 0..1, the probability of person."""
        logits = self.model(image.permute(0, 3, 1, 2))
        return logits.float().softmax(dim=1)[:, PERSON]  # type: ignore[no-any-return]


class PictureNorm(nn.Module):
    """Batch norm by the statistics of each picture alone, as the Tiramisu paper evaluates.

    A batch of one picture has its own statistics; so pictures in one batch are normalised here as
    if each came alone.
    """

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """N C H W → the same. The statistics are measured in float32."""
        normed = torch.instance_norm(
            *(x.float(), self.weight.float(), self.bias.float(), None, None),
            use_input_stats=True,
            momentum=0.0,
            eps=self.eps,
            cudnn_enabled=False,
        )
        return normed.to(x.dtype)


def _norm_by_picture(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, PictureNorm(child))
        else:
            _norm_by_picture(child)


def traced(network: Exportable) -> torch.export.ExportedProgram:
    """The network as a graph with free N, H and W."""
    free: Any = torch.export.Dim.DYNAMIC
    example = torch.zeros(_EXAMPLE, dtype=torch.uint8)
    with torch.no_grad(), hints_hidden():
        return torch.export.export(
            network.eval(), (example,), dynamic_shapes=({0: free, 1: free, 2: free},)
        )
