"""The audio of a video, track by track: copied if the container supports the codec, else encoded.

Audio is secondary here: whatever is wrong with it, the video is at worst written without it.
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

from segtrain.prediction.video.formats import VideoFormat

_BITS_PER_CHANNEL = 96_000
_AC3_SYNC = b"\x0b\x77"
# Old formats store the number of channels but not the layout: the layouts that libav then assumes.
_DEFAULT_LAYOUTS = {3: "2.1", 4: "4.0", 5: "5.0", 6: "5.1", 7: "6.1", 8: "7.1"}


class AudioTrack:
    """Copies or encodes one audio track into another file.

    Args:
        source: the track that packets come from.
        output: the file.
        stream: the track of the file.
        encoder: encodes for `stream`; None copies the packets of the source.

    Attributes:
        num_dropped: packets dropped so far: damaged ones, and those that are not later than the
            packet before.
    """

    def __init__(
        self,
        source: AudioStream,
        output: OutputContainer,
        stream: AudioStream,
        encoder: "_AudioEncoder | None" = None,
    ) -> None:
        self._source, self._output, self._stream = source, output, stream
        self._encoder = encoder
        self._last_time: Fraction | None = None
        self.num_dropped = 0

    @property
    def is_copied(self) -> bool:
        """Whether packets are copied without encoding."""
        return self._encoder is None

    def add(self, packet: "Packet[Stream]") -> None:
        """Copy or encode a packet of the source."""
        # Decode copied packets too: libav parses damaged ones again when it writes them, which may
        # be with the next video frame, and then fails for the whole file.
        frames = self._decode(packet)
        if frames is None or (self.is_copied and not self._starts_with_sync(packet)):
            self.num_dropped += 1
        elif self._encoder is None:
            self._write(packet)
        else:
            self._encode(self._encoder, frames)

    def try_silence(self) -> None:
        """Encode a moment of silence. Raises a libav error if the source format is unsupported."""
        if self._encoder is not None:
            sample_format, layout = self._source.format.name, self._source.layout
            silence = AudioFrame(sample_format, layout, samples=1024)
            silence.sample_rate = self._source.rate
            list(self._encoder.encode([silence]))

    def finish(self) -> None:
        """Flush the decoder and the encoder."""
        if self._encoder is not None:
            self._encode(self._encoder, self._decode(None) or [])
            self._write_all(self._encoder.flush())

    def _encode(self, encoder: "_AudioEncoder", frames: list[AudioFrame]) -> None:
        try:
            packets = list(encoder.encode(frames))
        except (ArgumentError, InvalidDataError):  # the format changed to one that cannot be mixed
            self.num_dropped += 1
        else:
            self._write_all(packets)

    def _decode(self, packet: "Packet[Stream] | None") -> list[AudioFrame] | None:
        """Decode a packet; None if it is damaged."""
        try:
            return self._source.decode(packet)
        except av.error.MemoryError:
            raise
        except FFmpegError:
            return None

    def _starts_with_sync(self, packet: "Packet[Stream]") -> bool:
        """Whether an AC-3 packet starts with the sync word.

        The decoder finds the word anywhere in a packet, but the muxer only at the start.
        """
        is_ac3 = codec_name(self._source) in {"ac3", "eac3"}
        return not is_ac3 or bytes(packet).startswith(_AC3_SYNC)

    def _write_all(self, packets: "Iterable[Packet[Stream]]") -> None:
        for packet in packets:
            self._write(packet)

    def _write(self, packet: "Packet[Stream]") -> None:
        assert packet.dts is not None  # VideoReader drops packets without it; encoders set it
        time = packet.dts * packet.time_base
        if self._last_time is not None and time <= self._last_time:
            self.num_dropped += 1
            return
        self._last_time = time
        packet.stream = self._stream
        try:
            self._output.mux(packet)
        except (InvalidDataError, ArgumentError):
            self.num_dropped += 1


class _AudioEncoder:
    """Encodes audio for a stream, and keeps its timestamps."""

    def __init__(self, stream: AudioStream) -> None:
        self._stream = stream
        self._input_format: tuple[str, str, int] | None = None
        self._resampler: AudioResampler | None = None
        self._next_pts = 0  # in samples, for frames without a timestamp

    def encode(self, frames: Iterable[AudioFrame]) -> "Iterator[Packet[Stream]]":
        """Encode frames; yield the packets that are complete."""
        for frame in frames:
            if frame.pts is not None and frame.time_base is not None:
                # Formats that count packets have ticks too coarse for packets of another length.
                ticks = Fraction(1, frame.sample_rate)
                frame.pts, frame.time_base = round(frame.pts * frame.time_base / ticks), ticks
            for resampled in self._resample(frame):
                yield from self._encode_resampled(resampled)

    def flush(self) -> "Iterator[Packet[Stream]]":
        """Yield the remaining packets."""
        for resampled in self._flush_resampler():
            yield from self._encode_resampled(resampled)
        yield from self._stream.encode(None)

    def _encode_resampled(self, frame: AudioFrame) -> "list[Packet[Stream]]":
        if frame.pts is None:  # as in the last frame, and in all frames of some decoders
            frame.pts, frame.time_base = self._next_pts, Fraction(1, self._stream.rate)
        self._next_pts = frame.pts + frame.samples
        return self._stream.encode(frame)

    def _resample(self, frame: AudioFrame) -> Iterator[AudioFrame]:
        """Convert a frame to the encoder's format. Broadcasts change the input format midway."""
        input_format = (frame.format.name, frame.layout.name, frame.sample_rate)
        if self._resampler is None or input_format != self._input_format:
            yield from self._flush_resampler()
            stream = self._stream
            self._resampler = AudioResampler(stream.format, stream.layout, stream.rate)
            self._input_format = input_format
        yield from self._resampler.resample(frame)

    def _flush_resampler(self) -> list[AudioFrame]:
        return [] if self._resampler is None else self._resampler.resample(None)


def codec_name(source: AudioStream) -> str | None:
    """Return the codec, not the decoder that libav chooses for it; None if libav has no decoder."""
    context = source.codec_context
    return None if context is None else context.codec.canonical_name


def add_audio_track(
    output: OutputContainer, video_format: VideoFormat, source: AudioStream
) -> AudioTrack | None:
    """Add a track to the output: copied if possible, else encoded; None if neither is possible."""
    codec = codec_name(source)
    options: list[Callable[[OutputContainer], AudioTrack]] = []
    if codec in video_format.copied_audio_codecs:
        options.append(partial(_add_copied, source))
    if codec is not None:
        for layout in _candidate_layouts(source, video_format.max_channels):
            options.append(partial(_add_encoded, source, video_format.audio_codec, layout))
    add = next((add for add in options if _is_supported(add, video_format.container)), None)
    return None if add is None else add(output)


def _is_supported(add: Callable[[OutputContainer], AudioTrack], container: str) -> bool:
    """Whether the track can be added, tried on a file in memory.

    libav rejects unsupported rates and layouts only when encoding starts, which is too late for the
    real file.
    """
    with av.open(io.BytesIO(), "w", format=container) as trial:
        try:
            track = add(trial)
            trial.start_encoding()
            track.try_silence()
        except (FFmpegError, UnknownCodecError, ValueError):
            return False
        return True


def _candidate_layouts(source: AudioStream, max_channels: int) -> list[str]:
    """Return the layouts to try for encoding, best first; none for a track without samples."""
    channels = source.layout.nb_channels
    if channels == 0 or source.rate == 0:
        return []
    if channels <= 2:
        return [("mono", "stereo")[channels - 1]]
    if channels > max_channels:
        return ["stereo"]
    return [source.layout.name, _DEFAULT_LAYOUTS.get(channels, "stereo"), "stereo"]


def _add_copied(source: AudioStream, output: OutputContainer) -> AudioTrack:
    stream = output.add_stream_from_template(source)
    _copy_language(source, stream)
    return AudioTrack(source, output, stream)


def _add_encoded(
    source: AudioStream, codec: str, layout: str, output: OutputContainer
) -> AudioTrack:
    rates = av.Codec(codec, "w").audio_rates or [source.rate]
    rate = min(rates, key=lambda rate: abs(rate - source.rate))
    stream = output.add_stream(codec, rate=rate, layout=layout)
    assert isinstance(stream, AudioStream)
    stream.bit_rate = _BITS_PER_CHANNEL * stream.layout.nb_channels
    _copy_language(source, stream)
    return AudioTrack(source, output, stream, _AudioEncoder(stream))


def _copy_language(source: AudioStream, stream: AudioStream) -> None:
    if source.language is not None:
        stream.metadata["language"] = source.language
