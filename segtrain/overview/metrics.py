"""Reading metrics.jsonl of any run, also of one that was killed or that another version wrote."""

import json
import math
from pathlib import Path
from typing import Any

from segtrain.errors import CheckpointError

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The rows of metrics.jsonl, an epoch each; none where there is no file.

    A last line that a kill has cut is left out. Each row has an `epoch` of 1 or more; take other
    numbers through `number`, for any may be missing.

    Raises:
        CheckpointError: another line is damaged.
        OSError: the file is there and cannot be read.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    lines = content.splitlines()
    rows = []
    for number_of_line, line in enumerate(lines, 1):
        row = _parse(line)
        if row is not None:
            rows.append(row)
        elif not (number_of_line == len(lines) and _is_cut(content, line)):
            raise CheckpointError(f"{path} is damaged at line {number_of_line}; repair that line")
    return rows


def number(row: Row, key: str) -> float | None:
    """The finite number under `key`; None where there is none."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def _parse(line: bytes) -> Row | None:
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("epoch")) is not int or row["epoch"] < 1:
        return None
    return row


def _is_cut(content: bytes, last_line: bytes) -> bool:
    return last_line.startswith(b"{") and not content.endswith(b"\n")
