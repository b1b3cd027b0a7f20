"""The label check of an evaluation: collect issues per image, then write sheet and table."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from segtrain.data.sample import SegmentationDataset
from segtrain.evaluation.label_check.issues import ISSUE_KINDS, find_issues
from segtrain.evaluation.label_check.paths import SHEET, TABLE, label_check_files
from segtrain.evaluation.label_check.ranking import Ranking
from segtrain.evaluation.label_check.write import write_sheet, write_table
from segtrain.runtime.files import refuse_existing
from segtrain.types import Mask, Probs


@dataclass(frozen=True, kw_only=True)
class LabelCheckResult:
    """The number of issues, and the files that list them.

    num_issues: kind → number of images.
    sheet, table: the files.
    """

    num_issues: Mapping[str, int]
    sheet: Path
    table: Path


class LabelCheck:
    """Collects the issues of all evaluated images; most images leave nothing in memory.

    Args:
        dataset: the evaluated images.
    """

    def __init__(self, dataset: SegmentationDataset) -> None:
        self._dataset = dataset
        self._ranking = Ranking()

    def add(self, index: int, probs: Probs, mask: Mask) -> None:
        """Check an image. Thread-safe; each image is added once, in any order.

        Args:
            index: of the image in the data set.
            probs: H W float32 in 0..1, probability of person at original resolution.
            mask: H W uint8 in {0, 1, 255}.
        """
        for issue in find_issues(probs, mask):
            self._ranking.add(index, issue, probs)

    def write(self, folder: Path, *, overwrite: bool = False) -> LabelCheckResult:
        """Write the sheet and the table; the images on the sheet are read again.

        Raises:
            UsageError: one of the files exists and `overwrite` is false.
            ResourceError: the folder cannot be made or written.
        """
        refuse_existing(label_check_files(folder), overwrite=overwrite, option="--report")
        write_sheet(folder / SHEET, self._ranking, self._dataset)
        write_table(folder / TABLE, self._ranking, self._dataset)
        return LabelCheckResult(
            num_issues={kind: len(self._ranking.ranked(kind)) for kind in ISSUE_KINDS},
            sheet=folder / SHEET,
            table=folder / TABLE,
        )


def summary_lines(result: LabelCheckResult) -> list[str]:
    """Lines for the terminal: the number of images per kind, and the files."""
    counts = ", ".join(f"{kind} {number}" for kind, number in result.num_issues.items())
    return [f"label check: {counts}", f"strongest issues: {result.sheet}; all: {result.table}"]
