"""Open, check, draw and describe the data of a diagnosis."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from segtrain.config.schema import Config
from segtrain.data.datasets import named_data_roots
from segtrain.data.selection import is_negative
from segtrain.data.workers import BATCHES_PER_WORKER, resolve_workers
from segtrain.doctor.contact_sheets import (
    write_augmentations,
    write_contact_sheet,
    write_person_area,
)
from segtrain.doctor.data_checks import DATA_CHECKS
from segtrain.doctor.findings import Finding, finding_from_error, run_checks
from segtrain.doctor.image_scan import SPLITS, ScannedSplit, open_split, scan_split
from segtrain.doctor.overfit_check import check_overfitting, overfit_one_batch
from segtrain.doctor.paths import AUGMENTATIONS, CONTACT_SHEET, PERSON_AREA
from segtrain.errors import ResourceError


def open_splits(config: Config) -> tuple[list[ScannedSplit], list[Finding]]:
    """Open both splits of the user's data as training does.

    Returns:
        The splits that open, and the findings about those that do not.
    """
    named = named_data_roots(config.data.root)
    if named is None:
        note = Finding(
            level="note",
            check="data",
            message="no data given: only the machine was checked",
            remedy="segtrain doctor FOLDER, or set $SEGTRAIN_DATA",
        )
        return [], [note]
    data = replace(config.data, root=tuple(map(str, named[0])))
    results = [open_split(data, name) for name in SPLITS]
    splits = [split for split, _ in results if split is not None]
    findings = [finding for _, split_findings in results for finding in split_findings]
    # A folder that is not a dataset fails in the same way for both splits.
    return splits, list(dict.fromkeys(findings))


def loader_bytes(config: Config, splits: Sequence[ScannedSplit]) -> int:
    """Upper bound of the shared memory that the batches of all loader processes take."""
    side = config.data.image_size
    largest_mask = max(
        (int(split.images.index.sizes.astype(np.int64).prod(axis=1).max()) for split in splits),
        default=side**2,
    )
    # Training: 3 bytes per pixel for the image and 1 for the mask. Validation: masks at full size.
    image_bytes = 4 * side**2 + 3 * side**2 + largest_mask
    workers = resolve_workers(config.data.workers)
    return workers * BATCHES_PER_WORKER * config.train.effective_batch_size * image_bytes


def check_data(
    splits: Sequence[ScannedSplit], device: torch.device | None
) -> tuple[list[ScannedSplit], list[Finding]]:
    """Scan the images, run the data checks, and overfit a few images.

    Args:
        device: for the overfitting check; None skips it.

    Returns:
        The scanned splits, and the findings.
    """
    scanned = [scan_split(split) for split in splits]
    findings = list(run_checks(DATA_CHECKS, scanned))
    train = _train_split(scanned)
    if device is not None and train is not None:
        findings += _check_learning(train, device)
    return scanned, findings


def write_images(
    splits: Sequence[ScannedSplit], config: Config, output_dir: Path, *, augmentations: bool
) -> tuple[list[str], list[Finding]]:
    """Write the images; returns their paths, and a finding if one cannot be written."""
    train = _train_split(splits)
    writers: dict[str, Callable[[Path], None]] = {
        CONTACT_SHEET: lambda path: write_contact_sheet(path, splits),
        PERSON_AREA: lambda path: write_person_area(path, splits),
    }
    if augmentations and train is not None:
        images = train.images
        writers[AUGMENTATIONS] = lambda path: write_augmentations(path, images, config.data)
    written: list[str] = []
    if not splits:
        return written, []
    for name, write in writers.items():
        try:
            write(output_dir / name)
        except ResourceError as error:
            return written, [finding_from_error("writing", error)]
        written.append(str(output_dir / name))
    return written, []


def describe_split(split: ScannedSplit) -> dict[str, Any]:
    """Statistics of a split, plain types."""
    catalog = split.images.index
    areas = catalog.sizes.astype(np.int64).prod(axis=1)
    order = np.argsort(areas)[[0, len(areas) // 2, -1]]
    fractions = catalog.person_fraction[catalog.person_fraction > 0]
    return {
        "parts": [{**asdict(part), "root": str(part.root)} for part in split.parts],
        "images": len(catalog),
        "looked_at": split.num_scanned,
        "seconds": round(split.seconds, 2),
        "damaged": len(split.damaged),
        "left_out": dict(split.images.skipped),
        "without_people": int(is_negative(catalog).sum()),
        "sizes_min_median_max": catalog.sizes[order][:, ::-1].tolist(),
        "person_share_min_median_max": [
            round(float(value), 4) for value in np.quantile(fractions, [0, 0.5, 1])
        ]
        if len(fractions)
        else [],
    }


def _train_split(splits: Sequence[ScannedSplit]) -> ScannedSplit | None:
    return next((split for split in splits if split.name == "train"), None)


def _check_learning(train: ScannedSplit, device: torch.device) -> list[Finding]:
    try:
        result = overfit_one_batch(train.images, device)
    except RuntimeError as error:  # the device fails, e.g. other processes use its memory
        reason = str(error).splitlines()[0]
        problem = Finding(
            level="warning",
            check="learning",
            message=f"cannot overfit four images on {device}: {reason}",
            remedy="see with nvidia-smi which processes use it, or try --device cpu",
        )
        return [problem]
    return list(run_checks({"learning": check_overfitting}, result))
