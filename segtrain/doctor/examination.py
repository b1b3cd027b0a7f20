"""Data and pictures of a check-up, step by step."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from segtrain.config import Config
from segtrain.data import named_data_roots
from segtrain.data.selection import is_negative
from segtrain.data.workers import BATCHES_A_WORKER, resolve_workers
from segtrain.doctor.data_checks import DATA_CHECKS
from segtrain.doctor.findings import Finding, run_checks
from segtrain.doctor.inspection import SPLITS, Split, look_at, open_split
from segtrain.doctor.learning import judge_learning, learn_by_heart
from segtrain.doctor.outputs import AUGMENTATIONS, CONTACT_SHEET, PERSON_AREA
from segtrain.doctor.sheets import write_augmentations, write_contact_sheet, write_person_area
from segtrain.errors import ResourceError


@dataclass(frozen=True, kw_only=True)
class Opened:
    """The splits that open, and what is wrong with those that do not."""

    splits: list[Split]
    findings: list[Finding]


def open_data(config: Config) -> Opened:
    """Both splits of the data the user named, as training would open them."""
    named = named_data_roots(config.data.root)
    if named is None:
        note = Finding(
            level="note",
            check="data",
            message="no data given: only the machine was looked at",
            remedy="segtrain doctor FOLDER, or set $SEGTRAIN_DATA",
        )
        return Opened(splits=[], findings=[note])
    data = replace(config.data, root=tuple(map(str, named[0])))
    opened = [open_split(data, name) for name in SPLITS]
    findings = [finding for _, found in opened for finding in found]
    return Opened(
        splits=[split for split, _ in opened if split is not None],
        # A folder that is no data set at all is none for both splits.
        findings=list(dict.fromkeys(findings)),
    )


def loader_bytes(config: Config, splits: Sequence[Split]) -> int:
    """Most that the batches of all loader processes take in shared memory."""
    side = config.data.image_size
    largest_mask = max(
        (int(split.pictures.catalog.sizes.astype(np.int64).prod(axis=1).max()) for split in splits),
        default=side**2,
    )
    # In training three bytes a pixel and one of mask; in validation the mask is as large as ever.
    a_picture = 4 * side**2 + 3 * side**2 + largest_mask
    workers = resolve_workers(config.data.workers)
    return workers * BATCHES_A_WORKER * config.train.images_a_step * a_picture


def examine(
    splits: Sequence[Split], device: torch.device | None
) -> tuple[list[Split], list[Finding]]:
    """Look at the pictures and learn some by heart.

    Args:
        device: to learn on; None leaves it out.

    Returns:
        The splits with what was seen, and the findings.
    """
    seen = [look_at(split) for split in splits]
    findings = list(run_checks(DATA_CHECKS, seen))
    train = next((split for split in seen if split.name == "train"), None)
    if device is not None and train is not None:
        findings += _learning(train, device)
    return seen, findings


def _learning(train: Split, device: torch.device) -> list[Finding]:
    try:
        learnt = learn_by_heart(train.pictures, device)
    except RuntimeError as error:  # the device gave out, e.g. others use its memory
        reason = str(error).splitlines()[0]
        problem = Finding(
            level="warning",
            check="learning",
            message=f"four pictures could not be learnt by heart on {device}: {reason}",
            remedy="see with nvidia-smi who else uses it, or try --device cpu",
        )
        return [problem]
    return list(run_checks({"learning": judge_learning}, learnt))


def draw(
    splits: Sequence[Split], config: Config, folder: Path, *, augmentations: bool
) -> tuple[list[str], list[Finding]]:
    """Write the pictures; returns their paths and what was in the way."""
    train = next((split for split in splits if split.name == "train"), None)
    writers: dict[str, Callable[[Path], None]] = {
        CONTACT_SHEET: lambda path: write_contact_sheet(path, splits),
        PERSON_AREA: lambda path: write_person_area(path, splits),
    }
    if augmentations and train is not None:
        pictures = train.pictures
        writers[AUGMENTATIONS] = lambda path: write_augmentations(path, pictures, config.data)
    written: list[str] = []
    if not splits:
        return written, []
    for name, write in writers.items():
        try:
            write(folder / name)
        except ResourceError as error:
            message, _, remedy = str(error).partition("; ")
            finding = Finding(level="error", check="writing", message=message, remedy=remedy)
            return written, [finding]
        written.append(str(folder / name))
    return written, []


def describe(split: Split) -> dict[str, Any]:
    """Numbers of a split, plain types."""
    catalog = split.pictures.catalog
    areas = catalog.sizes.astype(np.int64).prod(axis=1)
    order = np.argsort(areas)[[0, len(areas) // 2, -1]]
    shown = catalog.person_share[catalog.person_share > 0]
    return {
        "parts": [{**asdict(part), "root": str(part.root)} for part in split.parts],
        "pictures": len(catalog),
        "looked_at": split.num_looked,
        "seconds": round(split.seconds, 2),
        "damaged": len(split.damaged),
        "left_out": dict(split.pictures.skipped),
        "without_people": int(is_negative(catalog).sum()),
        "sizes_min_median_max": catalog.sizes[order][:, ::-1].tolist(),
        "person_share_min_median_max": [
            round(float(value), 4) for value in np.quantile(shown, [0, 0.5, 1])
        ]
        if len(shown)
        else [],
    }
