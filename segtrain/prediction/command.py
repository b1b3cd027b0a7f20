"""`segtrain predict`: pictures in, files out."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from segtrain.errors import DataError, UsageError
from segtrain.extras import needed
from segtrain.images import Picture, pixels_in, read_picture
from segtrain.prediction.backgrounds import MakeBackground, background_maker
from segtrain.prediction.finishing import Finishing
from segtrain.prediction.jobs import Job
from segtrain.prediction.network import HowToRun, Network, open_network
from segtrain.prediction.pipeline import Outcome, Pipeline
from segtrain.prediction.records import Record, recording
from segtrain.progress import progress_bar
from segtrain.runs import find_checkpoint
from segtrain.stopping import Stopped, at_once

_LARGEST_STDIN = 10**9


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What the user asked for, beside the inputs and where outputs go.

    checkpoint: as in `segtrain.runs.find_checkpoint`. background: as in
    `segtrain.prediction.backgrounds.background_maker`. records: as in
    `segtrain.prediction.records.recording`.
    """

    checkpoint: Path | None = None
    how: HowToRun = field(default_factory=HowToRun)
    background: str = "blur"
    refine: bool = False
    clean: bool = False
    max_pixels: int
    records: Path | None = None
    overwrite: bool = False


def predict(jobs: Sequence[Job], wishes: Wishes, *, tell: Callable[[str], object]) -> list[str]:
    """Find the checkpoint, do the jobs with a progress bar, and tell what was found in each.

    The first pictures are read while the network is opened, and torch imported.

    Args:
        tell: takes a line for the user.

    Returns:
        A line for each picture or video that could not be used.

    Raises:
        Stopped: a signal has come; what is written is whole.
        UserError: of any kind but a single unusable picture.
    """
    if any(job.is_video for job in jobs):
        needed("av", "video")
    _wait_politely()
    make_background = background_maker(wishes.background)
    finish = Finishing(
        make_background=make_background,
        refine=wishes.refine,
        clean=wishes.clean,
        describe=wishes.records is not None,
    )
    path, chosen_by = find_checkpoint(wishes.checkpoint)
    pictures = [job for job in jobs if not job.is_video]
    videos = [job for job in jobs if job.is_video]
    weigh = partial(_weigh, max_pixels=wishes.max_pixels)
    read = partial(_read, stdin=_stdin(pictures), max_pixels=wishes.max_pixels)
    problems: list[str] = []
    num_videos_done = 0
    with ExitStack() as stack:
        record = stack.enter_context(recording(wishes.records))
        pipeline = Pipeline(pictures, weigh=weigh, read=read, finish=finish)
        try:
            with pipeline:
                network = open_network(path, wishes.how)
                tell(f"checkpoint: {path} ({chosen_by}), {network.description}")
                problems += _do_pictures(pipeline, network, len(pictures), record)
            for problem in _do_videos(
                videos, network, make_background, overwrite=wishes.overwrite, tell=tell
            ):
                if problem is None:
                    num_videos_done += 1
                else:
                    problems.append(problem)
        except Stopped as stopped:
            done = _done(
                pictures=(pipeline.num_done, len(pictures)), videos=(num_videos_done, len(videos))
            )
            raise Stopped(stopped.received, done) from None
    return problems


def _done(**counts: tuple[int, int]) -> str:
    """How many of how many are done of each kind that there is."""
    kinds = [f"{done} of {total} {kind}" for kind, (done, total) in counts.items() if total]
    return f"{' and '.join(kinds)} are done"


def _do_pictures(pipeline: Pipeline, network: Network, total: int, record: Record) -> list[str]:
    problems = []
    with progress_bar(total=total, desc="predicting") as bar:
        for outcome in pipeline.outcomes(network):
            record(outcome)
            for line in _lines(outcome):
                bar.write(line, file=sys.stderr)
            if outcome.problem is not None:
                problems.append(outcome.problem)
            bar.update()
    return problems


def _lines(outcome: Outcome) -> list[str]:
    """What the user should know about a picture."""
    if outcome.facts is None:
        return [f"skipped: {outcome.problem}"]
    lines = [f"{outcome.job.name} {outcome.note}"] if outcome.note else []
    if outcome.facts["person_share"] == 0:
        lines.append(f"no person found in {outcome.job.name}")
    return lines


def _do_videos(
    jobs: Sequence[Job],
    network: Network,
    make_background: MakeBackground,
    *,
    overwrite: bool,
    tell: Callable[[str], object],
) -> Iterator[str | None]:
    """Do one after the other; yields why it could not be used, or None."""
    if not jobs:
        return
    from segtrain.prediction.video import predict_video

    for job in jobs:
        try:
            outcome = predict_video(
                *job.clip,
                network,
                make_background=make_background,
                overwrite=overwrite,
                tell=tell,
            )
        except DataError as error:
            tell(f"skipped: {error}")
            yield str(error)
            continue
        if outcome.person_share == 0:
            tell(f"no person found in {job.name}")
        yield None


def _weigh(job: Job, *, max_pixels: int) -> int:
    return 0 if job.source is None else pixels_in(job.source, max_pixels)


def _read(job: Job, *, stdin: bytes | None, max_pixels: int) -> Picture:
    if job.source is None:
        return read_picture(Path(job.name), content=stdin, max_pixels=max_pixels)
    return read_picture(job.source, max_pixels=max_pixels)


def _stdin(jobs: Sequence[Job]) -> bytes | None:
    """What comes on standard input, if a job wants it."""
    if all(job.source is not None for job in jobs):
        return None
    if sys.stdin.isatty():
        raise UsageError("`-` reads a picture from standard input; write `... - < photo.jpg`")
    content = bytearray()
    with at_once():
        while chunk := sys.stdin.buffer.read(2**20):
            content += chunk
            if len(content) > _LARGEST_STDIN:
                raise DataError("stdin has more than 1 GB; give the picture as a file")
    return bytes(content)


def _wait_politely() -> None:
    """Let OpenMP's threads sleep when they wait: spinning, they keep our threads from working.

    It is read when torch is imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
