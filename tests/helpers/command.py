"""Run segtrain commands in tests."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

# A network and a run small enough to train within two seconds.
TOY_TRAINING = (
    *("--set", "model.base_channels=4", "--set", "model.depth=2", "--set", "optim.warmup_steps=5"),
    *("--image-size", "48", "--batch-size", "4", "--workers", "0", "--precision", "fp32"),
    *("--device", "cpu"),
)


@dataclass(frozen=True)
class Finished:
    """The outcome of a command line."""

    code: int
    out: str
    err: str

    @property
    def error_lines(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error:")]


Command = Callable[..., Finished]


def assert_one_error(finished: Finished, code: int, *words: str) -> None:
    """The command ended with this exit code and one error line that contains `words`."""
    assert finished.code == code, finished.err
    assert len(finished.error_lines) == 1
    assert "Traceback" not in finished.err
    for word in words:
        assert word in finished.error_lines[0]


@contextmanager
def no_device_sync() -> Iterator[None]:
    """Raise inside the block if the host waits for the GPU."""
    with warnings.catch_warnings():
        # An error here would come after the mode is set, and leave it set for other tests.
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
