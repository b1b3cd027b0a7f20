"""The network as an ONNX file."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from segtrain.export.checking import Ask
from segtrain.export.hints import hints_hidden
from segtrain.export.network import Exportable, traced
from segtrain.extras import needed
from segtrain.prediction.metadata import Metadata
from segtrain.prediction.onnx_session import OnnxSession

# The first that has all operators used here and needs no conversion.
_OPSET = 18
_FREE = ("batch", "height", "width")


def onnx_bytes(model: nn.Module, metadata: Metadata) -> bytes:
    """The file's content; inputs and outputs are as `segtrain.prediction.metadata` says.

    Args:
        model: in float32, changed in place.
        metadata: its precision is that of the weights and of the computation; with fp16 only batch
            norm's statistics and the softmax are in float32. int8 is made from fp32 afterwards.

    Raises:
        UsageError: onnx, onnxscript or onnxruntime is not installed, or the network cannot be
            traced.
    """
    for module in ("onnx", "onnxscript", "onnxruntime"):
        needed(module, "onnx")
    network = Exportable(model, metadata.bn_eval)
    if metadata.precision == "fp16":
        network.half()
    with hints_hidden():
        program = torch.onnx.export(
            traced(network),
            dynamo=True,
            input_names=["image"],
            output_names=["probs"],
            opset_version=_OPSET,
            verbose=False,
        )
    assert program is not None
    proto: Any = program.model_proto
    _forget_how_it_was_made(proto)
    for value in (*proto.graph.input, *proto.graph.output):
        for side, name in zip(value.type.tensor_type.shape.dim, _FREE, strict=False):
            side.dim_param = name
    return with_metadata(proto, metadata)


def with_metadata(proto: Any, metadata: Metadata) -> bytes:
    """An ONNX model, checked and labelled, as bytes."""
    onnx: Any = needed("onnx", "onnx")
    onnx.helper.set_model_props(proto, metadata.as_texts())
    onnx.checker.check_model(proto)
    content: bytes = proto.SerializeToString()
    return content


def opened(content: bytes, path: Path) -> Ask:
    """The file's network, run by onnxruntime on the CPU."""
    return OnnxSession(content, path).probs


def _forget_how_it_was_made(proto: Any) -> None:
    """Drop the tracer's notes: they make up much of a small file and name folders here."""
    graph = proto.graph
    # Shapes in between are named by the tracer's symbols; whoever runs it finds its own.
    del graph.value_info[:]
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""
