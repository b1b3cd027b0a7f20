"""Devices and number formats: what was asked for, what there is, and what is taken."""

import ctypes
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from segtrain.config import Precision
from segtrain.errors import UsageError

Autocast = Callable[[], AbstractContextManager[object]]
ResolvedPrecision = Literal["fp32", "tf32", "bf16", "fp16"]

# The numbers of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4

_AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str, local_rank: int | None = None) -> torch.device:
    """auto: the first CUDA device, else the CPU.

    A CUDA device comes back with its index: torch.cuda.set_device refuses one without.

    Args:
        local_rank: of several processes on this machine each takes the CUDA device of its number.

    Raises:
        UsageError: a device is named that is not there. It is never replaced silently.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and local_rank is not None:
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name!r} is unknown; use auto, cpu, cuda or cuda:N") from None
    if device.type not in {"cpu", "cuda"}:
        raise UsageError(f"--device {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    num_cuda = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= num_cuda:
        raise UsageError(
            f"--device {name} is not there ({num_cuda} CUDA devices); "
            "use --device auto or check the driver with nvidia-smi"
        )
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def resolve_precision(precision: Precision, device: torch.device) -> ResolvedPrecision:
    """auto: bf16 where the device computes it natively, else fp32.

    Raises:
        UsageError: tf32 is asked for on a device that has none.
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
    """Makes the context of a forward pass in this precision.

    On CUDA that holds for float32, too: outside of tf32 nothing is rounded to TF32, and afterwards
    torch's switches are as the caller left them.
    """
    dtype = _AUTOCAST_DTYPES.get(precision)
    autocast = partial(torch.autocast, device.type, dtype=dtype, enabled=dtype is not None)
    return partial(_forward_on_cuda, precision, autocast) if device.type == "cuda" else autocast


@contextmanager
def _forward_on_cuda(precision: ResolvedPrecision, autocast: Autocast) -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    set_float32_arithmetic(precision)
    try:
        with autocast():
            yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def set_float32_arithmetic(precision: ResolvedPrecision) -> None:
    """Let CUDA multiply float32 with TF32's ten bits of mantissa in tf32 only.

    torch's own default rounds convolutions so, whatever the precision is called. A backward pass
    goes by what is set when it runs, so training sets it for good.
    """
    # torch's newer switches, an operation each, make its exporter's look at these raise.
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"


def keep_freed_memory() -> None:
    """Let the C library keep what tensors give back, for the next step's tensors.

    glibc hands large pieces back to the system, which has to clear the pages of the next ones: a
    tenth and more of an FC-DenseNet's step on a CPU (`benchmarks/train.py allocator`). Other C
    libraries have no such switch and are left as they are.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def move_model(model: nn.Module, device: torch.device) -> None:
    """Move a network in place, its weights laid out channels_last like the batches it gets.

    Convolutions are up to two and a half times faster so, on the CPU as on GPUs.
    """
    model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def prefetched(
    batches: Iterable[Mapping[str, Any]], device: torch.device
) -> Iterator[Mapping[str, Any]]:
    """Batches with their tensors on `device`, each copied while the one before it is worked on.

    On CUDA the copies run on a stream of their own; from pinned memory they hold up nobody.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    ready: tuple[Mapping[str, Any], torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(stream):
            copied = {
                key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
                for key, value in batch.items()
            }
            event = stream.record_event()
        if ready is not None:
            yield _handed_over(*ready, device)
        ready = copied, event
    if ready is not None:
        yield _handed_over(*ready, device)


def _handed_over(
    batch: Mapping[str, Any], copied: torch.cuda.Event, device: torch.device
) -> Mapping[str, Any]:
    """Let the current stream wait for the copy, and the allocator for the current stream."""
    current = torch.cuda.current_stream(device)
    current.wait_event(copied)
    for value in batch.values():
        if isinstance(value, Tensor):
            value.record_stream(current)
    return batch


def describe_device(device: torch.device) -> str:
    """The device's own name, for people."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    found = "" if torch.cuda.is_available() else ", no CUDA device found"
    return f"cpu ({torch.get_num_threads()} threads{found})"
