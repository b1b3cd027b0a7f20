"""`segtrain eval`: which checkpoint, which data, and the numbers."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from segtrain.checkpoint import Checkpoint, load_checkpoint, restore_model
from segtrain.data import named_data_root, open_dataset
from segtrain.data.loading import eval_batches, resolve_workers, worker_errors
from segtrain.devices import autocast_for, describe_device, move_model, resolve_device
from segtrain.errors import UsageError
from segtrain.evaluation.evaluate import evaluate
from segtrain.evaluation.metrics import SegmentationMetrics
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
    metrics: SegmentationMetrics

    def as_json(self) -> dict[str, Any]:
        """Plain types; the metrics have the names they have in metrics.jsonl, without `val/`."""
        return {
            "version": JSON_VERSION,
            "checkpoint": str(self.checkpoint),
            "data": str(self.data),
            "split": self.split,
            "num_images": self.num_images,
            "num_damaged": self.num_damaged,
            **asdict(self.metrics),
        }


def judge(
    checkpoint: Path | None,
    *,
    data: str | None,
    split: str,
    batch_size: int,
    workers: int | Literal["auto"],
    device_name: str,
    tell: Callable[[str], object],
) -> Judgement:
    """Judge a checkpoint in float32 on one split at original resolution.

    Args:
        checkpoint: as in `segtrain.runs.find_checkpoint`.
        data: root of a data set; None takes $SEGTRAIN_DATA, else what the network was trained on.
        workers: loader processes; "auto" chooses.
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
    batches = eval_batches(
        source,
        image_size=loaded.config.data.image_size,
        batch_size=batch_size,
        workers=resolve_workers(workers),
        pin_memory=device.type == "cuda",
    )
    with progress_bar(total=len(source), desc="evaluating") as bar, worker_errors():
        confusion = evaluate(
            model,
            batches,
            device=device,
            autocast=autocast_for("fp32", device),
            on_batch=bar.update,
        )
    num_damaged = len(batches.damaged)
    if num_damaged:
        tell(f"warning: {num_damaged} pictures left out, first: {min(batches.damaged)}")
    metrics = confusion.compute()
    return Judgement(path, root, split, len(source) - num_damaged, num_damaged, metrics)


def _data_root(data: str | None, loaded: Checkpoint) -> tuple[Path, str]:
    named = named_data_root(data)
    if named is not None:
        return named
    root = loaded.config.data.root
    if root is None or not Path(root).is_dir():
        raise UsageError("the data this network was trained on is not here; give --data")
    return Path(root), "what the network was trained on"
