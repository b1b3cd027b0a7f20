"""The processes of one job, as torchrun starts them, and their communication.

Without torchrun the world size is 1, and every operation here returns its input.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from segtrain.errors import ResourceError, UsageError

_T = TypeVar("_T")

# For a rank that hangs. A rank that died is detected by its closed connection.
_TIMEOUT = timedelta(minutes=10)
# Leaving a failed job is limited: the GPU may wait for a process that died (pytorch#119250).
_SECONDS_TO_LEAVE, _SECONDS_TO_EXIT = 5.0, 15.0


@dataclass(frozen=True)
class DistributedContext:
    """The rank of this process, its rank on its own machine, and the number of processes."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes files and log lines."""
        return self.rank == 0

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sum `values` over all processes, in place, on their own device."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any_rank(self, flag: bool) -> bool:
        """Whether `flag` is true in any process. All must call it. Does not use the GPU."""
        if self.size == 1:
            return flag
        reduced = torch.tensor(int(flag))
        dist.all_reduce(reduced, dist.ReduceOp.MAX, group=_cpu_group())
        return bool(reduced)

    def all_reduce_min(self, number: int) -> int:
        """The minimum of `number` over all processes."""
        if self.size == 1:
            return number
        reduced = torch.tensor(number)
        dist.all_reduce(reduced, dist.ReduceOp.MIN, group=_cpu_group())
        return int(reduced)

    def broadcast(self, value: _T) -> _T:
        """Return the `value` of the main process, a plain object, in every process."""
        if self.size == 1:
            return value
        objects: list[Any] = [value]
        dist.broadcast_object_list(objects, src=0, group=_cpu_group())
        received: _T = objects[0]
        return received

    def read_on_main(self, read: Callable[[], _T]) -> _T:
        """Call `read` in the main process only and return its result, a plain object, everywhere.

        The other processes may not share its disk.

        Raises:
            UserError: from `read`, in the main process; the others raise ResourceError.
        """
        value: Any = None
        with self.main_process_first():
            if self.is_main:
                value = read()
        received: _T = self.broadcast(value)
        return received

    def all_gather(self, value: _T) -> list[_T]:
        """The `value` of each process, plain objects ordered by rank."""
        if self.size == 1:
            return [value]
        objects: list[Any] = [None] * self.size
        dist.all_gather_object(objects, value, group=_cpu_group())
        return objects

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Run the block in the main process, then in the others, which fail if it failed."""
        failed = False
        if not self.is_main:
            failed = self.broadcast(False)
        if failed:
            raise ResourceError("the main process of the job failed", "see its own error message")
        try:
            yield
        except BaseException:
            if self.is_main:
                self.broadcast(True)
            raise
        if self.is_main:
            self.broadcast(False)


_gloo_group: "dist.ProcessGroup | None" = None


@contextmanager
def distributed_context(*, on_cuda: bool) -> Iterator[DistributedContext]:
    """Join the processes that torchrun started, inside the block; a world of 1 without torchrun.

    Raises:
        UsageError: an environment variable of torchrun is not a number.
        ResourceError: another process died, hangs or never connected.
    """
    global _gloo_group
    size = _env_int("WORLD_SIZE", 1)
    if size == 1:
        yield DistributedContext()
        return
    try:
        with _connection_errors():
            dist.init_process_group("nccl" if on_cuda else "gloo", timeout=_TIMEOUT)
            # Flags travel between CPUs: over a GPU they would wait for its queued work.
            group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
            assert isinstance(group, dist.ProcessGroup)
            _gloo_group = group
            yield DistributedContext(_env_int("RANK", 0), _env_int("LOCAL_RANK", 0), size)
    except BaseException:
        _gloo_group = None
        if dist.is_initialized():
            _leave_failed_job()
        raise
    _gloo_group = None
    dist.destroy_process_group()


def _leave_failed_job() -> None:
    """Leave the group without a long wait, and make sure that this process ends."""
    leaving = threading.Thread(target=dist.destroy_process_group, daemon=True)
    leaving.start()
    leaving.join(_SECONDS_TO_LEAVE)
    if leaving.is_alive():
        # Python may wait for the same at exit. The error has been printed by then.
        exiting = threading.Timer(_SECONDS_TO_EXIT, os._exit, [ResourceError.exit_code])
        exiting.daemon = True
        exiting.start()


@contextmanager
def _connection_errors() -> Iterator[None]:
    """Turn errors of nccl, gloo and the store into ResourceError."""
    try:
        yield
    except RuntimeError as error:
        # nccl and the store have their own classes; gloo puts its name into the message.
        classes = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)
        if not isinstance(error, classes) and "gloo" not in str(error).lower():
            raise
        raise ResourceError(
            "another process of the job died or hangs",
            "run the same command with --resume auto to continue the training",
        ) from error


def _cpu_group() -> "dist.ProcessGroup":
    assert _gloo_group is not None
    return _gloo_group


def _env_int(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise UsageError(f"${name} is {text!r}, not a number", "start with torchrun or unset it")
    return int(text)
