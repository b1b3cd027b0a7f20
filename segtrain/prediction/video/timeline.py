"""Timestamps of packets: from 0 on, and never backwards.

Recordings can be joined by concatenating their files. Timestamps then restart in the middle.
"""

from dataclasses import dataclass
from fractions import Fraction

from av.packet import Packet
from av.stream import Stream

# A track whose timestamps go back by more than this, in seconds, has reached another recording. A
# smaller step is imprecise muxing.
_JITTER = Fraction(3, 10)
# Where timestamps may jump, a jump forward by more seconds than this is also another recording.
_MAX_GAP = 10


@dataclass
class _TrackState:
    """The position of a track.

    Attributes:
        recording: index of the recording that the track has reached, from 0.
        time: decoding time of the last packet, in seconds.
    """

    recording: int = 0
    time: Fraction | None = None


class Timeline:
    """Shifts the timestamps of packets so that concatenated recordings follow each other.

    Tracks reach the next recording one by one. The first one determines the shift that continues
    the video at its current end, and the others use the same shift, so image and audio stay in
    sync.

    Args:
        start: start time of the video in seconds; broadcasts start anywhere.
        allow_jumps: the format does not guarantee continuous timestamps, as MPEG. In other formats,
            a gap of hours is kept.
    """

    def __init__(self, start: Fraction, *, allow_jumps: bool) -> None:
        self._allow_jumps = allow_jumps
        self._shifts = [-start]  # seconds added to the timestamps of each recording
        self._tracks: dict[int, _TrackState] = {}
        self._end = Fraction(0)

    def shift(self, packet: "Packet[Stream]") -> None:
        """Change the timestamps of the next packet of a track, if it has any."""
        # Decoding order differs from display order: dts never goes back within a recording, and pts
        # shows where a recording starts and ends.
        dts = packet.pts if packet.dts is None else packet.dts
        pts = packet.dts if packet.pts is None else packet.pts
        if dts is None or pts is None:
            return
        base = packet.time_base
        track = self._tracks.setdefault(packet.stream.index, _TrackState())
        if self._is_other_recording(track, dts * base, pts * base):
            self._enter_next_recording(track, pts * base)
        shift = self._shifts[track.recording]
        time, previous = dts * base + shift, track.time
        track.time = time
        # Packets without a duration, as in MPEG, last as long as the step from the previous one.
        step = Fraction(0) if previous is None else max(Fraction(0), time - previous)
        duration = packet.duration * base if packet.duration else step
        self._end = max(self._end, pts * base + shift + duration)
        _add_ticks(packet, round(shift / base))

    def _is_other_recording(self, track: _TrackState, dts: Fraction, pts: Fraction) -> bool:
        shift = self._shifts[track.recording]
        if track.time is not None and dts + shift < track.time - _JITTER:
            return True
        return self._allow_jumps and pts + shift > self._end + _MAX_GAP

    def _enter_next_recording(self, track: _TrackState, pts: Fraction) -> None:
        """Assign the track to the later recording that continues near the end, or to a new one."""
        later = range(track.recording + 1, len(self._shifts))
        near = (n for n in later if abs(pts + self._shifts[n] - self._end) < _MAX_GAP)
        track.recording = next(near, len(self._shifts))
        if track.recording == len(self._shifts):
            self._shifts.append(self._end - pts)


def _add_ticks(packet: "Packet[Stream]", ticks: int) -> None:
    if packet.pts is not None:
        packet.pts += ticks
    if packet.dts is not None:
        packet.dts += ticks
