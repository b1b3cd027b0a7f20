"""The layout of a run folder, its creation, and which checkpoint a command uses."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from segtrain.errors import CheckpointError, ResourceError, UsageError

DEFAULT_OUTPUT = Path("runs")


@dataclass(frozen=True)
class RunFolder:
    """Paths in `runs/<name>/`: configuration, metrics, images and checkpoints."""

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
        """The `last` before the current one."""
        return self.path / "checkpoints" / "previous.pt"

    @property
    def damaged(self) -> Path:
        """A `last` that could not be read, kept for inspection."""
        return self.path / "checkpoints" / "damaged.pt"

    @property
    def best(self) -> Path:
        return self.path / "checkpoints" / "best.pt"

    def has_saved(self) -> bool:
        """Whether there is a checkpoint to resume from."""
        return self.last.exists() or self.previous.exists()

    def samples(self, epoch: int) -> Path:
        return self.path / "samples" / f"epoch_{epoch:04d}.jpg"


def create_run(
    output: Path, name: str | None, model_name: str, *, reuse_unsaved: bool = False
) -> RunFolder:
    """Create a run folder; without a name, it is named after the model and the time.

    Args:
        reuse_unsaved: reuse an existing folder without a checkpoint to resume from.

    Raises:
        UsageError: the name is not a folder name, or a run of that name exists; it is kept.
        ResourceError: the folder cannot be created.
    """
    has_name = name is not None
    name = name or f"{model_name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if Path(name).name != name or name in {".", "..", "latest"}:
        raise UsageError(f"invalid --name {name!r}", "use a plain folder name")
    for attempt in range(100):
        # Two runs that start in the same second get different folders.
        run = RunFolder(output / (name if attempt == 0 else f"{name}-{attempt}"))
        try:
            run.path.mkdir(parents=True)
            return run
        except FileExistsError:
            if reuse_unsaved and run.path.is_dir() and not run.has_saved():
                return run
            if has_name:
                raise UsageError(
                    f"{run.path} already exists",
                    "continue it with --resume auto or choose another --name",
                ) from None
        except OSError as error:
            raise ResourceError(
                f"cannot create {run.path}: {error.strerror}", "choose another --output"
            ) from error
    raise UsageError(f"{output} has too many runs named {name}", "choose a --name")


def point_latest_at(run: RunFolder) -> None:
    """Point the link `runs/latest` at `run`; does nothing on a file system without links."""
    link = run.path.parent / "latest"
    # In the run's own folder, where the next start removes temporary files of killed processes.
    temporary = run.path / f".latest.{os.getpid()}.tmp"
    try:
        # A killed process with the same pid, common in containers, may have left one.
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(run.path.name)
        temporary.replace(link)
    except OSError:
        temporary.unlink(missing_ok=True)


def find_checkpoint(path: Path | None) -> tuple[Path, str]:
    """Return the checkpoint to use, and how it was chosen.

    Uses `path`, or $SEGTRAIN_CHECKPOINT, or the best checkpoint of the latest run, in this order.
    For a run folder, returns its best checkpoint.

    Raises:
        CheckpointError: there is no checkpoint.
    """
    environment = os.environ.get("SEGTRAIN_CHECKPOINT")
    if path is not None:
        chosen_by = "--checkpoint"
    elif environment:
        path, chosen_by = Path(environment), "$SEGTRAIN_CHECKPOINT"
    else:
        path, chosen_by = (DEFAULT_OUTPUT / "latest").resolve(), "the latest run"
        if not path.is_dir():
            raise CheckpointError(
                "no trained network in runs/ yet", "run `segtrain train` or give --checkpoint"
            )
    if path.is_dir():
        path = RunFolder(path).best
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path} ({chosen_by})", "train one first")
    return path, chosen_by


def find_resumable(resume: str, output: Path, name: str | None) -> list[Path]:
    """Return the checkpoints for `--resume`, newest first; empty if `auto` finds none.

    `auto` means the run called `name`, or the latest run in `output` if `name` is None. A folder
    means its last.pt, or its previous.pt if last.pt is missing.

    Raises:
        CheckpointError: there is no checkpoint at the given path.
    """
    if resume == "auto":
        run = RunFolder((output / (name or "latest")).resolve())
        return [path for path in (run.last, run.previous) if path.is_file()]
    path = Path(resume).resolve()
    if path.is_dir():
        run = RunFolder(path)
        path = run.last if run.last.is_file() or not run.previous.is_file() else run.previous
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}", "use --resume auto to start a new run")
    if path.parent.name != "checkpoints":
        raise CheckpointError(f"{path} is not in a run folder", "give the folder, e.g. runs/latest")
    return [path]


def resolve_run_dir(resume: str | None, output: Path, name: str | None) -> Path | None:
    """Return the run folder that training would use; None if it is not known yet."""
    if resume not in {None, "auto"}:
        path = Path(str(resume)).resolve()
        return path if path.is_dir() else path.parent.parent
    if name is None and resume is None:
        return None
    return (output / (name or "latest")).resolve()


def is_main_process() -> bool:
    """Whether this process is torchrun's rank 0, which owns the run folder, or runs alone."""
    return os.environ.get("RANK", "0") == "0"
