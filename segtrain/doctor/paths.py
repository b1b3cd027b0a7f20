"""Paths of the written images. Imports nothing heavy: the CLI resolves them first."""

import time
from pathlib import Path

from segtrain.runtime.files import refuse_existing

CONTACT_SHEET = "contact_sheet.png"
PERSON_AREA = "person_area.png"
AUGMENTATIONS = "augmentations.png"


def resolve_output_dir(output: Path | None, runs_dir: Path, *, overwrite: bool) -> Path:
    """Return `output`, else a new folder in `runs_dir`. Creates nothing.

    Raises:
        UsageError: an image exists and `overwrite` is false.
    """
    if output is None:
        return runs_dir / f"doctor-{time.strftime('%Y%m%d-%H%M%S')}"
    paths = (output / name for name in (CONTACT_SHEET, PERSON_AREA, AUGMENTATIONS))
    refuse_existing(paths, overwrite=overwrite, option="--output")
    return output
