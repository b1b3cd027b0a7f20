"""`segtrain eval`: which checkpoint, which data, and the numbers."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn

from segtrain.checkpoint import Checkpoint, load_checkpoint, restore_model
from segtrain.config import BnEval, Config, DataConfig, load_config, tree_from_config
from segtrain.data import Pictures, describe_roots, named_data_roots, open_pictures
from segtrain.data.loading import Batches, eval_batches, train_batches
from segtrain.data.transforms import train_transform
from segtrain.data.workers import resolve_workers, worker_errors
from segtrain.devices import autocast_for, describe_device, move_model, resolve_device
from segtrain.errors import UsageError
from segtrain.evaluation.evaluate import evaluate
from segtrain.evaluation.metrics import SegmentationMetrics
from segtrain.models.batch_norm import NUM_TO_RECALIBRATE, recalibrate
from segtrain.progress import progress_bar
from segtrain.runs import find_checkpoint

JSON_VERSION = 1

# The keys of `data.` that say which pictures are judged and what is person in them.
_SELECTION = {f.name for f in fields(DataConfig)} - {
    *("root", "weights", "image_size", "augment", "scale", "whole", "workers"),
}


@dataclass(frozen=True)
class Judgement:
    """What was judged, on what, and the result."""

    checkpoint: Path
    data: tuple[Path, ...]
    split: str
    num_images: int
    num_damaged: int
    num_trained_on: int
    """Of the pictures, those that the network has seen in training."""
    manifest: str
    """Hash of the selection."""
    metrics: dict[BnEval, SegmentationMetrics]
    """By the statistics that batch norm went by; as a rule one entry."""

    def as_json(self) -> dict[str, Any]:
        """Plain types; the metrics have the names they have in metrics.jsonl, without `val/`.

        Where several ways of batch norm were judged, each has an object of its own.
        """
        metrics: dict[str, Any] = {way: asdict(found) for way, found in self.metrics.items()}
        if len(metrics) == 1:
            ((way, found),) = metrics.items()
            metrics = {"bn_eval": way, **found}
        return {
            "version": JSON_VERSION,
            "checkpoint": str(self.checkpoint),
            "data": list(map(str, self.data)),
            "manifest": self.manifest,
            "split": self.split,
            "num_images": self.num_images,
            "num_damaged": self.num_damaged,
            "num_trained_on": self.num_trained_on,
            **metrics,
        }


def judge(
    checkpoint: Path | None,
    *,
    data: Sequence[str] | None,
    split: str,
    sets: Sequence[str] = (),
    batch_size: int,
    workers: int | Literal["auto"],
    device_name: str,
    bn_eval: BnEval | Literal["all"] | None = None,
    tell: Callable[[str], object],
) -> Judgement:
    """Judge a checkpoint in float32 on one split at original resolution.

    Args:
        checkpoint: as in `segtrain.runs.find_checkpoint`.
        data: roots of data sets; None takes $SEGTRAIN_DATA, else what the network was trained on.
        sets: `data.key=value` for another selection than the one it was trained with.
        workers: loader processes; "auto" chooses.
        bn_eval: which statistics batch norm goes by; "all" judges by each of them, None goes by the
            checkpoint's configuration.
        tell: takes a line for the user.

    Raises:
        UserError: of any kind.
    """
    device = resolve_device(device_name)
    path, chosen_by = find_checkpoint(checkpoint)
    loaded = load_checkpoint(path)
    model = restore_model(loaded, path)
    move_model(model, device)
    tell(f"checkpoint: {path} ({chosen_by}), device: {describe_device(device)}")
    roots, data_chosen_by = _data_roots(data, loaded)
    tell(f"data: {describe_roots(roots)}, by {data_chosen_by}")
    config = _with_selection(loaded.config, roots, sets)

    source = open_pictures(config.data, split)
    for note in source.notes:
        tell(note)
    for reason, count in source.skipped.items():
        tell(f"warning: {count} left out, {reason}")
    num_trained_on = _num_trained_on(loaded, source)
    if num_trained_on:
        tell(
            f"warning: {num_trained_on} of {len(source)} pictures were trained on; "
            "what is measured on them says little about others"
        )
    ways = get_args(BnEval) if bn_eval == "all" else (bn_eval or config.train.bn_eval,)
    loading: dict[str, Any] = {
        "workers": resolve_workers(workers),
        "pin_memory": device.type == "cuda",
    }
    metrics: dict[BnEval, SegmentationMetrics] = {}
    for way in ways:
        # The network of a run that recalibrates has been measured; only for others it is done here.
        if way == "recalibrate" and config.train.bn_eval != "recalibrate":
            tell("measuring batch norm's statistics on training images")
            _recalibrate(model, config, device, loading)
        batches = eval_batches(
            source,
            image_size=config.data.image_size,
            # By its own statistics a picture is judged alone.
            batch_size=1 if way == "batch" else batch_size,
            **loading,
        )
        metrics[way] = _evaluate(model, batches, way, device)
    num_damaged = len(batches.damaged)
    if num_damaged:
        tell(f"warning: {num_damaged} pictures left out, first: {min(batches.damaged)}")
    return Judgement(
        checkpoint=path,
        data=roots,
        split=split,
        num_images=len(source) - num_damaged,
        num_damaged=num_damaged,
        num_trained_on=num_trained_on,
        manifest=source.manifest,
        metrics=metrics,
    )


def _evaluate(
    model: nn.Module, batches: Batches, bn_eval: BnEval, device: torch.device
) -> SegmentationMetrics:
    with (
        progress_bar(total=batches.num_images, desc="evaluating") as bar,
        worker_errors(batches.watched),
    ):
        confusion = evaluate(
            model,
            batches,
            device=device,
            autocast=autocast_for("fp32", device),
            bn_eval=bn_eval,
            on_batch=bar.update,
        )
    return confusion.compute()


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


def _data_roots(data: Sequence[str] | None, loaded: Checkpoint) -> tuple[tuple[Path, ...], str]:
    named = named_data_roots(data)
    if named is not None:
        return named
    named = named_data_roots(loaded.config.data.root)
    if named is None or not all(root.is_dir() for root in named[0]):
        raise UsageError("the data this network was trained on is not here; give --data")
    return named[0], "what the network was trained on"


def _with_selection(config: Config, roots: tuple[Path, ...], sets: Sequence[str]) -> Config:
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


def _num_trained_on(loaded: Checkpoint, source: Pictures) -> int:
    """How many of the pictures the network has seen in training."""
    known = loaded.data.get("train_identities")
    if not isinstance(known, torch.Tensor) or known.dtype != torch.int64:
        return 0
    return int(np.isin(source.catalog.identities.view(np.int64), known.numpy()).sum())
