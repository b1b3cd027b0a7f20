"""Only one process at a time can lock a run folder."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from segtrain.errors import BusyError, ResourceError
from segtrain.runtime.lock import is_busy, lock_folder, refuse_if_busy

HOLDER = """
import os, sys, time
from pathlib import Path
from segtrain.runtime.lock import lock_folder
with lock_folder(Path(sys.argv[1])):
    # A child that outlives its killed parent, as a loader process may.
    if os.fork() == 0:
        time.sleep(30)
        os._exit(0)
    print("held", flush=True)
    time.sleep(30)
"""


def test_a_second_process_is_refused_with_the_name_of_the_first(tmp_path: Path) -> None:
    with lock_folder(tmp_path):
        with pytest.raises(BusyError, match=rf"process {os.getpid()} on .*wait for it"):
            lock_folder(tmp_path).__enter__()
        with pytest.raises(BusyError):
            refuse_if_busy(tmp_path)
        assert is_busy(tmp_path)

    refuse_if_busy(tmp_path)
    with lock_folder(tmp_path):
        pass


def test_a_folder_without_a_lock_file_is_free(tmp_path: Path) -> None:
    assert not is_busy(tmp_path)
    assert not is_busy(tmp_path / "missing")


def test_a_killed_process_releases_its_lock_even_if_its_children_live(tmp_path: Path) -> None:
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
            lock_folder(tmp_path).__enter__()

        holder.kill()
        holder.wait()
        os.killpg(holder.pid, 0)  # the child still runs

        with lock_folder(tmp_path):
            pass
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.stdout.close()
        holder.wait()


def test_a_damaged_lock_file_still_locks(tmp_path: Path) -> None:
    with lock_folder(tmp_path):
        (tmp_path / ".lock").write_text("not JSON")
        with pytest.raises(BusyError, match="is in use; "):
            refuse_if_busy(tmp_path)


def test_an_unwritable_folder_is_a_resource_error(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="permissions"):
        lock_folder(tmp_path / "missing").__enter__()
