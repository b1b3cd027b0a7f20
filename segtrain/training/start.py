"""From the command line to a run that can begin: configuration, data, run folder, resumed state."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from segtrain.devices import resolve_device
from segtrain.errors import CheckpointError, UsageError
from segtrain.files import write_text
from segtrain.models import build_model
from segtrain.models.encoder_unet import EncoderUNet
from segtrain.runs import RunFolder, create_run, find_last


@dataclass(frozen=True)
class Start:
    """All that `fit` needs, and what to tell the user about it."""

    config: Config
    run: RunFolder
    train_source: Pictures
    val_source: Pictures
    resumed: Checkpoint | None
    notes: list[str]


def prepare_start(
    yaml_path: Path | None,
    *,
    flags: Mapping[str, Any],
    sets: Sequence[str],
    resume: str | None,
) -> Start:
    """Resolve what is asked for and open the data; the run folder is made last.

    So a command with a mistake in it leaves nothing behind.

    Args:
        resume: a checkpoint, a run folder, "auto" or None.

    Raises:
        UserError: of any kind.
    """
    notes: list[str] = []
    asked = load_config(yaml_path, flags=flags, sets=sets)
    last = find_last(resume, Path(asked.train.output), asked.train.name) if resume else None
    if resume == "auto" and last is None:
        notes.append("nothing to resume: starting afresh")
    resumed = None
    if last is not None:
        resumed = load_checkpoint(last)
        asked, changed = _continued_config(resumed, last, yaml_path, flags, sets)
        notes.append(f"continuing {last} after epoch {resumed.epoch}")
        if changed:
            notes.append(f"changed from here on: {', '.join(changed)}")
    _check_possible(asked, fresh=last is None)
    config, data_note = _with_data_root(asked)
    notes.append(data_note)
    train_source, val_source = (open_pictures(config.data, split) for split in ("train", "val"))
    if resumed is not None and resumed.data.get("train_manifest") not in {
        None,
        train_source.manifest,
    }:
        notes.append("warning: the training pictures are not those that the run began with")
    if last is not None:
        run = RunFolder(last.parent.parent)
    else:
        run = create_run(
            Path(config.train.output),
            config.train.name,
            config.model.name,
            begin_again=resume == "auto",
        )
    config = replace(config, train=replace(config.train, name=run.path.name))
    write_text(run.config, dump_yaml(config))
    return Start(config, run, train_source, val_source, resumed, notes)


def _check_possible(config: Config, *, fresh: bool) -> None:
    """Find a wrong device, network argument or weights file before anything is drawn or made."""
    resolve_device(config.train.device)
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
    resumed: Checkpoint,
    last: Path,
    yaml_path: Path | None,
    flags: Mapping[str, Any],
    sets: Sequence[str],
) -> tuple[Config, list[str]]:
    """The run's own configuration with what the command line may safely change, and the changes."""
    if not resumed.training:
        raise CheckpointError(f"{last} cannot be resumed; give the run's last.pt")
    base = tree_from_config(resumed.config)
    config = load_config(yaml_path, base=base, flags=flags, sets=sets)
    changed = differing_keys(resumed.config, config)
    unsafe = [key for key in changed if key not in SAFE_TO_CHANGE]
    if unsafe:
        raise CheckpointError(
            f"{last} was trained with other values of {', '.join(unsafe)}; "
            "drop these options or start a new run"
        )
    return config, changed


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
