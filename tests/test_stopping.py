"""A signal is noted where it comes and heard where stopping is safe."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import TOY_TRAINING

from segtrain.progress import progress_bar
from segtrain.stopping import Stopped, at_once, check, listening


@pytest.fixture
def _listening() -> Iterator[None]:
    with listening():
        yield


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["TERM", "INT"]
)
@pytest.mark.usefixtures("_listening")
def test_a_signal_waits_until_somebody_looks(number: int, code: int) -> None:
    os.kill(os.getpid(), number)
    survived = True

    with pytest.raises(Stopped) as stopped:
        check()

    assert survived
    assert stopped.value.exit_code == code


@pytest.mark.usefixtures("_listening")
def test_the_first_signal_names_the_exit_code() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Stopped, match="SIGTERM"):
        check()


@pytest.mark.usefixtures("_listening")
def test_a_progress_bar_listens_before_and_between_pieces_of_work() -> None:
    with progress_bar(total=3, desc="working") as bar:
        bar.update()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped):
            bar.update()
    assert bar.n == 1
    with pytest.raises(Stopped):
        progress_bar(total=3, desc="working")


@pytest.mark.usefixtures("_listening")
def test_what_waits_for_long_can_be_left_at_once() -> None:
    killer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
    killer.start()

    with pytest.raises(Stopped), at_once():
        threading.Event().wait(30)

    os.kill(os.getpid(), signal.SIGINT)  # outside it, it waits again


def test_handlers_are_given_back_and_notes_forgotten() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with listening():
        os.kill(os.getpid(), signal.SIGTERM)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before

    with listening():
        check()


STUBBORN = """
import os, signal
from segtrain.stopping import listening
with listening():
    for _ in range(5):
        os.kill(os.getpid(), signal.SIGTERM)
        print("alive", flush=True)
"""


def test_the_third_signal_ends_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", STUBBORN], capture_output=True, text=True)

    assert done.returncode == 143
    assert done.stdout.split() == ["alive", "alive"]
    assert done.stderr.count("SIGTERM") == 1


IN_AN_IMPORT = """
import os, signal, sys

class AskedToStopByAnImport:
    def find_spec(self, name, path, target=None):
        if name == "matplotlib.ft2font":
            # As if it came while a C extension is being set up and calls back into Python.
            import ctypes
            self.call = ctypes.PYFUNCTYPE(None)(lambda: os.kill(os.getpid(), signal.SIGTERM))
            self.call()

sys.meta_path.insert(0, AskedToStopByAnImport())
from segtrain.cli import run
sys.exit(run(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_signal_in_the_middle_of_an_import_leaves_a_whole_epoch(
    toy_coco: Path, tmp_path: Path
) -> None:
    """The curves are drawn after the first epoch's save: its row must be written, too."""
    arguments = ["train", "--data", toy_coco, "--name", "x", "--epochs", "99", *TOY_TRAINING]
    done = subprocess.run(
        [sys.executable, "-c", IN_AN_IMPORT, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )

    assert done.returncode == 143, done.stderr
    run_folder = tmp_path / "runs" / "x"
    assert (run_folder / "checkpoints" / "last.pt").is_file()
    assert (run_folder / "curves.png").is_file()
    assert len((run_folder / "metrics.jsonl").read_text().splitlines()) == 1
