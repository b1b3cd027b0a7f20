"""A network in 8-bit whole numbers: onnxruntime's static quantisation, calibrated on pictures."""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from segtrain.errors import DataError
from segtrain.export.hints import hints_hidden
from segtrain.export.onnx_file import with_metadata
from segtrain.extras import needed
from segtrain.images import Pixels
from segtrain.prediction.metadata import Metadata

# Where the time and the weights are. The rest stays in float32: the softmax would come out in steps
# of 1/256, and in an FC-DenseNet, where every layer reads what all before it wrote, rounding also
# at concatenations makes the probabilities four times as wrong.
_OPERATORS = ["Conv", "ConvTranspose"]


def int8_bytes(content: bytes, pictures: Iterable[Pixels], metadata: Metadata) -> bytes:
    """The content of an .onnx file in float32, quantised.

    Weights are int8 with a scale a channel, activations uint8 with a range each, which is what they
    reached on the pictures. As QDQ: standard operators around each quantised one.

    Args:
        pictures: H W 3 uint8 RGB, scaled as the network sees them.

    Raises:
        DataError: there are no pictures.
    """
    onnx: Any = needed("onnx", "onnx")
    quantization: Any = needed("onnxruntime.quantization", "onnx")
    remaining = iter(pictures)
    first = next(remaining, None)
    if first is None:
        raise DataError("there is no picture to calibrate int8 on; give --data")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        """Hands out one picture after the other."""

        waiting: Pixels | None = first

        def get_next(self) -> dict[str, Pixels] | None:
            picture, self.waiting = self.waiting, next(remaining, None)
            return None if picture is None else {"image": picture[None]}

    with tempfile.TemporaryDirectory() as folder, hints_hidden():
        before, after = Path(folder, "fp32.onnx"), Path(folder, "int8.onnx")
        before.write_bytes(content)
        quantization.quantize_static(
            before,
            after,
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            op_types_to_quantize=_OPERATORS,
            per_channel=True,
        )
        proto = onnx.load(after)
    return with_metadata(proto, metadata)
