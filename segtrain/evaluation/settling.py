"""What `segtrain eval` was asked for, and what that means, settled before anything is judged."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from segtrain.asking import Asking
from segtrain.checkpoint import Checkpoint, load_checkpoint, restore_model
from segtrain.config import Config, DataConfig, load_config, tree_from_config
from segtrain.data import Pictures, describe_roots, named_data_roots, open_pictures
from segtrain.data.loading import train_batches
from segtrain.data.transforms import train_transform
from segtrain.data.workers import resolve_workers, worker_errors
from segtrain.devices import autocast_for, describe_device, move_model
from segtrain.distributed import World
from segtrain.errors import DataError, UsageError
from segtrain.evaluation.candidates import Candidate, MasksCandidate, NetworkCandidate
from segtrain.evaluation.judgement import Exam, Manner, Subject
from segtrain.evaluation.mask_folder import MaskFolder
from segtrain.evaluation.mean_mask import MeanMask, mean_mask
from segtrain.evaluation.wishes import Wishes
from segtrain.models.batch_norm import NUM_TO_RECALIBRATE, recalibrate
from segtrain.progress import progress_bar
from segtrain.runs import find_checkpoint

Tell = Callable[[str], object]
Roots = tuple[Path, ...]

# The keys of `data.` that say which pictures are judged and what is person in them.
_SELECTION = {f.name for f in fields(DataConfig)} - {
    *("root", "weights", "image_size", "augment", "scale", "whole", "workers"),
}
# More pictures change the mean of their masks by nothing that matters.
_NUM_FOR_MEAN = 1000


@dataclass(frozen=True, kw_only=True)
class Settled:
    """Who is judged on what.

    mean_mask: of the training pictures; None if there are none.
    """

    candidate: Candidate
    subject: Subject
    manner: Manner
    exam: Exam
    pictures: Pictures
    mean_mask: MeanMask | None


def settle(wishes: Wishes, *, device: torch.device, world: World, tell: Tell) -> Settled:
    """Open the checkpoint or the folder of masks, and the pictures.

    Raises:
        UserError: of any kind.
        Stopped: a signal came.
    """
    if wishes.predictions is not None:
        return _settle_masks(wishes, wishes.predictions, world, tell)
    return _settle_network(wishes, device, world, tell)


def _settle_network(wishes: Wishes, device: torch.device, world: World, tell: Tell) -> Settled:
    path, chosen_by = find_checkpoint(wishes.checkpoint)
    loaded = load_checkpoint(path)
    model = restore_model(loaded, path)
    move_model(model, device)
    tell(f"checkpoint: {path} ({chosen_by}), device: {describe_device(device)}")
    roots, data_chosen_by = _roots_to_judge(wishes, loaded)
    config = _with_selection(loaded.config, roots, wishes.sets)
    pictures = _open(wishes, config, roots, data_chosen_by, world, tell)
    num_trained_on = _num_trained_on(loaded, pictures)
    if num_trained_on:
        tell(
            f"warning: {num_trained_on} of {len(pictures)} pictures were trained on; "
            "what is measured on them says little about others"
        )
    manner = Manner(
        threshold=wishes.threshold,
        size=wishes.size or config.data.image_size,
        bn=wishes.bn or config.train.bn_eval,
        tta=wishes.tta,
        tile=wishes.tile,
        limit=wishes.limit,
    )
    return Settled(
        candidate=_network(wishes, config, manner, model, tell),
        subject=Subject(kind="checkpoint", path=path, model=config.model.name),
        manner=manner,
        exam=_exam(wishes, roots, pictures, num_trained_on),
        pictures=pictures,
        mean_mask=_mean_mask(config, world, tell),
    )


def _settle_masks(wishes: Wishes, path: Path, world: World, tell: Tell) -> Settled:
    folder = MaskFolder(path)
    tell(f"masks: {path}")
    named = named_data_roots(wishes.data)
    if named is None:
        raise UsageError("--predictions needs --data, the pictures and their true masks")
    roots, data_chosen_by = named
    config = _with_selection(Config(), roots, wishes.sets)
    pictures = _open(wishes, config, roots, data_chosen_by, world, tell)
    return Settled(
        candidate=MasksCandidate(folder=folder),
        subject=Subject(kind="predictions", path=path, model=None),
        manner=Manner(threshold=wishes.threshold, limit=wishes.limit),
        exam=_exam(wishes, roots, pictures, 0),
        pictures=pictures,
        mean_mask=_mean_mask(config, world, tell),
    )


def _network(
    wishes: Wishes, config: Config, manner: Manner, model: nn.Module, tell: Tell
) -> NetworkCandidate:
    assert manner.size is not None
    assert manner.bn is not None
    device = next(model.parameters()).device
    loading: dict[str, Any] = {
        "workers": resolve_workers(wishes.workers),
        "pin_memory": device.type == "cuda",
    }
    # The network of a run that recalibrates has been measured; only for others it is done here.
    if manner.bn == "recalibrate" and config.train.bn_eval != "recalibrate":
        tell("measuring batch norm's statistics on training images")
        _recalibrate(model, config, device, loading)
    return NetworkCandidate(
        model=model,
        asking=Asking(short_side=manner.size, tta=manner.tta, tile=manner.tile),
        bn=manner.bn,
        batch_size=wishes.batch_size,
        loading=loading,
    )


def _recalibrate(
    model: nn.Module, config: Config, device: torch.device, loading: dict[str, Any]
) -> None:
    """Measure batch norm's statistics anew, on training images as training shows them."""
    batches = train_batches(
        open_pictures(config.data, "train"),
        train_transform(config.data),
        batch_size=config.train.images_at_once,
        seed=config.train.seed,
        **loading,
    )
    total = min(NUM_TO_RECALIBRATE, batches.num_images)
    with progress_bar(total=total, desc="measuring") as bar, worker_errors(batches.watched):
        autocast = autocast_for("fp32", device)
        recalibrate(model, batches, device=device, autocast=autocast, on_batch=bar.update)


def _open(
    wishes: Wishes, config: Config, roots: Roots, chosen_by: str, world: World, tell: Tell
) -> Pictures:
    tell(f"data: {describe_roots(roots)}, by {chosen_by}")
    with world.first_alone():  # the others find in the cache what it has measured
        pictures = open_pictures(config.data, wishes.split)
    for note in pictures.notes:
        tell(note)
    for reason, count in pictures.skipped.items():
        tell(f"warning: {count} left out, {reason}")
    return pictures if wishes.limit is None else pictures.spread(wishes.limit)


def _exam(wishes: Wishes, roots: Roots, pictures: Pictures, num_trained_on: int) -> Exam:
    return Exam(
        data=roots,
        split=wishes.split,
        manifest=pictures.manifest,
        num_damaged=0,
        num_trained_on=num_trained_on,
    )


def _mean_mask(config: Config, world: World, tell: Tell) -> MeanMask | None:
    """Of the training pictures; taken once, by the first process."""
    found = None
    with world.first_alone():
        if world.is_first:
            try:
                pictures = open_pictures(config.data, "train")
                found = mean_mask(pictures.spread(_NUM_FOR_MEAN))
            except DataError as error:
                tell(f"no mean mask, for there are no training pictures here: {error}")
    return world.told_by_first(found)


def _roots_to_judge(wishes: Wishes, loaded: Checkpoint) -> tuple[Roots, str]:
    """The data to judge on, and by what it was chosen."""
    named = named_data_roots(wishes.data)
    if named is not None:
        return named
    named = named_data_roots(loaded.config.data.root)
    if named is None or not all(root.is_dir() for root in named[0]):
        raise UsageError("the data this network was trained on is not here; give --data")
    return named[0], "what the network was trained on"


def _with_selection(config: Config, roots: Roots, sets: Sequence[str]) -> Config:
    """The configuration of the run, on this data and with another selection where one is given."""
    for assignment in sets:
        key = assignment.partition("=")[0]
        if key.removeprefix("data.") not in _SELECTION:
            raise UsageError(
                f"--set {key} does not belong to eval; it takes data. and one of "
                f"{', '.join(sorted(_SELECTION))}"
            )
    root = tuple(map(str, roots))
    data = replace(config.data, root=root if len(root) > 1 else root[0], weights=None)
    return load_config(None, base=tree_from_config(replace(config, data=data)), sets=sets)


def _num_trained_on(loaded: Checkpoint, pictures: Pictures) -> int:
    """How many of the pictures the network has seen in training."""
    known = loaded.data.get("train_identities")
    if not isinstance(known, torch.Tensor) or known.dtype != torch.int64:
        return 0
    return int(np.isin(pictures.catalog.identities.view(np.int64), known.numpy()).sum())
