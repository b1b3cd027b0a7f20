"""The network as an ONNX file."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from segtrain.export.checking import Ask
from segtrain.export.network import Exportable, traced
from segtrain.extras import needed
from segtrain.prediction.metadata import Metadata
from segtrain.prediction.onnx_session import OnnxSession

# The first that has all operators used here and needs no conversion.
_OPSET = 18
_FREE = ("batch", "height", "width")


def onnx_bytes(network: Exportable, metadata: Metadata) -> bytes:
    """The file's content; inputs and outputs are as `segtrain.prediction.metadata` says.

    Raises:
        UsageError: onnx or onnxscript is not installed.
    """
    for module in ("onnx", "onnxscript"):
        needed(module, "onnx")
    with _quiet():
        program = torch.onnx.export(
            traced(network),
            dynamo=True,
            input_names=["image"],
            output_names=["probs"],
            opset_version=_OPSET,
            verbose=False,
        )
    assert program is not None
    model: Any = program.model_proto
    _forget_how_it_was_made(model)
    for value in (*model.graph.input, *model.graph.output):
        for side, name in zip(value.type.tensor_type.shape.dim, _FREE, strict=False):
            side.dim_param = name
    return with_metadata(model, metadata)


def with_metadata(model: Any, metadata: Metadata) -> bytes:
    """A model proto as bytes, labelled."""
    onnx: Any = needed("onnx", "onnx")
    onnx.helper.set_model_props(model, metadata.as_texts())
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content


def opened(content: bytes, path: Path) -> Ask:
    """The file's network, run by onnxruntime on the CPU."""
    return OnnxSession(content, path).probs


def _forget_how_it_was_made(model: Any) -> None:
    """Drop the tracer's notes: they make up much of a small file and name folders here."""
    graph = model.graph
    # Shapes in between are named by the tracer's symbols; whoever runs it finds its own.
    del graph.value_info[:]
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""


@contextmanager
def _quiet() -> Iterator[None]:
    """Within, the exporter's own hints, which say nothing about the file, are not shown."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
