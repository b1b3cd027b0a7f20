"""From the command line to a run that can begin: configuration, data, run folder, resumed state."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from segtrain.checkpoint import Checkpoint, load_checkpoint
from segtrain.config import (
    SAFE_TO_CHANGE,
    Config,
    differing_keys,
    dump_yaml,
    load_config,
    tree_from_config,
)
from segtrain.data import Pictures, describe_roots, named_data_roots, open_pictures
from segtrain.data.demo import demo_people_root, is_demo_root
from segtrain.devices import resolve_device, resolve_precision
from segtrain.distributed import World
from segtrain.errors import CheckpointError, UsageError
from segtrain.files import sweep, write_text
from segtrain.locking import locked
from segtrain.models import build_model
from segtrain.models.encoder_unet import EncoderUNet
from segtrain.runs import RunFolder, create_run, find_resumable


@dataclass(frozen=True)
class Start:
    """All that `fit` needs, and what to tell the user about it."""

    config: Config
    run: RunFolder
    train_source: Pictures
    val_source: Pictures
    resumed: Checkpoint | None
    resumed_from: Path | None
    other_validation: bool
    """Whether the run was validated on other pictures before."""
    notes: list[str]
    warnings: list[str]
    world: World


@dataclass(frozen=True)
class _Resumed:
    checkpoint: Checkpoint
    path: Path


@contextmanager
def starting(
    yaml_path: Path | None,
    *,
    flags: Mapping[str, Any],
    sets: Sequence[str],
    resume: str | None,
    world: World,
) -> Iterator[Start]:
    """Resolve what is asked for and open the data; the run folder is made last, and held within.

    So a command with a mistake in it leaves nothing behind.

    Args:
        resume: a checkpoint, a run folder, "auto" or None.

    Raises:
        UserError: of any kind.
    """
    notes: list[str] = []
    warnings: list[str] = []
    asked = load_config(yaml_path, flags=flags, sets=sets)
    resumed = world.read_by_first(lambda: _find_resumed(resume, asked, warnings))
    if resume == "auto" and resumed is None:
        notes.append("nothing to resume: starting afresh")
    if resumed is not None:
        asked, changed = _continued_config(resumed, yaml_path, flags, sets, world)
        notes.append(_where_it_goes_on(resumed))
        if changed:
            notes.append(f"changed from here on: {', '.join(changed)}")
    _check_possible(asked, world, fresh=resumed is None)
    # The first process makes what is kept in caches.
    with world.first_alone():
        config, data_note = _with_data_root(asked)
        train_source, val_source = (open_pictures(config.data, split) for split in ("train", "val"))
    notes.append(data_note)
    data = resumed.checkpoint.data if resumed is not None else {}
    if data.get("train_manifest") not in {None, train_source.manifest}:
        warnings.append("the training pictures are not those that the run began with")
    if resumed is not None:
        warnings.extend(_other_step_size(resumed, asked, world))
    with ExitStack() as held:
        run_path = None
        if world.is_first:
            run = _run_folder(config, resumed, resume)
            held.enter_context(locked(run.path))
            sweep(run.path)
            if resumed is not None:
                _set_damaged_aside(run, resumed.path, warnings)
            run_path = str(run.path)
        run = RunFolder(Path(str(world.told_by_first(run_path))))
        config = replace(config, train=replace(config.train, name=run.path.name))
        if world.is_first:
            write_text(run.config, dump_yaml(config))
        yield Start(
            config,
            run,
            train_source,
            val_source,
            resumed.checkpoint if resumed is not None else None,
            resumed.path if resumed is not None else None,
            data.get("val_manifest") not in {None, val_source.manifest},
            notes,
            warnings,
            world,
        )


def _find_resumed(resume: str | None, asked: Config, warnings: list[str]) -> _Resumed | None:
    """The checkpoint to go on with; with `auto` an older one where the newest is damaged."""
    if resume is None:
        return None
    found = find_resumable(resume, Path(asked.train.output), asked.train.name)
    errors: list[CheckpointError] = []
    for path, older in zip_longest(found, found[1:]):
        try:
            return _Resumed(load_checkpoint(path), path)
        except CheckpointError as error:
            errors.append(error)
            if older is not None:
                warnings.append(f"{error}; going on with {older}, the one before")
    if len(errors) > 1:
        names = " nor ".join(path.name for path in found)
        raise CheckpointError(f"neither {names} can be used: {errors[0]}")
    if errors:
        raise errors[0]
    return None


def _set_damaged_aside(run: RunFolder, resumed_from: Path, warnings: list[str]) -> None:
    """Move a last.pt out of the way that nobody can use.

    The next save makes what is last.pt the previous one: it would take the place of the file that
    the run goes on with.
    """
    if resumed_from.name != run.previous.name or not run.last.exists():
        return
    try:
        load_checkpoint(run.last)
    except CheckpointError:
        run.last.replace(run.damaged)
        warnings.append(f"the damaged {run.last.name} is kept as {run.damaged}")


def _where_it_goes_on(resumed: _Resumed) -> str:
    loaded = resumed.checkpoint
    drawn = loaded.training.get("images_drawn")
    within = f", in the midst of the next at step {loaded.global_step}" if drawn else ""
    return f"continuing {resumed.path} after epoch {loaded.epoch}{within}"


def _run_folder(config: Config, resumed: _Resumed | None, resume: str | None) -> RunFolder:
    if resumed is not None:
        return RunFolder(resumed.path.parent.parent)
    return create_run(
        Path(config.train.output),
        config.train.name,
        config.model.name,
        begin_again=resume == "auto",
    )


def _check_possible(config: Config, world: World, *, fresh: bool) -> None:
    """Find a wrong device, network argument or weights file before anything is drawn or made."""
    device = resolve_device(config.train.device, world.local_rank if world.size > 1 else None)
    resolve_precision(config.train.precision, device)
    if config.train.tensorboard and find_spec("tensorboard") is None:
        raise UsageError("--tensorboard needs its package: pip install 'segtrain[tensorboard]'")
    with torch.device("meta"):
        model = build_model(config.model.name, **config.model.kwargs)
    if isinstance(model, EncoderUNet):
        if fresh:
            model.read_pretrained()
    elif config.train.freeze_encoder_epochs:
        raise UsageError(
            "train.freeze_encoder_epochs needs a network with an encoder, e.g. "
            "--set model.encoder=resnet34"
        )


def _continued_config(
    resumed: _Resumed,
    yaml_path: Path | None,
    flags: Mapping[str, Any],
    sets: Sequence[str],
    world: World,
) -> tuple[Config, list[str]]:
    """The run's own configuration with what the command line may safely change, and the changes."""
    before = resumed.checkpoint.config
    if not resumed.checkpoint.training:
        raise CheckpointError(f"{resumed.path} cannot be resumed; give the run's last.pt")
    config = load_config(yaml_path, base=tree_from_config(before), flags=flags, sets=sets)
    changed = differing_keys(before, config)
    safe = set(SAFE_TO_CHANGE)
    if before.train.images_a_step * _processes(resumed, world) == (
        config.train.images_a_step * world.size
    ):
        # The same steps in other pieces: the way on where memory has run out, or with fewer GPUs.
        safe |= {"train.batch_size", "train.accumulation_steps", "train.effective_batch"}
    unsafe = [key for key in changed if key not in safe]
    if unsafe:
        raise CheckpointError(
            # The names first: of a long line the middle is lost.
            f"not to be changed on resuming: {', '.join(unsafe)}, given otherwise than for "
            f"{resumed.path}; drop these options or start a new run"
        )
    return config, changed


def _processes(resumed: _Resumed, world: World) -> int:
    """How many have trained the run; earlier versions did not write it down."""
    number = resumed.checkpoint.training.get("num_processes")
    return number if type(number) is int and number > 0 else world.size


def _other_step_size(resumed: _Resumed, config: Config, world: World) -> Iterator[str]:
    """A warning where another number of processes makes larger or smaller steps."""
    before, train = _processes(resumed, world), config.train
    images = resumed.checkpoint.config.train.images_a_step * before
    now = train.images_a_step * world.size
    if images == now:
        return
    keeps = ""
    if images % world.size == 0:
        own = images // world.size
        keeps = f"; --batch-size {own} --set train.accumulation_steps=1 keeps them"
        if train.batch_size == "auto":
            keeps = f"; --set train.effective_batch={own} keeps them"
        elif own % train.batch_size == 0:
            keeps = f"; --set train.accumulation_steps={own // train.batch_size} keeps them"
    yield (
        f"the run had steps of {images} images on {before} processes, and on {world.size} of "
        f"{now}{keeps}"
    )


def _with_data_root(config: Config) -> tuple[Config, str]:
    named = named_data_roots(config.data.root)
    # The demo people of a resumed run may have been cleared from the cache: they are drawn anew.
    if named is not None and not any(map(is_demo_root, named[0])):
        roots, named_by = named
        note = f"data: {describe_roots(roots)}, by {named_by}"
    else:
        root = demo_people_root()
        roots = (root,)
        note = (
            f"data: drawn demo people in {root}, since neither --data nor $SEGTRAIN_DATA is given. "
            "For real people download COCO 2017 (cocodataset.org: train2017, val2017, annotations) "
            "and pass --data <its folder>"
        )
    names = tuple(map(str, roots))
    root_or_roots = names if len(names) > 1 else names[0]
    return replace(config, data=replace(config.data, root=root_or_roots)), note
