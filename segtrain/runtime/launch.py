"""torchrun with an exit code that scripts can use.

    segtrain-launch --standalone --nproc-per-node 8 -m segtrain train --data /data/coco

It takes torchrun's arguments and starts the same processes. torchrun exits with 1 on any failure.
This exits with 143 or 130 after a signal, else with the exit code of the first process that failed,
or with 5 if that process was killed.
"""

import os
import signal
import sys
from types import FrameType

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

_RESOURCE = 5


def main() -> None:
    """The console script `segtrain-launch`."""
    # SIGUSR1 would kill torchrun and leave its processes behind.
    signal.signal(signal.SIGUSR1, _forward_as_sigterm)
    try:
        torchrun()
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)
    except ChildFailedError as failed:
        _, failure = failed.get_first_failure()
        sys.exit(failure.exitcode if failure.exitcode > 0 else _RESOURCE)


def _forward_as_sigterm(number: int, frame: FrameType | None) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
