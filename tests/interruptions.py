"""Trainings that are stopped at an exact moment, and what two runs must have in common.

As a script it is a process that runs many command lines, each in a fork of its own, so that torch
is imported once: for signals that must not reach pytest.
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

import segtrain.files
import segtrain.training.epoch
from segtrain.checkpoint import load_checkpoint
from segtrain.cli import run
from segtrain.errors import CheckpointError

PROJECT = Path(__file__).parents[1]
TIMES = {"seconds", "images_per_second", "data_wait"}
SetAttr = Callable[[Any, str, Any], None]


# --- What runs have in common -------------------------------------------------------------------


def digests(run_folder: Path) -> dict[str, str]:
    """sha256 of each checkpoint of a run."""
    paths = sorted((run_folder / "checkpoints").glob("*.pt"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def without_times(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: row[key] for key in row if key not in TIMES} for row in rows]


def metrics_rows(run_folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what differs from run to run."""
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    return without_times([json.loads(line) for line in lines])


def assert_same(left: Any, right: Any, where: str = "") -> None:
    """Equal to the last bit: nested containers of numbers and tensors."""
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


def assert_same_training(resumed: Path, straight: Path) -> None:
    """Two finished runs have the same weights, averages, optimizer and history."""
    for name in ("last.pt", "best.pt"):
        left, right = (load_checkpoint(path / "checkpoints" / name) for path in (resumed, straight))
        for content in (left, right):
            if content.training:
                content.training["history"] = without_times(content.training["history"])
        for part in ("weights", "training", "metrics", "epoch", "global_step", "data"):
            assert_same(getattr(left, part), getattr(right, part), f"{name} {part}")
    assert metrics_rows(resumed) == metrics_rows(straight)


def session_members(session: int) -> list[int]:
    """Living processes of a session, read from /proc: slim images have no pgrep."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, session_id, *_ = stat.read_text().rpartition(")")[2].split()
            if int(session_id) == session and state != "Z":
                members.append(int(stat.parent.name))
    return members


def leftovers(folder: Path) -> list[Path]:
    """Temporary files, as a killed writer leaves them."""
    return sorted(folder.rglob(".*.tmp"))


# --- Moments ------------------------------------------------------------------------------------


def after_step(set_attribute: SetAttr, number: int, action: Callable[[], None]) -> None:
    """Let `action` happen right after optimizer step `number` of this process, counted from 1."""
    real, taken = segtrain.training.epoch.training_steps, 0

    def hooked(*args: Any, **kwargs: Any) -> Iterator[Any]:
        nonlocal taken
        for step in real(*args, **kwargs):
            taken += 1
            if taken == number:
                action()
            yield step

    set_attribute(segtrain.training.epoch, "training_steps", hooked)


def in_mid_save(set_attribute: SetAttr, action: Callable[[], None]) -> None:
    """Let `action` happen when a file is written and has not got its name yet."""
    real = os.fsync

    def hooked(file: int) -> None:
        action()
        real(file)

    set_attribute(segtrain.files.os, "fsync", hooked)


def kill_self(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


# --- Processes of their own ---------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Case:
    """A command line to run in a process group of its own.

    step: after it `signals` come, to the group or to the process alone.
    later: come one after the other in the midst of the next save.
    """

    folder: Path
    arguments: Sequence[str | Path]
    step: int
    signals: Sequence[int]
    to_group: bool = False
    later: Sequence[int] = ()


@dataclass(frozen=True)
class Ended:
    code: int
    err: str
    seconds: float
    """From the first signal to the end of the process."""


@dataclass(frozen=True)
class Killed:
    """What a process that was killed at a random moment has left.

    whole: last.pt can be loaded.
    step: the steps that it has.
    stale: temporary files; where there are some a save was hit.
    err: what it said.
    """

    whole: bool
    step: int
    stale: int
    err: str


def run_cases(cases: Sequence[Case]) -> list[Ended]:
    """Run all of them, one after the other."""
    asked = [
        {
            **vars(case),
            "folder": str(case.folder),
            "arguments": [str(argument) for argument in case.arguments],
        }
        for case in cases
    ]
    return [Ended(**row) for row in run_script("cases", asked)]


def kill_at_random(folder: Path, arguments: Sequence[str], rounds: int) -> list[Killed]:
    """Run the same command again and again, each time until SIGKILL comes."""
    asked = {"folder": str(folder), "arguments": list(arguments), "rounds": rounds}
    return [Killed(**row) for row in run_script("kill", asked)]


def run_script(mode: str, asked: Any) -> Any:
    done = subprocess.run(
        [sys.executable, __file__, mode],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _fork(folder: Path, err: Path, then: Callable[[], int]) -> int:
    """The pid of a process with a group of its own that works in `folder`."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.chdir(folder)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        code = then()
        sys.stderr.flush()
        os._exit(code)
    return pid


def _killed_rounds(folder: Path, arguments: list[str], rounds: int) -> Iterator[dict[str, Any]]:
    draws = random.Random(0)
    err, last = folder / "stderr.txt", folder / "runs" / "x" / "checkpoints" / "last.pt"
    for _ in range(rounds):
        reads, writes = os.pipe()

        def train(writes: int = writes) -> int:
            after_step(setattr, 1, lambda: void(os.write(writes, b"!")))
            # As on a slow disk: it is hit more often.
            in_mid_save(setattr, lambda: time.sleep(0.02))
            return run(arguments)

        pid = _fork(folder, err, train)
        os.close(writes)
        os.read(reads, 1)  # ends where the process does, too
        os.close(reads)
        time.sleep(draws.uniform(0, 0.2))
        os.killpg(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, err.read_text()
        stale, whole, step = len(leftovers(folder)), True, -1
        try:
            step = load_checkpoint(last).global_step
        except CheckpointError:
            whole = False
        yield {"whole": whole, "step": step, "stale": stale, "err": err.read_text()}


def void(value: object) -> None:
    """For a lambda that must not return anything."""


def _in_a_fork(case: dict[str, Any]) -> dict[str, Any]:
    folder = Path(case["folder"])
    err, signalled = folder / "stderr.txt", folder / "signalled.txt"
    pid = _fork(folder, err, lambda: _run_and_be_hit(case, signalled))
    _, status = os.waitpid(pid, 0)
    ended = time.time()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    started = float(signalled.read_text()) if signalled.exists() else 0.0
    code = os.waitstatus_to_exitcode(status)
    return {"code": code, "err": err.read_text(), "seconds": ended - started}


def _run_and_be_hit(case: dict[str, Any], signalled: Path) -> int:
    def hit() -> None:
        before = {path.name: digests(path) for path in Path("runs").iterdir() if path.is_dir()}
        Path("before.json").write_text(json.dumps(before))
        signalled.write_text(str(time.time()))
        for number in case["signals"]:
            os.killpg(0, number) if case["to_group"] else os.kill(os.getpid(), number)
        if case["later"]:
            in_mid_save(setattr, hit_again)

    def hit_again() -> None:
        while case["later"]:
            os.kill(os.getpid(), case["later"].pop(0))
            time.sleep(0.05)

    after_step(setattr, case["step"], hit)
    return run(case["arguments"])


if __name__ == "__main__":
    heavy = ("segtrain.training.command", "torch._dynamo", "matplotlib.backends.backend_agg")
    for module in heavy:
        importlib.import_module(module)  # once, and not in each fork
    torch.set_num_threads(1)  # a fork has no thread but its own to wait for
    asked = json.load(sys.stdin)
    if sys.argv[1] == "cases":
        print(json.dumps([_in_a_fork(case) for case in asked]))
    else:
        asked["folder"] = Path(asked["folder"])
        print(json.dumps(list(_killed_rounds(**asked))))
