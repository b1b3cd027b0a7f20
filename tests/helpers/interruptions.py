"""Interrupt trainings at exact moments, and compare runs.

As a script this is a process that runs many command lines, each in its own fork, so that torch is
imported only once. It receives the signals that must not reach pytest.
"""

import contextlib
import hashlib
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import segtrain.runtime.files
import segtrain.training.epoch
from segtrain.checkpoint import load_checkpoint
from segtrain.cli.main import run
from segtrain.errors import CheckpointError

PROJECT = Path(__file__).parents[2]
TIMES = {"seconds", "images_per_second", "data_wait"}
SetAttr = Callable[[Any, str, Any], None]


# --- Comparing runs -----------------------------------------------------------------------------


def digests(run_folder: Path) -> dict[str, str]:
    """sha256 of each checkpoint of a run."""
    paths = sorted((run_folder / "checkpoints").glob("*.pt"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def without_times(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: row[key] for key in row if key not in TIMES} for row in rows]


def metrics_rows(run_folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without times."""
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    return without_times([json.loads(line) for line in lines])


def assert_same(left: Any, right: Any, where: str = "") -> None:
    """Assert that nested containers of numbers and tensors are bit-identical."""
    assert type(left) is type(right), where
    if isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_same(left[key], right[key], f"{where}/{key}")
    elif isinstance(left, list):
        assert len(left) == len(right), where
        for number, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same(a, b, f"{where}/{number}")
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    else:
        assert left == right, where


def assert_same_training(resumed: Path, uninterrupted: Path) -> None:
    """Assert that two finished runs have the same weights, EMA, optimizer and history."""
    for name in ("last.pt", "best.pt"):
        left, right = (
            load_checkpoint(path / "checkpoints" / name) for path in (resumed, uninterrupted)
        )
        for content in (left, right):
            if content.training:
                content.training["history"] = without_times(content.training["history"])
        for part in ("weights", "training", "metrics", "epoch", "global_step", "data"):
            assert_same(getattr(left, part), getattr(right, part), f"{name} {part}")
    assert metrics_rows(resumed) == metrics_rows(uninterrupted)


def session_members(session: int) -> list[int]:
    """Live processes of a session, read from /proc because slim images have no pgrep."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, session_id, *_ = stat.read_text().rpartition(")")[2].split()
            if int(session_id) == session and state != "Z":
                members.append(int(stat.parent.name))
    return members


def leftovers(folder: Path) -> list[Path]:
    """Temporary files of killed writers."""
    return sorted(folder.rglob(".*.tmp"))


# --- Hooks --------------------------------------------------------------------------------------


def after_step(set_attribute: SetAttr, number: int, action: Callable[[], None]) -> None:
    """Call `action` right after optimizer step `number` of this process, counted from 1."""
    original, num_steps = segtrain.training.epoch.train_step, 0

    def hooked(*args: Any, **kwargs: Any) -> Any:
        nonlocal num_steps
        result = original(*args, **kwargs)
        num_steps += 1
        if num_steps == number:
            action()
        return result

    set_attribute(segtrain.training.epoch, "train_step", hooked)


def during_save(set_attribute: SetAttr, action: Callable[[], None]) -> None:
    """Call `action` when a file is written and not yet renamed."""
    original = os.fsync

    def hooked(file: int) -> None:
        action()
        original(file)

    set_attribute(segtrain.runtime.files.os, "fsync", hooked)


def kill_self(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


# --- Separate processes -------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Case:
    """A command line to run in its own process group.

    step: the step after which `signals` are sent, to the group or to the process alone.
    later: signals that are sent one by one during the next save.
    """

    folder: Path
    arguments: Sequence[str | Path]
    step: int
    signals: Sequence[int]
    to_group: bool = False
    later: Sequence[int] = ()


@dataclass(frozen=True)
class Ended:
    """The end of a command line."""

    code: int
    err: str
    seconds: float
    """Time from the first signal to the end of the process."""


@dataclass(frozen=True)
class Killed:
    """State of a run whose process was killed at a random moment.

    valid: last.pt can be loaded.
    step: its global step.
    num_temp_files: temporary files; more than 0 if the kill hit a save.
    err: stderr of the process.
    """

    valid: bool
    step: int
    num_temp_files: int
    err: str


def run_cases(cases: Sequence[Case]) -> list[Ended]:
    """Run all cases, one after the other."""
    request = [
        {
            **vars(case),
            "folder": str(case.folder),
            "arguments": [str(argument) for argument in case.arguments],
        }
        for case in cases
    ]
    return [Ended(**row) for row in run_script("cases", request)]


def kill_at_random(folder: Path, arguments: Sequence[str], rounds: int) -> list[Killed]:
    """Run the same command `rounds` times, each time until SIGKILL."""
    request = {"folder": str(folder), "arguments": list(arguments), "rounds": rounds}
    return [Killed(**row) for row in run_script("kill", request)]


def run_script(mode: str, request: Any) -> Any:
    done = subprocess.run(
        [sys.executable, __file__, mode],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": f"{PROJECT}{os.pathsep}{PROJECT / 'tests'}",
            "OMP_NUM_THREADS": "1",
        },
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _fork(folder: Path, err: Path, command: Callable[[], int]) -> int:
    """Fork a process with its own group that runs `command` in `folder`; return its pid."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.chdir(folder)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        code = command()
        sys.stderr.flush()
        os._exit(code)
    return pid


def _killed_rounds(folder: Path, arguments: list[str], rounds: int) -> Iterator[dict[str, Any]]:
    rng = random.Random(0)
    err, last = folder / "stderr.txt", folder / "runs" / "x" / "checkpoints" / "last.pt"
    for _ in range(rounds):
        reads, writes = os.pipe()

        def train(writes: int = writes) -> int:
            after_step(setattr, 1, lambda: discard(os.write(writes, b"!")))
            # Like a slow disk, so that more kills hit a save.
            during_save(setattr, lambda: time.sleep(0.02))
            return run(arguments)

        pid = _fork(folder, err, train)
        os.close(writes)
        os.read(reads, 1)  # also returns if the process ends
        os.close(reads)
        time.sleep(rng.uniform(0, 0.2))
        os.killpg(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, err.read_text()
        num_temp_files, valid, step = len(leftovers(folder)), True, -1
        try:
            step = load_checkpoint(last).global_step
        except CheckpointError:
            valid = False
        yield {
            "valid": valid,
            "step": step,
            "num_temp_files": num_temp_files,
            "err": err.read_text(),
        }


def discard(value: object) -> None:
    """Drop the result of a lambda."""


def _in_a_fork(case: dict[str, Any]) -> dict[str, Any]:
    folder = Path(case["folder"])
    err, signalled = folder / "stderr.txt", folder / "signalled.txt"
    pid = _fork(folder, err, lambda: _run_and_signal(case, signalled))
    _, status = os.waitpid(pid, 0)
    ended = time.time()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    started = float(signalled.read_text()) if signalled.exists() else 0.0
    code = os.waitstatus_to_exitcode(status)
    return {"code": code, "err": err.read_text(), "seconds": ended - started}


def _run_and_signal(case: dict[str, Any], signalled: Path) -> int:
    def signal_after_step() -> None:
        before = {path.name: digests(path) for path in Path("runs").iterdir() if path.is_dir()}
        Path("before.json").write_text(json.dumps(before))
        signalled.write_text(str(time.time()))
        for number in case["signals"]:
            os.killpg(0, number) if case["to_group"] else os.kill(os.getpid(), number)
        if case["later"]:
            during_save(setattr, signal_during_save)

    def signal_during_save() -> None:
        while case["later"]:
            os.kill(os.getpid(), case["later"].pop(0))
            time.sleep(0.05)

    after_step(setattr, case["step"], signal_after_step)
    return run(case["arguments"])


if __name__ == "__main__":
    heavy = ("segtrain.training.train", "torch._dynamo", "matplotlib.backends.backend_agg")
    for module in heavy:
        importlib.import_module(module)  # once instead of in each fork
    torch.set_num_threads(1)  # a fork would wait for threads that only its parent has
    request = json.load(sys.stdin)
    if sys.argv[1] == "cases":
        print(json.dumps([_in_a_fork(case) for case in request]))
    else:
        request["folder"] = Path(request["folder"])
        print(json.dumps(list(_killed_rounds(**request))))
