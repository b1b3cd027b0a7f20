"""The files of a label check."""

from pathlib import Path

SHEET = "label_check.png"
TABLE = "label_check.csv"


def label_check_files(folder: Path) -> list[Path]:
    """The files that a label check writes to `folder`."""
    return [folder / SHEET, folder / TABLE]
