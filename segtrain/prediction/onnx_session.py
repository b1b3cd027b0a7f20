"""An exported .onnx file in onnxruntime. Imports no torch."""

from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from segtrain.cores import usable_cores
from segtrain.errors import CheckpointError, UsageError
from segtrain.extras import needed
from segtrain.images import Pixels
from segtrain.prediction.metadata import Metadata
from segtrain.prediction.probability import Values

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_ONLY_FATAL = 4
# The key under which a tensor names the file, or the place in memory, that its numbers lie in.
_ELSEWHERE = b"location"


class OnnxSession:
    """A network that a file holds, checked before it is run.

    Args:
        content: of the file. It is read from memory, so it can name no other file.
        path: named in errors only.
        device: auto, cpu, cuda or cuda:N; auto takes CUDA where this onnxruntime can use it.

    Attributes:
        device: on what it runs, for people.
        metadata: what `segtrain export` wrote of the network.

    Raises:
        CheckpointError: it is damaged, needs other files or operators of its own, or was not
            written by `segtrain export`.
        UsageError: onnxruntime is not installed, or cannot use such a device.
    """

    def __init__(self, content: bytes, path: Path, device: str = "cpu") -> None:
        ort: Any = needed("onnxruntime", "onnx")
        self._path = path
        provider, options = _provider(ort, device)
        if _ELSEWHERE in content:
            raise CheckpointError(f"{path} wants numbers from other files; export it in one file")
        try:
            if provider == _CUDA:
                self._session, self.device = _on_cuda(ort, content, device, options)
            else:
                self._session, self.device = _opened(ort, content, _CPU, {}), "CPU"
        except UsageError:
            raise
        except Exception as error:  # onnxruntime's own errors have no common class
            raise CheckpointError(
                f"{path} is damaged or no network for onnxruntime; export it again "
                f"({_reason(error)})"
            ) from error
        try:
            texts = self._session.get_modelmeta().custom_metadata_map
            self.metadata = Metadata.from_texts(texts)
            self._check_signature()
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} cannot be used: {error}") from None

    def probs(self, images: Pixels) -> Values:
        """N H W 3 uint8 RGB → N H W float32 in 0..1, the probability of person.

        Raises:
            CheckpointError: the network fails or answers nonsense.
            MemoryError: it does not fit into memory.
        """
        try:
            [probs] = self._session.run(None, {"image": np.ascontiguousarray(images)})
        except Exception as error:
            if "allocate memory" in str(error) or "bad_alloc" in str(error):
                raise MemoryError("out of memory") from error
            raise CheckpointError(f"{self._path} cannot be run: {_reason(error)}") from error
        # Written so that NaN is nonsense, too.
        if probs.shape != images.shape[:3] or not (probs.min() >= 0 and probs.max() <= 1.001):
            raise CheckpointError(f"{self._path} answers with nonsense; export it again")
        return np.asarray(probs, dtype=np.float32)

    def _check_signature(self) -> None:
        inputs = [(i.name, i.type, i.shape) for i in self._session.get_inputs()]
        outputs = [(o.name, o.type, o.shape) for o in self._session.get_outputs()]
        free = [isinstance(side, str) for _, _, shape in inputs + outputs for side in shape]
        wanted = [("image", "tensor(uint8)", 4), ("probs", "tensor(float)", 3)]
        found = [(name, kind, len(shape)) for name, kind, shape in inputs + outputs]
        if found != wanted or inputs[0][2][3] != 3 or free != [True] * 3 + [False] + [True] * 3:
            raise ValueError("it does not take N H W 3 uint8 and give N H W float32")


def _provider(ort: Any, device: str) -> tuple[str, dict[str, str]]:
    """onnxruntime's name for a device, and its options."""
    there = _CUDA in ort.get_available_providers()
    kind, _, number = device.partition(":")
    if kind == "cpu" or (kind == "auto" and not there):
        return _CPU, {}
    if kind not in {"auto", "cuda"} or (number and not number.isdecimal()):
        raise UsageError(f"--device {device!r} is unknown; use auto, cpu, cuda or cuda:N")
    if not there:
        raise UsageError(
            f"this onnxruntime has no CUDA for --device {device}: pip install onnxruntime-gpu"
        )
    if hasattr(ort, "preload_dlls"):
        # pip's own CUDA and cuDNN lie where the system does not look for libraries. Which are
        # missing it prints, where results may be written to; the session says it, too.
        with redirect_stdout(StringIO()):
            ort.preload_dlls()
    return _CUDA, {
        "device_id": number or "0",
        # The default tries every algorithm, again for each size of picture.
        "cudnn_conv_algo_search": "HEURISTIC",
        "use_tf32": "0",
    }


def _on_cuda(ort: Any, content: bytes, device: str, options: dict[str, str]) -> tuple[Any, str]:
    """A session and on what it runs: by `auto` the CPU, where CUDA is there but cannot be used.

    Without cuDNN, say, onnxruntime takes the CPU and says nothing; other failures it raises.

    Raises:
        UsageError: it cannot be used, and `device` insists on it.
    """
    try:
        session, problem = _opened(ort, content, _CUDA, options), "it cannot be loaded"
        if _CUDA in session.get_providers():
            return session, "CUDA"
    except Exception as error:
        # Whether the file is at fault shows on the CPU.
        session, problem = _opened(ort, content, _CPU, {}), _reason(error)
    if device != "auto":
        raise UsageError(
            f"onnxruntime cannot use CUDA for --device {device} ({problem}); install the CUDA and "
            "cuDNN that it was built for, or use --device cpu"
        )
    return session, f"CPU, for it cannot use CUDA ({problem})"


def _opened(ort: Any, content: bytes, provider: str, options: dict[str, str]) -> Any:
    # With its fallback it would print a banner to stdout and go on with the CPU.
    return ort.InferenceSession(
        content, _options(ort), providers=[(provider, options)], enable_fallback=0
    )


def _options(ort: Any) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = usable_cores()
    # Plans of memory are kept a size of picture, and every picture may have its own.
    options.enable_mem_pattern = False
    # Its lines on stderr say again what the exception says.
    options.log_severity_level = _ONLY_FATAL
    return options


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
