"""`segtrain eval`, from the wishes to the last line printed."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import get_args

from rich.console import Console

from segtrain.config import BnEval
from segtrain.data import Pictures
from segtrain.evaluation.counting import Onlooker
from segtrain.evaluation.document import as_document
from segtrain.evaluation.judge import judge
from segtrain.evaluation.judgement import Judgement
from segtrain.evaluation.labels.check import LabelCheck, summary_lines
from segtrain.evaluation.report.gallery import Gallery
from segtrain.evaluation.report.page import write_report
from segtrain.evaluation.table import batch_norm_table, judgement_tables
from segtrain.evaluation.wishes import Outputs, Wishes

Tell = Callable[[str], object]


def evaluate(wishes: Wishes, outputs: Outputs, *, as_json: bool, tell: Tell) -> None:
    """Judge, and print the figures.

    Args:
        as_json: print the document of `segtrain.evaluation.document`, on one line.
        tell: takes a line for the user.

    Raises:
        UserError: of any kind.
        Stopped: a signal came.
    """
    label_checks: list[LabelCheck] = []

    def onlookers(pictures: Pictures) -> Iterator[Onlooker]:
        if outputs.report:
            yield Gallery(outputs.report, pictures, wishes.threshold).add
        if outputs.label_check:
            label_checks.append(LabelCheck(pictures))
            yield label_checks[0].add

    judgement = judge(wishes, tell=tell, onlookers=onlookers)
    if judgement is None:
        return
    # What is written comes before what is printed: whoever reads that may have gone away.
    if outputs.report:
        tell(f"report: {write_report(outputs.report, judgement)}")
    for label_check in label_checks:
        result = label_check.write(outputs.label_folder, overwrite=outputs.overwrite)
        for line in summary_lines(result):
            tell(line)
    if as_json:
        print(json.dumps(as_document(judgement)))
    else:
        Console().print(judgement_tables(judgement))


def compare_batch_norms(wishes: Wishes, *, as_json: bool, tell: Tell) -> None:
    """The same network by each way of batch norm.

    Raises:
        UserError: of any kind.
        Stopped: a signal came.
    """
    found: dict[str, Judgement] = {}
    for way in get_args(BnEval):
        judgement = judge(replace(wishes, bn=way), tell=tell)
        if judgement is not None:
            found[way] = judgement
    if not found:
        return
    if as_json:
        print(json.dumps({way: as_document(judgement) for way, judgement in found.items()}))
    else:
        Console().print(batch_norm_table(found))
