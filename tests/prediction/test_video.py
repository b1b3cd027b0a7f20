"""Video prediction: preserved frames, times, audio and color; errors and leftovers."""

import ast
import gc
import os
import resource
import signal
import subprocess
import sys
import tracemalloc
import weakref
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from helpers.logs import logged_lines
from helpers.video import (
    RATE,
    AllPersonBackend,
    Array,
    RedBackend,
    VideoContent,
    VideoSpec,
    concatenate,
    damage_audio,
    moving_square,
    read_video,
    solid,
    yuv_to_rgb,
)

from segtrain.errors import DataError, ResourceError, UsageError
from segtrain.imaging.images import read_image, write_image
from segtrain.prediction import run
from segtrain.prediction.backgrounds import build_background_fn
from segtrain.prediction.jobs import plan_jobs
from segtrain.prediction.options import PredictOptions
from segtrain.prediction.video import VideoStats, predict_video
from segtrain.prediction.video.formats import video_output_suffix
from segtrain.prediction.video.smoothing import TIME_CONSTANT, TemporalSmoother
from segtrain.prediction.video.timeline import Timeline
from segtrain.runtime import signals

GREEN = "#00ff00"


def predict(
    source: Path,
    backend: Any = None,
    *,
    background: str = GREEN,
    overwrite: bool = False,
    log: list[str] | None = None,
) -> Path:
    target = Path("out") / (source.stem + video_output_suffix(background))
    with logged_lines() as lines:
        predict_video(
            source,
            target,
            backend or RedBackend(),
            make_background=build_background_fn(background),
            overwrite=overwrite,
        )
    if log is not None:
        log += lines
    return target


def convert(
    spec: VideoSpec, suffix: str = ".mp4", backend: Any = None
) -> tuple[VideoContent, VideoContent]:
    """Write a video and predict it; return the content of both."""
    source = spec.write(Path("clip" + suffix))
    return read_video(source), read_video(predict(source, backend))


# --- Preserved properties -----------------------------------------------------------------------


def assert_same_times(before: VideoContent, after: VideoContent) -> None:
    assert len(after.frames) == len(before.frames)
    assert after.times == pytest.approx([time - before.times[0] for time in before.times])


@pytest.mark.slow
def test_ten_seconds_keep_all_frames_and_audio() -> None:
    before, after = convert(
        VideoSpec(num_frames=250, image=lambda number: moving_square(number, 180, 320))
    )

    assert len(after.frames) == 250
    assert_same_times(before, after)
    assert after.audio[0]["packets"] == before.audio[0]["packets"]
    assert after.audio[0]["samples"].shape[1] / 48_000 == pytest.approx(10, abs=0.05)


def test_only_the_background_changes() -> None:
    source = VideoSpec().write(Path("clip.mp4"))
    with logged_lines() as log:
        stats = predict_video(
            source,
            Path("out/x.mp4"),
            RedBackend(),
            make_background=build_background_fn(GREEN),
            overwrite=False,
        )
    before, after = read_video(source), read_video(Path("out/x.mp4"))

    assert stats == VideoStats(25, 1.0, pytest.approx(16 * 16 / (48 * 64), rel=0.1))
    assert_same_times(before, after)
    assert (after.rate, after.duration) == (before.rate, before.duration)
    assert after.audio[0]["packets"] == before.audio[0]["packets"]
    assert after.audio[0]["language"] == "eng"
    for number, frame in enumerate(after.frames):
        assert frame.shape == (48, 64, 3)
        # At the center of the square and far from it, because chroma bleeds across its edge.
        assert frame[20, number % 48 + 8] == pytest.approx((200, 40, 30), abs=8)
        assert frame[44, 32] == pytest.approx((0, 255, 0), abs=8)
    assert log == []


def test_each_frame_keeps_its_timestamp() -> None:
    uneven = [0, 512, 700, 1500, 1600, 2900, 3300, 5000, *range(6000, 20_000, 777)]
    before, after = convert(VideoSpec(times=uneven, num_frames=len(uneven) - 1))

    assert after.times == pytest.approx([tick / 12_800 for tick in uneven[:-1]])
    assert_same_times(before, after)


@pytest.mark.parametrize(
    ("suffix", "spec"),
    [
        (".ts", VideoSpec(ticks=Fraction(1, 90_000))),  # starts at 1.4 seconds
        (".mkv", VideoSpec(ticks=Fraction(1, 1000), audio_codecs=("aac", "libopus"))),
        (".mov", VideoSpec(codec="mpeg4", options={}, audio_codecs=("libmp3lame",))),
        (
            ".webm",
            VideoSpec(
                codec="libvpx", options={}, ticks=Fraction(1, 1000), audio_codecs=("libopus",)
            ),
        ),
        (
            ".avi",
            VideoSpec(codec="mpeg4", options={}, ticks=1 / RATE, audio_codecs=("libmp3lame",)),
        ),
    ],
)
def test_other_containers(suffix: str, spec: VideoSpec) -> None:
    before, after = convert(spec, suffix)

    assert len(after.frames) == 25
    steps = np.diff(before.times)
    assert np.diff(after.times) == pytest.approx(steps)
    assert [track["codec"] for track in after.audio] == [track["codec"] for track in before.audio]
    seconds = [track["samples"].shape[1] / 48_000 for track in after.audio]
    assert seconds == pytest.approx([1] * len(spec.audio_codecs), abs=0.05)


def test_audio_and_image_stay_in_sync_if_a_recording_starts_late() -> None:
    VideoSpec(ticks=Fraction(1, 90_000)).write(Path("clip.ts"))
    target = predict(Path("clip.ts"))

    def offset(path: Path) -> float:
        with av.open(path) as file:
            starts = [
                float(stream.start_time * stream.time_base)
                for stream in (file.streams.video[0], file.streams.audio[0])
            ]
        return starts[0] - starts[1]

    assert offset(target) == pytest.approx(offset(Path("clip.ts")), abs=0.002)


@pytest.mark.parametrize("num_tracks", [2, 0])
def test_two_audio_tracks_and_none(num_tracks: int) -> None:
    before, after = convert(VideoSpec(audio_codecs=("aac",) * num_tracks))

    assert [track["language"] for track in after.audio] == ["eng", "deu"][:num_tracks]
    assert [track["packets"] for track in after.audio] == [
        track["packets"] for track in before.audio
    ]


@pytest.mark.parametrize(
    ("suffix", "codec"), [(".mov", "pcm_s16le"), (".avi", "pcm_s16le"), (".avi", "mp2")]
)
def test_audio_that_mp4_does_not_support_is_encoded_and_reported(suffix: str, codec: str) -> None:
    source = VideoSpec(codec="mpeg4", options={}, ticks=1 / RATE, audio_codecs=(codec,)).write(
        Path("clip" + suffix)
    )
    log: list[str] = []
    [original], [track] = read_video(source).audio, read_video(predict(source, log=log)).audio

    assert track["codec"] == "aac"
    assert f"audio re-encoded from {codec} to aac" in log[0]
    wave = track["samples"][0, 4096 : 4096 + 32_768]
    assert np.abs(np.fft.rfft(wave)).argmax() * 48_000 / 32_768 == pytest.approx(440, abs=2)
    # In sync with the images: every sample keeps its position, to the last one.
    before = original["samples"].reshape(-1, 2).T if codec == "pcm_s16le" else original["samples"]
    assert track["samples"].shape[1] >= before.shape[1]
    assert np.abs(wave - before[0, 4096 : 4096 + 32_768] / 32_768).mean() < 0.02


def test_audio_with_coarse_timestamps_is_encoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from segtrain.prediction.video.formats import VIDEO_FORMATS

    # A tick of MP3 in AVI is one packet, longer than a packet of AAC. Copying would hide this case.
    monkeypatch.setitem(
        VIDEO_FORMATS, ".mp4", replace(VIDEO_FORMATS[".mp4"], copied_audio_codecs=frozenset())
    )
    spec = VideoSpec(codec="mpeg4", options={}, ticks=1 / RATE, audio_codecs=("libmp3lame",))
    before, after = convert(spec, ".avi")

    assert after.audio[0]["codec"] == "aac"
    num_samples = before.audio[0]["samples"].shape[1]
    assert after.audio[0]["samples"].shape[1] == pytest.approx(num_samples, abs=1500)


@pytest.mark.parametrize(
    ("codec", "rate", "channels", "expected"),
    [
        ("pcm_s16le", 11_000, "stereo", ("aac", 11_025, "stereo")),
        ("pcm_s16le", 192_000, "mono", ("aac", 96_000, "mono")),
        ("libmp3lame", 8_000, "mono", ("aac", 8_000, "mono")),  # MP4 supports it from 16 kHz on
        ("pcm_s16le", 48_000, "7.1", ("aac", 48_000, "7.1")),  # Matroska does not store which eight
    ],
)
def test_unusual_audio_is_encoded_at_the_nearest_rate_and_layout(
    codec: str, rate: int, channels: str, expected: tuple[str, int, str]
) -> None:
    spec = VideoSpec(
        ticks=Fraction(1, 1000), audio_codecs=(codec,), audio_rate=rate, channels=channels
    )
    log: list[str] = []
    target = predict(spec.write(Path("clip.mkv")), log=log)

    with av.open(target) as file:
        track = file.streams.audio[0]
        assert (track.codec_context.name, track.rate, track.layout.name) == expected
        assert float(track.duration * track.time_base) == pytest.approx(1, abs=0.15)
        assert sum(1 for _ in file.decode(video=0)) == 25
    assert "audio re-encoded" in log[0]


@pytest.mark.parametrize("background", [GREEN, "transparent"])
def test_audio_whose_format_changes_midway_is_kept(background: str) -> None:
    parts = [
        VideoSpec(
            ticks=Fraction(1, 90_000), audio_codecs=("mp2",), audio_rate=rate, channels=channels
        ).write(Path(f"{channels}.ts"))
        for rate, channels in ((48_000, "stereo"), (32_000, "mono"))
    ]
    after = read_video(predict(concatenate(Path("clip.ts"), *parts), background=background))

    assert len(after.frames) == 50
    [track] = after.audio
    assert track["samples"].shape[1] / track["rate"] == pytest.approx(2, abs=0.05)
    for start in (0.2, 1.2):
        first = round(start * track["rate"])
        wave = track["samples"][0, first : first + track["rate"] // 2]
        assert np.abs(np.fft.rfft(wave)).argmax() * 2 == pytest.approx(440, abs=4)


@pytest.mark.parametrize("background", [GREEN, "transparent"])
@pytest.mark.parametrize(("suffix", "codec"), [(".mkv", "ac3"), (".mov", "aac")])
def test_damaged_audio_packets_are_dropped_and_reported(
    suffix: str, codec: str, background: str
) -> None:
    spec = VideoSpec(codec="mpeg4", options={}, ticks=Fraction(1, 1000), audio_codecs=(codec,))
    intact = spec.write(Path("intact" + suffix))
    log: list[str] = []
    source = damage_audio(intact, Path("clip" + suffix))
    after = read_video(predict(source, background=background, log=log))

    assert len(after.frames) == 25
    [track] = after.audio
    assert track["samples"].shape[1] / track["rate"] == pytest.approx(0.8, abs=0.03)
    assert "audio packets" in log[-1]


def test_damaged_audio_in_a_broadcast_does_not_fail_the_video() -> None:
    source = VideoSpec(ticks=Fraction(1, 90_000)).write(Path("clip.ts"))
    content = bytearray(source.read_bytes())
    starts = range(0, len(content), 188)
    audio_starts = [
        start for start in starts if content[start + 1] & 31 == 1 and not content[start + 2]
    ]
    for start in audio_starts[len(audio_starts) // 2 :]:
        content[start + 60 : start + 188] = b"\x55" * 128
    source.write_bytes(content)
    log: list[str] = []

    assert len(read_video(predict(source, log=log)).frames) == 25
    assert "audio packets" in log[-1]


@pytest.mark.parametrize("background", [GREEN, "transparent"])
@pytest.mark.parametrize("reason", ["no samples", "unknown codec", "nine channels"])
def test_unsupported_audio_is_dropped_and_reported(reason: str, background: str) -> None:
    if reason == "no samples":
        spec = VideoSpec(ticks=Fraction(1, 90_000), audio_seconds=0)
        source = spec.write(Path("clip.ts"))
    elif reason == "nine channels":  # without a layout, and no default layout has nine
        spec = VideoSpec(ticks=Fraction(1, 1000), audio_codecs=("pcm_s16le",), channels="9C")
        source = spec.write(Path("clip.mkv"))
    else:
        source = VideoSpec(ticks=Fraction(1, 1000)).write(Path("clip.mkv"))
        source.write_bytes(source.read_bytes().replace(b"A_AAC", b"A_XYZ"))
    log: list[str] = []
    after = read_video(predict(source, background=background, log=log))

    assert (len(after.frames), after.audio) == (25, [])
    assert len(log) == 1
    assert "audio dropped" in log[0]


@pytest.mark.parametrize(
    ("suffix", "spec"),
    [
        (".ts", VideoSpec(ticks=Fraction(1, 90_000))),
        (".mkv", VideoSpec(ticks=Fraction(1, 1000))),
        (".mpg", VideoSpec(codec="mpeg2video", options={}, ticks=1 / RATE, audio_codecs=("mp2",))),
    ],
)
def test_concatenated_recordings_follow_each_other(suffix: str, spec: VideoSpec) -> None:
    """Timestamps restart in the middle of a concatenated file."""
    part = spec.write(Path("part" + suffix))
    once = read_video(part)
    after = read_video(predict(concatenate(Path("clip" + suffix), part, part)))

    assert len(after.frames) == 50
    first, second = np.array(after.times[:25]), np.array(after.times[25:])
    steps = np.diff(once.times)
    assert np.diff(first) == pytest.approx(steps, abs=0.0015)
    assert np.diff(second) == pytest.approx(steps, abs=0.0015)
    assert 0.03 < second[0] - first[-1] < 0.1
    [track] = after.audio
    assert track["samples"].shape[1] / 48_000 == pytest.approx(2, abs=0.06)


def test_a_recording_from_another_day_follows_immediately() -> None:
    hours = 20 * 3600 * 90_000
    specs = [
        VideoSpec(
            ticks=Fraction(1, 90_000), audio_codecs=(), times=range(start, start + 10**6, 3600)
        )
        for start in (0, hours)
    ]
    parts = [spec.write(Path(f"{number}.ts")) for number, spec in enumerate(specs)]
    after = read_video(predict(concatenate(Path("clip.ts"), *parts)))

    assert after.times == pytest.approx([number / 25 for number in range(50)], abs=1e-4)


def test_a_gap_is_kept_in_formats_with_continuous_timestamps() -> None:
    times = [0, 40, 80, 3_600_000, 3_600_040, 3_600_080]
    spec = VideoSpec(ticks=Fraction(1, 1000), audio_codecs=(), num_frames=5, times=times)
    after = read_video(predict(spec.write(Path("clip.mkv"))))

    assert after.times == pytest.approx([time / 1000 for time in times[:-1]])


def test_image_and_audio_of_a_concatenated_recording_have_the_same_shift() -> None:
    def packet(track: int, stamp: int) -> Any:
        # The attributes that Timeline uses, in ticks of a tenth of a second.
        stream = SimpleNamespace(index=track)
        length, base = 1, Fraction(1, 10)
        return SimpleNamespace(stream=stream, pts=stamp, dts=stamp, duration=length, time_base=base)

    timeline = Timeline(Fraction(5), allow_jumps=False)
    image, audio = 0, 1
    order = [(image, 50), (audio, 50), (image, 51), (audio, 51), (image, 58)]
    # Audio reaches the second recording first, and starts there two ticks before the image.
    order += [(audio, 7), (image, 59), (audio, 8), (image, 9), (audio, 9)]
    packets = [packet(*each) for each in order]
    for each in packets:
        timeline.shift(each)

    shifted = [(each.stream.index, each.pts) for each in packets]
    assert shifted[:5] == [(image, 0), (audio, 0), (image, 1), (audio, 1), (image, 8)]
    assert shifted[5:] == [(audio, 9), (image, 9), (audio, 10), (image, 11), (audio, 11)]
    assert all(each.pts == each.dts for each in packets)


@pytest.mark.parametrize("background", [GREEN, "transparent"])
@pytest.mark.parametrize("audio_codecs", [(), ("aac",)], ids=["without audio", "with audio"])
@pytest.mark.parametrize(
    ("suffix", "ticks"),
    [(".mp4", Fraction(1, 12_800)), (".mkv", Fraction(1, 1000)), (".ts", Fraction(1, 90_000))],
)
def test_a_video_with_a_single_frame(
    suffix: str, ticks: Fraction, audio_codecs: tuple[str, ...], background: str
) -> None:
    source = VideoSpec(num_frames=1, ticks=ticks, audio_codecs=audio_codecs).write(
        Path("clip" + suffix)
    )
    with av.open(predict(source, background=background)) as file:
        assert sum(1 for _ in file.decode(video=0)) == 1
        assert len(file.streams.audio) == len(audio_codecs)


def test_a_recording_that_starts_late_starts_at_zero() -> None:
    late = range(128_000, 141_000, 512)
    _, after = convert(VideoSpec(times=late, audio_codecs=()), ".mkv")

    assert after.times[0] == 0
    assert len(after.frames) == 25


def test_other_streams_are_dropped_and_reported() -> None:
    with av.open("clip.mkv", "w") as output:
        output.add_attachment("notes.txt", "text/plain", b"x")
        VideoSpec(audio_codecs=()).write_frames(output)
    log: list[str] = []
    after = read_video(predict(Path("clip.mkv"), log=log))

    assert (len(after.frames), after.num_other_streams) == (25, 0)
    assert log == ["clip.mkv: dropped streams: 1 attachment"]


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, -90])
def test_a_rotated_video_is_predicted_and_written_upright(degrees: int, flipped: bool) -> None:
    backend = RedBackend()
    aspect = Fraction(4, 3)
    source = VideoSpec(rotation=(degrees, flipped), aspect=aspect, num_frames=3).write(
        Path("c.mp4")
    )
    after = read_video(predict(source, backend))

    upright = np.rot90(moving_square(0), degrees // 90)
    upright = np.fliplr(upright) if flipped else upright
    assert backend.shapes[0] == upright.shape
    assert after.rotation == 0
    red = after.frames[0][..., 0].astype(int) - after.frames[0][..., 1] > 0
    expected = upright[..., 0].astype(int) - upright[..., 1] > 0
    assert red.shape == expected.shape
    assert (red != expected).mean() < 0.03
    assert after.aspect == (1 / aspect if degrees % 180 else aspect)


@pytest.mark.parametrize("width", [64, 70])  # at 70, libav pads the rows
def test_rotation_does_not_modify_frames_that_the_decoder_reuses(width: int) -> None:
    """The QuickTime Animation decoder draws each frame over the previous one, in RGB."""
    spec = VideoSpec(
        codec="qtrle",
        options={},
        pixel_format="rgb24",
        image=lambda number: moving_square(number // 3, 48, width),
        rotation=(180, False),
        audio_codecs=(),
    )
    source = spec.write(Path("clip.mov"))
    after = read_video(predict(source, AllPersonBackend()))

    for number, frame in enumerate(after.frames):
        upright = np.rot90(moving_square(number // 3, 48, width), 2)
        assert np.abs(frame - upright.astype(int)).mean() < 8


def test_odd_sides_grow_by_one_pixel() -> None:
    spec = VideoSpec(image=lambda number: moving_square(number, 47, 63), pixel_format="yuv444p")
    log: list[str] = []
    after = read_video(predict(spec.write(Path("clip.mp4")), log=log))

    assert after.frames[0].shape == (48, 64, 3)
    assert after.frames[0][47, 63] == pytest.approx((0, 255, 0), abs=8)
    assert "odd sides" in log[0]


# --- Color -------------------------------------------------------------------------------------

BT709 = {"colorspace": 1, "color_primaries": 1, "color_trc": 1}
BT601 = {"colorspace": 6, "color_primaries": 6, "color_trc": 6}


@pytest.mark.parametrize("color", [(200, 40, 30), (20, 180, 60), (30, 60, 220), (128, 128, 128)])
@pytest.mark.parametrize(
    ("tags", "convert", "size", "pixel_format"),
    [
        (BT709 | {"color_range": 1}, {"dst_colorspace": 1, "dst_color_range": 1}, 48, "yuv420p"),
        (BT601 | {"color_range": 1}, {"dst_colorspace": 5, "dst_color_range": 1}, 48, "yuv420p"),
        (BT709 | {"color_range": 2}, {"dst_colorspace": 1, "dst_color_range": 2}, 48, "yuv420p"),
        ({}, {"dst_colorspace": 5, "dst_color_range": 1}, 48, "yuv420p"),
        ({}, {"dst_colorspace": 1, "dst_color_range": 1}, 720, "yuv420p"),
        (BT709, {"dst_colorspace": 1, "dst_color_range": 1}, 48, "yuv420p10le"),
    ],
    ids=["bt709", "bt601", "full range", "untagged", "untagged hd", "10 bit"],
)
def test_colors_are_preserved(
    color: tuple[int, int, int],
    tags: dict[str, int],
    convert: dict[str, int],
    size: int,
    pixel_format: str,
) -> None:
    spec = VideoSpec(
        num_frames=2,
        image=lambda number: solid(color, size),
        color=tags,
        convert=convert,
        pixel_format=pixel_format,
        audio_codecs=(),
    )
    source = spec.write(Path("clip.mp4"))
    target = predict(source, AllPersonBackend())

    assert yuv_to_rgb(source, "bt709" if convert["dst_colorspace"] == 1 else "bt601") == (
        pytest.approx(color, abs=3)
    )
    assert yuv_to_rgb(target) == pytest.approx(color, abs=3)
    if "color_primaries" in tags:
        names = ("color_primaries", "color_trc")
        assert read_video(target).color == (tags["colorspace"], 1, *(tags[name] for name in names))


@pytest.mark.slow  # libswscale needs seconds for its table, once per video
@pytest.mark.parametrize("transfer", [16, 18], ids=["PQ", "HLG"])
def test_hdr_becomes_standard_dynamic_range_and_is_reported(transfer: int) -> None:
    spec = VideoSpec(
        num_frames=2,
        image=lambda number: solid((128, 128, 128)),
        color={"colorspace": 9, "color_primaries": 9, "color_trc": transfer, "color_range": 1},
        convert={"dst_colorspace": 9},
        pixel_format="yuv420p10le",
        audio_codecs=(),
    )
    log: list[str] = []
    after = read_video(predict(spec.write(Path("clip.mp4")), AllPersonBackend(), log=log))

    assert "HDR" in log[0]
    assert after.color == (1, 1, 1, 1)
    gray = after.frames[0][20, 20]
    assert np.ptp(gray) <= 3
    assert 60 < gray.mean() < 220


def test_a_transparent_background_has_alpha() -> None:
    source = VideoSpec().write(Path("clip.mp4"))
    target = predict(source, background="transparent")
    after = read_video(target, decoder="libvpx-vp9", pixels="rgba")

    assert target.name == "clip_cutout.webm"
    assert len(after.frames) == 25
    assert_same_times(read_video(source), after)
    assert after.frames[0][20, 8] == pytest.approx((200, 40, 30, 255), abs=10)
    assert after.frames[0][44, 40, 3] <= 2
    assert [track["codec"] for track in after.audio] == ["opus"]


# --- Temporal smoothing -------------------------------------------------------------------------


def test_a_still_image_flickers_less() -> None:
    rng = np.random.default_rng(0)
    image, smoother = moving_square(0), TemporalSmoother()
    noisy = [rng.uniform(0.3, 0.9, (48, 64)).astype(np.float32) for _ in range(200)]
    smooth = [smoother.smooth(image, each, number / 25) for number, each in enumerate(noisy)]

    # A running average of independent values has (1 - w) / (1 + w) of their variance.
    weight = np.exp(-1 / 25 / TIME_CONSTANT)
    ratio = np.var(smooth[20:], axis=0).mean() / np.var(noisy[20:], axis=0).mean()
    assert ratio == pytest.approx((1 - weight) / (1 + weight), rel=0.1)
    assert np.mean(smooth[20:]) == pytest.approx(0.6, abs=0.01)


def test_a_higher_frame_rate_is_smoothed_over_the_same_time() -> None:
    after = []
    for rate in (25, 100):
        smoother = TemporalSmoother()
        smoother.smooth(moving_square(0), np.ones((48, 64), np.float32), 0)
        for number in range(1, rate // 5 + 1):
            last = smoother.smooth(moving_square(0), np.zeros((48, 64), np.float32), number / rate)
        after.append(last[0, 0])

    assert after[0] == pytest.approx(after[1], rel=1e-3)


@pytest.mark.parametrize("speed", [1, 3, 9])
def test_a_moving_edge_does_not_lag(speed: int) -> None:
    smoother, backend = TemporalSmoother(), RedBackend()
    for number in range(12):
        image = moving_square(number * speed, 96, 192)
        [probs] = backend.probs([image])
        smooth = smoother.smooth(image, probs, number / 25)

        assert np.abs((smooth >= 0.5).sum(1) - (probs >= 0.5).sum(1)).max() == 0
        assert ((smooth >= 0.5) == (probs >= 0.5)).all()


def test_a_cut_restarts_the_average() -> None:
    smoother = TemporalSmoother()
    smoother.smooth(solid((40, 40, 40)), np.ones((48, 48), np.float32), 0)
    after = smoother.smooth(solid((90, 90, 90)), np.zeros((48, 48), np.float32), 0.04)

    assert after.max() == 0


def test_a_cut_between_similar_scenes_restarts_the_average() -> None:
    smoother = TemporalSmoother()
    first, second = solid((40, 40, 40)), solid((40, 40, 40))
    second[:, :36] = 200
    smoother.smooth(first, np.ones((48, 48), np.float32), 0)
    after = smoother.smooth(second, np.zeros((48, 48), np.float32), 0.04)

    assert after.max() == 0


# --- Memory, signals, leftovers -----------------------------------------------------------------


class CountingBackend(RedBackend):
    """Records the largest number of images alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: list[weakref.ref[Array]] = []
        self.most = 0

    def probs(self, images: Sequence[Array]) -> list[Array]:
        self._alive = [ref for ref in self._alive if ref() is not None]
        self._alive += [weakref.ref(image) for image in images]
        self.most = max(self.most, len(self._alive))
        return super().probs(images)


def test_memory_is_independent_of_the_length() -> None:
    peaks, most = [], []
    for num_frames in (50, 200):
        source = VideoSpec(num_frames=num_frames).write(Path(f"{num_frames}.mp4"))
        backend = CountingBackend()
        predict(source, backend, overwrite=True)  # warm up imports and caches
        gc.collect()
        tracemalloc.start()
        predict(source, backend, overwrite=True)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        most.append(backend.most)

    assert most[0] == most[1] <= 8
    assert peaks[1] < peaks[0] + 48 * 64 * 3 * 20


class StoppedBackend(RedBackend):
    """Receives SIGTERM while it processes one of the images."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._number = number

    def probs(self, images: Sequence[Array]) -> list[Array]:
        if len(self.shapes) == self._number:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().probs(images)


@pytest.mark.parametrize("number", [0, 12])
def test_a_stopped_run_keeps_the_existing_target(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals, "_received", [])
    source = VideoSpec().write(Path("clip.mp4"))
    Path("out").mkdir()
    target = Path("out") / (source.stem + video_output_suffix(GREEN))
    target.write_text("precious")
    backend = StoppedBackend(number)

    with signals.handle_signals(), pytest.raises(signals.Stopped):
        predict(source, backend, overwrite=True)
    assert len(backend.shapes) == number + 1
    assert [path.name for path in Path("out").iterdir()] == [target.name]
    assert target.read_text() == "precious"


def test_only_the_temporary_file_of_a_killed_run_is_removed() -> None:
    source = VideoSpec(num_frames=3).write(Path("clip.mp4"))
    Path("out").mkdir()
    Path("out/.clip_background.mp4.77.tmp").write_text("left by a killed run")
    Path("out/.other_background.mp4.78.tmp").write_text("being written by another run")

    predict(source)

    assert sorted(path.name for path in Path("out").iterdir()) == [
        ".other_background.mp4.78.tmp",
        "clip_background.mp4",
    ]


def test_a_killed_run_leaves_only_a_hidden_file() -> None:
    VideoSpec().write(Path("clip.mp4"))
    script = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "from helpers.video import RedBackend\n"
        "from segtrain.prediction.backgrounds import build_background_fn\n"
        "from segtrain.prediction.video import predict_video\n"
        "class KilledBackend(RedBackend):\n"
        "    def probs(self, images):\n"
        "        if len(self.shapes) == 20: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return super().probs(images)\n"
        "predict_video(Path('clip.mp4'), Path('out/a.mp4'), KilledBackend(), overwrite=False,\n"
        "    make_background=build_background_fn('blur'))\n"
    )
    paths = os.pathsep.join(str(Path(__file__).parents[up]) for up in (1, 2))
    process = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": paths}
    )

    assert process.returncode == -signal.SIGKILL
    [leftover] = Path("out").iterdir()
    assert leftover.name.startswith(".a.mp4.")
    assert leftover.suffix == ".tmp"


def test_a_full_disk_is_a_resource_error() -> None:
    source = VideoSpec(num_frames=50, image=lambda number: noise(number)).write(Path("clip.mp4"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(ResourceError, match="cannot write"):
            predict(source, AllPersonBackend())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(Path("out").iterdir()) == []


def noise(number: int) -> Array:
    return np.random.default_rng(number).integers(0, 255, (48, 64, 3), dtype=np.uint8)


# --- Several inputs, by the command --------------------------------------------------------------


def predict_all(
    monkeypatch: pytest.MonkeyPatch, backend: Any, *sources: Path, background: str = GREEN
) -> list[str]:
    """Run `segtrain predict SOURCES -o out` with a backend that needs no checkpoint."""
    monkeypatch.setattr(run, "find_checkpoint", lambda path: (Path("best.pt"), "given"))
    monkeypatch.setattr(run, "load_backend", lambda path, options: backend)
    options = PredictOptions(background=background, max_pixels=10**8)
    jobs = plan_jobs([*map(str, sources)], Path("out"), ["background"], background=background)
    return run.predict(jobs, options)


def test_the_background_is_read_once_for_all_videos_and_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    beach, photo = Path("beach.png"), Path("photo.png")
    write_image(beach, solid((10, 20, 200)))
    write_image(photo, moving_square(0))
    videos = [VideoSpec(num_frames=3).write(Path(name)) for name in ("a.mp4", "b.mp4")]
    reads: list[Path] = []

    def read_and_record(path: Path) -> Array:
        reads.append(path)
        return read_image(path)

    monkeypatch.setattr("segtrain.prediction.backgrounds.read_image", read_and_record)

    assert predict_all(monkeypatch, RedBackend(), photo, *videos, background=str(beach)) == []
    assert reads == [beach]
    for video in videos:
        frame = read_video(Path("out") / f"{video.stem}_background.mp4").frames[0]
        assert frame[44, 32] == pytest.approx((10, 20, 200), abs=8)


@pytest.mark.parametrize(
    ("with_photo", "done"), [(False, ""), (True, "1 of 1 images and ")], ids=["videos", "both"]
)
def test_a_signal_between_videos_reports_how_many_are_done(
    monkeypatch: pytest.MonkeyPatch, with_photo: bool, done: str
) -> None:
    monkeypatch.setattr(signals, "_received", [])
    sources = [VideoSpec(num_frames=5).write(Path(name)) for name in ("a.mp4", "c.mp4", "d.mp4")]
    Path("b.mp4").write_text("not a video, so it does not count as done")
    if with_photo:
        write_image(Path("photo.png"), moving_square(0))
        sources.append(Path("photo.png"))
    backend = StoppedBackend(number=5 + 2 + with_photo)

    with (
        signals.handle_signals(),
        pytest.raises(signals.Stopped, match=f"; {done}1 of 4 videos are done$"),
    ):
        predict_all(monkeypatch, backend, sources[0], Path("b.mp4"), *sources[1:])
    assert {path.name for path in Path("out").iterdir()} == {
        "a_background.mp4",
        *(["photo_background.jpg"] if with_photo else []),
    }
    assert len(read_video(Path("out/a_background.mp4")).frames) == 5


# --- Invalid inputs -----------------------------------------------------------------------------


def truncate(path: Path, fraction: float = 0.6) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])
    return path


def assert_rejected(source: Path, match: str) -> None:
    with pytest.raises(DataError, match=match):
        predict(source)
    assert not list(Path().glob("out/*"))
    assert not list(Path().glob("out/.*"))


@pytest.mark.parametrize(
    ("suffix", "spec"),
    [
        (".mkv", VideoSpec(num_frames=100)),
        (".mp4", VideoSpec(num_frames=100, movflags="faststart")),
        (".flv", VideoSpec(num_frames=100, ticks=Fraction(1, 1000), audio_codecs=("libmp3lame",))),
    ],
)
def test_a_truncated_video_is_rejected(suffix: str, spec: VideoSpec) -> None:
    assert_rejected(truncate(spec.write(Path("clip" + suffix))), r"clip.* is truncated")


def test_a_video_without_its_index_is_rejected() -> None:
    assert_rejected(truncate(VideoSpec().write(Path("clip.mp4"))), "cannot read clip.mp4")


def test_a_file_with_only_audio_is_rejected() -> None:
    source = VideoSpec(num_frames=0, audio_seconds=1).write(Path("clip.mp4"))

    assert_rejected(source, "no video stream")


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\0" * 5000, b"ffconcat version 1.0\nfile other.mp4\n"]
)
def test_a_file_that_is_not_a_video_is_rejected(content: bytes) -> None:
    VideoSpec(num_frames=3).write(Path("other.mp4"))
    Path("clip.mp4").write_bytes(content)

    assert_rejected(Path("clip.mp4"), r"cannot read clip\.mp4")


def test_a_missing_file_and_a_folder_are_rejected() -> None:
    Path("folder.mp4").mkdir()

    assert_rejected(Path("nope.mp4"), r"nope\.mp4 does not exist")
    assert_rejected(Path("folder.mp4"), r"folder\.mp4 is not a file")


def test_too_large_frames_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    source = VideoSpec(num_frames=3).write(Path("clip.mp4"))
    monkeypatch.setattr("segtrain.prediction.video.reading.MAX_PIXELS", 48 * 64 - 1)

    assert_rejected(source, "megapixels")


def test_damage_in_the_middle_is_reported_and_the_rest_is_kept() -> None:
    spec = VideoSpec(num_frames=50, options={"g": "10"}, audio_codecs=(), movflags="faststart")
    source = spec.write(Path("clip.mp4"))
    content = bytearray(source.read_bytes())
    middle = len(content) * 3 // 4  # after the index
    content[middle : middle + 60] = b"\xff" * 60
    source.write_bytes(content)
    log: list[str] = []
    after = read_video(predict(source, log=log))

    assert 40 <= len(after.frames) <= 50
    assert "damaged packets" in log[-1]


def test_metadata_that_is_not_utf_8_is_accepted() -> None:
    source = VideoSpec(ticks=Fraction(1, 1000)).write(Path("clip.mkv"))
    content = source.read_bytes()
    assert b"eng" in content
    source.write_bytes(content.replace(b"eng", b"\xe9\xff\xe8"))

    assert len(read_video(predict(source)).frames) == 25


def test_a_file_name_that_looks_like_an_address_is_accepted() -> None:
    source = VideoSpec(num_frames=3).write(Path("clip.mp4")).rename("12:30.mp4")

    assert predict(source).is_file()


def test_existing_targets_and_the_source_are_protected() -> None:
    source = VideoSpec(num_frames=3).write(Path("clip.mp4"))
    target = predict(source)
    backend = RedBackend()
    options: dict[str, Any] = {"make_background": build_background_fn(GREEN)}

    with pytest.raises(UsageError, match="--overwrite"):
        predict_video(source, target, backend, overwrite=False, **options)
    Path("link.mp4").symlink_to(source)
    with pytest.raises(UsageError, match="is also the input"):
        predict_video(source, Path("link.mp4"), backend, overwrite=True, **options)
    assert backend.shapes == []


def test_missing_pyav_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)

    with pytest.raises(UsageError, match=r"pip install 'segtrain\[video\]'"):
        predict(Path("clip.mp4"))


# --- Imports ------------------------------------------------------------------------------------


def test_the_package_imports_no_torch() -> None:
    script = (
        "import sys, segtrain.prediction.video.formats\n"
        "heavy = {'av', 'torch'} & sys.modules.keys()\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)\n"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
    for path in (Path(__file__).parents[2] / "segtrain/prediction/video").glob("*.py"):
        names = {
            alias.name if isinstance(node, ast.Import) else node.module
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        assert not any(str(name).startswith("torch") for name in names)
