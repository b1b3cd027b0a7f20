"""Signals are recorded when they arrive and raise where stopping is safe."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.command import TOY_TRAINING

from segtrain.runtime.progress import progress_bar
from segtrain.runtime.signals import (
    Stopped,
    handle_signals,
    interrupt_immediately,
    raise_if_stopped,
)


@pytest.fixture
def _signals_handled() -> Iterator[None]:
    with handle_signals():
        yield


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["TERM", "INT"]
)
@pytest.mark.usefixtures("_signals_handled")
def test_a_signal_raises_only_in_raise_if_stopped(number: int, code: int) -> None:
    os.kill(os.getpid(), number)

    with pytest.raises(Stopped) as stopped:
        raise_if_stopped()

    assert stopped.value.exit_code == code


@pytest.mark.usefixtures("_signals_handled")
def test_the_first_of_two_signals_is_reported() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Stopped, match="SIGTERM"):
        raise_if_stopped()


@pytest.mark.usefixtures("_signals_handled")
def test_a_progress_bar_does_not_raise() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    with progress_bar(total=3, desc="working") as bar:
        bar.update()
    assert bar.n == 1
    with pytest.raises(Stopped):
        raise_if_stopped()


@pytest.mark.usefixtures("_signals_handled")
def test_a_long_wait_can_be_interrupted_immediately() -> None:
    killer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
    killer.start()

    with pytest.raises(Stopped), interrupt_immediately():
        threading.Event().wait(30)

    os.kill(os.getpid(), signal.SIGINT)  # outside the block it is only recorded


def test_handlers_are_restored_and_recorded_signals_cleared() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with handle_signals():
        os.kill(os.getpid(), signal.SIGTERM)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before

    with handle_signals():
        raise_if_stopped()


IGNORE_SIGNALS = """
import os, signal
from segtrain.runtime.signals import handle_signals
with handle_signals():
    for _ in range(5):
        os.kill(os.getpid(), signal.SIGTERM)
        print("alive", flush=True)
"""


def test_the_third_signal_ends_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", IGNORE_SIGNALS], capture_output=True, text=True)

    assert done.returncode == 143
    assert done.stdout.split() == ["alive", "alive"]
    assert done.stderr.count("SIGTERM") == 1


SIGNAL_DURING_IMPORT = """
import os, signal, sys

class SendSignalOnImport:
    def find_spec(self, name, path, target=None):
        if name == "matplotlib.ft2font":
            # As if it arrived while a C extension initializes and calls back into Python.
            import ctypes
            self.call = ctypes.PYFUNCTYPE(None)(lambda: os.kill(os.getpid(), signal.SIGTERM))
            self.call()

sys.meta_path.insert(0, SendSignalOnImport())
from segtrain.cli.main import run
sys.exit(run(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_signal_during_an_import_leaves_a_complete_epoch(toy_coco: Path, tmp_path: Path) -> None:
    """The curves are drawn after the save of the first epoch, whose row must be written too."""
    arguments = ["train", "--data", toy_coco, "--name", "x", "--epochs", "99", *TOY_TRAINING]
    done = subprocess.run(
        [sys.executable, "-c", SIGNAL_DURING_IMPORT, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )

    assert done.returncode == 143, done.stderr
    run_dir = tmp_path / "runs" / "x"
    assert (run_dir / "checkpoints" / "last.pt").is_file()
    assert (run_dir / "curves.png").is_file()
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 1
