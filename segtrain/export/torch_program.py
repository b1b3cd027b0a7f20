"""torch.export programs, which run without segtrain."""

import io
import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

from segtrain.export.module import ExportModule, suppress_warnings, trace
from segtrain.export.verify import Predict
from segtrain.inference.onnx_metadata import Metadata
from segtrain.types import Image, Probs

METADATA_FILE = "segtrain.json"

# Debug info that the tracer stores at every node; it has paths of this machine.
_DEBUG_KEYS = ("stack_trace", "source_fn_stack", "nn_module_stack", "from_node")


def program_bytes(model: nn.Module, metadata: Metadata) -> bytes:
    """The content of a .pt2 file, with the metadata as JSON inside.

    Raises:
        UsageError: the model cannot be traced.
    """
    program = trace(ExportModule(model, metadata.bn_eval))
    for node in program.graph.nodes:
        for key in _DEBUG_KEYS:
            node.meta.pop(key, None)
    file = io.BytesIO()
    extra_files = {METADATA_FILE: json.dumps(metadata.to_dict(), indent=2)}
    with suppress_warnings():
        torch.export.save(program, file, extra_files=extra_files)
    return file.getvalue()


def load_program(content: bytes, path: Path) -> Predict:
    """The program, run by torch on the CPU. Only for files that this process exported."""
    with suppress_warnings():
        program = torch.export.load(io.BytesIO(content))
    # Guards fix properties of the example input, e.g. that its sides needed padding. The graph
    # does not depend on them, as the comparison with torch shows.
    module = program.module(check_guards=False)

    def predict(images: Image) -> Probs:
        with torch.inference_mode():
            probs = module(torch.from_numpy(images))
        return np.asarray(probs.numpy(), dtype=np.float32)

    return predict
