"""Devices and number formats, and the way of batches to the device."""

import ctypes
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from segtrain.config.schema import Precision
from segtrain.errors import UsageError

Autocast = Callable[[], AbstractContextManager[object]]
ResolvedPrecision = Literal["fp32", "tf32", "bf16", "fp16"]

# Constants from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4

_AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str, local_rank: int | None = None) -> torch.device:
    """Resolve a device name; auto is the first CUDA device, else the CPU.

    A CUDA device is returned with its index, which torch.cuda.set_device requires.

    Args:
        local_rank: with several processes on this machine, each uses the CUDA device of its rank.

    Raises:
        UsageError: the device does not exist. It is never replaced silently.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and local_rank is not None:
        name = f"cuda:{local_rank}"
    hint = "use auto, cpu, cuda or cuda:N"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"unknown --device {name!r}", hint) from None
    if device.type not in {"cpu", "cuda"}:
        raise UsageError(f"--device {name!r} is not supported", hint)
    num_cuda = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= num_cuda:
        raise UsageError(
            f"--device {name} does not exist ({num_cuda} CUDA devices found)",
            "use --device auto or check the driver with nvidia-smi",
        )
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def resolve_precision(precision: Precision, device: torch.device) -> ResolvedPrecision:
    """Resolve auto to bf16 if the device computes it natively, else to fp32.

    Raises:
        UsageError: the device does not support tf32.
    """
    if precision == "tf32" and (
        device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)
    ):
        raise UsageError(f"--precision tf32 needs an NVIDIA GPU of 2020 or newer, not {device}")
    if precision != "auto":
        return precision
    if device.type == "cuda":
        with torch.cuda.device(device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = _cpu_has_bf16()
    return "bf16" if native else "fp32"


def _cpu_has_bf16() -> bool:
    """Whether the CPU has instructions for bf16."""
    if not hasattr(torch.cpu, "get_capabilities"):  # torch 2.10
        return torch.cpu._is_avx512_bf16_supported()
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def autocast_for(precision: ResolvedPrecision, device: torch.device) -> Autocast:
    """Return a function that makes the context of a forward pass in this precision.

    On CUDA the context also controls float32: except with tf32, nothing is rounded to TF32. It
    restores torch's switches on exit.
    """
    dtype = _AUTOCAST_DTYPES.get(precision)
    autocast = partial(torch.autocast, device.type, dtype=dtype, enabled=dtype is not None)
    return partial(_cuda_forward, precision, autocast) if device.type == "cuda" else autocast


@contextmanager
def _cuda_forward(precision: ResolvedPrecision, autocast: Autocast) -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    set_float32_precision(precision)
    try:
        with autocast():
            yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def set_float32_precision(precision: ResolvedPrecision) -> None:
    """Allow TF32, with its 10-bit mantissa, in float32 CUDA operations only if precision is tf32.

    torch rounds convolutions to TF32 by default, whatever the precision is called. A backward pass
    uses the switches as they are when it runs, so training sets them permanently.
    """
    # torch's newer per-operation switches make its exporter raise when it reads these two.
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"


def keep_freed_memory() -> None:
    """Make malloc keep freed memory for the tensors of the next step.

    glibc returns large blocks to the kernel, which must zero the pages of the next ones: 10 % or
    more of the time of an FC-DenseNet step on a CPU (`benchmarks/train.py allocator`). Other C
    libraries have no such switch and are left unchanged.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def move_model(model: nn.Module, device: torch.device) -> None:
    """Move a model in place, its weights in channels_last like its batches.

    This makes convolutions up to 2.5 times faster, on the CPU and on GPUs.
    """
    model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def prefetch(
    batches: Iterable[Mapping[str, Any]], device: torch.device
) -> Iterator[Mapping[str, Any]]:
    """Yield batches with their tensors on `device`; copy each while the previous one is in use.

    On CUDA the copies run on their own stream; from pinned memory they do not block the host.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    ready: tuple[Mapping[str, Any], torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(stream):
            on_device = {
                key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
                for key, value in batch.items()
            }
            copied = stream.record_event()
        if ready is not None:
            yield _wait_for_copy(*ready, device)
        ready = on_device, copied
    if ready is not None:
        yield _wait_for_copy(*ready, device)


def _wait_for_copy(
    batch: Mapping[str, Any], copied: torch.cuda.Event, device: torch.device
) -> Mapping[str, Any]:
    """Make the current stream wait for the copy, and the allocator for the current stream."""
    current = torch.cuda.current_stream(device)
    current.wait_event(copied)
    for value in batch.values():
        if isinstance(value, Tensor):
            value.record_stream(current)
    return batch


def describe_device(device: torch.device) -> str:
    """Name a device for the log, e.g. "cuda:0 (NVIDIA H100 80GB HBM3)"."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    no_cuda = "" if torch.cuda.is_available() else ", no CUDA device found"
    return f"cpu ({torch.get_num_threads()} threads{no_cuda})"
