"""`segtrain predict`: images and videos in, files out."""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from segtrain.errors import DataError, UsageError
from segtrain.imaging.images import DecodedImage, count_pixels, decode_image
from segtrain.inference.backend import Backend
from segtrain.inference.load import load_backend
from segtrain.prediction.backgrounds import BackgroundFn, build_background_fn
from segtrain.prediction.jobs import Job
from segtrain.prediction.jsonl import WriteOutcome, open_jsonl
from segtrain.prediction.options import PredictOptions
from segtrain.prediction.pipeline import Outcome, Pipeline
from segtrain.prediction.postprocess import Postprocess
from segtrain.runs.folder import find_checkpoint
from segtrain.runtime.optional_imports import require
from segtrain.runtime.progress import progress_bar
from segtrain.runtime.signals import Stopped, interrupt_immediately, raise_if_stopped

log = logging.getLogger(__name__)

_MAX_STDIN_BYTES = 10**9


def predict(jobs: Sequence[Job], options: PredictOptions) -> list[str]:
    """Load the checkpoint and process the jobs, with a progress bar and a line per problem.

    The first images are read while torch is imported and the network is loaded.

    Returns:
        An error for each image or video that failed.

    Raises:
        Stopped: a signal was received; the files written so far are complete.
        UserError: any error except that of a single image or video.
    """
    if any(job.is_video for job in jobs):
        require("av", "video")
    _set_passive_omp_wait()
    make_background = build_background_fn(options.background)
    postprocess = Postprocess(
        make_background=make_background,
        refine=options.refine,
        clean=options.clean,
        describe=options.jsonl is not None,
    )
    path, source = find_checkpoint(options.checkpoint)
    images = [job for job in jobs if not job.is_video]
    videos = [job for job in jobs if job.is_video]
    count_pixels = partial(_count_pixels, max_pixels=options.max_pixels)
    read = partial(_read, stdin=_read_stdin(images), max_pixels=options.max_pixels)
    errors: list[str] = []
    num_videos_done = 0
    with ExitStack() as stack:
        write_outcome = stack.enter_context(open_jsonl(options.jsonl))
        pipeline = Pipeline(images, count_pixels=count_pixels, read=read, postprocess=postprocess)
        try:
            with pipeline:
                backend = load_backend(path, options.inference)
                log.info(f"checkpoint: {path} ({source}), {backend.description}")
                errors += _predict_images(pipeline, backend, len(images), write_outcome)
            for error in _predict_videos(
                videos, backend, make_background, overwrite=options.overwrite
            ):
                if error is None:
                    num_videos_done += 1
                else:
                    errors.append(error)
        except Stopped as stopped:
            done = _describe_progress(
                images=(pipeline.num_done, len(images)), videos=(num_videos_done, len(videos))
            )
            raise Stopped(stopped.received, done) from None
    return errors


def _predict_images(
    pipeline: Pipeline, backend: Backend, total: int, write_outcome: WriteOutcome
) -> list[str]:
    errors = []
    with progress_bar(total=total, desc="predicting") as bar:
        for outcome in pipeline.outcomes(backend):
            write_outcome(outcome)
            for line in _messages(outcome):
                bar.write(line, file=sys.stderr)
            if outcome.error is not None:
                errors.append(outcome.error)
            raise_if_stopped()
            bar.update()
    return errors


def _messages(outcome: Outcome) -> list[str]:
    if outcome.stats is None:
        return [f"skipped: {outcome.error}"]
    lines = [f"{outcome.job.name} {outcome.note}"] if outcome.note else []
    if outcome.stats["person_fraction"] == 0:
        lines.append(f"no person found in {outcome.job.name}")
    return lines


def _predict_videos(
    jobs: Sequence[Job],
    backend: Backend,
    make_background: BackgroundFn,
    *,
    overwrite: bool,
) -> Iterator[str | None]:
    """Process the videos one by one; yield the error of each, or None."""
    if not jobs:
        return
    from segtrain.prediction.video import predict_video

    for job in jobs:
        try:
            stats = predict_video(
                *job.video_paths,
                backend,
                make_background=make_background,
                overwrite=overwrite,
            )
        except DataError as error:
            log.info(f"skipped: {error}")
            yield str(error)
            continue
        if stats.person_fraction == 0:
            log.info(f"no person found in {job.name}")
        yield None


def _describe_progress(**counts: tuple[int, int]) -> str:
    """Return e.g. "3 of 4 images and 1 of 2 videos are done", without kinds that have no job."""
    parts = [f"{done} of {total} {kind}" for kind, (done, total) in counts.items() if total]
    return f"{' and '.join(parts)} are done"


def _count_pixels(job: Job, *, max_pixels: int) -> int:
    return 0 if job.source is None else count_pixels(job.source, max_pixels)


def _read(job: Job, *, stdin: bytes | None, max_pixels: int) -> DecodedImage:
    if job.source is None:
        return decode_image(Path(job.name), content=stdin, max_pixels=max_pixels)
    return decode_image(job.source, max_pixels=max_pixels)


def _read_stdin(jobs: Sequence[Job]) -> bytes | None:
    """Read standard input if it is the source of a job."""
    if all(job.source is not None for job in jobs):
        return None
    if sys.stdin.isatty():
        raise UsageError(
            "`-` reads an image from standard input, which is a terminal",
            "write `... - < photo.jpg`",
        )
    content = bytearray()
    with interrupt_immediately():
        while chunk := sys.stdin.buffer.read(2**20):
            content += chunk
            if len(content) > _MAX_STDIN_BYTES:
                raise DataError("stdin has more than 1 GB", "give the image as a file")
    return bytes(content)


def _set_passive_omp_wait() -> None:
    """Let waiting OpenMP threads sleep: while spinning, they take the CPU from the pipeline.

    torch reads the variable when it is imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
