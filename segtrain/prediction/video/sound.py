"""The sound of a clip, track by track: copied where the file takes it, else encoded anew.

Sound is beside the point of a clip with a new background: whatever is wrong with it, at worst the
clip is written without.
"""

import io
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from functools import partial

import av
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.codec.codec import UnknownCodecError
from av.container import OutputContainer
from av.error import ArgumentError, FFmpegError, InvalidDataError
from av.packet import Packet
from av.stream import Stream

from segtrain.prediction.video.kinds import Kind

_BITS_PER_CHANNEL = 96_000
_AC3_SYNC = b"\x0b\x77"
# Old formats say how many channels, and not which: those that libav then assumes.
_USUAL_LAYOUTS = {3: "2.1", 4: "4.0", 5: "5.0", 6: "5.1", 7: "6.1", 8: "7.1"}


class Track:
    """One track of sound on its way into another file.

    Args:
        source: the track that packets come from.
        stream: of the file that is written.
        encoder: makes its packets; None copies those of the source.

    Attributes:
        num_lost: packets left out so far: damaged ones, and of two that are due at one time the
            second.
    """

    def __init__(
        self,
        source: AudioStream,
        output: OutputContainer,
        stream: AudioStream,
        encoder: "_Encoder | None" = None,
    ) -> None:
        self._source, self._output, self._stream = source, output, stream
        self._encoder = encoder
        self._last: Fraction | None = None
        self.num_lost = 0

    @property
    def is_copied(self) -> bool:
        """Whether the sound stays as it is."""
        return self._encoder is None

    def add(self, packet: "Packet[Stream]") -> None:
        """Write what becomes of a packet of the source."""
        # What is copied is decoded, too: libav reads damaged packets again when it is about to
        # write them, which may be with the next frame of the picture, and gives up the file.
        frames = self._decoded(packet)
        if frames is None or (self.is_copied and not self._begins_well(packet)):
            self.num_lost += 1
        elif self._encoder is None:
            self._write(packet)
        else:
            self._encode(self._encoder, frames)

    def try_silence(self) -> None:
        """Encode a moment of it. Raises what libav has against sound of the source's form."""
        if self._encoder is not None:
            form, layout = self._source.format.name, self._source.layout
            silence = AudioFrame(form, layout, samples=1024)
            silence.sample_rate = self._source.rate
            list(self._encoder.encoded([silence]))

    def finish(self) -> None:
        """Write what is still held back."""
        if self._encoder is not None:
            self._encode(self._encoder, self._decoded(None) or [])
            self._write_all(self._encoder.rest())

    def _encode(self, encoder: "_Encoder", frames: list[AudioFrame]) -> None:
        try:
            packets = list(encoder.encoded(frames))
        except (ArgumentError, InvalidDataError):  # midway it became sound that cannot be mixed
            self.num_lost += 1
        else:
            self._write_all(packets)

    def _decoded(self, packet: "Packet[Stream] | None") -> list[AudioFrame] | None:
        """The sound in a packet; None if it is damaged."""
        try:
            return self._source.decode(packet)
        except av.error.MemoryError:
            raise
        except FFmpegError:
            return None

    def _begins_well(self, packet: "Packet[Stream]") -> bool:
        """AC-3's decoder looks for the beginning anywhere in a packet, who writes it only there."""
        is_ac3 = codec_of(self._source) in {"ac3", "eac3"}
        return not is_ac3 or bytes(packet).startswith(_AC3_SYNC)

    def _write_all(self, packets: "Iterable[Packet[Stream]]") -> None:
        for packet in packets:
            self._write(packet)

    def _write(self, packet: "Packet[Stream]") -> None:
        assert packet.dts is not None  # none come without from a clip, nor from an encoder
        time = packet.dts * packet.time_base
        if self._last is not None and time <= self._last:
            self.num_lost += 1
            return
        self._last = time
        packet.stream = self._stream
        try:
            self._output.mux(packet)
        except (InvalidDataError, ArgumentError):
            self.num_lost += 1


class _Encoder:
    """Encodes sound for a stream, at the times at which it is due."""

    def __init__(self, stream: AudioStream) -> None:
        self._stream = stream
        self._form: tuple[str, str, int] | None = None
        self._resampler: AudioResampler | None = None
        self._next = 0  # when the next samples are due if nobody says, in samples

    def encoded(self, frames: Iterable[AudioFrame]) -> "Iterator[Packet[Stream]]":
        """What is ready when these have come."""
        for frame in frames:
            if frame.pts is not None and frame.time_base is not None:
                # Formats that count packets give ticks too coarse for packets of another length.
                ticks = Fraction(1, frame.sample_rate)
                frame.pts, frame.time_base = round(frame.pts * frame.time_base / ticks), ticks
            for even in self._even(frame):
                yield from self._encoded(even)

    def rest(self) -> "Iterator[Packet[Stream]]":
        """What is ready when nothing more will come."""
        for even in self._held_back():
            yield from self._encoded(even)
        yield from self._stream.encode(None)

    def _encoded(self, even: AudioFrame) -> "list[Packet[Stream]]":
        if even.pts is None:  # the last samples come without, and so do some decoders'
            even.pts, even.time_base = self._next, Fraction(1, self._stream.rate)
        self._next = even.pts + even.samples
        return self._stream.encode(even)

    def _even(self, frame: AudioFrame) -> Iterator[AudioFrame]:
        """The frame as the encoder takes it, which wants all alike; broadcasts change midway."""
        form = (frame.format.name, frame.layout.name, frame.sample_rate)
        if self._resampler is None or form != self._form:
            yield from self._held_back()
            stream = self._stream
            self._resampler = AudioResampler(stream.format, stream.layout, stream.rate)
            self._form = form
        yield from self._resampler.resample(frame)

    def _held_back(self) -> list[AudioFrame]:
        return [] if self._resampler is None else self._resampler.resample(None)


def codec_of(source: AudioStream) -> str | None:
    """The name of the codec, not of the decoder that libav takes for it; None: libav knows none."""
    context = source.codec_context
    return None if context is None else context.codec.canonical_name


def add_track(output: OutputContainer, kind: Kind, source: AudioStream) -> Track | None:
    """Make room for a track of sound: copied if that can be, else encoded; None if neither can."""
    codec = codec_of(source)
    ways = (
        []
        if codec is None
        else [
            partial(_add_encoded, source, kind.sound, layout)
            for layout in _layouts(source, kind.most_channels)
        ]
    )
    if codec in kind.copied:
        ways.insert(0, partial(_add_copied, source))
    way = next((way for way in ways if _works(way, kind.container)), None)
    return None if way is None else way(output)


def _works(way: Callable[[OutputContainer], Track], container: str) -> bool:
    """Whether a file in memory can be begun so: rates and layouts that libav does not take, it
    refuses then, when it is too late for the file that is meant."""
    with av.open(io.BytesIO(), "w", format=container) as trial:
        try:
            track = way(trial)
            trial.start_encoding()
            track.try_silence()
        except (FFmpegError, UnknownCodecError, ValueError):
            return False
        return True


def _layouts(source: AudioStream, most_channels: int) -> list[str]:
    """What the channels can be encoded as, the best first; none where there is no sound at all."""
    channels = source.layout.nb_channels
    if channels == 0 or source.rate == 0:
        return []
    if channels <= 2:
        return [("mono", "stereo")[channels - 1]]
    if channels > most_channels:
        return ["stereo"]
    return [source.layout.name, _USUAL_LAYOUTS.get(channels, "stereo"), "stereo"]


def _add_copied(source: AudioStream, output: OutputContainer) -> Track:
    stream = output.add_stream_from_template(source)
    _name(stream, source)
    return Track(source, output, stream)


def _add_encoded(source: AudioStream, codec: str, layout: str, output: OutputContainer) -> Track:
    rates = av.Codec(codec, "w").audio_rates or [source.rate]
    rate = min(rates, key=lambda rate: abs(rate - source.rate))
    stream = output.add_stream(codec, rate=rate, layout=layout)
    assert isinstance(stream, AudioStream)
    stream.bit_rate = _BITS_PER_CHANNEL * stream.layout.nb_channels
    _name(stream, source)
    return Track(source, output, stream, _Encoder(stream))


def _name(stream: AudioStream, source: AudioStream) -> None:
    if source.language is not None:
        stream.metadata["language"] = source.language
