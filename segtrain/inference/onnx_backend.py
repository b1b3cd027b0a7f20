"""Run an exported network with onnxruntime, without torch.

`OnnxBackend` predicts the same probabilities as `TorchBackend`. `OnnxSession` loads the file, which
is untrusted input, and runs the network.
"""

from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from segtrain.errors import CheckpointError, UsageError
from segtrain.imaging.images import resize_short_side, scaled_size
from segtrain.inference.onnx_metadata import Metadata
from segtrain.inference.options import InferenceOptions
from segtrain.inference.probability import ProbsLike, UpsampledProbs
from segtrain.inference.tiles import auto_tile_size, tile_spans, tile_weights
from segtrain.runtime.cpu import available_cpus
from segtrain.runtime.optional_imports import require
from segtrain.types import Image, Probs

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_LOG_FATAL = 4
# The key under which a tensor stores the file, or the memory address, of its data.
_EXTERNAL_DATA_KEY = b"location"


class OnnxBackend:
    """A trained network in an .onnx file written by `segtrain export`.

    Raises:
        CheckpointError: the file is missing, damaged or of another kind.
        UsageError: onnxruntime is not installed or cannot use the device, or the requested
            precision is not that of the file.
    """

    def __init__(self, path: Path, options: InferenceOptions) -> None:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
        self._session = OnnxSession(content, path, options.device)
        metadata = self._session.metadata
        if options.precision not in {"auto", "fp32", metadata.precision}:
            raise UsageError(
                f"{path} computes in {metadata.precision}",
                f"export with --precision {options.precision}",
            )
        self._options = replace(options, size=options.size or metadata.short_side)
        self.batch_size = 1
        self.description = (
            f"{metadata.model['name']} ({metadata.precision}) on onnxruntime {self._session.device}"
        )

    def probs(self, images: Sequence[Image]) -> list[ProbsLike]:
        """Implement `segtrain.inference.backend.Backend.probs`.

        Raises:
            CheckpointError: the network fails or returns invalid probabilities.
        """
        return [self._predict(image) for image in images]

    def _predict(self, image: Image) -> ProbsLike:
        outputs = [self._forward_with_flip(view) for view in _tta_scales(image, self._options)]
        return UpsampledProbs(outputs, (image.shape[0], image.shape[1]))

    def _forward_with_flip(self, view: Image) -> Probs:
        if self._options.tta == "none":
            return self._forward_tiled(view)
        return (
            self._forward_tiled(view) + self._forward_tiled(view[:, ::-1])[:, ::-1]
        ) / np.float32(2)

    def _forward_tiled(self, view: Image) -> Probs:
        """Return probabilities h w of a scaled image h w 3, whole or in tiles."""
        height, width = view.shape[:2]
        tile = self._options.tile
        tile_size = auto_tile_size(height, width) if tile == "auto" else tile
        if tile_size is None:
            whole: Probs = self._session.probs(view[None])[0]
            return whole
        probs = np.zeros((height, width), dtype=np.float32)
        row_tiles = zip(tile_spans(height, tile_size), tile_weights(height, tile_size), strict=True)
        column_tiles = list(
            zip(tile_spans(width, tile_size), tile_weights(width, tile_size), strict=True)
        )
        for rows, row_weights in row_tiles:
            for columns, column_weights in column_tiles:
                tile_probs = self._session.probs(view[None, rows, columns])[0]
                probs[rows, columns] += tile_probs * (row_weights[:, None] * column_weights)
        return probs


def _tta_scales(image: Image, options: InferenceOptions) -> Iterator[Image]:
    """The image at each scale, all resized from the largest, as with torch.

    Unlike with torch, the smaller ones are rounded, because the exported network takes bytes.
    """
    largest = resize_short_side(image, options.loaded_short_side)
    *smaller, _ = options.short_sides
    for short_side in smaller:
        height, width = scaled_size(largest.shape[0], largest.shape[1], short_side)
        scaled = PIL.Image.fromarray(largest).resize((width, height), PIL.Image.Resampling.BILINEAR)
        yield np.asarray(scaled)
    yield largest


class OnnxSession:
    """An onnxruntime session of an exported network, which is validated before it runs.

    Args:
        content: of the file. The model is loaded from memory, so it cannot refer to other files.
        path: for error messages.
        device: auto, cpu, cuda or cuda:N; auto uses CUDA if this onnxruntime can.

    Attributes:
        device: name of the device in use, for log messages.
        metadata: as written by `segtrain export`.

    Raises:
        CheckpointError: the content is damaged, needs other files or custom operators, or was not
            written by `segtrain export`.
        UsageError: onnxruntime is not installed, or cannot use the device.
    """

    def __init__(self, content: bytes, path: Path, device: str = "cpu") -> None:
        ort: Any = require("onnxruntime", "onnx")
        self._path = path
        provider, options = _select_provider(ort, device)
        if _EXTERNAL_DATA_KEY in content:
            raise CheckpointError(
                f"{path} stores weights in other files", "export it to a single file"
            )
        try:
            if provider == _CUDA:
                self._session, self.device = _open_cuda_session(ort, content, device, options)
            else:
                self._session, self.device = _open_session(ort, content, _CPU, {}), "CPU"
        except UsageError:
            raise
        except Exception as error:  # onnxruntime's errors have no common base class
            raise CheckpointError(
                f"{path} is damaged or not a network for onnxruntime ({_reason(error)})",
                "export it again",
            ) from error
        try:
            strings = self._session.get_modelmeta().custom_metadata_map
            self.metadata = Metadata.from_strings(strings)
            self._check_signature()
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"cannot use {path}: {error}") from None

    def probs(self, images: Image) -> Probs:
        """Map N H W 3 uint8 to person probabilities N H W float32 in 0..1.

        Raises:
            CheckpointError: the network fails or returns invalid probabilities.
            MemoryError: out of memory.
        """
        try:
            [probs] = self._session.run(None, {"image": np.ascontiguousarray(images)})
        except Exception as error:
            if "allocate memory" in str(error) or "bad_alloc" in str(error):
                raise MemoryError("out of memory") from error
            raise CheckpointError(f"cannot run {self._path}: {_reason(error)}") from error
        # This form of the comparison also rejects NaN.
        if probs.shape != images.shape[:3] or not (probs.min() >= 0 and probs.max() <= 1.001):
            raise CheckpointError(f"{self._path} returns invalid probabilities", "export it again")
        return np.asarray(probs, dtype=np.float32)

    def _check_signature(self) -> None:
        inputs = [(i.name, i.type, i.shape) for i in self._session.get_inputs()]
        outputs = [(o.name, o.type, o.shape) for o in self._session.get_outputs()]
        dynamic = [isinstance(side, str) for _, _, shape in inputs + outputs for side in shape]
        expected = [("image", "tensor(uint8)", 4), ("probs", "tensor(float)", 3)]
        signature = [(name, kind, len(shape)) for name, kind, shape in inputs + outputs]
        if (
            signature != expected
            or inputs[0][2][3] != 3
            or dynamic != [True] * 3 + [False] + [True] * 3
        ):
            raise ValueError("its signature is not N H W 3 uint8 to N H W float32")


def _select_provider(ort: Any, device: str) -> tuple[str, dict[str, str]]:
    """Return onnxruntime's provider for a device, with its options."""
    has_cuda = _CUDA in ort.get_available_providers()
    kind, _, index = device.partition(":")
    if kind == "cpu" or (kind == "auto" and not has_cuda):
        return _CPU, {}
    if kind not in {"auto", "cuda"} or (index and not index.isdecimal()):
        raise UsageError(f"unknown --device {device!r}", "use auto, cpu, cuda or cuda:N")
    if not has_cuda:
        raise UsageError(
            f"this onnxruntime has no CUDA for --device {device}", "pip install onnxruntime-gpu"
        )
    if hasattr(ort, "preload_dlls"):
        # The system does not find the CUDA and cuDNN libraries that pip installs. preload_dlls
        # prints missing ones to stdout, where segtrain may write results. The session reports them
        # as well.
        with redirect_stdout(StringIO()):
            ort.preload_dlls()
    return _CUDA, {
        "device_id": index or "0",
        # The default benchmarks every algorithm for each new image size.
        "cudnn_conv_algo_search": "HEURISTIC",
        "use_tf32": "0",
    }


def _open_cuda_session(
    ort: Any, content: bytes, device: str, options: dict[str, str]
) -> tuple[Any, str]:
    """Return a session and the name of its device; with `auto`, fall back to the CPU.

    Without cuDNN, for example, onnxruntime silently uses the CPU. For other failures it raises.

    Raises:
        UsageError: CUDA cannot be used, and `device` requires it.
    """
    try:
        session, problem = _open_session(ort, content, _CUDA, options), "it cannot be loaded"
        if _CUDA in session.get_providers():
            return session, "CUDA"
    except Exception as error:
        # If the file is at fault, opening it on the CPU raises.
        session, problem = _open_session(ort, content, _CPU, {}), _reason(error)
    if device != "auto":
        raise UsageError(
            f"onnxruntime cannot use CUDA for --device {device} ({problem})",
            "install the CUDA and cuDNN that it was built for, or use --device cpu",
        )
    return session, f"CPU (cannot use CUDA: {problem})"


def _open_session(ort: Any, content: bytes, provider: str, options: dict[str, str]) -> Any:
    session_options = ort.SessionOptions()
    session_options.intra_op_num_threads = available_cpus()
    # Memory patterns are cached for each image size, and every image may have its own.
    session_options.enable_mem_pattern = False
    # Its lines on stderr repeat the exception.
    session_options.log_severity_level = _LOG_FATAL
    # The fallback would print a banner to stdout and continue on the CPU.
    return ort.InferenceSession(
        content, session_options, providers=[(provider, options)], enable_fallback=0
    )


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
