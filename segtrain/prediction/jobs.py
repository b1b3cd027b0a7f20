"""Where the outputs go, settled before any work is done."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from segtrain.errors import UsageError
from segtrain.images import IMAGE_SUFFIXES
from segtrain.prediction.inputs import Input, find_inputs
from segtrain.prediction.outputs import OUTPUTS, suffix_of
from segtrain.prediction.video.suffixes import VIDEO_SUFFIXES, video_suffix_of
from segtrain.tiles import check_side

STDOUT = Path("-")
_WRITABLE = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class Job:
    """One picture or video and its outputs.

    source: None for standard input. outputs: kind → file, None for standard output; of a video
    there is one, "video".
    """

    source: Path | None
    outputs: dict[str, Path | None]
    is_video: bool = False

    @property
    def name(self) -> str:
        """The picture, for people."""
        return "stdin" if self.source is None else str(self.source)

    @property
    def clip(self) -> tuple[Path, Path]:
        """Of a video its file and that of its result."""
        target = self.outputs["video"]
        assert self.source is not None
        assert target is not None
        return self.source, target

    @property
    def files(self) -> list[Path]:
        """The outputs that are files."""
        return [path for path in self.outputs.values() if path is not None]


def wanted_kinds(
    save: str | None, background: str | None, output: Path, *, panel: bool = False
) -> list[str]:
    """Which outputs are meant.

    Without --save these are mask and cutout, and background if one is given; where there is room
    for one only, the background if one is given, else the cutout.

    Args:
        save: kinds with commas between them, or None.
        background: as given, or None.
        output: a folder, a file, or "-".
        panel: also the panel.

    Raises:
        UsageError: a kind is unknown, or several are to go into one file.
    """
    one_only = output == STDOUT or _is_file_name(output)
    if save is not None:
        kinds = [word.strip() for word in save.split(",") if word.strip()]
    elif one_only:
        kinds = [] if panel else ["cutout" if background is None else "background"]
    else:
        kinds = ["mask", "cutout"] + (["background"] if background is not None else [])
    kinds = list(dict.fromkeys([*kinds, *(["panel"] if panel else [])]))
    unknown = [kind for kind in kinds if kind not in OUTPUTS]
    if unknown or not kinds:
        wrong = unknown[0] if unknown else save
        raise UsageError(f"--save {wrong!r} is unknown; there are {', '.join(OUTPUTS)}")
    if background is not None and not {"background", "panel"} & set(kinds):
        raise UsageError("--background shows in neither of --save; add background or panel")
    if one_only and len(kinds) > 1:
        raise UsageError(
            f"--output {output} holds one picture, not {' and '.join(kinds)}; choose by --save"
        )
    return kinds


def tile_of(text: str) -> int | Literal["auto"] | None:
    """What `--tile` says: a side in pixels, "auto", or None for off.

    Raises:
        UsageError: it says something else, or tiles cannot have that side.
    """
    if text == "auto":
        return "auto"
    if text == "off":
        return None
    if not text.isdecimal():
        raise UsageError(f"--tile {text!r} is no number of pixels, not auto, and not off")
    check_side(int(text))
    return int(text)


def plan_jobs(
    words: Sequence[str],
    output: Path,
    kinds: Sequence[str],
    *,
    background: str = "blur",
    records: Path | None = None,
    overwrite: bool = False,
) -> list[Job]:
    """Pair every input with its outputs before any work is done.

    Args:
        words: as in `segtrain.prediction.inputs.find_inputs`.
        output: a folder; or, for one input and one kind, a file with a picture's or video's
            suffix, or "-" for standard output.
        kinds: of `OUTPUTS`.
        background: what people are put on, for it may decide on a file's format.
        records: the file of --jsonl, which is an output like the others.
        overwrite: allow outputs that exist. An input is never overwritten.

    Raises:
        UsageError: nothing is found, outputs would collide, or an output exists or is an input.
    """
    alone = output == STDOUT or _is_file_name(output)
    if output.exists() and not output.is_dir() and not alone:
        raise UsageError(f"--output {output} is a file; give a folder, or a name like x.png")
    inputs = find_inputs(words, leave_out=None if alone else output)
    if alone:
        jobs = [_only_job(inputs, output, kinds[0], background)]
    else:
        jobs = [_job(meant, output, kinds, background) for meant in inputs]
    if records == STDOUT and output == STDOUT:
        raise UsageError("--output - and --jsonl - would mix on standard output; give one a file")
    _refuse_conflicts(jobs, None if records == STDOUT else records, overwrite=overwrite)
    return jobs


def _is_file_name(output: Path) -> bool:
    """A folder may be called x.png, if it is one."""
    suffix = output.suffix.lower()
    return suffix in IMAGE_SUFFIXES | VIDEO_SUFFIXES and not output.is_dir()


def _job(meant: Input, folder: Path, kinds: Sequence[str], background: str) -> Job:
    stem = folder / meant.stem
    if meant.is_video:
        outputs = {"video": stem.with_name(stem.name + video_suffix_of(background))}
    else:
        outputs = {kind: stem.with_name(stem.name + suffix_of(kind, background)) for kind in kinds}
    return Job(meant.path, {**outputs}, meant.is_video)


def _only_job(inputs: Sequence[Input], output: Path, kind: str, background: str) -> Job:
    if len(inputs) > 1:
        raise UsageError(
            f"--output {output} is one file, and there are {len(inputs)} inputs; give a folder"
        )
    [meant] = inputs
    if meant.is_video:
        wanted = Path(video_suffix_of(background)).suffix
        if output.suffix != wanted:
            raise UsageError(
                f"--output {output} cannot hold that video; give a name like x{wanted}"
            )
        return Job(meant.path, {"video": output}, is_video=True)
    if output == STDOUT:
        return Job(meant.path, {kind: None})
    if output.suffix.lower() not in _WRITABLE:
        raise UsageError(f"--output {output} is not written here; give .png or .jpg")
    if output.suffix.lower() != ".png" and suffix_of(kind, background).endswith(".png"):
        raise UsageError(f"--output {output}: JPEG would spoil a {kind}; give .png")
    return Job(meant.path, {kind: output})


def _refuse_conflicts(jobs: Sequence[Job], records: Path | None, *, overwrite: bool) -> None:
    sources = {job.source.resolve() for job in jobs if job.source is not None}
    writer: dict[Path, str] = {}
    for path, name in _written(jobs, records):
        # The folder is resolved, for two of its names may mean one; the file itself is not: a link
        # in its place is replaced, not followed.
        place = path.parent.resolve() / path.name
        if place in writer:
            raise UsageError(
                f"{writer[place]} and {name} would both become {path.name}; give them different "
                "--output folders"
            )
        writer[place] = name
        if path.resolve() in sources:
            raise UsageError(f"{path} is an input too; choose another --output")
        if path.is_dir():
            raise UsageError(f"{path} is a folder; choose another --output")
        if not overwrite and (path.exists() or path.is_symlink()):
            raise UsageError(f"{path} exists; use --overwrite or another --output")


def _written(jobs: Sequence[Job], records: Path | None) -> Iterator[tuple[Path, str]]:
    for job in jobs:
        for path in job.files:
            yield path, job.name
    if records is not None:
        yield records, "--jsonl"
