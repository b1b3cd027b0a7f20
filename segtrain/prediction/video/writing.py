"""Writing a clip: frames encoded, each at its own time, and the sound beside them."""

from collections.abc import Callable, Iterator, Sequence
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
from segtrain.images import Pixels
from segtrain.prediction.video.colour import Converter
from segtrain.prediction.video.kinds import KINDS, Kind
from segtrain.prediction.video.reading import Facts
from segtrain.prediction.video.sound import add_track, codec_of


class Film:
    """A clip that is being written.

    Attributes:
        tracks: what becomes of the source's tracks of sound, by their index; some are left out.
    """

    def __init__(
        self, container: OutputContainer, kind: Kind, facts: Facts, sounds: Sequence[AudioStream]
    ) -> None:
        self._container, self.kind, self.facts = container, kind, facts
        self._converter = Converter(facts.colour)
        self._video = _add_video(container, kind, facts)
        added = {source.index: add_track(container, kind, source) for source in sounds}
        self.tracks = {index: track for index, track in added.items() if track is not None}

    def add_frame(self, pixels: Pixels, ticks: int, duration: int) -> None:
        """Encode a frame.

        Args:
            pixels: H W 3 or H W 4 uint8, RGB or RGBA, upright.
            ticks, duration: when and how long it is shown, in the clip's time base.
        """
        layout = "rgb24" if pixels.shape[2] == 3 else "rgba"
        frame = VideoFrame.from_ndarray(_even(pixels), format=layout)
        frame = self._converter.from_rgb(frame, self.kind.pixel_format)
        frame.pts, frame.duration, frame.time_base = ticks, duration, self.facts.time_base
        self._container.mux(self._video.encode(frame))

    def add_sound(self, packet: "Packet[Stream]") -> None:
        """Pass on a packet of one of the source's tracks."""
        track = self.tracks.get(packet.stream.index)
        if track is not None:
            track.add(packet)

    def finish(self) -> None:
        """Write what the encoders still hold back."""
        self._container.mux(self._video.encode(None))
        for track in self.tracks.values():
            track.finish()
        self._container.close()

    @property
    def num_lost(self) -> int:
        """Packets of sound that were left out, so far."""
        return sum(track.num_lost for track in self.tracks.values())


@contextmanager
def writing(
    file: BinaryIO,
    target: Path,
    facts: Facts,
    sounds: Sequence[AudioStream],
    tell: Callable[[str], object],
) -> Iterator[Film]:
    """Open a film; when the block ends well it is finished.

    Args:
        file: where it is written; seekable.
        target: its name, which tells the kind.
        facts: of the clip it is made from.
        sounds: tracks whose packets will be added.
        tell: takes a line about each thing that could not be kept as it was.

    Raises:
        DataError: there is no encoder for frames like these.
    """
    kind = KINDS[target.suffix]
    container = av.open(file, "w", format=kind.container)
    try:
        film = Film(container, kind, facts, sounds)
        _tell_changes(target, film, sounds, tell)
        yield film
        film.finish()
        if film.num_lost:
            tell(f"{target}: packets of sound left out, damaged or out of order: {film.num_lost}")
    except BaseException as error:
        # The end of a broken file may be impossible to write, too, and says nothing new.
        with suppress(Exception):
            container.close()
        if isinstance(error, av.FFmpegError | UnknownCodecError) and not isinstance(
            error, OSError | MemoryError
        ):
            raise DataError(f"cannot write {target} as {kind.container}: {error}") from error
        raise


def _add_video(container: OutputContainer, kind: Kind, facts: Facts) -> VideoStream:
    height, width = (
        (facts.width, facts.height) if facts.is_on_its_side else (facts.height, facts.width)
    )
    stream = container.add_stream(
        kind.codec,
        rate=facts.rate,
        options=kind.options,
        width=width + width % 2,
        height=height + height % 2,
        # Not one over the rate: phones do not keep to it, and each frame has its own time.
        time_base=facts.time_base,
    )
    assert isinstance(stream, VideoStream)
    context, colour, aspect = stream.codec_context, facts.colour, facts.sample_aspect_ratio
    context.pix_fmt = kind.pixel_format
    context.sample_aspect_ratio = 1 / aspect if facts.is_on_its_side else aspect
    context.colorspace, context.color_range = colour.matrix, ColorRange.MPEG
    context.color_primaries, context.color_trc = colour.primaries, colour.transfer
    return stream


def _even(pixels: Pixels) -> Pixels:
    """Colour is kept for two by two pixels, so an odd side grows by a copy of its last pixels."""
    rows, columns = pixels.shape[0] % 2, pixels.shape[1] % 2
    if not rows and not columns:
        return pixels
    grown = cv2.copyMakeBorder(pixels, 0, rows, 0, columns, cv2.BORDER_REPLICATE)
    return np.asarray(grown, dtype=np.uint8)


def _tell_changes(
    target: Path, film: Film, sounds: Sequence[AudioStream], tell: Callable[[str], object]
) -> None:
    facts, kind = film.facts, film.kind
    if facts.width % 2 or facts.height % 2:
        tell(f"{target}: odd sides grow by one pixel, as {kind.codec} needs")
    if facts.colour.hdr:
        tell(f"{target}: HDR becomes standard range")
    for source in sounds:
        track = film.tracks.get(source.index)
        codec = codec_of(source) or "a codec that is not known"
        if track is None:
            tell(f"{target}: sound is left out, in {codec}: it can be neither copied nor encoded")
        elif not track.is_copied:
            tell(f"{target}: sound is encoded anew, {codec} to {kind.sound}")
