"""A clip in, a clip out: read, ask the network, smooth, compose, write."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np

from segtrain.files import atomic_write, sweep_beside
from segtrain.prediction.backgrounds import MakeBackground
from segtrain.prediction.network import Network
from segtrain.prediction.outputs import Composition, Result
from segtrain.prediction.probability import Values
from segtrain.prediction.video import VideoOutcome
from segtrain.prediction.video.reading import Clip, Frame, open_clip
from segtrain.prediction.video.smoothing import Smoother
from segtrain.prediction.video.writing import writing
from segtrain.progress import progress_bar


def convert(
    source: Path,
    target: Path,
    network: Network,
    *,
    make_background: MakeBackground,
    tell: Callable[[str], object],
) -> VideoOutcome:
    """As `segtrain.prediction.video.predict_video`, whose checks have been made."""
    with open_clip(source) as clip:
        _tell_left_out(source, clip, tell)
        sweep_beside(target)
        with (
            atomic_write(target) as file,
            writing(file, target, clip.facts, clip.sounds, tell) as film,
            progress_bar(total=clip.facts.num_frames, desc=source.name, unit="frame") as bar,
        ):
            smoother, tally = Smoother(), _Tally()
            for piece in clip.pieces():
                if not isinstance(piece, Frame):
                    film.add_sound(piece)
                    continue
                [answer] = network.probs([piece.pixels])
                seconds = float(piece.ticks * clip.facts.time_base)
                probability = smoother.smooth(piece.pixels, np.asarray(answer), seconds)
                result = Result(image=piece.pixels, answer=probability)
                composed = Composition(result, make_background).composed
                film.add_frame(composed, piece.ticks, piece.duration)
                tally.add(piece, probability)
                bar.update()
        if clip.num_broken:
            tell(f"{source}: {clip.num_broken} damaged packets, concealed or left out")
    return tally.outcome(clip.facts.time_base)


class _Tally:
    """Sums over the frames."""

    def __init__(self) -> None:
        self._num_frames, self._start, self._end, self._person = 0, 0, 0, 0.0

    def add(self, frame: Frame, probability: Values) -> None:
        if self._num_frames == 0:
            self._start = frame.ticks
        self._num_frames += 1
        self._end = frame.ticks + frame.duration
        self._person += float((probability >= 0.5).mean())

    def outcome(self, time_base: Fraction) -> VideoOutcome:
        return VideoOutcome(
            num_frames=self._num_frames,
            seconds=float((self._end - self._start) * time_base),
            person_share=self._person / self._num_frames,
        )


def _tell_left_out(source: Path, clip: Clip, tell: Callable[[str], object]) -> None:
    if clip.left_out:
        kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(clip.left_out.items()))
        tell(f"{source}: left out: {kinds}")
