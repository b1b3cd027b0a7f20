"""Pair the inputs of `segtrain predict` with their outputs before any work starts."""

import glob
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from segtrain.errors import UsageError
from segtrain.imaging.images import IMAGE_SUFFIXES, find_images
from segtrain.inference.tiles import check_tile_size
from segtrain.prediction.outputs import OUTPUTS, output_suffix
from segtrain.prediction.video.formats import VIDEO_SUFFIXES, video_output_suffix
from segtrain.runtime.files import refuse_existing

STDIN = "-"
STDOUT = Path("-")

_WRITABLE_SUFFIXES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class Input:
    """An image, a video, or standard input.

    Attributes:
        path: None for standard input.
        stem: path of the outputs relative to the output folder, without suffix.
    """

    path: Path | None
    stem: Path

    @property
    def is_video(self) -> bool:
        return self.path is not None and self.path.suffix.lower() in VIDEO_SUFFIXES


@dataclass(frozen=True)
class Job:
    """One image or video and its outputs.

    Attributes:
        source: None for standard input.
        outputs: from output kind to file; None for standard output. A video has the one kind
            "video".
        is_video: whether `source` is a video.
    """

    source: Path | None
    outputs: dict[str, Path | None]
    is_video: bool = False

    @property
    def name(self) -> str:
        """The name of the input in messages."""
        return "stdin" if self.source is None else str(self.source)

    @property
    def video_paths(self) -> tuple[Path, Path]:
        """Source and target of a video."""
        target = self.outputs["video"]
        assert self.source is not None
        assert target is not None
        return self.source, target

    @property
    def files(self) -> list[Path]:
        """The outputs that are files."""
        return [path for path in self.outputs.values() if path is not None]


def plan_jobs(
    inputs: Sequence[str],
    output: Path,
    kinds: Sequence[str],
    *,
    background: str = "blur",
    jsonl: Path | None = None,
    overwrite: bool = False,
) -> list[Job]:
    """Pair every input with its outputs before any work starts.

    Args:
        inputs: as in `find_inputs`.
        output: a folder; or, for one input and one kind, a file with the suffix of an image or
            video, or "-" for standard output.
        kinds: keys of `OUTPUTS`.
        background: value of `--background`, which affects the output format.
        jsonl: the file of `--jsonl`, which is an output like the others.
        overwrite: allow outputs that exist. An input is never overwritten.

    Raises:
        UsageError: an input matches no file, outputs collide, or an output exists or is an input.
    """
    single_output = _is_single_output(output)
    if output.exists() and not output.is_dir() and not single_output:
        raise UsageError(f"--output {output} is a file", "give a folder, or a name like x.png")
    found = find_inputs(inputs, exclude=None if single_output else output)
    if single_output:
        jobs = [_single_output_job(found, output, kinds[0], background)]
    else:
        jobs = [_folder_job(each, output, kinds, background) for each in found]
    if jsonl == STDOUT and output == STDOUT:
        raise UsageError(
            "--output - and --jsonl - both write to standard output", "give a file for one of them"
        )
    _check_conflicts(jobs, None if jsonl == STDOUT else jsonl, overwrite=overwrite)
    return jobs


def find_inputs(arguments: Sequence[str], exclude: Path | None = None) -> list[Input]:
    """Find the images and videos that the arguments refer to, without duplicates, in order.

    Files in one folder that differ only in their suffix, such as 1.jpg and 1.png, get the stems
    1_jpg and 1_png.

    Args:
        arguments: files, folders (searched recursively for images, not for videos), glob
            patterns, and "-" for standard input.
        exclude: a folder whose images are skipped in the folders that contain it: the results of
            an earlier run.

    Raises:
        UsageError: an argument matches no file.
    """
    found: dict[Path | None, Path] = {}
    for argument in arguments:
        for path, relative in _expand(argument, exclude):
            found.setdefault(path, relative)
    counts = Counter(path.with_suffix("") for path in found if path is not None)
    inputs = []
    for path, relative in found.items():
        stem = relative
        if path is not None:
            stem = relative.with_suffix("")
            if counts[path.with_suffix("")] > 1:
                stem = stem.with_name(f"{stem.name}_{path.suffix[1:]}")
        inputs.append(Input(path, stem))
    return inputs


def select_kinds(
    save: str | None, background: str | None, output: Path, *, panel: bool = False
) -> list[str]:
    """Return the output kinds that the options ask for.

    Without `--save`: mask and cutout, and the background if `--background` is given. If the output
    holds only one image: the background if `--background` is given, else the cutout.

    Args:
        save: comma-separated kinds, or None.
        background: value of `--background`, or None.
        output: a folder, a file, or "-".
        panel: add the panel.

    Raises:
        UsageError: a kind is unknown, or one output file would hold several kinds.
    """
    single_output = _is_single_output(output)
    if save is not None:
        kinds = [kind.strip() for kind in save.split(",") if kind.strip()]
    elif single_output:
        kinds = [] if panel else ["cutout" if background is None else "background"]
    else:
        kinds = ["mask", "cutout"] + (["background"] if background is not None else [])
    kinds = list(dict.fromkeys([*kinds, *(["panel"] if panel else [])]))
    unknown = [kind for kind in kinds if kind not in OUTPUTS]
    if unknown or not kinds:
        raise UsageError(
            f"--save: unknown kind {unknown[0] if unknown else save!r}",
            f"available: {', '.join(OUTPUTS)}",
        )
    if background is not None and not {"background", "panel"} & set(kinds):
        raise UsageError(
            "--background has no effect on the kinds of --save", "add background or panel"
        )
    if single_output and len(kinds) > 1:
        raise UsageError(
            f"--output {output} holds one image, not {' and '.join(kinds)}", "choose one by --save"
        )
    return kinds


def parse_tile(text: str) -> int | Literal["auto"] | None:
    """Parse `--tile`: a side in pixels, "auto", or "off" (None).

    Raises:
        UsageError: the value is invalid, or tiles cannot have this side.
    """
    if text == "auto":
        return "auto"
    if text == "off":
        return None
    if not text.isdecimal():
        raise UsageError(f"invalid --tile {text!r}", "use a number of pixels, auto or off")
    check_tile_size(int(text))
    return int(text)


def _expand(argument: str, exclude: Path | None) -> list[tuple[Path | None, Path]]:
    """Return each matching file, with its path relative to the argument."""
    if argument == STDIN:
        return [(None, Path("stdin"))]
    path = Path(argument)
    if path.is_dir():
        images = [file for file in find_images(path) if not _is_excluded(file, path, exclude)]
        if not images:
            raise UsageError(f"{path}: no images in this folder")
        return [(file, file.relative_to(path)) for file in images]
    if path.exists():
        return [(path, Path(path.name))]
    # Path.glob does not accept absolute patterns.
    matches = [Path(match) for match in sorted(glob.glob(argument, recursive=True))]  # noqa: PTH207
    files = [match for match in matches if match.is_file()]
    if not files:
        raise UsageError(f"{argument}: no such file, and no match for that pattern")
    return [(file, Path(file.name)) for file in files]


def _is_excluded(file: Path, folder: Path, exclude: Path | None) -> bool:
    if exclude is None or exclude.resolve() == folder.resolve():
        return False
    return file.resolve().is_relative_to(exclude.resolve())


def _is_single_output(output: Path) -> bool:
    """Whether `output` is standard output or a file. An existing folder may be named x.png."""
    is_file_name = output.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES and not output.is_dir()
    return output == STDOUT or is_file_name


def _folder_job(source: Input, folder: Path, kinds: Sequence[str], background: str) -> Job:
    stem = folder / source.stem
    if source.is_video:
        suffixes = {"video": video_output_suffix(background)}
    else:
        suffixes = {kind: output_suffix(kind, background) for kind in kinds}
    outputs = {kind: stem.with_name(stem.name + suffix) for kind, suffix in suffixes.items()}
    return Job(source.path, {**outputs}, source.is_video)


def _single_output_job(inputs: Sequence[Input], output: Path, kind: str, background: str) -> Job:
    if len(inputs) > 1:
        raise UsageError(
            f"--output {output} is one file, but there are {len(inputs)} inputs", "give a folder"
        )
    [source] = inputs
    if source.is_video:
        suffix = Path(video_output_suffix(background)).suffix
        if output.suffix != suffix:
            raise UsageError(
                f"--output {output} cannot hold this video", f"give a name like x{suffix}"
            )
        return Job(source.path, {"video": output}, is_video=True)
    if output == STDOUT:
        return Job(source.path, {kind: None})
    if output.suffix.lower() not in _WRITABLE_SUFFIXES:
        raise UsageError(f"--output {output}: unsupported format", "use .png or .jpg")
    if output.suffix.lower() != ".png" and output_suffix(kind, background).endswith(".png"):
        raise UsageError(f"--output {output}: JPEG cannot store a {kind}", "use .png")
    return Job(source.path, {kind: output})


def _check_conflicts(jobs: Sequence[Job], jsonl: Path | None, *, overwrite: bool) -> None:
    sources = {job.source.resolve() for job in jobs if job.source is not None}
    owners: dict[Path, str] = {}
    for path, name in _output_files(jobs, jsonl):
        # Resolve the folder, because two paths may lead to one folder. Do not resolve the file: a
        # link in its place is replaced, not followed.
        place = path.parent.resolve() / path.name
        if place in owners:
            raise UsageError(
                f"{owners[place]} and {name} would both be written to {path.name}",
                "give them different --output folders",
            )
        owners[place] = name
        if path.resolve() in sources:
            raise UsageError(f"{path} is also an input", "choose another --output")
        if path.is_dir():
            raise UsageError(f"{path} is a folder", "choose another --output")
        refuse_existing([path], overwrite=overwrite, option="--output")


def _output_files(jobs: Sequence[Job], jsonl: Path | None) -> Iterator[tuple[Path, str]]:
    """Yield each output file with the input or option that it belongs to."""
    for job in jobs:
        for path in job.files:
            yield path, job.name
    if jsonl is not None:
        yield jsonl, "--jsonl"
