"""Reading a clip: its frames upright in RGB, each with its time, and its sound as packets.

Clips come from strangers: only formats of video files are opened, frames are limited in size before
their memory is taken, and everything libav can raise becomes one DataError that names the file.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import av
import numpy as np
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.format import Flags
from av.packet import Packet
from av.stream import Disposition, Stream
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from segtrain.errors import DataError
from segtrain.images import MAX_PIXELS, Pixels
from segtrain.prediction.video.colour import Colour, Converter, colour_of
from segtrain.prediction.video.orientation import orientation_of
from segtrain.prediction.video.timeline import Timeline
from segtrain.rgb import is_on_its_side, turned_upright

# libav knows playlists and scripts, too, which name other files and addresses.
_FORMATS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg,mxf"
# Metadata is not always UTF-8. PyAV 18 raises UnicodeDecodeError unless it is told otherwise. PyAV
# 19 preserves the bytes and no longer has this argument.
_METADATA: dict[str, Any] = (
    {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "replace"}
)
# A clip that ends this much sooner than its header says was cut short.
_TOLERANCE = 0.3


@dataclass(frozen=True)
class Facts:
    """What a clip's header and first frame say.

    width, height: as stored. orientation: how they lie, EXIF's 1 (upright) to 8.
    time_base: seconds a tick of the frames' times.
    rate: frames a second, on average.
    sample_aspect_ratio: width by height of a stored pixel.
    num_frames: as far as is known beforehand.
    """

    width: int
    height: int
    orientation: int
    colour: Colour
    time_base: Fraction
    rate: Fraction
    sample_aspect_ratio: Fraction
    num_frames: int | None

    @property
    def is_on_its_side(self) -> bool:
        """Whether frames are as wide as they were high, once they are upright."""
        return is_on_its_side(self.orientation)


@dataclass(frozen=True)
class Frame:
    """pixels: H W 3 uint8 RGB, upright. ticks: when it is shown. duration: for how many ticks."""

    pixels: Pixels
    ticks: int
    duration: int


class Clip:
    """An opened clip, to be read once.

    Attributes:
        facts: what is known beforehand.
        sounds: its audio tracks.
        left_out: how many streams there are of each other kind.
        num_broken: packets that could not be decoded, so far.
    """

    def __init__(self, path: Path, container: InputContainer, facts: Facts) -> None:
        self.facts = facts
        self._path, self._container = path, container
        self._video = _video_stream(path, container)
        self.sounds: list[AudioStream] = list(container.streams.audio)
        self._used = {self._video.index, *(stream.index for stream in self.sounds)}
        self.left_out = Counter(s.type for s in container.streams if s.index not in self._used)
        self.num_broken = 0
        self._converter, self._end = Converter(facts.colour), 0.0
        self._timeline = Timeline(
            Fraction(container.start_time or 0, av.time_base),
            may_leap=Flags.ts_discont in Flags(container.format.flags),
        )

    def pieces(self) -> "Iterator[Frame | Packet[Stream]]":
        """Frames and packets of sound, as they lie in the file; times start at 0 and go on.

        Raises:
            DataError: the clip ends before its header says, or reading fails.
        """
        ticks = -1
        with _reading(self._path):
            for packet in self._container.demux():
                self._note_end(packet)
                if packet.stream.index not in self._used:
                    continue
                self._timeline.settle(packet)
                if packet.stream is self._video:
                    for decoded in self._decode(packet):
                        frame = self._frame(decoded, ticks)
                        ticks = frame.ticks
                        yield frame
                elif packet.dts is not None:
                    yield packet
        self._check_end()

    def _decode(self, packet: "Packet[Stream]") -> Iterator[VideoFrame]:
        try:
            frames = self._video.decode(packet)
        except av.error.InvalidDataError:
            self.num_broken += 1
            return
        for frame in frames:
            self.num_broken += frame.is_corrupt
            yield frame

    def _frame(self, decoded: VideoFrame, previous: int) -> Frame:
        facts = self.facts
        rgb = self._converter.to_rgb(decoded, facts.width, facts.height)
        # A copy, since it is turned in place: of RGB these may be the pixels that the decoder
        # paints the next frame upon.
        pixels = np.array(rgb.to_ndarray(), dtype=np.uint8)
        duration = decoded.duration or max(1, round(1 / (facts.rate * facts.time_base)))
        stamp = decoded.pts if decoded.pts is not None else decoded.dts
        ticks = previous + duration if stamp is None else stamp
        # Encoders take no two frames at one time.
        return Frame(
            turned_upright(pixels, facts.orientation),
            max(ticks, previous + 1),
            duration,
        )

    def _note_end(self, packet: "Packet[Stream]") -> None:
        if packet.pts is not None:
            end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
            self._end = max(self._end, end)

    def _check_end(self) -> None:
        if self._container.duration is None:
            return
        # Counted from 0 and not from the start, as Matroska does: where others do not, a clip that
        # starts late may be cut by as much unnoticed, which is better than refusing a whole one.
        stated, found = self._container.duration / av.time_base, self._end
        if found < stated - _TOLERANCE:
            raise DataError(
                f"{self._path} was cut short: it ends after {found:.1f} of {stated:.1f} seconds; "
                "copy it again or repair it"
            )


@contextmanager
def open_clip(path: Path) -> Iterator[Clip]:
    """Open a clip.

    Raises:
        DataError: the file is missing, no video, damaged, or its frames are too large.
    """
    with _container(path) as container:
        facts = _facts(path, container)
    # Opened anew and not wound back: not every format can.
    with _container(path) as container:
        yield Clip(path, container, facts)


def _facts(path: Path, container: InputContainer) -> Facts:
    stream = _video_stream(path, container)
    frame = next(_decodable(path, container, stream), None)
    if frame is None:
        raise DataError(f"{path} has no frame that can be decoded; replace the file")
    rate = _exact(stream.guessed_rate) or _exact(stream.average_rate) or Fraction(25)
    duration = Fraction(container.duration or 0, av.time_base)
    return Facts(
        width=frame.width,
        height=frame.height,
        orientation=orientation_of(frame),
        colour=colour_of(frame),
        time_base=_exact(stream.time_base) or Fraction(1, av.time_base),
        rate=rate,
        sample_aspect_ratio=_exact(stream.sample_aspect_ratio) or Fraction(1),
        num_frames=stream.frames or round(duration * rate) or None,
    )


class _Ratio(Protocol):
    @property
    def numerator(self) -> int: ...
    @property
    def denominator(self) -> int: ...


def _exact(ratio: _Ratio | None) -> Fraction | None:
    """A ratio as a Fraction, and None if it is not set.

    PyAV 19 returns its own AVRational, which is 0 if it is not set, and whose products are rounded
    to 32 bits.
    """
    return Fraction(ratio.numerator, ratio.denominator) if ratio else None


def _decodable(path: Path, container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    with _reading(path):
        for packet in container.demux(stream):
            try:
                yield from stream.decode(packet)
            except av.error.InvalidDataError:
                continue  # a recording may start between two pictures that stand alone


def _video_stream(path: Path, container: InputContainer) -> VideoStream:
    streams = [
        stream
        for stream in container.streams.video
        if not stream.disposition & Disposition.attached_pic and stream.codec_context is not None
    ]
    if not streams:
        raise DataError(f"{path} has no moving pictures; give the path of a video")
    best = max(streams, key=lambda stream: stream.width * stream.height)
    if best.width * best.height > MAX_PIXELS:
        raise DataError(
            f"{path} has frames of {best.width * best.height / 1e6:.0f} megapixels, the limit is "
            f"{MAX_PIXELS / 1e6:.0f}; shrink it"
        )
    best.thread_type = av.codec.context.ThreadType.AUTO
    return best


@contextmanager
def _container(path: Path) -> Iterator[InputContainer]:
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise DataError(f"{path} {what}; give the path of a video")
    options = {"format_whitelist": _FORMATS, "max_pixels": str(MAX_PIXELS)}
    with _reading(path):
        # Without `file:` a name like 12:30.mp4 is taken for an address.
        container = av.open(f"file:{path}", "r", options=options, **_METADATA)
    with container:
        yield container


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Within, whatever libav raises becomes a DataError with the clip's name."""
    try:
        yield
    except av.error.MemoryError:
        raise
    except av.FFmpegError as error:
        raise DataError(f"cannot read {path} as a video: {error}; replace the file") from error
