"""A run folder belongs to one process at a time."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from segtrain.errors import BusyError, ResourceError
from segtrain.locking import is_busy, locked, refuse_if_busy

HOLDER = """
import os, sys, time
from pathlib import Path
from segtrain.locking import locked
with locked(Path(sys.argv[1])):
    # A child that lives on when its parent is killed, as a loader process may.
    if os.fork() == 0:
        time.sleep(30)
        os._exit(0)
    print("held", flush=True)
    time.sleep(30)
"""


def test_a_second_holder_is_refused_and_told_who_the_first_is(tmp_path: Path) -> None:
    with locked(tmp_path):
        with pytest.raises(BusyError, match=rf"process {os.getpid()} on .*wait for it"):
            locked(tmp_path).__enter__()
        with pytest.raises(BusyError):
            refuse_if_busy(tmp_path)
        assert is_busy(tmp_path)

    refuse_if_busy(tmp_path)
    with locked(tmp_path):
        pass


def test_a_folder_that_was_never_locked_is_free(tmp_path: Path) -> None:
    assert not is_busy(tmp_path)
    assert not is_busy(tmp_path / "missing")


def test_the_lock_goes_with_a_killed_holder_though_its_children_live(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BusyError, match=f"process {holder.pid} "):
            locked(tmp_path).__enter__()

        holder.kill()
        holder.wait()
        os.killpg(holder.pid, 0)  # the child is still there

        with locked(tmp_path):
            pass
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.stdout.close()
        holder.wait()


def test_a_damaged_lock_file_still_locks(tmp_path: Path) -> None:
    with locked(tmp_path):
        (tmp_path / ".lock").write_text("no JSON")
        with pytest.raises(BusyError, match="is in use; "):
            refuse_if_busy(tmp_path)


def test_a_folder_that_cannot_be_written_is_a_resource_error(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="permissions"):
        locked(tmp_path / "missing").__enter__()
