"""Convert a video: read, predict, smooth, compose, write."""

import logging
from fractions import Fraction
from pathlib import Path

import numpy as np

from segtrain.inference.backend import Backend
from segtrain.prediction.backgrounds import BackgroundFn
from segtrain.prediction.outputs import Composite, Result
from segtrain.prediction.video import VideoStats
from segtrain.prediction.video.reading import Frame, VideoReader, open_video
from segtrain.prediction.video.smoothing import TemporalSmoother
from segtrain.prediction.video.writing import open_video_writer
from segtrain.runtime.files import atomic_write, remove_temp_files_beside
from segtrain.runtime.progress import progress_bar
from segtrain.runtime.signals import raise_if_stopped
from segtrain.types import Probs

log = logging.getLogger(__name__)


def convert(
    source: Path,
    target: Path,
    backend: Backend,
    *,
    make_background: BackgroundFn,
) -> VideoStats:
    """Do the work of `segtrain.prediction.video.predict_video`, without its checks."""
    with open_video(source) as reader:
        _log_dropped_streams(source, reader)
        remove_temp_files_beside(target)
        info = reader.info
        with (
            atomic_write(target) as file,
            open_video_writer(file, target, info, reader.audio_streams) as writer,
            progress_bar(total=info.num_frames, desc=source.name, unit="frame") as bar,
        ):
            smoother, accumulator = TemporalSmoother(), _StatsAccumulator()
            for item in reader.read():
                if not isinstance(item, Frame):
                    writer.add_audio(item)
                    continue
                [frame_probs] = backend.probs([item.pixels])
                seconds = float(item.ticks * info.time_base)
                probs = smoother.smooth(item.pixels, np.asarray(frame_probs), seconds)
                composite = Composite(Result(item.pixels, probs), make_background)
                writer.add_frame(composite.pixels, item.ticks, item.duration)
                accumulator.add(item, probs)
                raise_if_stopped()
                bar.update()
        if reader.num_damaged_packets:
            log.info(
                f"{source}: {reader.num_damaged_packets} damaged packets, concealed or dropped"
            )
    return accumulator.stats(info.time_base)


class _StatsAccumulator:
    """Sums over the frames."""

    def __init__(self) -> None:
        self._num_frames, self._start, self._end, self._person = 0, 0, 0, 0.0

    def add(self, frame: Frame, probs: Probs) -> None:
        if self._num_frames == 0:
            self._start = frame.ticks
        self._num_frames += 1
        self._end = frame.ticks + frame.duration
        self._person += float((probs >= 0.5).mean())

    def stats(self, time_base: Fraction) -> VideoStats:
        return VideoStats(
            num_frames=self._num_frames,
            seconds=float((self._end - self._start) * time_base),
            person_fraction=self._person / self._num_frames,
        )


def _log_dropped_streams(source: Path, reader: VideoReader) -> None:
    if reader.dropped_streams:
        counts = sorted(reader.dropped_streams.items())
        kinds = ", ".join(f"{number} {kind}" for kind, number in counts)
        log.info(f"{source}: dropped streams: {kinds}")
