"""The table of a label check, for a spreadsheet or a program."""

import csv
import io
from pathlib import Path

from segtrain.data.sample import Source
from segtrain.evaluation.labels.ranking import Ranking
from segtrain.evaluation.labels.suspicion import KINDS
from segtrain.files import write_bytes

COLUMNS = ("kind", "rank", "score", "name", "picture", "left", "top", "width", "height")
# A spreadsheet takes what begins so for a formula, and would run it.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def write_table(path: Path, ranking: Ranking, source: Source) -> None:
    """A row for each suspicion, kind by kind, the strongest first; as CSV in UTF-8.

    `name` is the picture's in its split; where a spreadsheet would take it for a formula there is
    an apostrophe before it. `picture` is the absolute path, always as it is. A name that is no
    UTF-8 keeps its bytes.

    Raises:
        ResourceError: it cannot be written.
    """
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(COLUMNS)
    for kind in KINDS:
        for rank, ranked in enumerate(ranking.ranked(kind), start=1):
            name = source.stem(ranked.index)
            writer.writerow(
                [
                    kind,
                    rank,
                    f"{ranked.suspicion.score:.4f}",
                    f"'{name}" if name.startswith(_FORMULA) else name,
                    source.picture_path(ranked.index).absolute(),
                    *ranked.suspicion.box,
                ]
            )
    write_bytes(path, table.getvalue().encode("utf-8", "surrogateescape"))
