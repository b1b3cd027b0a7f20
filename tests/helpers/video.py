"""Generated videos, and backends that need no trained network."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from av.video.reformatter import Interpolation

Array = npt.NDArray[Any]
RATE = Fraction(25)
TICKS = Fraction(1, 12_800)
EXACT = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


def moving_square(number: int, height: int = 48, width: int = 64) -> Array:
    """A red square that moves over a gray background: H W 3 uint8 RGB."""
    image = np.full((height, width, 3), (90, 100, 110), dtype=np.uint8)
    left = number % (width - 16)
    image[height // 4 : height // 4 + 16, left : left + 16] = (200, 40, 30)
    return image


def solid(color: tuple[int, int, int], size: int = 48) -> Array:
    """A constant color, size size 3 uint8."""
    return np.full((size, size, 3), color, dtype=np.uint8)


@dataclass(kw_only=True)
class VideoSpec:
    """The content and format of a generated video.

    Attributes:
        image: from the number of a frame to its pixels.
        times: of each frame, and the end of the last, in `ticks`; None: a constant rate.
        ticks: time base.
        audio_codecs: a codec per track, with `channels` at `audio_rate`.
        audio_seconds: None: as long as the video; 0: tracks without samples.
    """

    num_frames: int = 25
    image: Callable[[int], Array] = moving_square
    times: Sequence[int] | None = None
    ticks: Fraction = TICKS
    codec: str = "libx264"
    pixel_format: str = "yuv420p"
    rate: Fraction = RATE
    audio_codecs: Sequence[str] = ("aac",)
    audio_seconds: float | None = None
    audio_rate: int = 48_000
    channels: str = "stereo"
    options: dict[str, str] = field(default_factory=lambda: {"crf": "10"})
    rotation: tuple[int, bool] | None = None
    aspect: Fraction | None = None
    color: dict[str, int] = field(default_factory=dict)
    convert: dict[str, int] = field(default_factory=dict)
    movflags: str | None = None

    def write(self, path: Path, container: str | None = None) -> Path:
        options = {"movflags": self.movflags} if self.movflags else {}
        with av.open(path, "w", format=container, container_options=options) as output:
            streams = [
                output.add_stream(codec, rate=self.audio_rate) for codec in self.audio_codecs
            ]
            for number, stream in enumerate(streams):
                stream.layout = self.channels
                stream.metadata["language"] = ("eng", "deu")[number % 2]
            if self.num_frames:
                self.write_frames(output)
            seconds = self.audio_seconds
            if seconds is None:
                seconds = float(self.num_frames / self.rate)
            for number, stream in enumerate(streams):
                _write_sine(output, stream, seconds, 440 * (number + 1))
        return path

    def write_frames(self, output: Any) -> None:
        first = self.image(0)
        video = output.add_stream(self.codec, rate=self.rate, options=self.options)
        video.height, video.width = first.shape[:2]
        video.pix_fmt, video.codec_context.time_base = self.pixel_format, self.ticks
        if self.rotation is not None:
            video.set_display_rotation(self.rotation[0], hflip=self.rotation[1])
        if self.aspect is not None:
            video.codec_context.sample_aspect_ratio = self.aspect
        for name, value in self.color.items():
            setattr(video.codec_context, name, value)
        times = self.times or range(0, 10**9, round(1 / self.rate / self.ticks))
        for number in range(self.num_frames):
            frame = av.VideoFrame.from_ndarray(self.image(number), format="rgb24")
            frame = frame.reformat(format=self.pixel_format, interpolation=EXACT, **self.convert)
            frame.pts, frame.duration = times[number], times[number + 1] - times[number]
            frame.time_base = self.ticks
            output.mux(video.encode(frame))
        output.mux(video.encode(None))


def _write_sine(output: Any, stream: Any, seconds: float, hertz: int) -> None:
    rate, layout = stream.rate, stream.layout
    for start in range(0, round(seconds * rate), 1024):
        time = np.arange(start, min(start + 1024, round(seconds * rate))) / rate
        wave = (0.5 * np.sin(2 * np.pi * hertz * time)).astype(np.float32)
        samples = np.repeat(wave, layout.nb_channels)[None]
        frame = av.AudioFrame.from_ndarray(samples, format="flt", layout=layout.name)
        frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
        output.mux(stream.encode(frame))
    if seconds:
        output.mux(stream.encode(None))


def concatenate(path: Path, *sources: Path) -> Path:
    """Write the files one after the other to `path`."""
    path.write_bytes(b"".join(source.read_bytes() for source in sources))
    return path


def damage_audio(source: Path, path: Path) -> Path:
    """Copy a video, with noise in every fifth audio packet."""
    rng, number = np.random.default_rng(0), 0
    with av.open(source) as video, av.open(path, "w") as output:
        copies = [output.add_stream_from_template(stream, opaque=True) for stream in video.streams]
        for packet in video.demux():
            if packet.dts is None:
                continue
            number += packet.stream.type == "audio"
            if packet.stream.type == "audio" and number % 5 == 2:
                packet.update(rng.bytes(packet.size))
            packet.stream = copies[packet.stream.index]
            output.mux(packet)
    return path


class RedBackend:
    """A backend for which red pixels are a person. Records the image shapes."""

    description, batch_size = "red", 1

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def probs(self, images: Sequence[Array]) -> list[Array]:
        self.shapes += [image.shape for image in images]
        redness = [image[..., 0].astype(np.float32) - image[..., 1] for image in images]
        return [np.clip((each - 40) / 80, 0, 1).astype(np.float32) for each in redness]


class AllPersonBackend:
    """A backend for which every pixel is a person, so the image stays as it is."""

    description, batch_size = "all person", 1

    def probs(self, images: Sequence[Array]) -> list[Array]:
        return [np.ones(image.shape[:2], dtype=np.float32) for image in images]


@dataclass(frozen=True)
class VideoContent:
    """The content of a video file.

    Attributes:
        frames: H W 3 int16 RGB as a player shows them, before the rotation.
        times: in seconds.
        audio: codec, language, samples, rate and packets of each track.
        num_other_streams: streams that are neither video nor audio.
    """

    frames: list[Array]
    times: list[float]
    rotation: int
    format: str
    aspect: Fraction | None
    color: tuple[int, int, int, int]
    rate: Fraction
    duration: float
    audio: list[dict[str, Any]]
    num_other_streams: int


def read_video(path: Path, decoder: str | None = None, pixels: str = "rgb24") -> VideoContent:
    """Decode a file completely."""
    with av.open(path) as file:
        video = file.streams.video[0]
        context = video.codec_context
        if decoder is not None:
            context = av.CodecContext.create(decoder, "r")
            context.extradata = video.codec_context.extradata
        frames = [
            frame
            for packet in file.demux(video)
            for frame in context.decode(packet if packet.size else None)
        ]
        first = frames[0]
        return VideoContent(
            frames=[frame.to_ndarray(format=pixels).astype(np.int16) for frame in frames],
            times=[float(frame.pts * video.time_base) for frame in frames],
            rotation=first.rotation,
            format=first.format.name,
            aspect=video.sample_aspect_ratio,
            color=(first.colorspace, first.color_range, first.color_primaries, first.color_trc),
            rate=video.average_rate,
            duration=file.duration / av.time_base,
            audio=[_read_audio(path, number) for number in range(len(file.streams.audio))],
            num_other_streams=len(file.streams) - len(file.streams.audio) - 1,
        )


def yuv_to_rgb(path: Path, matrix: str | None = None) -> Array:
    """The color at the center of the first frame, by the formulas of BT.601 and BT.709.

    Args:
        matrix: of an untagged file.
    """
    with av.open(path) as file:
        frame = next(file.decode(video=0))
    luma, blue, red = (_center(plane, "10" in frame.format.name) for plane in frame.planes)
    if frame.color_range == 2:
        luma, blue, red = luma / 255, (blue - 128) / 255, (red - 128) / 255
    else:
        luma, blue, red = (luma - 16) / 219, (blue - 128) / 224, (red - 128) / 224
    name = matrix or {1: "bt709", 5: "bt601", 6: "bt601"}[frame.colorspace]
    red_weight, blue_weight = {"bt709": (0.2126, 0.0722), "bt601": (0.299, 0.114)}[name]
    r, b = luma + 2 * (1 - red_weight) * red, luma + 2 * (1 - blue_weight) * blue
    g = (luma - red_weight * r - blue_weight * b) / (1 - red_weight - blue_weight)
    return np.array([r, g, b]) * 255


def _center(plane: Any, ten_bits: bool) -> float:
    """The value at the center of a plane, in units of 8 bits."""
    rows = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
    if ten_bits:
        return float(rows.view(np.uint16)[plane.height // 2, plane.width // 2]) / 4
    return float(rows[plane.height // 2, plane.width // 2])


def _read_audio(path: Path, number: int) -> dict[str, Any]:
    with av.open(path) as file:
        stream = file.streams.audio[number]
        packets = [bytes(packet) for packet in file.demux(stream) if packet.size]
    with av.open(path) as file:
        stream = file.streams.audio[number]
        samples = [frame.to_ndarray() for frame in file.decode(stream)]
        return {
            "codec": stream.codec_context.name,
            "language": stream.language,
            "packets": packets,
            "samples": np.concatenate(samples, axis=1) if samples else None,
            "rate": stream.rate,
        }
