"""What is kept of every picture that was judged: a row of an array, some 370 bytes."""

from typing import Any

import numpy as np
import numpy.typing as npt

from segtrain.data.sample import Catalog
from segtrain.evaluation.picture import NUM_BINS, NUM_RELIABILITY_BINS, PictureCounts

RECORD = np.dtype(
    [
        # Its place among the pictures that were opened, and who it is whatever was opened.
        ("index", np.int64),
        ("identity", np.uint64),
        # Its place among the roots of data sets.
        ("source", np.int32),
        ("size", np.int32, 2),
        ("num_people", np.int32),
        ("has_crowd", np.bool_),
        ("touches_frame", np.bool_),
        # As in `segtrain.evaluation.picture.PictureCounts`.
        ("confusion", np.int64, (2, 2)),
        ("boundary", np.int64, 2),
        ("contour", np.int64, 4),
        # Pixels by truth and reliability bin, and what their probabilities exceed its edge by.
        ("in_bin", np.int32, (2, NUM_RELIABILITY_BINS)),
        ("confidence", np.int64, NUM_RELIABILITY_BINS),
    ]
)

Records = npt.NDArray[np.void]
"""N rows of `RECORD`."""


def record_of(index: int, source: int, catalog: Catalog, counts: PictureCounts) -> Records:
    """One row.

    Args:
        index: the picture's row in `catalog`.
        source: the number of its data set.
    """
    row = np.zeros(1, dtype=RECORD)
    row["index"], row["source"] = index, source
    row["identity"] = catalog.identities[index]
    row["num_people"] = catalog.num_people[index]
    row["has_crowd"] = catalog.has_crowd[index]
    row["size"], row["touches_frame"] = counts.size, counts.touches_frame
    row["confusion"], row["boundary"] = counts.confusion, counts.boundary
    row["contour"], row["confidence"] = counts.contour, counts.confidence
    per_bin = NUM_BINS // NUM_RELIABILITY_BINS
    row["in_bin"] = counts.histogram.reshape(2, NUM_RELIABILITY_BINS, per_bin).sum(axis=2)
    return row


def records_as_lists(records: Records) -> dict[str, list[Any]]:
    """Columns of plain types, for JSON: name → N numbers, truth values or nested lists."""
    return {name: records[name].tolist() for name in RECORD.names or ()}


def records_from_lists(columns: object) -> Records:
    """What `records_as_lists` gave.

    Raises:
        ValueError: it did not give that.
    """
    names = RECORD.names or ()
    if not isinstance(columns, dict) or not columns.keys() >= set(names):
        raise ValueError(f"not columns of {', '.join(names)}")
    lengths = {len(columns[name]) if isinstance(columns[name], list) else -1 for name in names}
    if len(lengths) != 1 or -1 in lengths:
        raise ValueError("columns of different lengths")
    records = np.zeros(lengths.pop(), dtype=RECORD)
    for name in names if len(records) else ():
        records[name] = _column(name, columns[name], records[name].shape)
    return records


def _column(name: str, values: list[object], shape: tuple[int, ...]) -> npt.NDArray[np.generic]:
    """`values` as the type of the column, without rounding or wrapping any."""
    wanted = RECORD[name].base
    kind = bool if wanted.kind == "b" else int
    # As objects first: small and large numbers side by side would become floats.
    given = np.array(values, dtype=object)
    if given.shape != shape or any(type(value) is not kind for value in given.flat):
        raise ValueError(f"column {name} has other values or another shape than {shape}")
    try:
        column: npt.NDArray[np.generic] = given.astype(wanted)
    except OverflowError as error:
        raise ValueError(f"column {name}: {error}") from None
    return column
