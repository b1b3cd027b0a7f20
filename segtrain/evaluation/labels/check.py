"""The label check of an evaluation, from the first picture to the sheet."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from segtrain.data.sample import Source
from segtrain.evaluation.labels.outputs import SHEET, TABLE, check_outputs
from segtrain.evaluation.labels.ranking import Ranking
from segtrain.evaluation.labels.sheet import write_review
from segtrain.evaluation.labels.suspicion import KINDS, suspicions_of
from segtrain.evaluation.labels.table import write_table
from segtrain.evaluation.picture import Probs
from segtrain.images import Pixels


@dataclass(frozen=True, kw_only=True)
class LabelCheckResult:
    """What was found, and where it is.

    num_suspicious: of each kind, how many pictures.
    sheet, table: the files.
    """

    num_suspicious: Mapping[str, int]
    sheet: Path
    table: Path


class LabelCheck:
    """Looks at each picture that is judged; of most, nothing is kept."""

    def __init__(self, source: Source) -> None:
        """
        Args:
            source: the pictures that are judged.
        """
        self._source = source
        self._ranking = Ranking()

    def add(self, index: int, probs: Probs, mask: Pixels) -> None:
        """Take a picture, once; in any order, also from several threads at once.

        Args:
            index: of the picture in the source.
            probs: H W float32 in 0..1, probability of person at original resolution.
            mask: H W uint8 in {0, 1, 255}.
        """
        for suspicion in suspicions_of(probs, mask):
            self._ranking.add(index, suspicion, probs)

    def write(self, folder: Path, *, overwrite: bool = False) -> LabelCheckResult:
        """Write the sheet and the table; the pictures on the sheet are read again.

        Raises:
            UsageError: one of them is there and may not be replaced.
            ResourceError: the folder cannot be made or written.
        """
        check_outputs(folder, overwrite=overwrite)
        write_review(folder / SHEET, self._ranking, self._source)
        write_table(folder / TABLE, self._ranking, self._source)
        return LabelCheckResult(
            num_suspicious={kind: len(self._ranking.ranked(kind)) for kind in KINDS},
            sheet=folder / SHEET,
            table=folder / TABLE,
        )


def summary_lines(result: LabelCheckResult) -> list[str]:
    """For the terminal: how many pictures of each kind, and where to look."""
    found = ", ".join(f"{kind} {number}" for kind, number in result.num_suspicious.items())
    return [
        f"label check, suspicious pictures: {found}",
        f"look at {result.sheet}; all of them: {result.table}",
    ]
