"""Errors that a user can cause: one line on stderr and an exit code for scripts."""

from typing import ClassVar

# torch, cv2 and CUDA use different wordings and do not always have a class for it. The last four
# come from cuDNN and cuBLAS when the GPU has no room for their workspace or their handles.
_OUT_OF_MEMORY_TEXTS = (
    "can't allocate memory",
    "out of memory",
    "insufficient memory",
    "unable to find an engine to execute this computation",
    "cudnn_status_alloc_failed",
    "cudnn_status_not_initialized",
    "cublas_status_alloc_failed",
)


def is_memory_error(error: BaseException) -> bool:
    """Whether an error means that the device or the machine is out of memory."""
    message = str(error).lower()
    return isinstance(error, MemoryError) or any(text in message for text in _OUT_OF_MEMORY_TEXTS)


class UserError(Exception):
    """Base class of errors that are reported in one `error:` line without a traceback.

    Args:
        message: what went wrong, and with which file.
        hint: what to do about it.
    """

    exit_code: ClassVar[int]

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(f"{message}; {hint}" if hint else message)


class UsageError(UserError):
    """The command line or the configuration is wrong."""

    exit_code = 2


class DataError(UserError):
    """A data set, an annotation or an image cannot be used."""

    exit_code = 3


class CheckpointError(UserError):
    """A checkpoint is missing, damaged or unsafe, or belongs to another network."""

    exit_code = 4


class ResourceError(UserError):
    """The disk, the memory or a worker process failed."""

    exit_code = 5


class DivergedError(UserError):
    """The loss is no longer finite."""

    exit_code = 6


class BusyError(UserError):
    """Another process is using the run folder."""

    exit_code = 7
