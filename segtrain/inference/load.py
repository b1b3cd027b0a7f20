"""Load a trained network with the backend that fits its file suffix."""

from __future__ import annotations

from pathlib import Path

from segtrain.inference.backend import Backend
from segtrain.inference.options import InferenceOptions


def load_backend(path: Path, options: InferenceOptions) -> Backend:
    """Load a checkpoint or, without importing torch, an .onnx file written by `segtrain export`.

    Raises:
        CheckpointError: the file is missing, damaged or of another kind.
        UsageError: the device is not available, or onnxruntime is not installed.
    """
    if path.suffix == ".onnx":
        from segtrain.inference.onnx_backend import OnnxBackend

        return OnnxBackend(path, options)
    from segtrain.inference.torch_backend import TorchBackend

    return TorchBackend(path, options)
