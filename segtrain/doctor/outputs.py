"""Where the pictures of a check-up go. Imports nothing heavy: it comes before any work."""

import time
from pathlib import Path

from segtrain.errors import UsageError

CONTACT_SHEET = "contact_sheet.png"
PERSON_AREA = "person_area.png"
AUGMENTATIONS = "augmentations.png"


def output_folder(given: Path | None, runs: Path, *, overwrite: bool) -> Path:
    """`given`, else a new folder beside the runs; nothing is made yet.

    Raises:
        UsageError: pictures would be replaced and nobody allowed it.
    """
    if given is None:
        return runs / f"doctor-{time.strftime('%Y%m%d-%H%M%S')}"
    for name in (CONTACT_SHEET, PERSON_AREA, AUGMENTATIONS):
        if (given / name).exists() and not overwrite:
            raise UsageError(f"{given / name} exists; give --overwrite or another --output")
    return given
