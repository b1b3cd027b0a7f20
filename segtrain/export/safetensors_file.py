"""The weights as safetensors, with the metadata that rebuilds the model in the header."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from segtrain.errors import CheckpointError, UsageError
from segtrain.export.verify import Predict, torch_predict
from segtrain.inference.onnx_metadata import Metadata
from segtrain.models import build_model
from segtrain.runtime.optional_imports import require
from segtrain.types import CLASSES

# The limit of the file format.
_MAX_HEADER_BYTES = 100_000_000


def safetensors_bytes(model: nn.Module, metadata: Metadata) -> bytes:
    """The content of a .safetensors file: the state dict under its own keys.

    Raises:
        UsageError: safetensors is not installed.
    """
    safetensors_torch: Any = require("safetensors.torch", "safetensors")
    weights = {key: weight.contiguous() for key, weight in model.state_dict().items()}
    content: bytes = safetensors_torch.save(weights, metadata=metadata.to_strings())
    return content


def load_safetensors(content: bytes, path: Path) -> Predict:
    """The model rebuilt from the file alone, run by torch on the CPU."""
    model, metadata = model_from_bytes(content, path)
    return torch_predict(model, metadata.bn_eval)


def model_from_bytes(content: bytes, path: Path) -> tuple[nn.Module, Metadata]:
    """The model, in eval mode on the CPU, and the metadata of the file.

    Args:
        path: used in error messages only.

    Raises:
        CheckpointError: the file is damaged or not written by segtrain, or the weights do not fit.
        UsageError: safetensors is not installed.
    """
    safetensors_torch: Any = require("safetensors.torch", "safetensors")
    safetensor_error: Any = require("safetensors", "safetensors").SafetensorError
    try:
        weights = safetensors_torch.load(content)
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + min(length, _MAX_HEADER_BYTES)])
        metadata = Metadata.from_strings(header.get("__metadata__", {}))
        kwargs = dict(metadata.model)
        # On the meta device, a hostile width allocates nothing: shapes are compared first.
        with torch.device("meta"):
            model = build_model(kwargs.pop("name"), len(CLASSES), **kwargs)
        model.load_state_dict(weights, strict=True, assign=True)
    except (safetensor_error, UsageError, ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(" ".join(str(error).splitlines()[:2]).split())
        raise CheckpointError(f"{path} cannot be used: {reason}") from None
    return model.eval(), metadata
