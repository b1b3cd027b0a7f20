"""Which pictures are meant and where their outputs go, settled before any work is done."""

import glob
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from segtrain.errors import UsageError
from segtrain.images import find_images
from segtrain.prediction.outputs import OUTPUTS


@dataclass(frozen=True)
class Job:
    """One picture and its outputs: kind (mask, cutout, background, panel) → file."""

    source: Path
    outputs: dict[str, Path]


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


def _output(stem: Path, kind: str) -> Path:
    return stem.with_name(stem.name + OUTPUTS[kind].suffix)


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
