"""When the packets of a clip are due: from 0 on, and never back.

Recordings are joined by laying one file behind the other, and then times start again in the middle.
"""

from dataclasses import dataclass
from fractions import Fraction

from av.packet import Packet
from av.stream import Stream

# A track that steps back further than this, in seconds, has come to another recording. Less is
# careless muxing.
_JITTER = Fraction(3, 10)
# Where times may leap, a step ahead further than this is another recording, too.
_LONGEST_GAP = 10


@dataclass
class _Track:
    """recording: the one it has come to, counted from 0. at: when its last packet is decoded."""

    recording: int = 0
    at: Fraction | None = None


class Timeline:
    """Moves the times of packets to where they belong.

    Tracks come to the next recording one after the other. The first one finds out by how much its
    times are to be moved, so that it goes on where the clip has got to, and the others follow:
    picture and sound stay together.

    Args:
        start: when the clip starts by its own clock, in seconds; broadcasts start anywhere.
        may_leap: the format does not promise that times go on, as MPEG's do not. Elsewhere a gap
            of hours is what it says.
    """

    def __init__(self, start: Fraction, *, may_leap: bool) -> None:
        self._may_leap = may_leap
        self._shifts = [-start]  # seconds to add to the times of each recording
        self._tracks: dict[int, _Track] = {}
        self._end = Fraction(0)

    def settle(self, packet: "Packet[Stream]") -> None:
        """Change the times of the next packet of a track, if it has any."""
        # Frames are decoded in another order than they are shown in: of the two times, one never
        # steps back, and the other says where a recording ends and begins.
        decoded = packet.pts if packet.dts is None else packet.dts
        shown = packet.dts if packet.pts is None else packet.pts
        if decoded is None or shown is None:
            return
        base = packet.time_base
        track = self._tracks.setdefault(packet.stream.index, _Track())
        if self._is_elsewhere(track, decoded * base, shown * base):
            self._go_on(track, shown * base)
        shift = self._shifts[track.recording]
        at, before = decoded * base + shift, track.at
        track.at = at
        # Where packets do not say how long they are, as in MPEG, they are as long as the step.
        step = Fraction(0) if before is None else max(Fraction(0), at - before)
        length = packet.duration * base if packet.duration else step
        self._end = max(self._end, shown * base + shift + length)
        _move(packet, round(shift / base))

    def _is_elsewhere(self, track: _Track, decoded: Fraction, shown: Fraction) -> bool:
        shift = self._shifts[track.recording]
        if track.at is not None and decoded + shift < track.at - _JITTER:
            return True
        return self._may_leap and shown + shift > self._end + _LONGEST_GAP

    def _go_on(self, track: _Track, shown: Fraction) -> None:
        """Bring a track to the recording that goes on near the end of what there is; maybe new."""
        later = range(track.recording + 1, len(self._shifts))
        near = (n for n in later if abs(shown + self._shifts[n] - self._end) < _LONGEST_GAP)
        track.recording = next(near, len(self._shifts))
        if track.recording == len(self._shifts):
            self._shifts.append(self._end - shown)


def _move(packet: "Packet[Stream]", ticks: int) -> None:
    if packet.pts is not None:
        packet.pts += ticks
    if packet.dts is not None:
        packet.dts += ticks
