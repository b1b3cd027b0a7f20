"""Run folders are never overwritten, and the choice of the checkpoint is unambiguous."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from segtrain.errors import CheckpointError, ResourceError, UsageError
from segtrain.runs.folder import (
    RunFolder,
    create_run,
    find_checkpoint,
    find_resumable,
    point_latest_at,
    resolve_run_dir,
)


@pytest.fixture(autouse=True)
def empty_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`runs/latest` is relative to the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SEGTRAIN_CHECKPOINT", raising=False)


def make_trained_run(name: str, output: str = "runs", latest: bool = True) -> RunFolder:
    run = create_run(Path(output), name, "unet")
    run.last.parent.mkdir()
    for path in (run.last, run.best):
        path.write_text(f"{name}/{path.name}")
    if latest:
        point_latest_at(run)
    return run


# --- The folder ---------------------------------------------------------------------------------


def test_the_layout_of_a_run_folder() -> None:
    run = RunFolder(Path("runs/a"))
    assert [str(path) for path in (run.config, run.metrics, run.curves, run.log)] == [
        "runs/a/config.yaml",
        "runs/a/metrics.jsonl",
        "runs/a/curves.png",
        "runs/a/log.txt",
    ]
    assert str(run.last) == "runs/a/checkpoints/last.pt"
    assert str(run.best) == "runs/a/checkpoints/best.pt"
    assert str(run.samples(5)) == "runs/a/samples/epoch_0005.jpg"


def test_create_run_creates_the_folder_and_its_parents() -> None:
    run = create_run(Path("deep/down/runs"), "first", "unet")
    assert run.path == Path("deep/down/runs/first")
    assert list(run.path.iterdir()) == []


def test_an_existing_run_is_kept() -> None:
    run = make_trained_run("first")
    with pytest.raises(UsageError) as caught:
        create_run(Path("runs"), "first", "unet")
    assert str(run.path) in str(caught.value)
    assert "--resume" in str(caught.value)
    assert run.best.read_text() == "first/best.pt"


@pytest.mark.parametrize("name", ["a/b", "/tmp/a", "../a", "..", ".", "a/", "latest", "./a"])
def test_a_name_outside_the_folder_or_equal_to_latest_is_rejected(name: str) -> None:
    with pytest.raises(UsageError, match="--name"):
        create_run(Path("runs"), name, "unet")
    assert not Path("runs").exists()


def test_unnamed_runs_of_the_same_second_get_different_folders(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(time, "strftime", lambda form: "20200102-030405")
    names = [create_run(Path("runs"), None, "tiramisu").path.name for _ in range(3)]
    assert names[0] == "tiramisu-20200102-030405"
    assert len(set(names)) == 3
    assert {path.name for path in Path("runs").iterdir()} == set(names)


def test_an_unnamed_run_is_named_after_the_model_and_the_time() -> None:
    before = time.strftime("tiramisu-%Y%m%d-%H%M%S")
    name = create_run(Path("runs"), None, "tiramisu").path.name
    assert before <= name <= time.strftime("tiramisu-%Y%m%d-%H%M%S")


def test_an_output_that_is_a_file_is_a_resource_error() -> None:
    Path("runs").write_text("in the way")
    with pytest.raises(ResourceError, match="--output"):
        create_run(Path("runs"), "a", "unet")


# --- latest -------------------------------------------------------------------------------------


def test_latest_points_at_the_newest_run() -> None:
    for name in ("one", "two"):
        point_latest_at(create_run(Path("runs"), name, "unet"))
        assert Path("runs/latest").resolve().name == name
    assert {path.name for path in Path("runs").iterdir()} == {"one", "two", "latest"}


def test_latest_still_works_after_moving_the_folder_of_all_runs() -> None:
    make_trained_run("one")
    Path("runs").rename("elsewhere")
    assert (Path("elsewhere/latest") / "checkpoints" / "best.pt").read_text() == "one/best.pt"


def test_a_folder_named_latest_is_kept() -> None:
    run = create_run(Path("runs"), "one", "unet")
    (run.path.parent / "latest").mkdir()
    (run.path.parent / "latest" / "kept").write_text("")
    point_latest_at(run)
    assert (run.path.parent / "latest" / "kept").exists()
    assert {path.name for path in Path("runs").iterdir()} == {"one", "latest"}


def test_a_file_system_without_links_is_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_unsupported(*args: object, **kwargs: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "symlink", raise_unsupported)
    run = create_run(Path("runs"), "one", "unet")
    point_latest_at(run)
    assert list(Path("runs").iterdir()) == [run.path]


AFTER_A_KILL = """
import os
from pathlib import Path
from segtrain.runs.folder import create_run, point_latest_at
Path("runs").mkdir()
Path(f"runs/.latest.{os.getpid()}.tmp").symlink_to("gone")
point_latest_at(create_run(Path("runs"), "one", "unet"))
"""


def test_a_temporary_link_of_a_killed_process_with_the_same_pid_is_replaced() -> None:
    """In a container, the same program usually has the same pid."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", AFTER_A_KILL], check=True, env=environment)
    assert Path("runs/latest").resolve().name == "one"


# --- find_checkpoint ----------------------------------------------------------------------------


def test_the_option_precedes_the_environment_and_the_latest_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_trained_run("newest")
    for name in ("flag", "variable"):
        Path(f"{name}.pt").write_text(name)
    monkeypatch.setenv("SEGTRAIN_CHECKPOINT", "variable.pt")
    assert find_checkpoint(Path("flag.pt")) == (Path("flag.pt"), "--checkpoint")
    assert find_checkpoint(None) == (Path("variable.pt"), "$SEGTRAIN_CHECKPOINT")
    monkeypatch.delenv("SEGTRAIN_CHECKPOINT")
    path, chosen_by = find_checkpoint(None)
    assert (path.read_text(), chosen_by) == ("newest/best.pt", "the latest run")
    monkeypatch.setenv("SEGTRAIN_CHECKPOINT", "")
    assert find_checkpoint(None) == (path, chosen_by)


def test_the_latest_run_is_resolved_to_its_own_name() -> None:
    """`latest` may point elsewhere later, and the path is printed."""
    make_trained_run("one")
    assert find_checkpoint(None)[0].parts[-4:] == ("runs", "one", "checkpoints", "best.pt")


@pytest.mark.parametrize("by_variable", [False, True])
def test_a_run_folder_means_its_best_checkpoint(
    monkeypatch: pytest.MonkeyPatch, by_variable: bool
) -> None:
    run = make_trained_run("old", latest=False)
    make_trained_run("newest")
    monkeypatch.setenv("SEGTRAIN_CHECKPOINT", str(run.path))
    path, _ = find_checkpoint(None if by_variable else run.path)
    assert path.read_text() == "old/best.pt"


def test_a_missing_checkpoint_is_an_error_even_if_there_is_a_latest_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_trained_run("newest")
    with pytest.raises(CheckpointError, match=r"missing\.pt.*--checkpoint"):
        find_checkpoint(Path("missing.pt"))
    monkeypatch.setenv("SEGTRAIN_CHECKPOINT", "absent.pt")
    with pytest.raises(CheckpointError, match=r"absent\.pt.*\$SEGTRAIN_CHECKPOINT"):
        find_checkpoint(None)


def test_without_any_run_the_error_names_the_train_command() -> None:
    with pytest.raises(CheckpointError, match="segtrain train"):
        find_checkpoint(None)


def test_a_latest_run_without_a_checkpoint_is_an_error_that_names_the_run() -> None:
    point_latest_at(create_run(Path("runs"), "begun", "unet"))
    with pytest.raises(CheckpointError, match="begun"):
        find_checkpoint(None)


# --- --resume -----------------------------------------------------------------------------------


def test_auto_means_the_named_run_or_the_latest() -> None:
    old = make_trained_run("old")
    make_trained_run("new")
    make_trained_run("aside", output="other")
    assert find_resumable("auto", Path("runs"), "old") == [old.last.resolve()]
    [newest] = find_resumable("auto", Path("runs"), None)
    assert newest.read_text() == "new/last.pt"
    assert newest.parts[-3] == "new"  # resolved from `latest`, which may point elsewhere later
    [elsewhere] = find_resumable("auto", Path("other"), None)
    assert elsewhere.read_text() == "aside/last.pt"


def test_auto_falls_back_to_the_previous_checkpoint() -> None:
    run = make_trained_run("one")
    run.previous.write_text("")
    assert find_resumable("auto", Path("runs"), None) == [
        run.last.resolve(),
        run.previous.resolve(),
    ]
    run.last.unlink()
    assert find_resumable("auto", Path("runs"), None) == [run.previous.resolve()]
    assert find_resumable("runs/one", Path("runs"), None) == [run.previous.resolve()]


def test_auto_finds_nothing_without_a_checkpoint() -> None:
    assert find_resumable("auto", Path("runs"), None) == []
    create_run(Path("runs"), "begun", "unet")
    assert find_resumable("auto", Path("runs"), "begun") == []
    make_trained_run("new")
    assert find_resumable("auto", Path("runs"), "unknown") == []


def test_a_run_folder_means_its_last_checkpoint() -> None:
    run = make_trained_run("one")
    run.previous.write_text("")
    for resume in ("runs/one", "runs/latest", "runs/one/checkpoints/last.pt"):
        assert find_resumable(resume, Path("elsewhere"), None) == [run.last.resolve()]


def test_any_checkpoint_of_a_run_can_be_resumed() -> None:
    run = make_trained_run("one")
    assert find_resumable(str(run.best), Path("runs"), None) == [run.best.resolve()]


@pytest.mark.parametrize("resume", ["missing.pt", "runs/missing", "runs/begun", "runs"])
def test_a_path_without_a_checkpoint_is_an_error(resume: str) -> None:
    make_trained_run("one")
    create_run(Path("runs"), "begun", "unet")
    with pytest.raises(CheckpointError, match=resume.split("/")[-1]):
        find_resumable(resume, Path("runs"), None)


def test_a_checkpoint_outside_a_run_folder_cannot_be_resumed() -> None:
    Path("alone.pt").write_text("")
    with pytest.raises(CheckpointError, match="run folder"):
        find_resumable("alone.pt", Path("runs"), None)


@pytest.mark.parametrize(
    ("resume", "name", "run_dir"),
    [
        (None, None, None),  # a new folder, named after the time
        (None, "new", "runs/new"),
        ("auto", "new", "runs/new"),
        ("auto", None, "runs/one"),
        ("runs/one", None, "runs/one"),
        ("runs/latest", None, "runs/one"),
        ("runs/one/checkpoints/last.pt", "other", "runs/one"),
    ],
)
def test_resolve_run_dir(resume: str | None, name: str | None, run_dir: str | None) -> None:
    make_trained_run("one")
    resolved = resolve_run_dir(resume, Path("runs"), name)
    assert resolved == (Path(run_dir).resolve() if run_dir else None)
