"""The processes of one job, as torchrun starts them, and what they tell each other.

One process alone is a world of one: everything here then does nothing.
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

# A rank that is gone is noticed by its closed connection; this is for one that hangs.
_PATIENCE = timedelta(minutes=10)
# To leave a job that has failed: then the GPU may wait for a process that is gone (pytorch#119250).
_SECONDS_TO_LEAVE, _SECONDS_TO_END = 5.0, 15.0


@dataclass(frozen=True)
class World:
    """This process's number among all of them, and on its own machine."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and talks."""
        return self.rank == 0

    def sum_(self, values: Tensor) -> Tensor:
        """`values` summed over all processes, in place, on their own device."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, here: bool) -> bool:
        """Whether it is so in any process; all must ask. Takes no device's time."""
        if self.size == 1:
            return here
        flag = torch.tensor(int(here))
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=_control())
        return bool(flag)

    def smallest(self, here: int) -> int:
        """The smallest of all processes' numbers."""
        if self.size == 1:
            return here
        number = torch.tensor(here)
        dist.all_reduce(number, dist.ReduceOp.MIN, group=_control())
        return int(number)

    def told_by_first(self, value: _T) -> _T:
        """What the first process has as `value`; a plain object."""
        if self.size == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, group=_control())
        told: _T = box[0]
        return told

    def read_by_first(self, read: Callable[[], _T]) -> _T:
        """What the first process reads, a plain object; the others may have another disk.

        Raises:
            UserError: in the first process as `read` raises it, in the others ResourceError.
        """
        value: Any = None
        with self.first_alone():
            if self.is_first:
                value = read()
        told: _T = self.told_by_first(value)
        return told

    def gathered(self, value: _T) -> list[_T]:
        """What all processes have as `value`, in the order of their ranks; plain objects."""
        if self.size == 1:
            return [value]
        box: list[Any] = [None] * self.size
        dist.all_gather_object(box, value, group=_control())
        return box

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """The first process goes in first, the others when it is out; an error there is theirs."""
        failed = False
        if not self.is_first:
            failed = self.told_by_first(False)
        if failed:
            raise ResourceError("the first process of the job failed; its own message says why")
        try:
            yield
        except BaseException:
            if self.is_first:
                self.told_by_first(True)
            raise
        if self.is_first:
            self.told_by_first(False)


_control_group: "dist.ProcessGroup | None" = None


@contextmanager
def joined(*, on_cuda: bool) -> Iterator[World]:
    """Within, this process is one of those that torchrun has started; alone without torchrun.

    Raises:
        UsageError: torchrun's environment variables are there in part, or the others do not come.
        ResourceError: another process has died or hangs.
    """
    global _control_group
    size = _number("WORLD_SIZE", 1)
    if size == 1:
        yield World()
        return
    try:
        with _lost_connections():
            dist.init_process_group("nccl" if on_cuda else "gloo", timeout=_PATIENCE)
            # Flags travel between CPUs: a GPU would have to be waited for.
            group = dist.new_group(backend="gloo", timeout=_PATIENCE)
            assert isinstance(group, dist.ProcessGroup)
            _control_group = group
            yield World(_number("RANK", 0), _number("LOCAL_RANK", 0), size)
    except BaseException:
        _control_group = None
        if dist.is_initialized():
            _leave_in_time()
        raise
    _control_group = None
    dist.destroy_process_group()


def _leave_in_time() -> None:
    """Leave the others without waiting for them for long, and have this process end for certain."""
    leaving = threading.Thread(target=dist.destroy_process_group, daemon=True)
    leaving.start()
    leaving.join(_SECONDS_TO_LEAVE)
    if leaving.is_alive():
        # Python's end may wait for the same; by then the error has been printed.
        ending = threading.Timer(_SECONDS_TO_END, os._exit, [ResourceError.exit_code])
        ending.daemon = True
        ending.start()


@contextmanager
def _lost_connections() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        # Those of nccl and of the store have classes of their own, those of gloo say their name.
        classes = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)
        if not isinstance(error, classes) and "gloo" not in str(error).lower():
            raise
        raise ResourceError(
            "another process of the job died or hangs; training continues by the same command with "
            "--resume auto"
        ) from error


def _control() -> "dist.ProcessGroup":
    assert _control_group is not None
    return _control_group


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise UsageError(f"${name} is {text!r}, not a number; start with torchrun or unset it")
    return int(text)
