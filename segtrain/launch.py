"""torchrun, ending with an exit code that scripts can act on.

    segtrain-launch --standalone --nproc-per-node 8 -m segtrain train --data /data/coco

takes torchrun's own arguments and starts the same processes. torchrun ends with 1 whatever
happened; this ends with 143 or 130 after a signal, and else with the exit code of the process that
failed first, 5 where that was killed.
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
    """The console script."""
    # torchrun would die of it and leave its processes behind.
    signal.signal(signal.SIGUSR1, _as_sigterm)
    try:
        torchrun()
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)
    except ChildFailedError as failed:
        _, failure = failed.get_first_failure()
        sys.exit(failure.exitcode if failure.exitcode > 0 else _RESOURCE)


def _as_sigterm(number: int, frame: FrameType | None) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
