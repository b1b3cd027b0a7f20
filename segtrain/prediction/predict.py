"""`segtrain predict`: pictures in, files out."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from segtrain.errors import DataError
from segtrain.files import write_bytes
from segtrain.images import encode_image, read_image
from segtrain.prediction.compose import MakeBackground, background_maker
from segtrain.prediction.jobs import Job
from segtrain.prediction.network import HowToRun, Network, open_network
from segtrain.prediction.outputs import OUTPUTS, Composition, Result
from segtrain.progress import progress_bar
from segtrain.runs import find_checkpoint


@dataclass(frozen=True)
class Outcome:
    """What became of a job: the share of person pixels, or why the picture could not be used."""

    job: Job
    person_share: float = 0.0
    problem: str | None = None


def predict_all(
    jobs: Sequence[Job],
    checkpoint: Path | None,
    *,
    background: str,
    max_pixels: int,
    device_name: str,
    tell: Callable[[str], object],
) -> list[str]:
    """Find the checkpoint, do the jobs with a progress bar, and tell what was found in each.

    Args:
        checkpoint: as in `segtrain.runs.find_checkpoint`.
        background: as in `segtrain.prediction.compose.background_maker`.
        tell: takes a line for the user.

    Returns:
        A line for each picture that could not be used.

    Raises:
        UserError: of any kind but a single unusable picture.
    """
    make_background = background_maker(background)
    path, chosen_by = find_checkpoint(checkpoint)
    network = open_network(path, HowToRun(device=device_name))
    tell(f"checkpoint: {path} ({chosen_by}), {network.description}")
    problems = []
    with progress_bar(total=len(jobs), desc="predicting") as bar:
        for outcome in run_jobs(jobs, network, make_background, max_pixels=max_pixels):
            if outcome.problem is not None:
                problems.append(outcome.problem)
                bar.write(f"skipped: {outcome.problem}", file=sys.stderr)
            elif outcome.person_share == 0:
                bar.write(f"no person found in {outcome.job.source}", file=sys.stderr)
            bar.update()
    return problems


def run_jobs(
    jobs: Sequence[Job],
    network: Network,
    make_background: MakeBackground,
    *,
    max_pixels: int,
) -> Iterator[Outcome]:
    """Do the jobs one by one; a picture that cannot be read does not stop the others.

    Raises:
        ResourceError: an output cannot be written.
    """
    for job in jobs:
        try:
            image = read_image(job.source, max_pixels=max_pixels)
            [probability] = network.probs([image])
            result = Result(image=image, probability=probability)
            _write(job, Composition(result, make_background))
        except DataError as error:
            yield Outcome(job, problem=str(error))
        else:
            yield Outcome(job, person_share=float((result.mask > 0).mean()))


def _write(job: Job, composition: Composition) -> None:
    # Everything is encoded before anything is written: a picture is done whole or not at all.
    encoded = {
        path: encode_image(OUTPUTS[kind].make(composition), path)
        for kind, path in job.outputs.items()
    }
    for path, content in encoded.items():
        write_bytes(path, content)
