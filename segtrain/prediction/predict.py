"""Pictures in, files out: which inputs are meant, where the outputs go, and nothing overwritten."""

import glob
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from segtrain.devices import describe_device, resolve_device
from segtrain.errors import DataError, UsageError
from segtrain.images import find_images, read_image, write_image
from segtrain.prediction.compose import (
    MakeBackground,
    background_maker,
    make_panel,
    put_on_background,
)
from segtrain.prediction.predictor import Predictor, Result
from segtrain.progress import progress_bar
from segtrain.runs import find_checkpoint


@dataclass(frozen=True)
class Job:
    """One picture and its outputs: kind (mask, cutout, background, panel) → file."""

    source: Path
    outputs: dict[str, Path]


@dataclass(frozen=True)
class Outcome:
    """What became of a job: the share of person pixels, or why the picture could not be used."""

    job: Job
    person_share: float = 0.0
    problem: str | None = None


def plan_jobs(
    inputs: Sequence[str], output_dir: Path, kinds: Sequence[str], *, overwrite: bool
) -> list[Job]:
    """Pair every input picture with its output files before any work is done.

    Args:
        inputs: files, folders (searched to the bottom, their structure kept) and glob patterns.
        kinds: which outputs are wanted.
        overwrite: allow outputs that exist. An input is never overwritten.

    Raises:
        UsageError: nothing is found, two inputs would write one file, or an output exists.
    """
    jobs = [
        Job(source, {kind: _output(output_dir / relative, kind) for kind in kinds})
        for source, relative in _expand(inputs)
    ]
    sources = {job.source.resolve() for job in jobs}
    writer: dict[Path, Path] = {}
    for job in jobs:
        for path in job.outputs.values():
            if path in writer:
                raise UsageError(
                    f"{writer[path]} and {job.source} would both become {path.name}; give them "
                    "different --output folders"
                )
            writer[path] = job.source
            if path.resolve() in sources:
                raise UsageError(f"{path} is an input too; choose another --output")
            if path.exists() and not overwrite:
                raise UsageError(f"{path} exists; use --overwrite or another --output")
    return jobs


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
    device = resolve_device(device_name)
    make_background = background_maker(background)
    path, chosen_by = find_checkpoint(checkpoint)
    predictor = Predictor(path, device)
    tell(f"checkpoint: {path} ({chosen_by}), device: {describe_device(device)}")
    problems = []
    with progress_bar(total=len(jobs), desc="predicting") as bar:
        for outcome in run_jobs(jobs, predictor, make_background, max_pixels=max_pixels):
            if outcome.problem is not None:
                problems.append(outcome.problem)
                bar.write(f"skipped: {outcome.problem}", file=sys.stderr)
            elif outcome.person_share == 0:
                bar.write(f"no person found in {outcome.job.source}", file=sys.stderr)
            bar.update()
    return problems


def run_jobs(
    jobs: Sequence[Job],
    predictor: Predictor,
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
            result = predictor(read_image(job.source, max_pixels=max_pixels))
            _write(job, result, make_background)
        except DataError as error:
            yield Outcome(job, problem=str(error))
        else:
            yield Outcome(job, person_share=float((result.mask > 0).mean()))


def _write(job: Job, result: Result, make_background: MakeBackground) -> None:
    if path := job.outputs.get("mask"):
        write_image(path, result.mask)
    if path := job.outputs.get("cutout"):
        write_image(path, result.cutout())
    if job.outputs.keys() & {"background", "panel"}:
        background = make_background(result.image)
        composed = put_on_background(result.image, result.probability, background)
        if path := job.outputs.get("background"):
            write_image(path, composed)
        if path := job.outputs.get("panel"):
            write_image(path, make_panel(result.image, composed, result.mask))


_SUFFIXES = {
    "mask": "_mask.png",
    "cutout": "_cutout.png",
    "background": "_background.jpg",
    "panel": "_panel.jpg",
}


def _output(stem: Path, kind: str) -> Path:
    return stem.with_name(stem.name + _SUFFIXES[kind])


def _expand(inputs: Sequence[str]) -> list[tuple[Path, Path]]:
    """(file, path below the output folder without its extension) of every input picture, once.

    Neighbours that differ only in their extension, 1.jpg and 1.png, become 1_jpg and 1_png.
    """
    found: dict[Path, Path] = {}
    for text in inputs:
        for path, relative in _expand_one(text):
            found.setdefault(path, relative)
    twins = Counter(path.with_suffix("") for path in found)
    stems = []
    for path, relative in found.items():
        stem = relative.with_suffix("")
        if twins[path.with_suffix("")] > 1:
            stem = stem.with_name(f"{stem.name}_{path.suffix[1:]}")
        stems.append((path, stem))
    return stems


def _expand_one(text: str) -> list[tuple[Path, Path]]:
    path = Path(text)
    if path.is_dir():
        pictures = [(file, file.relative_to(path)) for file in find_images(path)]
        if not pictures:
            raise UsageError(f"there are no pictures in the folder {path}")
        return pictures
    if path.exists():
        return [(path, Path(path.name))]
    # Path.glob takes no absolute pattern.
    matches = [Path(match) for match in sorted(glob.glob(text, recursive=True))]  # noqa: PTH207
    files = [match for match in matches if match.is_file()]
    if not files:
        raise UsageError(f"{text} is no file, no folder, and matches nothing")
    return [(file, Path(file.name)) for file in files]
