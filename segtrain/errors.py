"""What a user can cause. Each error is one line for stderr and one exit code for the shell script.

The message says what went wrong, names the file and says what to do about it.
"""

from typing import ClassVar

# torch, cv2 and CUDA each have words of their own for it, and not always a class. The last four are
# cuDNN's and cuBLAS's when the GPU has no room for their workspace or for themselves.
_NO_MEMORY = (
    "can't allocate memory",
    "out of memory",
    "insufficient memory",
    "unable to find an engine to execute this computation",
    "cudnn_status_alloc_failed",
    "cudnn_status_not_initialized",
    "cublas_status_alloc_failed",
)


def says_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, of a device or of the machine."""
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in _NO_MEMORY)


class UserError(Exception):
    """Base of every error that ends in one `error:` line and no traceback."""

    exit_code: ClassVar[int]


class UsageError(UserError):
    """The command line or the configuration asks for something that does not exist."""

    exit_code = 2


class DataError(UserError):
    """A data set, an annotation or a picture cannot be used."""

    exit_code = 3


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, unsafe or of another network."""

    exit_code = 4


class ResourceError(UserError):
    """The disk, the memory or a worker process gave out."""

    exit_code = 5


class DivergedError(UserError):
    """The loss is no longer a finite number."""

    exit_code = 6


class BusyError(UserError):
    """Another process is using the run folder."""

    exit_code = 7
