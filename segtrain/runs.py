"""The folder of a run: where everything of it lies, and which checkpoint is meant."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from segtrain.errors import CheckpointError, ResourceError, UsageError

DEFAULT_OUTPUT = Path("runs")


@dataclass(frozen=True)
class RunFolder:
    """`runs/<name>/` with its configuration, numbers, pictures and checkpoints."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def curves(self) -> Path:
        return self.path / "curves.png"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def last(self) -> Path:
        return self.path / "checkpoints" / "last.pt"

    @property
    def previous(self) -> Path:
        """What `last` was before."""
        return self.path / "checkpoints" / "previous.pt"

    @property
    def damaged(self) -> Path:
        """A `last` that could not be read, for whoever wants to look at it."""
        return self.path / "checkpoints" / "damaged.pt"

    @property
    def best(self) -> Path:
        return self.path / "checkpoints" / "best.pt"

    def has_saved(self) -> bool:
        """Whether there is anything to continue from."""
        return self.last.exists() or self.previous.exists()

    def samples(self, epoch: int) -> Path:
        return self.path / "samples" / f"epoch_{epoch:04d}.jpg"


def create_run(
    output: Path, name: str | None, model_name: str, *, begin_again: bool = False
) -> RunFolder:
    """Make a new run folder; without a name it is called after the model and the time.

    Args:
        begin_again: take an existing folder that was stopped before its first checkpoint.

    Raises:
        UsageError: the name is no folder name, or a run of that name exists: it is kept.
        ResourceError: the folder cannot be made.
    """
    given = name is not None
    name = name or f"{model_name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if Path(name).name != name or name in {".", "..", "latest"}:
        raise UsageError(f"--name {name!r} must be a plain folder name")
    for attempt in range(100):
        # Two runs started in the same second both get a folder.
        run = RunFolder(output / (name if attempt == 0 else f"{name}-{attempt}"))
        try:
            run.path.mkdir(parents=True)
            return run
        except FileExistsError:
            if begin_again and run.path.is_dir() and not run.has_saved():
                return run
            if given:
                raise UsageError(
                    f"{run.path} exists already; continue it with --resume auto or choose "
                    "another --name"
                ) from None
        except OSError as error:
            raise ResourceError(
                f"cannot make {run.path}: {error.strerror}; choose another --output"
            ) from error
    raise UsageError(f"{output} is full of runs called {name}; choose a --name")


def point_latest_at(run: RunFolder) -> None:
    """Let `runs/latest` be `run`. A file system without links goes without."""
    link = run.path.parent / "latest"
    # In the run's own folder, where the next start sweeps what a kill leaves.
    temporary = run.path / f".latest.{os.getpid()}.tmp"
    try:
        # A killed process of the same pid (usual in containers) may have left one.
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(run.path.name)
        temporary.replace(link)
    except OSError:
        temporary.unlink(missing_ok=True)


def find_checkpoint(given: Path | None) -> tuple[Path, str]:
    """The checkpoint to use and how it was chosen.

    `given`, else $SEGTRAIN_CHECKPOINT, else the best one of the latest run. A run folder stands for
    its best checkpoint.

    Raises:
        CheckpointError: nothing is there.
    """
    environment = os.environ.get("SEGTRAIN_CHECKPOINT")
    if given is not None:
        path, chosen_by = given, "--checkpoint"
    elif environment:
        path, chosen_by = Path(environment), "$SEGTRAIN_CHECKPOINT"
    else:
        path, chosen_by = (DEFAULT_OUTPUT / "latest").resolve(), "the latest run"
        if not path.is_dir():
            raise CheckpointError(
                "there is no trained network in runs/ yet; run `segtrain train` or give "
                "--checkpoint"
            )
    if path.is_dir():
        path = RunFolder(path).best
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path} ({chosen_by}); train one first")
    return path, chosen_by


def find_resumable(resume: str, output: Path, name: str | None) -> list[Path]:
    """The checkpoints that `--resume` means, the newest first; none where `auto` finds nothing.

    auto: those of the run called `name` if one is given, else of the latest run in `output`. A
    folder stands for its last.pt and, should that be gone, its previous.pt.

    Raises:
        CheckpointError: a path is given and no checkpoint is there.
    """
    if resume == "auto":
        run = RunFolder((output / (name or "latest")).resolve())
        return [path for path in (run.last, run.previous) if path.is_file()]
    path = Path(resume).resolve()
    if path.is_dir():
        run = RunFolder(path)
        path = run.last if run.last.is_file() or not run.previous.is_file() else run.previous
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}; --resume auto would start afresh")
    if path.parent.name != "checkpoints":
        raise CheckpointError(f"{path} is in no run folder; give the folder, e.g. runs/latest")
    return [path]


def is_first_process() -> bool:
    """Whether this is the one of torchrun's processes that holds the run folder, or alone."""
    return os.environ.get("RANK", "0") == "0"


def meant_folder(resume: str | None, output: Path, name: str | None) -> Path | None:
    """The run folder that a training would work in, as far as it can be known beforehand."""
    if resume not in {None, "auto"}:
        path = Path(str(resume)).resolve()
        return path if path.is_dir() else path.parent.parent
    if name is None and resume is None:
        return None
    return (output / (name or "latest")).resolve()
