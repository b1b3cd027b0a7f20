"""Number of CPU cores that this process may use."""

import os


def available_cpus() -> int:
    """Count usable cores: a container or scheduler may grant far fewer than the machine has."""
    get_affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    return len(get_affinity(0))
