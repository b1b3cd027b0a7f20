"""The sound of a clip, track by track: copied as it is where the container takes it."""

from collections.abc import Iterator
from fractions import Fraction
from typing import Protocol

from av.audio.stream import AudioStream
from av.container import OutputContainer
from av.error import InvalidDataError
from av.packet import Packet
from av.stream import Stream

_BITS_PER_CHANNEL = 96_000


class Track(Protocol):
    """One track of sound on its way into another file."""

    def passed_on(self, packet: "Packet[Stream]") -> "Iterator[Packet[Stream]]":
        """What becomes of a packet of the source."""
        ...

    def rest(self) -> "Iterator[Packet[Stream]]":
        """What is still owed when the source has ended."""
        ...


class CopiedTrack:
    """Packets go on untouched."""

    def __init__(self, source: AudioStream, output: OutputContainer) -> None:
        self._stream = output.add_stream_from_template(source)
        _name(self._stream, source)

    def passed_on(self, packet: "Packet[Stream]") -> "Iterator[Packet[Stream]]":
        packet.stream = self._stream
        yield packet

    def rest(self) -> "Iterator[Packet[Stream]]":
        return iter(())


class EncodedTrack:
    """Decoded and encoded anew, at the same times.

    Args:
        rate: samples a second that the codec needs; None: as in the source.
        most_channels: sound with more is mixed down to two.
    """

    def __init__(
        self,
        source: AudioStream,
        output: OutputContainer,
        codec: str,
        *,
        rate: int | None,
        most_channels: int,
    ) -> None:
        channels = source.layout.nb_channels
        # Old formats say how many channels, and not which.
        layout = {1: "mono", 2: "stereo"}.get(channels, source.layout.name)
        layout = layout if channels <= most_channels else "stereo"
        self._source = source
        stream = output.add_stream(codec, rate=rate or source.rate, layout=layout)
        assert isinstance(stream, AudioStream)
        stream.bit_rate = _BITS_PER_CHANNEL * min(channels, most_channels)
        self._stream = stream
        _name(stream, source)

    def passed_on(self, packet: "Packet[Stream]") -> "Iterator[Packet[Stream]]":
        yield from self._encoded(packet)

    def rest(self) -> "Iterator[Packet[Stream]]":
        yield from self._encoded(None)
        yield from self._stream.encode(None)

    def _encoded(self, packet: "Packet[Stream] | None") -> "Iterator[Packet[Stream]]":
        try:
            frames = self._source.decode(packet)
        except InvalidDataError:
            return  # a damaged packet is a moment of silence
        for frame in frames:
            if frame.pts is not None and frame.time_base is not None:
                # Formats that count packets give ticks too coarse for packets of another length.
                ticks = Fraction(1, frame.sample_rate)
                frame.pts, frame.time_base = round(frame.pts * frame.time_base / ticks), ticks
            yield from self._stream.encode(frame)


def _name(stream: AudioStream, source: AudioStream) -> None:
    if source.language is not None:
        stream.metadata["language"] = source.language
