"""`segtrain runs`: list all runs and compare two."""

import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from helpers.command import Command
from matplotlib.colors import to_rgb

from segtrain.config.resolve import dump_yaml, load_config
from segtrain.errors import CheckpointError
from segtrain.runs.comparison import read_run_pair
from segtrain.runs.format import escape_unprintable, format_age, format_duration
from segtrain.runs.plot import draw_curves
from segtrain.runs.read import finite_number, read_rows


def row(epoch: int, iou: Any = 0.5, loss: Any = 0.3, **more: Any) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "global_step": 24 * epoch,
        "lr": 1e-3,
        "train/loss": loss,
        "val/person_iou": iou,
        "val/mean_iou": 0.6,
        "val/all_person_iou": 0.17,
        "seconds": 100.0,
        "images_per_second": 40.0,
        **more,
    }


def make_run(
    name: str,
    rows: Iterable[dict[str, Any]] = (),
    *,
    output: str = "runs",
    epochs: int = 3,
    sets: Iterable[str] = (),
    stages: Iterable[dict[str, Any]] = (),
    saved: str | None = "last.pt",
    age: float = 0,
) -> Path:
    """A run folder as training leaves it, last changed `age` seconds ago."""
    path = Path(output) / name
    path.mkdir(parents=True)
    flags = {"train.epochs": epochs, "train.name": name, "stages": list(stages)}
    (path / "config.yaml").write_text(dump_yaml(load_config(flags=flags, sets=sets)))
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    if saved:
        (path / "checkpoints").mkdir()
        (path / "checkpoints" / saved).write_text("weights")
    for file in ("config.yaml", "metrics.jsonl"):
        changed = time.time() - age
        os.utime(path / file, (changed, changed))
    return path


def list_runs(segtrain: Command, output: str = "runs") -> dict[str, dict[str, Any]]:
    done = segtrain("runs", output, "--json")
    assert (done.code, done.err) == (0, "")
    return {run["name"]: run for run in json.loads(done.out)}


def three_rows(*ious: Any) -> list[dict[str, Any]]:
    return [row(epoch, iou) for epoch, iou in enumerate(ious or (0.3, 0.5, 0.4), 1)]


# --- The list -----------------------------------------------------------------------------------


def test_a_run_is_one_line_or_one_json_object(segtrain: Command) -> None:
    make_run("first", three_rows(0.3, 0.51234, 0.4), age=3 * 3600 + 100)

    done = segtrain("runs")

    assert done.code == 0
    [line] = [line for line in done.out.splitlines() if line.startswith("first")]
    assert line.split() == ["first", "unet", "0.5123", "(2)", "3/3", "3", "hours", "finished"]
    changed = list_runs(segtrain)["first"].pop("changed")
    last_changed = Path("runs/first/metrics.jsonl").stat().st_mtime
    assert changed == time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(last_changed))
    assert {k: v for k, v in list_runs(segtrain)["first"].items() if k != "changed"} == {
        "name": "first",
        "path": "runs/first",
        "latest": False,
        "state": "finished",
        "problem": None,
        "model": "unet",
        "best_person_iou": 0.51234,
        "best_epoch": 2,
        "epochs_done": 3,
        "epochs_planned": 3,
    }


def test_listing_imports_no_heavy_library() -> None:
    make_run("one", three_rows())
    script = (
        "import sys\n"
        "from segtrain.cli.main import run\n"
        "assert run(['runs']) == 0\n"
        "print(*({'torch', 'matplotlib', 'numpy', 'cv2', 'PIL'} & sys.modules.keys()))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", script]

    out = subprocess.run(command, capture_output=True, text=True, env=environment).stdout

    assert "one " in out
    assert out.splitlines()[-1] == ""


def test_runs_are_sorted_newest_first(segtrain: Command) -> None:
    for name, age in (("old", 900), ("new", 10), ("middle", 400)):
        make_run(name, age=age)

    names = [line.split()[0] for line in segtrain("runs").out.splitlines() if "unet" in line]

    assert names == ["new", "middle", "old"]
    assert list(list_runs(segtrain)) == names


def test_a_resumed_run_is_sorted_by_its_configuration_time(segtrain: Command) -> None:
    run = make_run("resumed", three_rows(), age=9000)
    make_run("other", age=50)
    os.utime(run / "config.yaml", (time.time() - 1,) * 2)

    assert list(list_runs(segtrain)) == ["resumed", "other"]


@pytest.mark.parametrize(
    ("rows", "saved", "stages", "state"),
    [
        (three_rows(), "last.pt", [], "finished"),
        (three_rows(), "last.pt", [{"epochs": 1}], "stopped"),
        ([*three_rows(), row(4)], "last.pt", [{"epochs": 1}], "finished"),
        ([row(1), row(2, stopped_early=True)], "last.pt", [], "finished"),
        ([row(1, stopped_early=True), row(2)], "last.pt", [], "stopped"),
        ([row(1, stopped_early=False)], "last.pt", [], "stopped"),
        ([row(1, stopped_early="no")], "last.pt", [], "stopped"),
        ([row(1)], "previous.pt", [], "stopped"),
        ([], "last.pt", [], "stopped"),  # saved during its first epoch
        ([], "best.pt", [], "begun"),
        ([], None, [], "begun"),
    ],
)
def test_the_state_of_a_run(
    segtrain: Command, rows: list[dict[str, Any]], saved: str, stages: list[Any], state: str
) -> None:
    make_run("a", rows, saved=saved, stages=stages)

    run = list_runs(segtrain)["a"]

    assert run["state"] == state
    assert run["epochs_done"] == len(rows)
    assert run["epochs_planned"] == 3 + len(stages)


def staged_rows(*stages: int, **last: Any) -> list[dict[str, Any]]:
    """One row for each epoch with its stage, from 1; `last` adds keys to the last row."""
    rows = [row(epoch, stage=stage) for epoch, stage in enumerate(stages, 1)]
    rows[-1] |= last
    return rows


@pytest.mark.parametrize(
    ("rows", "planned", "state"),
    [
        (staged_rows(1, 1, 1), 5, "stopped"),
        (staged_rows(1, 1, 1, 2), 5, "stopped"),
        (staged_rows(1, 1, 1, 2, 2), 5, "finished"),
        # The first stage ended early; the second did not.
        (staged_rows(1, 2), 3, "stopped"),
        (staged_rows(1, 2, 2), 3, "finished"),
        # Early stopping ends the run only in the last stage.
        (staged_rows(1, stopped_early=True), 5, "stopped"),
        (staged_rows(1, 2, stopped_early=True), 3, "finished"),
        # Impossible stages, or stages of another configuration.
        (staged_rows(9), 5, "stopped"),
        (staged_rows(0), 5, "stopped"),
        ([row(1, stage="two")], 5, "stopped"),
        ([row(1), row(2, stage=2)], 3, "stopped"),
    ],
)
def test_the_state_of_a_run_with_a_second_stage(
    segtrain: Command, rows: list[dict[str, Any]], planned: int, state: str
) -> None:
    make_run("a", rows, epochs=3, stages=[{"epochs": 2}])

    run = list_runs(segtrain)["a"]

    assert (run["epochs_planned"], run["state"]) == (planned, state)


HOLD_LOCK = """
import sys, time
from pathlib import Path
from segtrain.runtime.lock import lock_folder
with lock_folder(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock a run folder from another process, as training does."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", HOLD_LOCK, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "locked\n"
            yield
        finally:
            holder.kill()


def test_a_run_locked_by_another_process_is_running(segtrain: Command) -> None:
    paths = [make_run("training", [row(1)]), make_run("begun"), Path("runs/no-config-yet")]
    paths[2].mkdir()
    make_run("idle", [row(1)])
    with locked(paths[0]), locked(paths[1]), locked(paths[2]):
        states = {name: run["state"] for name, run in list_runs(segtrain).items()}
        assert segtrain("runs").out.count("running") == 3
    assert states == {
        "training": "running",
        "begun": "running",
        "no-config-yet": "running",
        "idle": "stopped",
    }
    assert list_runs(segtrain)["training"]["state"] == "stopped"
    assert list_runs(segtrain)["no-config-yet"]["state"] == "begun"


def test_the_latest_run_is_marked_and_listed_once(segtrain: Command) -> None:
    make_run("one")
    make_run("two")
    Path("runs/latest").symlink_to("one")
    Path("runs/.latest.123.tmp").symlink_to("two")  # left by a killed process

    assert {name: run["latest"] for name, run in list_runs(segtrain).items()} == {
        "one": True,
        "two": False,
    }
    out = segtrain("runs").out
    assert "one (latest)" in out
    assert out.count("latest") == 1


@pytest.mark.parametrize("target", ["deleted", "latest"])
def test_a_dangling_latest_link_marks_nothing(segtrain: Command, target: str) -> None:
    make_run("one")
    Path("runs/latest").symlink_to(target)

    done = segtrain("runs")

    assert done.code == 0
    assert "one" in done.out
    assert "latest" not in done.out
    assert not list_runs(segtrain)["one"]["latest"]


def test_links_to_runs_elsewhere_are_listed(segtrain: Command) -> None:
    make_run("old", output="attic")
    Path("runs").mkdir()
    Path("runs/linked").symlink_to(Path("attic/old").resolve())

    assert list(list_runs(segtrain)) == ["linked"]


def test_a_folder_named_latest_is_an_ordinary_run(segtrain: Command) -> None:
    """Training keeps such a folder and does not create the link."""
    make_run("latest")

    assert not list_runs(segtrain)["latest"]["latest"]
    assert "(latest)" not in segtrain("runs").out


def test_other_files_and_folders_are_not_listed(segtrain: Command) -> None:
    make_run("one")
    Path("runs/compare-a-b.png").write_text("an image")
    Path("runs/config.yaml.txt").write_text("a stray file")
    Path("runs/doctor-20260101-000000").mkdir()
    Path("runs/doctor-20260101-000000/contact_sheet.png").write_text("")
    Path("runs/loop").symlink_to("loop")

    assert list(list_runs(segtrain)) == ["one"]


def test_a_folder_without_runs_is_not_an_error(segtrain: Command) -> None:
    Path("runs").mkdir()

    done = segtrain("runs")

    assert (done.code, done.err) == (0, "")
    assert done.out == "no runs in runs yet; segtrain train creates one\n"
    assert list_runs(segtrain) == {}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere is not a folder of runs"),
        (["file"], "file is not a folder of runs"),
        (["runs/one"], "runs/one is a run folder"),
        (["runs", "--output", "x.png"], "segtrain runs FOLDER"),
        (["runs", "--overwrite"], "segtrain runs FOLDER"),
        (["runs", "--compare", "one"], "--compare"),
        (["--compare", "one", "oen"], "did you mean 'one'?"),
        (["--compare", "xyz", "one"], "no run 'xyz' in runs"),
        (["elsewhere", "--compare", "one", "two"], "no run 'one' in elsewhere"),
        (["--compare", "one", "latest"], "are the same run"),
        (["--compare", "one", "two", "--output", "a.jpg"], "must end in .png"),
        (["--compare", "one", "two", "--output", "old.png"], "old.png exists; use --overwrite"),
    ],
)
def test_a_usage_error_is_one_line_and_writes_nothing(
    segtrain: Command, arguments: list[str], words: str
) -> None:
    Path("file").write_text("")
    Path("old.png").write_text("old")
    make_run("one", three_rows())
    make_run("two", three_rows())
    Path("runs/latest").symlink_to("one")
    before = sorted(Path.cwd().rglob("*"))

    done = segtrain("runs", *arguments)

    assert done.code == 2
    assert done.out == ""
    [line] = done.err.splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert sorted(Path.cwd().rglob("*")) == before
    assert Path("old.png").read_text() == "old"


# --- Damaged runs -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.yaml", b"train: {epochs: 3", "config.yaml is not valid YAML at line 1"),
        ("config.yaml", b"train: {epochs: 0}", "config.yaml: train.epochs: "),
        ("config.yaml", b"train: {epocs: 3}", "config.yaml: unknown configuration key"),
        ("config.yaml", b"train: {seed: 2020-13-45}", "config.yaml: month must be"),
        ("config.yaml", b"- a list", "config.yaml must hold sections"),
        ("config.yaml", b"\xff\xfe\x00", "config.yaml: it is not UTF-8 text"),
        ("config.yaml", b"[" * 5000, "config.yaml"),
        ("config.yaml", None, "config.yaml is missing"),
        ("metrics.jsonl", b'{"epoch": 1}\n{"epo\n{"epoch": 3}\n', "damaged at line 2"),
        ("metrics.jsonl", b'{"epoch": 1}\n{"epoch": 2, "x":\n', "damaged at line 2"),
        ("metrics.jsonl", b'{"epoch": 1}\n{"epo\n{"epoch": 3}', "damaged at line 2"),
        ("metrics.jsonl", b"hello", "damaged at line 1"),
        ("metrics.jsonl", b'{"epoch": "1"}\n', "damaged at line 1"),
        ("metrics.jsonl", b'{"epoch": 0}\n', "damaged at line 1"),
        ("metrics.jsonl", b'{"epoch": true}\n', "damaged at line 1"),
        ("metrics.jsonl", b'{"loss": 1}\n', "damaged at line 1"),
        ("metrics.jsonl", b"7\n", "damaged at line 1"),
        ("metrics.jsonl", b"[" * 100_000 + b"\n", "damaged at line 1"),
        ("metrics.jsonl", b'{"epoch": 1, "x": "\xff"}\n', "damaged at line 1"),
    ],
)
def test_a_damaged_run_is_one_line_and_the_others_are_listed(
    segtrain: Command, file: str, content: bytes | None, words: str
) -> None:
    make_run("good", three_rows())
    path = make_run("bad", three_rows()) / file
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)

    done = segtrain("runs")

    assert (done.code, done.err) == (0, "")
    assert [line for line in done.out.splitlines() if line.startswith("good")]
    [line] = [line for line in done.out.splitlines() if line.startswith("bad: ")]
    assert words in line
    assert line.count(file) == 1
    runs = list_runs(segtrain)
    assert runs["bad"]["state"] == "unreadable"
    assert f"bad: {runs['bad']['problem']}" == line
    assert runs["good"]["state"] == "finished"


@pytest.mark.parametrize("file", ["config.yaml", "metrics.jsonl"])
def test_a_folder_instead_of_a_file_is_damage(segtrain: Command, file: str) -> None:
    make_run("good")
    path = make_run("bad") / file
    path.unlink()
    path.mkdir()

    runs = list_runs(segtrain)

    assert runs["bad"]["state"] == "unreadable"
    assert file in runs["bad"]["problem"]
    assert "Is a directory" in runs["bad"]["problem"]
    assert runs["good"]["state"] == "stopped"


def test_a_folder_without_permission_is_named(
    segtrain: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run("good")
    make_run("private")
    exists = Path.exists

    def exists_or_denied(path: Path) -> bool:
        if path.parent.name == "private":
            raise PermissionError(13, "Permission denied", str(path))
        return exists(path)

    monkeypatch.setattr(Path, "exists", exists_or_denied)

    runs = list_runs(segtrain)

    assert runs["private"]["problem"] == "config.yaml: Permission denied"
    assert runs["good"]["state"] == "stopped"


@pytest.mark.parametrize("cut", [1, 10, 40])
def test_a_truncated_last_line_is_skipped(segtrain: Command, cut: int) -> None:
    path = make_run("killed", three_rows(0.3, 0.4, 0.9)) / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[: -1 - cut])

    run = list_runs(segtrain)["killed"]

    assert (run["epochs_done"], run["best_person_iou"], run["state"]) == (2, 0.4, "stopped")


def test_a_complete_last_line_without_a_newline_counts(segtrain: Command) -> None:
    path = make_run("whole", three_rows(0.3, 0.4, 0.9)) / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-1])

    assert list_runs(segtrain)["whole"]["best_epoch"] == 3


def test_a_truncated_first_line_counts_as_no_epoch(segtrain: Command) -> None:
    path = make_run("killed") / "metrics.jsonl"
    path.write_text('{"epoch": 1, "glob')

    assert list_runs(segtrain)["killed"]["epochs_done"] == 0


def test_values_that_are_not_finite_numbers_are_ignored(segtrain: Command) -> None:
    ious = [float("nan"), 0.4, float("inf"), None, "0.9", True, 0.4]
    make_run("odd", three_rows(*ious), epochs=9)
    make_run("only odd", three_rows(float("nan"), float("-inf")), epochs=9)
    nothing = make_run("nothing", three_rows())
    (nothing / "metrics.jsonl").write_text('{"epoch": 1}\n{"epoch": 2, "stage": 7}\n')

    runs = list_runs(segtrain)

    assert (runs["odd"]["best_person_iou"], runs["odd"]["best_epoch"]) == (0.4, 2)
    assert runs["only odd"]["best_person_iou"] is None
    assert (runs["nothing"]["best_epoch"], runs["nothing"]["epochs_done"]) == (None, 2)
    out = segtrain("runs").out
    assert "nan" not in out
    assert "inf" not in out


def test_finite_number() -> None:
    row = {"a": 1, "b": 0.5, "c": 10**400, "d": float("nan"), "e": False}
    assert [finite_number(row, key) for key in "abcdef"] == [1.0, 0.5, None, None, None, None]


def test_read_rows_of_a_missing_and_of_a_damaged_file() -> None:
    assert read_rows(Path("missing.jsonl")) == []
    Path("x.jsonl").write_text("{}\n")
    with pytest.raises(CheckpointError, match=r"x\.jsonl is damaged at line 1; "):
        read_rows(Path("x.jsonl"))


# --- Names and narrow terminals -----------------------------------------------------------------

ODD_NAMES = [
    "[red]not red[/red]".replace("/", "|"),
    "[/]".replace("/", ""),
    "ünï 人",
    "_$x$_",
    "-a",
]


@pytest.mark.parametrize("name", [*ODD_NAMES, "[bold]", "a\\[b]", "%s {x}"])
def test_names_are_printed_literally(segtrain: Command, name: str) -> None:
    make_run(name, three_rows())
    (make_run(f"{name} bad") / "config.yaml").write_text("]")

    out = segtrain("runs").out

    assert [line for line in out.splitlines() if line.startswith(f"{name} ") and "3/3" in line]
    assert f"\n{name} bad: config.yaml" in out
    assert set(list_runs(segtrain)) == {name, f"{name} bad"}


def test_names_cannot_send_terminal_control_sequences(segtrain: Command) -> None:
    make_run("a\x1b[2Jb\nc", three_rows())
    Path(os.fsdecode(b"runs/d\xff")).mkdir()
    (Path(os.fsdecode(b"runs/d\xff")) / "config.yaml").write_text("]")

    done = segtrain("runs")

    assert done.code == 0
    assert r"a\x1b[2Jb\nc" in done.out
    assert r"d\udcff: config.yaml" in done.out
    assert "\x1b" not in done.out
    assert len(list_runs(segtrain)) == 2


@pytest.mark.parametrize("columns", [80, 100])
def test_the_table_fits_the_terminal(
    segtrain: Command, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    long_name = "fc_densenet103-20260101-123456"
    make_run(long_name, three_rows(), epochs=1000, sets=["model.name=fc_densenet103"], age=1e7)
    make_run("unet-20260101-123456", three_rows(), epochs=1000, age=59 * 60)
    (make_run("broken") / "config.yaml").write_text("]")

    lines = segtrain("runs").out.splitlines()

    assert max(len(line.rstrip()) for line in lines) <= columns
    assert not any("…" in line for line in lines)
    [short] = [line for line in lines if line.startswith("unet-20260101-123456")]
    assert short.split()[1:] == ["unet", "0.5000", "(2)", "3/1000", "59", "min", "stopped"]
    # The long name is folded into the next line without loss.
    at = next(i for i, line in enumerate(lines) if line.startswith("fc_densenet103-"))
    folded = "".join(line.split()[0] for line in lines[at : at + (2 if columns == 80 else 1)])
    assert folded == long_name


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-100, "just now"),
        (4.9, "just now"),
        (5, "5 s"),
        (59.9, "59 s"),
        (60, "1 min"),
        (3599, "59 min"),
        (3600, "1 hour"),
        (86400, "1 day"),
        (6.9 * 86400, "6 days"),
        (7 * 86400, "1 week"),
        (30 * 86400, "1 month"),
        (364 * 86400, "12 months"),
        (730 * 86400, "2 years"),
    ],
)
def test_format_age(seconds: float, text: str) -> None:
    assert format_age(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 00 s"), (3599.4, "59 min 59 s"), (3725, "1 h 02 min")],
)
def test_format_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_escape_unprintable() -> None:
    assert escape_unprintable("ünï 人 [b]") == "ünï 人 [b]"
    assert escape_unprintable("a\tb\u202e\udcff") == r"a\tb\u202e\udcff"


# --- Comparison ---------------------------------------------------------------------------------


def compare_rows(out: str) -> dict[str, list[str]]:
    """Map the first cell of each line to the other cells."""
    cells = [[c.strip() for c in line.split("  ") if c.strip()] for line in out.splitlines()]
    return {first: others for first, *others in filter(None, cells)}


def test_comparison_as_tables(segtrain: Command) -> None:
    rows = [
        row(1, 0.2, 0.9, images_per_second=1.0, seconds=4000.0),
        row(2, 0.61, 0.5, images_per_second=52.0),
        row(3, 0.6, 0.41, images_per_second=50.0),
    ]
    make_run("a", rows, sets=["data.root=/data/[x]", "optim.lr=0.01", "model.base_channels=16"])
    make_run(
        "b",
        [row(1, 0.7, 0.2)],
        sets=["data.root=/data/y"],
        stages=[{"epochs": 2, "optim": {"lr": 0.1}}],
    )

    done = segtrain("runs", "--compare", "a", "b")

    assert (done.code, done.err) == (0, "")
    tables = compare_rows(done.out)
    assert tables.pop("curves: runs/compare-a-b.png") == []
    assert {key: tables.pop(key) for key in ("configuration", "metrics")} == {
        "configuration": ["a", "b"],
        "metrics": ["a", "b"],
    }
    assert {key: cells for key, cells in tables.items() if "─" not in key} == {
        "data.root": ["/data/[x]", "/data/y"],
        "optim.lr": ["0.01", "0.001"],
        "model.base_channels": ["16", "-"],
        "stages": ["[]", "[{epochs: 2, optim: {lr: 0.1}}]"],
        "best person IoU": ["0.6100", "0.7000"],
        "in epoch": ["2", "1"],
        "last training loss": ["0.4100", "0.2000"],
        "images per second": ["50.0", "40.0"],
        "total time": ["1 h 10 min", "1 min 40 s"],
        "epochs": ["3 of 3, finished", "1 of 5, stopped"],
    }


def test_comparison_as_json(segtrain: Command) -> None:
    make_run("a", three_rows(), sets=["optim.momentum=0.5"])
    make_run("b", sets=["model.base_channels=16"])

    done = segtrain("runs", "--compare", "b", "a", "--json", "--output", "deep/x.png")

    comparison = json.loads(done.out)
    assert comparison["differences"] == {
        "model.base_channels": [16, None],
        "optim.momentum": [0.0, 0.5],
    }
    assert [run["name"] for run in comparison["runs"]] == ["b", "a"]
    assert comparison["runs"][0]["best_person_iou"] is None
    assert comparison["runs"][1] == {
        "name": "a",
        "path": "runs/a",
        "state": "finished",
        "epochs_done": 3,
        "epochs_planned": 3,
        "best_person_iou": 0.5,
        "best_epoch": 2,
        "last_loss": 0.3,
        "images_per_second": 40.0,
        "seconds": 300.0,
    }
    assert comparison["cautions"] == []
    assert comparison["image"] == "deep/x.png"
    assert cv2.imread("deep/x.png") is not None


def test_runs_are_given_by_name_by_path_or_as_latest(segtrain: Command) -> None:
    make_run("a", three_rows())
    make_run("b", three_rows(), output="elsewhere")
    make_run("a", three_rows(), output="elsewhere")
    Path("runs/latest").symlink_to("a")

    assert segtrain("runs", "--compare", "latest", "elsewhere/b").code == 0
    assert Path("runs/compare-a-b.png").is_file()
    # Runs of the same name are labeled by their paths.
    done = segtrain("runs", "elsewhere", "--compare", "a", "runs/a")
    assert compare_rows(done.out)["metrics"] == ["elsewhere/a", "runs/a"]
    assert "the configurations are the same" in done.out


def test_a_run_name_precedes_a_path_of_that_name(segtrain: Command) -> None:
    make_run("a", three_rows())
    make_run("a", output=".")
    make_run("b", three_rows())

    done = segtrain("runs", "--compare", "a", "b")

    assert compare_rows(done.out)["epochs"][0] == "3 of 3, finished"


def test_the_current_directory_is_labeled_by_its_name(
    segtrain: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run("a", three_rows())
    make_run("b", three_rows())
    monkeypatch.chdir("runs/a")

    done = segtrain("runs", "..", "--compare", ".", "../b")

    assert compare_rows(done.out)["metrics"] == ["a", "b"]
    assert Path("../compare-a-b.png").is_file()


def test_the_better_iou_is_bold(segtrain: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run("a", three_rows(0.5))
    make_run("b", three_rows(0.75))
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")

    out = segtrain("runs", "--compare", "a", "b").out

    assert "\x1b[1m0.7500" in out
    assert "\x1b[1m0.5000" not in out


@pytest.mark.parametrize("option", [[], ["--output", "own.png"]])
def test_an_existing_plot_is_kept_without_overwrite(segtrain: Command, option: list[str]) -> None:
    make_run("a", three_rows())
    make_run("b", three_rows())
    path = Path(option[1] if option else "runs/compare-a-b.png")
    path.write_text("old")

    refused = segtrain("runs", "--compare", "a", "b", *option)

    assert refused.code == 2
    assert f"{path} exists; use --overwrite or another --output" in refused.err
    assert path.read_text() == "old"
    assert segtrain("runs", "--compare", "a", "b", *option, "--overwrite").code == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_names_too_long_for_a_file_need_an_output(segtrain: Command) -> None:
    for name in ("a" * 150, "b" * 150):
        make_run(name, three_rows())

    done = segtrain("runs", "--compare", "a" * 150, "b" * 150)

    assert done.code == 2
    [line] = done.error_lines
    assert line.endswith("File name too long; give another --output")


def test_two_runs_without_an_epoch_have_no_plot(segtrain: Command) -> None:
    make_run("a")
    make_run("b")

    done = segtrain("runs", "--compare", "a", "b")

    assert done.code == 0
    assert done.out.endswith("curves: none, because neither run has finished an epoch\n")
    assert compare_rows(done.out)["best person IoU"] == ["-", "-"]
    assert not list(Path("runs").glob("*.png"))


def test_incomparable_metrics_are_noted(segtrain: Command) -> None:
    make_run("a", three_rows())
    make_run("b", [row(1, **{"val/all_person_iou": 0.2})])
    make_run("c", three_rows(), sets=["loss.name=ce_dice"])
    make_run("d", three_rows(), stages=[{"epochs": 1, "optim": {"lr": 0.1}}])
    make_run("e", three_rows(), stages=[{"epochs": 1, "loss": {"name": "focal"}}])

    notes = {
        name: [
            line.split()[2]
            for line in segtrain("runs", "--compare", "a", name).out.splitlines()
            if line.startswith("note: ")
        ]
        for name in "bcde"
    }

    assert notes == {"b": ["validation"], "c": ["losses"], "d": [], "e": ["losses"]}


@pytest.mark.parametrize(("file", "code"), [("config.yaml", 2), ("metrics.jsonl", 4)])
def test_a_damaged_run_cannot_be_compared(segtrain: Command, file: str, code: int) -> None:
    make_run("a", three_rows())
    (make_run("b", three_rows()) / file).write_text("]\n")

    done = segtrain("runs", "--compare", "a", "b")

    assert done.code == code
    [line] = done.error_lines
    assert f"runs/b: {file} is" in line
    assert not list(Path("runs").glob("*.png"))


def test_a_run_without_a_configuration_cannot_be_compared(segtrain: Command) -> None:
    make_run("a", three_rows())
    Path("runs/b").mkdir()
    Path("runs/b/log.txt").write_text("")

    done = segtrain("runs", "--compare", "a", "b")

    assert done.code == 2
    assert "runs/b has no config.yaml yet" in done.err


# --- The plot -----------------------------------------------------------------------------------


def test_the_plot_has_the_metrics_of_both_runs() -> None:
    make_run("a", [row(1, 0.2, 0.9), row(2, float("nan"), None), row(3, 0.4, 0.5)])
    make_run("b", [row(1, 0.3, 0.8), row(2, 0.6, 0.7)])

    loss_axes, iou_axes = draw_curves(read_run_pair("a", "b", Path("runs"))).axes

    nan = float("nan")
    curves = [np.array(line.get_xydata()) for line in loss_axes.get_lines()]
    np.testing.assert_array_equal(curves[0], [[1, 0.9], [2, nan], [3, 0.5]])
    np.testing.assert_array_equal(curves[1], [[1, 0.8], [2, 0.7]])
    curves = [np.array(line.get_xydata()) for line in iou_axes.get_lines()]
    np.testing.assert_array_equal(curves[0], [[1, 0.2], [2, nan], [3, 0.4]])
    np.testing.assert_array_equal(curves[1], [[3, 0.4]])
    np.testing.assert_array_equal(curves[2], [[1, 0.3], [2, 0.6]])
    np.testing.assert_array_equal(curves[3], [[2, 0.6]])
    assert "IoU" in iou_axes.get_title(loc="left")
    assert "loss" in loss_axes.get_title(loc="left")
    assert loss_axes.get_ylim()[0] == 0
    for axes in (loss_axes, iou_axes):
        assert axes.get_xlabel() == "epoch"


def test_a_negative_loss_is_visible() -> None:
    make_run("a", [row(1, loss=0.5), row(2, loss=-2.0)])
    make_run("b")

    loss_axes, _ = draw_curves(read_run_pair("a", "b", Path("runs"))).axes

    assert loss_axes.get_ylim()[0] < -2


def test_each_run_has_one_color_and_the_colors_differ_in_lightness() -> None:
    for name in "ab":
        make_run(name, three_rows())

    figure = draw_curves(read_run_pair("a", "b", Path("runs")))

    colors = [[line.get_color() for line in axes.get_lines()] for axes in figure.axes]
    one, other = colors[0]
    assert colors[1] == [one, one, other, other]
    gray = [np.dot(to_rgb(color), [0.299, 0.587, 0.114]) for color in (one, other)]
    assert abs(gray[0] - gray[1]) > 0.2
    legend = figure.legends[0]
    assert [line.get_color() for line in legend.get_lines()] == [one, other]
    assert [text.get_text() for text in legend.get_texts()] == ["a, best 0.5000", "b, best 0.5000"]


@pytest.mark.parametrize("name", [*ODD_NAMES, "$broken", r"$\frac$", "x" * 200])
def test_any_name_can_be_drawn_in_the_plot(segtrain: Command, name: str) -> None:
    make_run(name, three_rows())
    make_run("other", three_rows())

    done = segtrain("runs", "--output", "odd.png", "--compare", f"runs/{name}", "other")

    assert (done.code, done.err) == (0, "")
    assert cv2.imread("odd.png") is not None
    if len(name) < 80:
        assert compare_rows(done.out)["metrics"] == [name, "other"]
    figure = draw_curves(read_run_pair(name, "other", Path("runs")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # characters that the font lacks
        figure.draw_without_rendering()
    width = figure.bbox.width
    for text in figure.legends[0].get_texts():
        box = text.get_window_extent()
        assert 0 <= box.x0 < box.x1 <= width
    entry = figure.legends[0].get_texts()[0].get_text()
    assert entry.endswith(", best 0.5000")
    assert entry.startswith(name if len(name) < 80 else "x" * 30)


@pytest.mark.parametrize("rows", [[row(1)], [row(1, None, None)], [row(1, -1, -2), row(2)]])
def test_few_or_odd_values_can_be_plotted(segtrain: Command, rows: list[dict[str, Any]]) -> None:
    make_run("a", rows)
    make_run("b")

    done = segtrain("runs", "--compare", "a", "b")

    assert (done.code, done.err) == (0, "")
    image = cv2.imread("runs/compare-a-b.png")
    assert image is not None
    assert min(image.shape[:2]) > 400


# --- A trained run ------------------------------------------------------------------------------


def test_a_trained_run_is_listed_and_compared(
    segtrain: Command, trained_run: Path, tmp_path: Path
) -> None:
    output = trained_run.parent
    rows = [json.loads(line) for line in (trained_run / "metrics.jsonl").read_text().splitlines()]
    best = max(rows, key=lambda row: row["val/person_iou"])

    run = list_runs(segtrain, str(output))["toy"]

    assert (run["state"], run["epochs_done"], run["epochs_planned"]) == ("finished", 2, 2)
    assert run["best_person_iou"] == best["val/person_iou"]
    assert run["best_epoch"] == best["epoch"]
    assert run["latest"]
    make_run("made", three_rows())
    plot = tmp_path / "both.png"
    done = segtrain("runs", "--compare", trained_run, "made", "--output", plot)
    assert done.code == 0
    assert compare_rows(done.out)["in epoch"] == [str(best["epoch"]), "2"]
    assert plot.is_file()
