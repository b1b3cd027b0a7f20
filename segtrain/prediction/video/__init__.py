"""People of a video on a new background: the same frames at the same times, and the sound."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from segtrain.errors import UsageError
from segtrain.extras import needed

if TYPE_CHECKING:
    from segtrain.prediction.backgrounds import MakeBackground
    from segtrain.prediction.network import Network


@dataclass(frozen=True)
class VideoOutcome:
    """What became of a clip.

    seconds: from its first frame to the end of its last.
    person_share: share of person pixels, the mean over the frames.
    """

    num_frames: int
    seconds: float
    person_share: float


def predict_video(
    source: Path,
    target: Path,
    network: "Network",
    *,
    make_background: "MakeBackground",
    overwrite: bool,
    tell: Callable[[str], object],
) -> VideoOutcome:
    """Put the people of a clip on a new background, frame by frame, in constant memory.

    Args:
        source: a clip in any format libav reads.
        target: .mp4, or .webm where the background is to be transparent. It is there whole or not
            at all.
        make_background: of `segtrain.prediction.backgrounds.background_maker`; asked for each
            frame.
        overwrite: allow a target that exists. The source is never overwritten.
        tell: takes a line for the user about what could not be kept as it was.

    Raises:
        UsageError: PyAV is missing, or the target exists or is the source.
        DataError: the source is no video, is damaged, cut short or too large.
        ResourceError: the target cannot be written.
        Stopped: a signal has come; nothing is left behind.
    """
    needed("av", "video")
    if target.resolve() == source.resolve():
        raise UsageError(f"{target} is the input, too; choose another --output")
    if target.exists() and not overwrite:
        raise UsageError(f"{target} exists; use --overwrite or another --output")
    from segtrain.prediction.video.command import convert

    return convert(source, target, network, make_background=make_background, tell=tell)
