"""`segtrain eval`: evaluate a model or a folder of masks, and print the metrics."""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np
import torch
from rich.console import Console

from segtrain.config.schema import BnEval
from segtrain.data.datasets import ImageSelection
from segtrain.evaluation.bootstrap import compare
from segtrain.evaluation.boundary import Counts
from segtrain.evaluation.counts import (
    CountAccumulator,
    ImageCounts,
    Records,
    Totals,
    count_confusion,
    count_image,
)
from segtrain.evaluation.label_check.check import LabelCheck, summary_lines
from segtrain.evaluation.options import EvalOptions
from segtrain.evaluation.predictions import Prediction, refuse_too_many_damaged
from segtrain.evaluation.report.gallery import Gallery
from segtrain.evaluation.report.page import write_report
from segtrain.evaluation.result import EvalResult, build_result
from segtrain.evaluation.result_json import read_records, result_to_json
from segtrain.evaluation.setup import EvalSetup, setup_evaluation
from segtrain.evaluation.tables import batch_norm_table, result_tables
from segtrain.runtime.cpu import available_cpus
from segtrain.runtime.devices import resolve_device
from segtrain.runtime.distributed import DistributedContext, distributed_context
from segtrain.runtime.logs import no_log
from segtrain.runtime.progress import no_progress_bars, progress_bar
from segtrain.runtime.signals import raise_if_stopped
from segtrain.types import Mask, Probs

log = logging.getLogger(__name__)

ImageCallback = Callable[[int, Probs, Mask], object]
"""Called for each image, from several threads, with its index, H W probabilities and H W mask."""


def evaluate(options: EvalOptions, *, as_json: bool) -> None:
    """Evaluate, write the files that `options` name, and print the metrics.

    Args:
        as_json: print the JSON of `segtrain.evaluation.result_json` on one line, not tables.

    Raises:
        UserError: of any kind.
        Stopped: a signal came.
    """
    label_checks: list[LabelCheck] = []

    def callbacks(images: ImageSelection) -> Iterator[ImageCallback]:
        if options.report:
            yield Gallery(options.report, images, options.threshold).add
        if options.label_check:
            label_checks.append(LabelCheck(images))
            yield label_checks[0].add

    result = evaluate_images(options, callbacks)
    if result is None:
        return
    # Files first: the reader of stdout may be gone.
    if options.report:
        log.info(f"report: {write_report(options.report, result)}")
    for label_check in label_checks:
        written = label_check.write(options.label_check_dir, overwrite=options.overwrite)
        for line in summary_lines(written):
            log.info(line)
    if as_json:
        print(json.dumps(result_to_json(result)))
    else:
        Console().print(result_tables(result))


def compare_batch_norms(options: EvalOptions, *, as_json: bool) -> None:
    """Evaluate the same model with each kind of batch-norm statistics.

    Raises:
        UserError: of any kind.
        Stopped: a signal came.
    """
    results: dict[str, EvalResult] = {}
    for bn in get_args(BnEval):
        result = evaluate_images(replace(options, inference=replace(options.inference, bn=bn)))
        if result is not None:
            results[bn] = result
    if not results:
        return
    if as_json:
        print(json.dumps({bn: result_to_json(result) for bn, result in results.items()}))
    else:
        Console().print(batch_norm_table(results))


def evaluate_images(
    options: EvalOptions,
    callbacks: Callable[[ImageSelection], Iterable[ImageCallback]] = lambda images: (),
) -> EvalResult | None:
    """Evaluate a model in float32, or a folder of masks, at original resolution.

    Processes started by torchrun share the images; the result is bit-identical.

    Args:
        callbacks: makes, from the selected images, the functions to call for each of them.

    Returns:
        None in all processes but the main one.

    Raises:
        UserError: of any kind.
        Stopped: a signal came.
    """
    # Find a file that cannot be compared before an hour of work.
    other = None if options.compare is None else read_records(options.compare)
    device_name = options.inference.device
    with ExitStack() as stack:
        on_cuda = resolve_device(device_name).type == "cuda"
        world = stack.enter_context(distributed_context(on_cuda=on_cuda))
        if not world.is_main:
            stack.enter_context(no_progress_bars())
            stack.enter_context(no_log())
        device = resolve_device(device_name, world.local_rank if world.size > 1 else None)
        if device.type == "cuda":
            # Otherwise, each thread that pins memory takes half a gigabyte of the first GPU.
            torch.cuda.set_device(device)
        setup = setup_evaluation(options, device=device, world=world)
        counts = _count_images(setup, world, list(callbacks(setup.images)))
        counts = EvalCounts.merge(world.all_gather(counts))
        damaged = set().union(*world.all_gather(setup.source.damaged))
        refuse_too_many_damaged(damaged, len(setup.images))  # a single process sees fewer
    if not world.is_main:
        return None
    if damaged:
        log.warning(f"{len(damaged)} images left out, first: {min(damaged)}")
    records = counts.totals.records
    return build_result(
        counts.totals,
        options=setup.options,
        model_info=setup.model_info,
        data=replace(setup.data, num_damaged=len(damaged)),
        image_ids=[setup.images.name(index) for index in records["index"].tolist()],
        mean_mask=counts.mean_mask_records(),
        comparison=None if other is None else compare(other, records),
    )


@dataclass(frozen=True, kw_only=True)
class EvalCounts:
    """The counts of some images.

    mean_mask: image index → 2 2 int64, the confusion of the mean-mask baseline; None without that
        baseline.
    """

    totals: Totals
    mean_mask: dict[int, Counts] | None

    @staticmethod
    def merge(parts: "Sequence[EvalCounts]") -> "EvalCounts":
        """Join the counts of several processes: the same as if one had counted all images."""
        confusions = [part.mean_mask for part in parts]
        return EvalCounts(
            totals=Totals.merge([part.totals for part in parts]),
            mean_mask=None
            if None in confusions
            else {index: counts for part in confusions for index, counts in (part or {}).items()},
        )

    def mean_mask_records(self) -> Records | None:
        """The records with the confusion of the mean-mask baseline.

        Only `segtrain.evaluation.metrics.CONFUSION_METRICS` are valid for them.
        """
        if self.mean_mask is None:
            return None
        records = self.totals.records.copy()
        confusions = [self.mean_mask[index] for index in records["index"].tolist()]
        records["confusion"] = np.reshape(confusions, records["confusion"].shape)
        return records


def _count_images(
    setup: EvalSetup, world: DistributedContext, callbacks: Sequence[ImageCallback]
) -> EvalCounts:
    """Count this process's share of the images, on all cores."""
    images, threshold, mean_mask = setup.images, setup.options.threshold, setup.mean_mask
    sources = np.repeat(np.arange(len(images.lengths)), images.lengths)
    accumulator = CountAccumulator(images.index, sources, threshold)
    confusions: dict[int, Counts] = {}

    def count(prediction: Prediction) -> ImageCounts:
        index, probs, mask = prediction.index, prediction.probs, prediction.mask
        for callback in callbacks:
            callback(index, probs, mask)
        if mean_mask is not None:
            confusions[index] = count_confusion(mean_mask.predict(mask.shape), mask)
        return count_image(probs, mask, threshold=threshold)

    pool = ThreadPoolExecutor(available_cpus())
    try:
        with progress_bar(total=len(images) // world.size, desc="evaluating") as bar:
            for predictions in setup.source.predictions(images, world):
                all_counts = pool.map(count, predictions)
                for prediction, counts in zip(predictions, all_counts, strict=True):
                    accumulator.add(prediction.index, counts)
                raise_if_stopped()
                bar.update(len(predictions))
    finally:
        pool.shutdown(cancel_futures=True)
    return EvalCounts(
        totals=accumulator.totals(), mean_mask=None if mean_mask is None else confusions
    )
