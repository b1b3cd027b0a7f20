"""The network as a program of torch.export, which runs without segtrain."""

import io
import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

from segtrain.export.checking import Ask
from segtrain.export.hints import hints_hidden
from segtrain.export.network import Exportable, traced
from segtrain.images import Pixels
from segtrain.prediction.metadata import Metadata
from segtrain.prediction.probability import Values

METADATA_FILE = "segtrain.json"

# What the tracer notes at every node of where it came from: folders of this machine.
_NOTES = ("stack_trace", "source_fn_stack", "nn_module_stack", "from_node")


def program_bytes(model: nn.Module, metadata: Metadata) -> bytes:
    """The content of a .pt2 file, with the metadata as JSON inside.

    Raises:
        UsageError: the network cannot be traced.
    """
    program = traced(Exportable(model, metadata.bn_eval))
    for node in program.graph.nodes:
        for note in _NOTES:
            node.meta.pop(note, None)
    packed = io.BytesIO()
    extra = {METADATA_FILE: json.dumps(metadata.as_tree(), indent=2)}
    with hints_hidden():
        torch.export.save(program, packed, extra_files=extra)
    return packed.getvalue()


def opened(content: bytes, path: Path) -> Ask:
    """The file's network, run by torch on the CPU; only for files that were made here."""
    with hints_hidden():
        program = torch.export.load(io.BytesIO(content))
    # Guards hold down what was seen while tracing, e.g. that the sides needed padding; the graph
    # does not hang on it, as the comparison shows.
    network = program.module(check_guards=False)

    def ask(images: Pixels) -> Values:
        with torch.inference_mode():
            probs = network(torch.from_numpy(images))
        return np.asarray(probs.numpy(), dtype=np.float32)

    return ask
