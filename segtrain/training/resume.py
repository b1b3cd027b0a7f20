"""Find the checkpoint that `--resume` continues from, and the configuration to continue with."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from segtrain.checkpoint import Checkpoint, load_checkpoint
from segtrain.config.resolve import config_to_dict, differing_keys
from segtrain.config.schema import SAFE_TO_CHANGE, Config
from segtrain.errors import CheckpointError
from segtrain.runs.folder import RunFolder, find_resumable
from segtrain.runtime.distributed import DistributedContext

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResumePoint:
    """The checkpoint that a run continues from."""

    checkpoint: Checkpoint
    path: Path

    @property
    def num_processes(self) -> int:
        """Processes that trained the run."""
        num_processes = self.checkpoint.training.get("num_processes")
        return num_processes if type(num_processes) is int and num_processes > 0 else 1

    @property
    def step_size(self) -> int:
        """Images per optimizer step, of all processes together."""
        return self.checkpoint.config.train.effective_batch_size * self.num_processes


def find_resume_point(resume: str | None, config: Config) -> ResumePoint | None:
    """Load the checkpoint to continue from; with `auto`, an older one if the newest is damaged.

    Args:
        resume: a checkpoint, a run folder, "auto" or None.

    Returns:
        None if `resume` is None, or if `auto` finds no run.

    Raises:
        CheckpointError: the checkpoint is missing or unusable.
    """
    if resume is None:
        return None
    paths = find_resumable(resume, Path(config.train.output), config.train.name)
    errors: list[CheckpointError] = []
    for path, older in zip_longest(paths, paths[1:]):
        try:
            point = ResumePoint(load_checkpoint(path), path)
        except CheckpointError as error:
            errors.append(error)
            if older is not None:
                log.warning(f"{error}; continuing with the previous checkpoint, {older}")
            continue
        seen = point.checkpoint.training.get("samples_seen")
        within = f", within the next at step {point.checkpoint.global_step}" if seen else ""
        log.info(f"continuing from {path} after epoch {point.checkpoint.epoch}{within}")
        return point
    if len(errors) > 1:
        names = " nor ".join(path.name for path in paths)
        raise CheckpointError(f"neither {names} can be used: {errors[0]}")
    if errors:
        raise errors[0]
    if resume == "auto":
        log.info("no run to resume: starting a new run")
    return None


def continued_config(
    point: ResumePoint, resolve: Callable[..., Config], world: DistributedContext
) -> Config:
    """Apply the command line to the configuration of the resumed run.

    Args:
        resolve: as in `segtrain.training.train.train`.

    Raises:
        CheckpointError: the checkpoint cannot be resumed, or an option must not change.
    """
    before = point.checkpoint.config
    if not point.checkpoint.training:
        raise CheckpointError(f"{point.path} cannot be resumed", "pass the run's last.pt")
    config = resolve(base=config_to_dict(before))
    changed = differing_keys(before, config)
    safe = set(SAFE_TO_CHANGE)
    if point.step_size == config.train.effective_batch_size * world.size:
        # The same steps in other micro-batches, e.g. after running out of memory or on fewer GPUs.
        safe |= {"train.batch_size", "train.accumulation_steps", "train.effective_batch"}
    unsafe = [key for key in changed if key not in safe]
    if unsafe:
        raise CheckpointError(
            # The names come first, because a long line loses its middle.
            f"cannot change {', '.join(unsafe)} when resuming {point.path}",
            "drop these options or start a new run",
        )
    if changed:
        log.info(f"changed from here on: {', '.join(changed)}")
    return config


def warn_of_other_step_size(point: ResumePoint, config: Config, world: DistributedContext) -> None:
    """Warn if the number of images per step changes with the number of processes."""
    train = config.train
    step_size = train.effective_batch_size * world.size
    if point.step_size == step_size:
        return
    hint = ""
    if point.step_size % world.size == 0:
        per_process = point.step_size // world.size
        options = f"--batch-size {per_process} --set train.accumulation_steps=1"
        if train.batch_size == "auto":
            options = f"--set train.effective_batch={per_process}"
        elif per_process % train.batch_size == 0:
            options = f"--set train.accumulation_steps={per_process // train.batch_size}"
        hint = f"; {options} keeps the step size"
    log.warning(
        f"the run took steps of {point.step_size} images on {point.num_processes} processes, and "
        f"takes steps of {step_size} on {world.size}{hint}"
    )


def set_damaged_aside(run: RunFolder, resumed_from: Path) -> None:
    """Rename a damaged last.pt if the run continues from previous.pt.

    The next save turns last.pt into previous.pt, and would overwrite the file that the run
    continues from.
    """
    if resumed_from.name != run.previous.name or not run.last.exists():
        return
    try:
        load_checkpoint(run.last)
    except CheckpointError:
        run.last.replace(run.damaged)
        log.warning(f"the damaged {run.last.name} is kept as {run.damaged}")
