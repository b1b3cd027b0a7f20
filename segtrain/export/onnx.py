"""ONNX export and int8 quantization."""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from segtrain.errors import DataError
from segtrain.export.module import ExportModule, suppress_warnings, trace
from segtrain.export.verify import Predict
from segtrain.inference.onnx_backend import OnnxSession
from segtrain.inference.onnx_metadata import Metadata
from segtrain.runtime.optional_imports import require
from segtrain.types import Image

# The oldest opset that has all operators used here and needs no conversion.
_OPSET = 18
_DYNAMIC_AXES = ("batch", "height", "width")

# The operators with most of the time and the weights. The rest stays in float32: the softmax would
# come out in steps of 1/256, and in an FC-DenseNet, where every layer reads the outputs of all
# earlier layers, rounding also at concatenations makes the error of the probabilities four times
# as large.
_QUANTIZED_OPERATORS = ["Conv", "ConvTranspose"]


def onnx_bytes(model: nn.Module, metadata: Metadata) -> bytes:
    """The content of an .onnx file; see `segtrain.inference.onnx_metadata` for inputs and outputs.

    Args:
        model: in float32; modified in place.
        metadata: its precision is the precision of the weights and the computation. With fp16, only
            the batch-norm statistics and the softmax are in float32. int8 is quantized from fp32
            afterwards.

    Raises:
        UsageError: onnx, onnxscript or onnxruntime is not installed, or the model cannot be traced.
    """
    for library in ("onnx", "onnxscript", "onnxruntime"):
        require(library, "onnx")
    module = ExportModule(model, metadata.bn_eval)
    if metadata.precision == "fp16":
        module.half()
    with suppress_warnings():
        program = torch.onnx.export(
            trace(module),
            dynamo=True,
            input_names=["image"],
            output_names=["probs"],
            opset_version=_OPSET,
            verbose=False,
        )
    assert program is not None
    proto: Any = program.model_proto
    _remove_debug_info(proto)
    for value in (*proto.graph.input, *proto.graph.output):
        for dim, name in zip(value.type.tensor_type.shape.dim, _DYNAMIC_AXES, strict=False):
            dim.dim_param = name
    return _serialize(proto, metadata)


def int8_bytes(content: bytes, images: Iterable[Image], metadata: Metadata) -> bytes:
    """Quantize the content of a float32 .onnx file.

    Weights are int8 with one scale per channel. Activations are uint8 with one range per tensor,
    calibrated on the images. The format is QDQ: standard operators around each quantized one.

    Args:
        images: H W 3 uint8 RGB, at the size at which the model sees them.

    Raises:
        DataError: there are no images.
    """
    onnx: Any = require("onnx", "onnx")
    quantization: Any = require("onnxruntime.quantization", "onnx")
    remaining = iter(images)
    first = next(remaining, None)
    if first is None:
        raise DataError("no readable image to calibrate int8 on", "choose a dataset with --data")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        """Returns one image after the other, then None."""

        next_image: Image | None = first

        def get_next(self) -> dict[str, Image] | None:
            image, self.next_image = self.next_image, next(remaining, None)
            return None if image is None else {"image": image[None]}

    with tempfile.TemporaryDirectory() as folder, suppress_warnings():
        fp32_path, int8_path = Path(folder, "fp32.onnx"), Path(folder, "int8.onnx")
        fp32_path.write_bytes(content)
        quantization.quantize_static(
            fp32_path,
            int8_path,
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            op_types_to_quantize=_QUANTIZED_OPERATORS,
            per_channel=True,
        )
        proto = onnx.load(int8_path)
    return _serialize(proto, metadata)


def load_onnx(content: bytes, path: Path) -> Predict:
    """The model of an .onnx file, run by onnxruntime on the CPU."""
    return OnnxSession(content, path).probs


def _serialize(proto: Any, metadata: Metadata) -> bytes:
    """Add the metadata to an ONNX model and check the model."""
    onnx: Any = require("onnx", "onnx")
    onnx.helper.set_model_props(proto, metadata.to_strings())
    onnx.checker.check_model(proto)
    content: bytes = proto.SerializeToString()
    return content


def _remove_debug_info(proto: Any) -> None:
    """Remove the tracer's annotations: a large part of a small file, with paths of this machine."""
    graph = proto.graph
    # Intermediate shapes use the tracer's symbols; a runtime infers its own.
    del graph.value_info[:]
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""
