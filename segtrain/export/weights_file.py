"""The plain weights as safetensors, with what rebuilds the network in the header."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from segtrain.classes import CLASSES
from segtrain.errors import CheckpointError, UsageError
from segtrain.export.checking import Ask, ask_torch
from segtrain.extras import needed
from segtrain.models import build_model
from segtrain.prediction.metadata import Metadata

# The format's own limit for its header.
_LONGEST_HEADER = 100_000_000


def weights_bytes(model: nn.Module, metadata: Metadata) -> bytes:
    """The content of a .safetensors file: the state dict by its own names.

    Raises:
        UsageError: safetensors is not installed.
    """
    writer: Any = needed("safetensors.torch", "safetensors")
    weights = {key: weight.contiguous() for key, weight in model.state_dict().items()}
    content: bytes = writer.save(weights, metadata=metadata.as_texts())
    return content


def opened(content: bytes, path: Path) -> Ask:
    """The network rebuilt from the file alone."""
    model, metadata = model_from_bytes(content, path)
    return ask_torch(model, metadata.bn_eval)


def model_from_bytes(content: bytes, path: Path) -> tuple[nn.Module, Metadata]:
    """The network, in evaluation mode on the CPU, and what the file says of it.

    Args:
        path: named in errors only.

    Raises:
        CheckpointError: the file is damaged, not of segtrain, or the weights do not fit.
        UsageError: safetensors is not installed.
    """
    reader: Any = needed("safetensors.torch", "safetensors")
    damaged: Any = needed("safetensors", "safetensors").SafetensorError
    try:
        weights = reader.load(content)
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + min(length, _LONGEST_HEADER)])
        metadata = Metadata.from_texts(header.get("__metadata__", {}))
        arguments = dict(metadata.model)
        # On the meta device a hostile width costs no memory: shapes are compared first.
        with torch.device("meta"):
            model = build_model(arguments.pop("name"), len(CLASSES), **arguments)
        model.load_state_dict(weights, strict=True, assign=True)
    except (damaged, UsageError, ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(" ".join(str(error).splitlines()[:2]).split())
        raise CheckpointError(f"{path} cannot be used: {reason}") from None
    return model.eval(), metadata
