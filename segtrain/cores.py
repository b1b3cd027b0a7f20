"""How many processors this process may use."""

import os


def usable_cores() -> int:
    """A container or a scheduler may give far fewer cores than the machine has."""
    usable = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    return len(usable(0))
