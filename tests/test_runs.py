"""Run folders: none is overwritten, and which checkpoint is meant is never a guess."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from segtrain.errors import CheckpointError, ResourceError, UsageError
from segtrain.runs import (
    RunFolder,
    create_run,
    find_checkpoint,
    find_resumable,
    meant_folder,
    point_latest_at,
)


@pytest.fixture(autouse=True)
def empty_folder_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`runs/latest` is looked for in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SEGTRAIN_CHECKPOINT", raising=False)


def trained(name: str, output: str = "runs", latest: bool = True) -> RunFolder:
    run = create_run(Path(output), name, "unet")
    run.last.parent.mkdir()
    for path in (run.last, run.best):
        path.write_text(f"{name}/{path.name}")
    if latest:
        point_latest_at(run)
    return run


# --- The folder ---------------------------------------------------------------------------------


def test_a_run_lies_where_the_design_says() -> None:
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


def test_create_run_makes_the_folder_and_its_parents() -> None:
    run = create_run(Path("deep/down/runs"), "first", "unet")
    assert run.path == Path("deep/down/runs/first")
    assert list(run.path.iterdir()) == []


def test_an_existing_run_is_kept() -> None:
    run = trained("mine")
    with pytest.raises(UsageError) as caught:
        create_run(Path("runs"), "mine", "unet")
    assert str(run.path) in str(caught.value)
    assert "--resume" in str(caught.value)
    assert run.best.read_text() == "mine/best.pt"


@pytest.mark.parametrize("name", ["a/b", "/tmp/a", "../a", "..", ".", "a/", "latest", "./a"])
def test_a_name_that_leaves_the_folder_or_shadows_latest_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="--name"):
        create_run(Path("runs"), name, "unet")
    assert not Path("runs").exists()


def test_two_runs_without_a_name_in_one_second_get_two_folders(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(time, "strftime", lambda form: "20200102-030405")
    names = [create_run(Path("runs"), None, "tiramisu").path.name for _ in range(3)]
    assert names[0] == "tiramisu-20200102-030405"
    assert len(set(names)) == 3
    assert {path.name for path in Path("runs").iterdir()} == set(names)


def test_a_run_without_a_name_is_called_after_the_model_and_the_time() -> None:
    before = time.strftime("tiramisu-%Y%m%d-%H%M%S")
    name = create_run(Path("runs"), None, "tiramisu").path.name
    assert before <= name <= time.strftime("tiramisu-%Y%m%d-%H%M%S")


def test_an_output_that_is_a_file_is_a_resource_error() -> None:
    Path("runs").write_text("in the way")
    with pytest.raises(ResourceError, match="--output"):
        create_run(Path("runs"), "a", "unet")


# --- latest -------------------------------------------------------------------------------------


def test_latest_is_the_run_pointed_at_last() -> None:
    for name in ("one", "two"):
        point_latest_at(create_run(Path("runs"), name, "unet"))
        assert Path("runs/latest").resolve().name == name
    assert {path.name for path in Path("runs").iterdir()} == {"one", "two", "latest"}


def test_latest_survives_moving_the_folder_of_all_runs() -> None:
    trained("one")
    Path("runs").rename("elsewhere")
    assert (Path("elsewhere/latest") / "checkpoints" / "best.pt").read_text() == "one/best.pt"


def test_a_folder_called_latest_is_left_alone() -> None:
    run = create_run(Path("runs"), "one", "unet")
    (run.path.parent / "latest").mkdir()
    (run.path.parent / "latest" / "kept").write_text("")
    point_latest_at(run)
    assert (run.path.parent / "latest" / "kept").exists()
    assert {path.name for path in Path("runs").iterdir()} == {"one", "latest"}


def test_without_links_latest_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*args: object, **kwargs: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "symlink", no_links)
    run = create_run(Path("runs"), "one", "unet")
    point_latest_at(run)
    assert list(Path("runs").iterdir()) == [run.path]


LEFT_BY_A_KILL = """
import os
from pathlib import Path
from segtrain.runs import create_run, point_latest_at
Path("runs").mkdir()
Path(f"runs/.latest.{os.getpid()}.tmp").symlink_to("gone")
point_latest_at(create_run(Path("runs"), "one", "unet"))
"""


def test_a_link_left_by_a_killed_run_of_the_same_pid_is_no_obstacle() -> None:
    """In a container the same program has the same pid every time."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", LEFT_BY_A_KILL], check=True, env=environment)
    assert Path("runs/latest").resolve().name == "one"


# --- Which checkpoint ---------------------------------------------------------------------------


def test_a_given_checkpoint_wins_over_the_environment_and_the_latest_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained("newest")
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


def test_the_latest_run_is_named_by_its_own_name() -> None:
    """`latest` may point elsewhere tomorrow; what was taken is printed."""
    trained("one")
    assert find_checkpoint(None)[0].parts[-4:] == ("runs", "one", "checkpoints", "best.pt")


@pytest.mark.parametrize("by_variable", [False, True])
def test_a_run_folder_stands_for_its_best_checkpoint(
    monkeypatch: pytest.MonkeyPatch, by_variable: bool
) -> None:
    run = trained("old", latest=False)
    trained("newest")
    monkeypatch.setenv("SEGTRAIN_CHECKPOINT", str(run.path))
    path, _ = find_checkpoint(None if by_variable else run.path)
    assert path.read_text() == "old/best.pt"


def test_a_missing_checkpoint_is_an_error_even_if_another_could_be_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained("newest")
    with pytest.raises(CheckpointError, match=r"missing\.pt.*--checkpoint"):
        find_checkpoint(Path("missing.pt"))
    monkeypatch.setenv("SEGTRAIN_CHECKPOINT", "absent.pt")
    with pytest.raises(CheckpointError, match=r"absent\.pt.*\$SEGTRAIN_CHECKPOINT"):
        find_checkpoint(None)


def test_with_nothing_trained_the_error_says_what_to_do() -> None:
    with pytest.raises(CheckpointError, match="segtrain train"):
        find_checkpoint(None)


def test_a_latest_run_without_a_checkpoint_is_an_error_that_names_it() -> None:
    point_latest_at(create_run(Path("runs"), "begun", "unet"))
    with pytest.raises(CheckpointError, match="begun"):
        find_checkpoint(None)


# --- What --resume means ------------------------------------------------------------------------


def test_auto_takes_the_named_run_else_the_latest() -> None:
    old = trained("old")
    trained("new")
    trained("aside", output="other")
    assert find_resumable("auto", Path("runs"), "old") == [old.last.resolve()]
    [newest] = find_resumable("auto", Path("runs"), None)
    assert newest.read_text() == "new/last.pt"
    assert newest.parts[-3] == "new"  # not `latest`, which may move on
    [elsewhere] = find_resumable("auto", Path("other"), None)
    assert elsewhere.read_text() == "aside/last.pt"


def test_auto_has_the_previous_one_in_reserve() -> None:
    run = trained("one")
    run.previous.write_text("")
    assert find_resumable("auto", Path("runs"), None) == [
        run.last.resolve(),
        run.previous.resolve(),
    ]
    run.last.unlink()
    assert find_resumable("auto", Path("runs"), None) == [run.previous.resolve()]
    assert find_resumable("runs/one", Path("runs"), None) == [run.previous.resolve()]


def test_auto_finds_nothing_where_nothing_is() -> None:
    assert find_resumable("auto", Path("runs"), None) == []
    create_run(Path("runs"), "begun", "unet")
    assert find_resumable("auto", Path("runs"), "begun") == []
    trained("new")
    assert find_resumable("auto", Path("runs"), "unheard-of") == []


def test_a_run_folder_stands_for_its_last_checkpoint() -> None:
    run = trained("one")
    run.previous.write_text("")
    for given in ("runs/one", "runs/latest", "runs/one/checkpoints/last.pt"):
        assert find_resumable(given, Path("elsewhere"), None) == [run.last.resolve()]


def test_any_checkpoint_of_a_run_can_be_resumed_from() -> None:
    run = trained("one")
    assert find_resumable(str(run.best), Path("runs"), None) == [run.best.resolve()]


@pytest.mark.parametrize("given", ["missing.pt", "runs/missing", "runs/begun", "runs"])
def test_a_path_with_no_checkpoint_is_an_error_and_no_fresh_start(given: str) -> None:
    trained("one")
    create_run(Path("runs"), "begun", "unet")
    with pytest.raises(CheckpointError, match=given.split("/")[-1]):
        find_resumable(given, Path("runs"), None)


def test_a_checkpoint_outside_a_run_folder_cannot_be_resumed() -> None:
    Path("alone.pt").write_text("")
    with pytest.raises(CheckpointError, match="run folder"):
        find_resumable("alone.pt", Path("runs"), None)


@pytest.mark.parametrize(
    ("resume", "name", "folder"),
    [
        (None, None, None),  # a new folder, called after the time
        (None, "mine", "runs/mine"),
        ("auto", "mine", "runs/mine"),
        ("auto", None, "runs/one"),
        ("runs/one", None, "runs/one"),
        ("runs/latest", None, "runs/one"),
        ("runs/one/checkpoints/last.pt", "other", "runs/one"),
    ],
)
def test_the_folder_that_a_training_means(
    resume: str | None, name: str | None, folder: str | None
) -> None:
    trained("one")
    meant = meant_folder(resume, Path("runs"), name)
    assert meant == (Path(folder).resolve() if folder else None)
