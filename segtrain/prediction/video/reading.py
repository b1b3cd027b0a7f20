"""Read a video: upright RGB frames with timestamps, and the audio as packets.

Video files are untrusted input: only video containers are opened, the frame size is limited before
memory is allocated, and every libav error becomes one DataError with the name of the file.
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
from segtrain.imaging.images import MAX_PIXELS
from segtrain.imaging.rgb import rotate_upright, swaps_axes
from segtrain.prediction.video.color import ColorConverter, ColorSpace, color_space_of
from segtrain.prediction.video.timeline import Timeline
from segtrain.types import Image

# EXIF orientations by (transposed, mirrored left-right, mirrored top-bottom), as undone by
# `segtrain.imaging.rgb.rotate_upright`.
_ORIENTATIONS = {
    (False, False, False): 1,
    (False, True, False): 2,
    (False, True, True): 3,
    (False, False, True): 4,
    (True, False, False): 5,
    (True, True, False): 6,
    (True, True, True): 7,
    (True, False, True): 8,
}
# libav also reads playlists and scripts, which refer to other files and addresses.
_CONTAINERS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg,mxf"
# Metadata is not always UTF-8. PyAV 18 raises UnicodeDecodeError without this argument. PyAV 19
# preserves the bytes and no longer has it.
_METADATA: dict[str, Any] = (
    {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "replace"}
)
# A video that ends this many seconds before the duration in its header is truncated.
_TRUNCATION_TOLERANCE = 0.3


@dataclass(frozen=True)
class VideoInfo:
    """Properties of a video from its header and first frame.

    Attributes:
        width, height: of the stored frames.
        orientation: EXIF orientation of the stored frames, 1 (upright) to 8.
        color: color space of the output.
        time_base: seconds per tick of the frame timestamps.
        rate: average frames per second.
        sample_aspect_ratio: width by height of a stored pixel.
        num_frames: estimate; None if unknown.
    """

    width: int
    height: int
    orientation: int
    color: ColorSpace
    time_base: Fraction
    rate: Fraction
    sample_aspect_ratio: Fraction
    num_frames: int | None

    @property
    def swaps_axes(self) -> bool:
        """Whether rotating the frames upright swaps width and height."""
        return swaps_axes(self.orientation)


@dataclass(frozen=True)
class Frame:
    """A decoded frame.

    Attributes:
        pixels: H W 3 uint8 RGB, upright.
        ticks: presentation timestamp.
        duration: in ticks.
    """

    pixels: Image
    ticks: int
    duration: int


class VideoReader:
    """An open video, which can be read once.

    Attributes:
        info: properties of the video.
        audio_streams: all audio tracks.
        dropped_streams: number of unused streams per type.
        num_damaged_packets: packets that could not be decoded, so far.
    """

    def __init__(self, path: Path, container: InputContainer, info: VideoInfo) -> None:
        self.info = info
        self._path, self._container = path, container
        self._video = _video_stream(path, container)
        self.audio_streams: list[AudioStream] = list(container.streams.audio)
        self._used = {self._video.index, *(stream.index for stream in self.audio_streams)}
        self.dropped_streams = Counter(
            stream.type for stream in container.streams if stream.index not in self._used
        )
        self.num_damaged_packets = 0
        self._converter, self._end = ColorConverter(info.color), 0.0
        self._timeline = Timeline(
            Fraction(container.start_time or 0, av.time_base),
            allow_jumps=Flags.ts_discont in Flags(container.format.flags),
        )

    def read(self) -> "Iterator[Frame | Packet[Stream]]":
        """Yield frames and audio packets in file order, with timestamps that start at 0 and rise.

        Raises:
            DataError: the video ends before the duration in its header, or reading fails.
        """
        ticks = -1
        with _convert_errors(self._path):
            for packet in self._container.demux():
                self._update_end(packet)
                if packet.stream.index not in self._used:
                    continue
                self._timeline.shift(packet)
                if packet.stream is self._video:
                    for decoded in self._decode(packet):
                        frame = self._to_frame(decoded, ticks)
                        ticks = frame.ticks
                        yield frame
                elif packet.dts is not None:
                    yield packet
        self._check_truncation()

    def _decode(self, packet: "Packet[Stream]") -> Iterator[VideoFrame]:
        try:
            frames = self._video.decode(packet)
        except av.error.InvalidDataError:
            self.num_damaged_packets += 1
            return
        for frame in frames:
            self.num_damaged_packets += frame.is_corrupt
            yield frame

    def _to_frame(self, decoded: VideoFrame, previous: int) -> Frame:
        info = self.info
        rgb = self._converter.to_rgb(decoded, info.width, info.height)
        # Copy, because the rotation is in place: for an RGB codec, these may be the pixels onto
        # which the decoder draws the next frame.
        pixels = np.array(rgb.to_ndarray(), dtype=np.uint8)
        duration = decoded.duration or max(1, round(1 / (info.rate * info.time_base)))
        timestamp = decoded.pts if decoded.pts is not None else decoded.dts
        ticks = previous + duration if timestamp is None else timestamp
        # Encoders reject two frames with the same timestamp.
        return Frame(
            rotate_upright(pixels, info.orientation),
            max(ticks, previous + 1),
            duration,
        )

    def _update_end(self, packet: "Packet[Stream]") -> None:
        if packet.pts is not None:
            end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
            self._end = max(self._end, end)

    def _check_truncation(self) -> None:
        if self._container.duration is None:
            return
        # The end counts from 0 and not from the start time, as in Matroska. In other formats, a
        # video that starts late may be truncated by as much without an error, which is better than
        # rejecting a complete one.
        expected, end = self._container.duration / av.time_base, self._end
        if end < expected - _TRUNCATION_TOLERANCE:
            raise DataError(
                f"{self._path} is truncated: it ends after {end:.1f} of {expected:.1f} seconds",
                "copy it again or repair it",
            )


@contextmanager
def open_video(path: Path) -> Iterator[VideoReader]:
    """Open a video.

    Raises:
        DataError: the file is missing, not a video, damaged, or its frames are too large.
    """
    with _open_container(path) as container:
        info = _video_info(path, container)
    # Reopen the file instead of seeking: some formats cannot seek.
    with _open_container(path) as container:
        yield VideoReader(path, container, info)


def frame_orientation(frame: VideoFrame) -> int:
    """Return the EXIF orientation of a decoded frame, 1 (upright) to 8.

    Angles between the multiples of 90 degrees are rounded to the nearest one.
    """
    side_data: Any = frame.side_data  # PyAV's stubs do not declare this key
    if "DISPLAYMATRIX" not in side_data:
        return 1
    # A stored pixel x, y is displayed at a x + c y, b x + d y.
    a, b, _, c, d, *_ = np.frombuffer(bytes(side_data["DISPLAYMATRIX"]), dtype=np.int32).tolist()
    if abs(b) > abs(a):
        return _ORIENTATIONS[True, c < 0, b < 0]
    return _ORIENTATIONS[False, a < 0, d < 0]


def _video_info(path: Path, container: InputContainer) -> VideoInfo:
    stream = _video_stream(path, container)
    frame = next(_decode_valid(path, container, stream), None)
    if frame is None:
        raise DataError(f"cannot decode any frame of {path}", "replace the file")
    rate = _to_fraction(stream.guessed_rate) or _to_fraction(stream.average_rate) or Fraction(25)
    duration = Fraction(container.duration or 0, av.time_base)
    return VideoInfo(
        width=frame.width,
        height=frame.height,
        orientation=frame_orientation(frame),
        color=color_space_of(frame),
        time_base=_to_fraction(stream.time_base) or Fraction(1, av.time_base),
        rate=rate,
        sample_aspect_ratio=_to_fraction(stream.sample_aspect_ratio) or Fraction(1),
        num_frames=stream.frames or round(duration * rate) or None,
    )


class _Ratio(Protocol):
    @property
    def numerator(self) -> int: ...
    @property
    def denominator(self) -> int: ...


def _to_fraction(ratio: _Ratio | None) -> Fraction | None:
    """Convert a ratio to a Fraction, or to None if it is not set.

    PyAV 19 returns its own AVRational, which is 0 if it is not set, and whose products are rounded
    to 32 bits.
    """
    return Fraction(ratio.numerator, ratio.denominator) if ratio else None


def _decode_valid(
    path: Path, container: InputContainer, stream: VideoStream
) -> Iterator[VideoFrame]:
    with _convert_errors(path):
        for packet in container.demux(stream):
            try:
                yield from stream.decode(packet)
            except av.error.InvalidDataError:
                continue  # a recording may start between two keyframes


def _video_stream(path: Path, container: InputContainer) -> VideoStream:
    """Return the largest video stream, without cover images."""
    streams = [
        stream
        for stream in container.streams.video
        if not stream.disposition & Disposition.attached_pic and stream.codec_context is not None
    ]
    if not streams:
        raise DataError(f"{path} has no video stream", "give the path of a video")
    largest = max(streams, key=lambda stream: stream.width * stream.height)
    if largest.width * largest.height > MAX_PIXELS:
        raise DataError(
            f"{path} has frames of {largest.width * largest.height / 1e6:.0f} megapixels, the "
            f"limit is {MAX_PIXELS / 1e6:.0f}",
            "shrink it",
        )
    largest.thread_type = av.codec.context.ThreadType.AUTO
    return largest


@contextmanager
def _open_container(path: Path) -> Iterator[InputContainer]:
    if not path.is_file():
        reason = "is not a file" if path.exists() else "does not exist"
        raise DataError(f"{path} {reason}", "give the path of a video")
    options = {"format_whitelist": _CONTAINERS, "max_pixels": str(MAX_PIXELS)}
    with _convert_errors(path):
        # Without `file:`, a name like 12:30.mp4 is parsed as an address.
        container = av.open(f"file:{path}", "r", options=options, **_METADATA)
    with container:
        yield container


@contextmanager
def _convert_errors(path: Path) -> Iterator[None]:
    """Convert errors of libav to a DataError with the name of the file."""
    try:
        yield
    except av.error.MemoryError:
        raise
    except av.FFmpegError as error:
        raise DataError(f"cannot read {path} as a video: {error}", "replace the file") from error
