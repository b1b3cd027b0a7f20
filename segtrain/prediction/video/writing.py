"""Write a video: encode frames with their timestamps, and copy or encode the audio."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import av
import cv2
import numpy as np
from av.audio.stream import AudioStream
from av.codec.codec import UnknownCodecError
from av.container import OutputContainer
from av.packet import Packet
from av.stream import Stream
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange
from av.video.stream import VideoStream

from segtrain.errors import DataError
from segtrain.prediction.video.audio import add_audio_track, codec_name
from segtrain.prediction.video.color import ColorConverter
from segtrain.prediction.video.formats import VIDEO_FORMATS, VideoFormat
from segtrain.prediction.video.reading import VideoInfo
from segtrain.types import Image

log = logging.getLogger(__name__)


class VideoWriter:
    """A video that is being written.

    Attributes:
        tracks: output tracks by the index of their source stream; dropped ones are missing.
    """

    def __init__(
        self,
        container: OutputContainer,
        video_format: VideoFormat,
        info: VideoInfo,
        audio_streams: Sequence[AudioStream],
    ) -> None:
        self._container, self.format, self.info = container, video_format, info
        self._converter = ColorConverter(info.color)
        self._video = _add_video(container, video_format, info)
        added = {
            source.index: add_audio_track(container, video_format, source)
            for source in audio_streams
        }
        self.tracks = {index: track for index, track in added.items() if track is not None}

    def add_frame(self, pixels: Image, ticks: int, duration: int) -> None:
        """Encode a frame.

        Args:
            pixels: H W 3 or H W 4 uint8, RGB or RGBA, upright.
            ticks: presentation timestamp, in the time base of the source.
            duration: in ticks.
        """
        layout = "rgb24" if pixels.shape[2] == 3 else "rgba"
        frame = VideoFrame.from_ndarray(_pad_to_even(pixels), format=layout)
        frame = self._converter.from_rgb(frame, self.format.pixel_format)
        frame.pts, frame.duration, frame.time_base = ticks, duration, self.info.time_base
        self._container.mux(self._video.encode(frame))

    def add_audio(self, packet: "Packet[Stream]") -> None:
        """Add a packet of a source track."""
        track = self.tracks.get(packet.stream.index)
        if track is not None:
            track.add(packet)

    def finish(self) -> None:
        """Flush the encoders and close the container."""
        self._container.mux(self._video.encode(None))
        for track in self.tracks.values():
            track.finish()
        self._container.close()

    @property
    def num_dropped_packets(self) -> int:
        """Audio packets that were dropped, so far."""
        return sum(track.num_dropped for track in self.tracks.values())


@contextmanager
def open_video_writer(
    file: BinaryIO,
    target: Path,
    info: VideoInfo,
    audio_streams: Sequence[AudioStream],
) -> Iterator[VideoWriter]:
    """Open a writer, and finish the file at the end of the block unless it raises.

    Args:
        file: seekable output.
        target: the output path; its suffix determines the format.
        info: properties of the source.
        audio_streams: source tracks whose packets will be added.

    Raises:
        DataError: no encoder accepts these frames.
    """
    video_format = VIDEO_FORMATS[target.suffix]
    container = av.open(file, "w", format=video_format.container)
    try:
        writer = VideoWriter(container, video_format, info, audio_streams)
        _log_changes(target, writer, audio_streams)
        yield writer
        writer.finish()
        if writer.num_dropped_packets:
            log.info(
                f"{target}: dropped {writer.num_dropped_packets} audio packets, damaged or out of "
                "order"
            )
    except BaseException as error:
        # Closing a broken file may also fail, which adds no information.
        with suppress(Exception):
            container.close()
        if isinstance(error, av.FFmpegError | UnknownCodecError) and not isinstance(
            error, OSError | MemoryError
        ):
            raise DataError(
                f"cannot write {target} as {video_format.container}: {error}"
            ) from error
        raise


def _add_video(
    container: OutputContainer, video_format: VideoFormat, info: VideoInfo
) -> VideoStream:
    height, width = (info.width, info.height) if info.swaps_axes else (info.height, info.width)
    stream = container.add_stream(
        video_format.codec,
        rate=info.rate,
        options=video_format.options,
        width=width + width % 2,
        height=height + height % 2,
        # Not the inverse of the rate: phones record at a variable rate, and each frame keeps its
        # own timestamp.
        time_base=info.time_base,
    )
    assert isinstance(stream, VideoStream)
    context, color, aspect = stream.codec_context, info.color, info.sample_aspect_ratio
    context.pix_fmt = video_format.pixel_format
    context.sample_aspect_ratio = 1 / aspect if info.swaps_axes else aspect
    context.colorspace, context.color_range = color.matrix, ColorRange.MPEG
    context.color_primaries, context.color_trc = color.primaries, color.transfer
    return stream


def _pad_to_even(pixels: Image) -> Image:
    """Repeat the last row or column of an odd side: chroma is stored per 2 x 2 pixels."""
    rows, columns = pixels.shape[0] % 2, pixels.shape[1] % 2
    if not rows and not columns:
        return pixels
    padded = cv2.copyMakeBorder(pixels, 0, rows, 0, columns, cv2.BORDER_REPLICATE)
    return np.asarray(padded, dtype=np.uint8)


def _log_changes(target: Path, writer: VideoWriter, audio_streams: Sequence[AudioStream]) -> None:
    info, video_format = writer.info, writer.format
    if info.width % 2 or info.height % 2:
        log.info(f"{target}: odd sides grow by one pixel, as {video_format.codec} requires")
    if info.color.hdr:
        log.info(f"{target}: HDR becomes standard dynamic range")
    for source in audio_streams:
        track = writer.tracks.get(source.index)
        codec = codec_name(source) or "unknown codec"
        if track is None:
            log.info(f"{target}: audio dropped ({codec}): it can be neither copied nor encoded")
        elif not track.is_copied:
            log.info(f"{target}: audio re-encoded from {codec} to {video_format.audio_codec}")
