"""`segtrain eval`: which checkpoint, which data, and the numbers."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from segtrain.checkpoint import Checkpoint, load_checkpoint, restore_model
from segtrain.config import BnEval, Config
from segtrain.data import named_data_root, open_dataset
from segtrain.data.loading import (
    Batches,
    eval_batches,
    resolve_workers,
    train_batches,
    worker_errors,
)
from segtrain.data.transforms import TrainTransform
from segtrain.devices import autocast_for, describe_device, move_model, resolve_device
from segtrain.errors import UsageError
from segtrain.evaluation.evaluate import evaluate
from segtrain.evaluation.metrics import SegmentationMetrics
from segtrain.models.batch_norm import NUM_TO_RECALIBRATE, recalibrate
from segtrain.progress import progress_bar
from segtrain.runs import find_checkpoint

JSON_VERSION = 1


@dataclass(frozen=True)
class Judgement:
    """What was judged, on what, and the result."""

    checkpoint: Path
    data: Path
    split: str
    num_images: int
    num_damaged: int
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
            "data": str(self.data),
            "split": self.split,
            "num_images": self.num_images,
            "num_damaged": self.num_damaged,
            **metrics,
        }


def judge(
    checkpoint: Path | None,
    *,
    data: str | None,
    split: str,
    batch_size: int,
    workers: int | Literal["auto"],
    device_name: str,
    bn_eval: BnEval | Literal["all"] | None = None,
    tell: Callable[[str], object],
) -> Judgement:
    """Judge a checkpoint in float32 on one split at original resolution.

    Args:
        checkpoint: as in `segtrain.runs.find_checkpoint`.
        data: root of a data set; None takes $SEGTRAIN_DATA, else what the network was trained on.
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
    root, data_chosen_by = _data_root(data, loaded)
    tell(f"data: {root} ({data_chosen_by})")

    source = open_dataset(root, split)
    for reason, count in source.skipped.items():
        tell(f"warning: {count} left out, {reason}")
    config = loaded.config
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
            _recalibrate(model, root, config, device, loading)
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
    return Judgement(path, root, split, len(source) - num_damaged, num_damaged, metrics)


def _evaluate(
    model: nn.Module, batches: Batches, bn_eval: BnEval, device: torch.device
) -> SegmentationMetrics:
    with progress_bar(total=batches.num_images, desc="evaluating") as bar, worker_errors():
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
    model: nn.Module, root: Path, config: Config, device: torch.device, loading: dict[str, Any]
) -> None:
    """Measure batch norm's statistics anew, on training images as training shows them."""
    batches = train_batches(
        open_dataset(root, "train"),
        TrainTransform(config.data.image_size, config.data.scale),
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        **loading,
    )
    total = min(NUM_TO_RECALIBRATE, batches.num_images)
    with progress_bar(total=total, desc="measuring") as bar, worker_errors():
        autocast = autocast_for("fp32", device)
        recalibrate(model, batches, device=device, autocast=autocast, on_batch=bar.update)


def _data_root(data: str | None, loaded: Checkpoint) -> tuple[Path, str]:
    named = named_data_root(data)
    if named is not None:
        return named
    root = loaded.config.data.root
    if root is None or not Path(root).is_dir():
        raise UsageError("the data this network was trained on is not here; give --data")
    return Path(root), "what the network was trained on"
