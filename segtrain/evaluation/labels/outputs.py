"""Where a label check goes. Imports nothing heavy: it comes before any work."""

from pathlib import Path

from segtrain.errors import UsageError

SHEET = "label_check.png"
TABLE = "label_check.csv"


def check_outputs(folder: Path, *, overwrite: bool) -> None:
    """See that `folder`, which need not be there, holds no sheet or table yet, or they may go.

    Raises:
        UsageError: one would be replaced and nobody allowed it.
    """
    for name in (SHEET, TABLE):
        if (folder / name).exists() and not overwrite:
            raise UsageError(f"{folder / name} exists; give --overwrite or another --report")
