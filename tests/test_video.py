"""Clips in, clips out: frames, times, sound and colour stay; nothing is left half done."""

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
from video_cases import (
    RATE,
    Array,
    Everything,
    Recipe,
    Redness,
    Seen,
    joined,
    look,
    moving_square,
    solid,
    with_damaged_sound,
    yuv_to_rgb,
)

from segtrain import stopping
from segtrain.errors import DataError, ResourceError, UsageError
from segtrain.images import read_image, write_image
from segtrain.prediction import command
from segtrain.prediction.backgrounds import background_maker
from segtrain.prediction.jobs import plan_jobs
from segtrain.prediction.video import VideoOutcome, predict_video
from segtrain.prediction.video.smoothing import TIME_CONSTANT, Smoother
from segtrain.prediction.video.suffixes import video_suffix_of
from segtrain.prediction.video.timeline import Timeline

GREEN = "#00ff00"


def predict(
    source: Path,
    network: Any = None,
    *,
    background: str = GREEN,
    overwrite: bool = False,
    told: list[str] | None = None,
) -> Path:
    target = Path("out") / (source.stem + video_suffix_of(background))
    tell = ([] if told is None else told).append
    predict_video(
        source,
        target,
        network or Redness(),
        make_background=background_maker(background),
        overwrite=overwrite,
        tell=tell,
    )
    return target


def converted(recipe: Recipe, suffix: str = ".mp4", network: Any = None) -> tuple[Seen, Seen]:
    """A clip and its result."""
    source = recipe.write(Path("clip" + suffix))
    return look(source), look(predict(source, network))


# --- What stays ---------------------------------------------------------------------------------


def assert_same_times(before: Seen, after: Seen) -> None:
    assert len(after.frames) == len(before.frames)
    assert after.times == pytest.approx([time - before.times[0] for time in before.times])


@pytest.mark.slow
def test_ten_seconds_come_back_with_their_frames_and_their_sound() -> None:
    before, after = converted(
        Recipe(num_frames=250, picture=lambda number: moving_square(number, 180, 320))
    )

    assert len(after.frames) == 250
    assert_same_times(before, after)
    assert after.sounds[0]["packets"] == before.sounds[0]["packets"]
    assert after.sounds[0]["samples"].shape[1] / 48_000 == pytest.approx(10, abs=0.05)


def test_frames_times_size_and_sound_stay_and_the_ground_is_new() -> None:
    source = Recipe().write(Path("clip.mp4"))
    told: list[str] = []
    outcome = predict_video(
        source,
        Path("out/x.mp4"),
        Redness(),
        make_background=background_maker(GREEN),
        overwrite=False,
        tell=told.append,
    )
    before, after = look(source), look(Path("out/x.mp4"))

    assert outcome == VideoOutcome(25, 1.0, pytest.approx(16 * 16 / (48 * 64), rel=0.1))
    assert_same_times(before, after)
    assert (after.rate, after.duration) == (before.rate, before.duration)
    assert after.sounds[0]["packets"] == before.sounds[0]["packets"]
    assert after.sounds[0]["language"] == "eng"
    for number, frame in enumerate(after.frames):
        assert frame.shape == (48, 64, 3)
        # In the square's middle and far from it: chroma bleeds over its edge.
        assert frame[20, number % 48 + 8] == pytest.approx((200, 40, 30), abs=8)
        assert frame[44, 32] == pytest.approx((0, 255, 0), abs=8)
    assert told == []


def test_each_frame_keeps_its_own_time() -> None:
    uneven = [0, 512, 700, 1500, 1600, 2900, 3300, 5000, *range(6000, 20_000, 777)]
    before, after = converted(Recipe(times=uneven, num_frames=len(uneven) - 1))

    assert after.times == pytest.approx([tick / 12_800 for tick in uneven[:-1]])
    assert_same_times(before, after)


@pytest.mark.parametrize(
    ("suffix", "recipe"),
    [
        (".ts", Recipe(ticks=Fraction(1, 90_000))),  # starts at 1.4 seconds
        (".mkv", Recipe(ticks=Fraction(1, 1000), sounds=("aac", "libopus"))),
        (".mov", Recipe(codec="mpeg4", options={}, sounds=("libmp3lame",))),
        (".webm", Recipe(codec="libvpx", options={}, ticks=Fraction(1, 1000), sounds=("libopus",))),
        (".avi", Recipe(codec="mpeg4", options={}, ticks=1 / RATE, sounds=("libmp3lame",))),
    ],
)
def test_other_containers(suffix: str, recipe: Recipe) -> None:
    before, after = converted(recipe, suffix)

    assert len(after.frames) == 25
    steps = np.diff(before.times)
    assert np.diff(after.times) == pytest.approx(steps)
    assert [sound["codec"] for sound in after.sounds] == [s["codec"] for s in before.sounds]
    sounds = [sound["samples"].shape[1] / 48_000 for sound in after.sounds]
    assert sounds == pytest.approx([1] * len(recipe.sounds), abs=0.05)


def test_sound_and_picture_keep_together_where_a_recording_starts_late() -> None:
    Recipe(ticks=Fraction(1, 90_000)).write(Path("clip.ts"))
    target = predict(Path("clip.ts"))

    def gap(path: Path) -> float:
        with av.open(path) as clip:
            starts = [
                float(stream.start_time * stream.time_base)
                for stream in (clip.streams.video[0], clip.streams.audio[0])
            ]
        return starts[0] - starts[1]

    assert gap(target) == pytest.approx(gap(Path("clip.ts")), abs=0.002)


@pytest.mark.parametrize("tracks", [2, 0])
def test_several_tracks_of_sound_and_none(tracks: int) -> None:
    before, after = converted(Recipe(sounds=("aac",) * tracks))

    assert [sound["language"] for sound in after.sounds] == ["eng", "deu"][:tracks]
    assert [s["packets"] for s in after.sounds] == [s["packets"] for s in before.sounds]


@pytest.mark.parametrize(
    ("suffix", "codec"), [(".mov", "pcm_s16le"), (".avi", "pcm_s16le"), (".avi", "mp2")]
)
def test_sound_that_mp4_does_not_take_is_encoded_and_told(suffix: str, codec: str) -> None:
    source = Recipe(codec="mpeg4", options={}, ticks=1 / RATE, sounds=(codec,)).write(
        Path("clip" + suffix)
    )
    told: list[str] = []
    [original], [sound] = look(source).sounds, look(predict(source, told=told)).sounds

    assert sound["codec"] == "aac"
    assert f"sound is encoded anew, {codec} to aac" in told[0]
    wave = sound["samples"][0, 4096 : 4096 + 32_768]
    assert np.abs(np.fft.rfft(wave)).argmax() * 48_000 / 32_768 == pytest.approx(440, abs=2)
    # In step with the pictures: each sample is where it was, to the last.
    before = original["samples"].reshape(-1, 2).T if codec == "pcm_s16le" else original["samples"]
    assert sound["samples"].shape[1] >= before.shape[1]
    assert np.abs(wave - before[0, 4096 : 4096 + 32_768] / 32_768).mean() < 0.02


def test_sound_of_packets_with_coarse_times_is_encoded_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from segtrain.prediction.video.kinds import KINDS

    # MP3 in AVI has ticks of a packet, longer than AAC's; as it is copied, nothing else shows it.
    monkeypatch.setitem(KINDS, ".mp4", replace(KINDS[".mp4"], copied=frozenset()))
    recipe = Recipe(codec="mpeg4", options={}, ticks=1 / RATE, sounds=("libmp3lame",))
    before, after = converted(recipe, ".avi")

    assert after.sounds[0]["codec"] == "aac"
    num_samples = before.sounds[0]["samples"].shape[1]
    assert after.sounds[0]["samples"].shape[1] == pytest.approx(num_samples, abs=1500)


@pytest.mark.parametrize(
    ("codec", "rate", "channels", "expected"),
    [
        ("pcm_s16le", 11_000, "stereo", ("aac", 11_025, "stereo")),
        ("pcm_s16le", 192_000, "mono", ("aac", 96_000, "mono")),
        ("libmp3lame", 8_000, "mono", ("aac", 8_000, "mono")),  # MP4 takes it from 16 kHz on
        ("pcm_s16le", 48_000, "7.1", ("aac", 48_000, "7.1")),  # Matroska does not say which eight
    ],
)
def test_unusual_sound_is_encoded_as_near_as_can_be(
    codec: str, rate: int, channels: str, expected: tuple[str, int, str]
) -> None:
    recipe = Recipe(ticks=Fraction(1, 1000), sounds=(codec,), sound_rate=rate, channels=channels)
    told: list[str] = []
    target = predict(recipe.write(Path("clip.mkv")), told=told)

    with av.open(target) as clip:
        sound = clip.streams.audio[0]
        assert (sound.codec_context.name, sound.rate, sound.layout.name) == expected
        assert float(sound.duration * sound.time_base) == pytest.approx(1, abs=0.15)
        assert sum(1 for _ in clip.decode(video=0)) == 25
    assert "sound is encoded anew" in told[0]


@pytest.mark.parametrize("background", [GREEN, "transparent"])
def test_sound_that_changes_midway_is_kept(background: str) -> None:
    parts = [
        Recipe(
            ticks=Fraction(1, 90_000), sounds=("mp2",), sound_rate=rate, channels=channels
        ).write(Path(f"{channels}.ts"))
        for rate, channels in ((48_000, "stereo"), (32_000, "mono"))
    ]
    after = look(predict(joined(Path("clip.ts"), *parts), background=background))

    assert len(after.frames) == 50
    [sound] = after.sounds
    assert sound["samples"].shape[1] / sound["rate"] == pytest.approx(2, abs=0.05)
    for start in (0.2, 1.2):
        first = round(start * sound["rate"])
        wave = sound["samples"][0, first : first + sound["rate"] // 2]
        assert np.abs(np.fft.rfft(wave)).argmax() * 2 == pytest.approx(440, abs=4)


@pytest.mark.parametrize("background", [GREEN, "transparent"])
@pytest.mark.parametrize(("suffix", "codec"), [(".mkv", "ac3"), (".mov", "aac")])
def test_damaged_sound_is_left_out_packet_by_packet_and_told(
    suffix: str, codec: str, background: str
) -> None:
    recipe = Recipe(codec="mpeg4", options={}, ticks=Fraction(1, 1000), sounds=(codec,))
    whole = recipe.write(Path("whole" + suffix))
    told: list[str] = []
    source = with_damaged_sound(whole, Path("clip" + suffix))
    after = look(predict(source, background=background, told=told))

    assert len(after.frames) == 25
    [sound] = after.sounds
    assert sound["samples"].shape[1] / sound["rate"] == pytest.approx(0.8, abs=0.03)
    assert "packets of sound left out" in told[-1]


def test_damaged_sound_of_a_broadcast_does_not_cost_the_clip() -> None:
    source = Recipe(ticks=Fraction(1, 90_000)).write(Path("clip.ts"))
    content = bytearray(source.read_bytes())
    starts = range(0, len(content), 188)
    of_sound = [
        start for start in starts if content[start + 1] & 31 == 1 and not content[start + 2]
    ]
    for start in of_sound[len(of_sound) // 2 :]:
        content[start + 60 : start + 188] = b"\x55" * 128
    source.write_bytes(content)
    told: list[str] = []

    assert len(look(predict(source, told=told)).frames) == 25
    assert "packets of sound left out" in told[-1]


@pytest.mark.parametrize("background", [GREEN, "transparent"])
@pytest.mark.parametrize("why", ["no samples", "unknown codec", "nine channels"])
def test_sound_that_cannot_be_kept_is_left_out_and_told(why: str, background: str) -> None:
    if why == "no samples":
        recipe = Recipe(ticks=Fraction(1, 90_000), seconds_of_sound=0)
        source = recipe.write(Path("clip.ts"))
    elif why == "nine channels":  # which ones is not said, and nine are none that are known
        recipe = Recipe(ticks=Fraction(1, 1000), sounds=("pcm_s16le",), channels="9C")
        source = recipe.write(Path("clip.mkv"))
    else:
        source = Recipe(ticks=Fraction(1, 1000)).write(Path("clip.mkv"))
        source.write_bytes(source.read_bytes().replace(b"A_AAC", b"A_XYZ"))
    told: list[str] = []
    after = look(predict(source, background=background, told=told))

    assert (len(after.frames), after.sounds) == (25, [])
    assert len(told) == 1
    assert "sound is left out" in told[0]


@pytest.mark.parametrize(
    ("suffix", "recipe"),
    [
        (".ts", Recipe(ticks=Fraction(1, 90_000))),
        (".mkv", Recipe(ticks=Fraction(1, 1000))),
        (".mpg", Recipe(codec="mpeg2video", options={}, ticks=1 / RATE, sounds=("mp2",))),
    ],
)
def test_recordings_that_are_joined_follow_each_other(suffix: str, recipe: Recipe) -> None:
    """One file behind the other: times start again in the middle."""
    part = recipe.write(Path("part" + suffix))
    once = look(part)
    after = look(predict(joined(Path("clip" + suffix), part, part)))

    assert len(after.frames) == 50
    first, second = np.array(after.times[:25]), np.array(after.times[25:])
    steps = np.diff(once.times)
    assert np.diff(first) == pytest.approx(steps, abs=0.0015)
    assert np.diff(second) == pytest.approx(steps, abs=0.0015)
    assert 0.03 < second[0] - first[-1] < 0.1
    [sound] = after.sounds
    assert sound["samples"].shape[1] / 48_000 == pytest.approx(2, abs=0.06)


def test_a_recording_of_another_day_follows_at_once() -> None:
    hours = 20 * 3600 * 90_000
    recipes = [
        Recipe(ticks=Fraction(1, 90_000), sounds=(), times=range(start, start + 10**6, 3600))
        for start in (0, hours)
    ]
    parts = [recipe.write(Path(f"{number}.ts")) for number, recipe in enumerate(recipes)]
    after = look(predict(joined(Path("clip.ts"), *parts)))

    assert after.times == pytest.approx([number / 25 for number in range(50)], abs=1e-4)


def test_a_gap_stays_where_a_format_means_it() -> None:
    times = [0, 40, 80, 3_600_000, 3_600_040, 3_600_080]
    recipe = Recipe(ticks=Fraction(1, 1000), sounds=(), num_frames=5, times=times)
    after = look(predict(recipe.write(Path("clip.mkv"))))

    assert after.times == pytest.approx([time / 1000 for time in times[:-1]])


def test_picture_and_sound_of_a_joined_recording_are_moved_alike() -> None:
    def packet(track: int, stamp: int) -> Any:
        # What a timeline looks at, in ticks of a tenth of a second.
        stream = SimpleNamespace(index=track)
        length, base = 1, Fraction(1, 10)
        return SimpleNamespace(stream=stream, pts=stamp, dts=stamp, duration=length, time_base=base)

    timeline = Timeline(Fraction(5), may_leap=False)
    picture, sound = 0, 1
    order = [(picture, 50), (sound, 50), (picture, 51), (sound, 51), (picture, 58)]
    # The sound comes to the next recording first, and begins there two ticks before the picture.
    order += [(sound, 7), (picture, 59), (sound, 8), (picture, 9), (sound, 9)]
    packets = [packet(*each) for each in order]
    for each in packets:
        timeline.settle(each)

    settled = [(each.stream.index, each.pts) for each in packets]
    assert settled[:5] == [(picture, 0), (sound, 0), (picture, 1), (sound, 1), (picture, 8)]
    assert settled[5:] == [(sound, 9), (picture, 9), (sound, 10), (picture, 11), (sound, 11)]
    assert all(each.pts == each.dts for each in packets)


@pytest.mark.parametrize("background", [GREEN, "transparent"])
@pytest.mark.parametrize("sounds", [(), ("aac",)], ids=["silent", "with sound"])
@pytest.mark.parametrize(
    ("suffix", "ticks"),
    [(".mp4", Fraction(1, 12_800)), (".mkv", Fraction(1, 1000)), (".ts", Fraction(1, 90_000))],
)
def test_a_clip_of_a_single_frame(
    suffix: str, ticks: Fraction, sounds: tuple[str, ...], background: str
) -> None:
    source = Recipe(num_frames=1, ticks=ticks, sounds=sounds).write(Path("clip" + suffix))
    with av.open(predict(source, background=background)) as clip:
        assert sum(1 for _ in clip.decode(video=0)) == 1
        assert len(clip.streams.audio) == len(sounds)


def test_a_recording_that_starts_late_starts_at_zero() -> None:
    late = range(128_000, 141_000, 512)
    _, after = converted(Recipe(times=late, sounds=()), ".mkv")

    assert after.times[0] == 0
    assert len(after.frames) == 25


def test_other_streams_are_left_out_and_told() -> None:
    with av.open("clip.mkv", "w") as output:
        output.add_attachment("notes.txt", "text/plain", b"x")
        Recipe(sounds=()).write_frames(output)
    told: list[str] = []
    after = look(predict(Path("clip.mkv"), told=told))

    assert (len(after.frames), after.other) == (25, 0)
    assert told == ["clip.mkv: left out: 1 attachment"]


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, -90])
def test_a_turned_clip_is_seen_and_written_upright(degrees: int, flipped: bool) -> None:
    network = Redness()
    aspect = Fraction(4, 3)
    source = Recipe(rotation=(degrees, flipped), aspect=aspect, num_frames=3).write(Path("c.mp4"))
    after = look(predict(source, network))

    upright = np.rot90(moving_square(0), degrees // 90)
    upright = np.fliplr(upright) if flipped else upright
    assert network.seen[0] == upright.shape
    assert after.rotation == 0
    red = after.frames[0][..., 0].astype(int) - after.frames[0][..., 1] > 0
    expected = upright[..., 0].astype(int) - upright[..., 1] > 0
    assert red.shape == expected.shape
    assert (red != expected).mean() < 0.03
    assert after.aspect == (1 / aspect if degrees % 180 else aspect)


@pytest.mark.parametrize("width", [64, 70])  # 70 leaves room at the end of libav's rows
def test_turning_leaves_the_frames_that_the_decoder_keeps_alone(width: int) -> None:
    """QuickTime's animation decoder paints each frame over the one before, in RGB as it is."""
    recipe = Recipe(
        codec="qtrle",
        options={},
        pixel_format="rgb24",
        picture=lambda number: moving_square(number // 3, 48, width),
        rotation=(180, False),
        sounds=(),
    )
    source = recipe.write(Path("clip.mov"))
    after = look(predict(source, Everything()))

    for number, frame in enumerate(after.frames):
        upright = np.rot90(moving_square(number // 3, 48, width), 2)
        assert np.abs(frame - upright.astype(int)).mean() < 8


def test_odd_sides_grow_by_one_pixel() -> None:
    recipe = Recipe(picture=lambda number: moving_square(number, 47, 63), pixel_format="yuv444p")
    told: list[str] = []
    after = look(predict(recipe.write(Path("clip.mp4")), told=told))

    assert after.frames[0].shape == (48, 64, 3)
    assert after.frames[0][47, 63] == pytest.approx((0, 255, 0), abs=8)
    assert "odd sides" in told[0]


# --- Colour -------------------------------------------------------------------------------------

BT709 = {"colorspace": 1, "color_primaries": 1, "color_trc": 1}
BT601 = {"colorspace": 6, "color_primaries": 6, "color_trc": 6}


@pytest.mark.parametrize("colour", [(200, 40, 30), (20, 180, 60), (30, 60, 220), (128, 128, 128)])
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
def test_a_colour_comes_through(
    colour: tuple[int, int, int],
    tags: dict[str, int],
    convert: dict[str, int],
    size: int,
    pixel_format: str,
) -> None:
    recipe = Recipe(
        num_frames=2,
        picture=lambda number: solid(colour, size),
        colour=tags,
        convert=convert,
        pixel_format=pixel_format,
        sounds=(),
    )
    source = recipe.write(Path("clip.mp4"))
    target = predict(source, Everything())

    assert yuv_to_rgb(source, "bt709" if convert["dst_colorspace"] == 1 else "bt601") == (
        pytest.approx(colour, abs=3)
    )
    assert yuv_to_rgb(target) == pytest.approx(colour, abs=3)
    if "color_primaries" in tags:
        names = ("color_primaries", "color_trc")
        assert look(target).colour == (tags["colorspace"], 1, *(tags[name] for name in names))


@pytest.mark.slow  # libswscale computes its table for seconds, once a clip
@pytest.mark.parametrize("transfer", [16, 18], ids=["PQ", "HLG"])
def test_hdr_becomes_standard_range_and_is_told(transfer: int) -> None:
    recipe = Recipe(
        num_frames=2,
        picture=lambda number: solid((128, 128, 128)),
        colour={"colorspace": 9, "color_primaries": 9, "color_trc": transfer, "color_range": 1},
        convert={"dst_colorspace": 9},
        pixel_format="yuv420p10le",
        sounds=(),
    )
    told: list[str] = []
    after = look(predict(recipe.write(Path("clip.mp4")), Everything(), told=told))

    assert "HDR" in told[0]
    assert after.colour == (1, 1, 1, 1)
    grey = after.frames[0][20, 20]
    assert np.ptp(grey) <= 3
    assert 60 < grey.mean() < 220


def test_a_transparent_background_has_alpha() -> None:
    source = Recipe().write(Path("clip.mp4"))
    target = predict(source, background="transparent")
    after = look(target, decoder="libvpx-vp9", pixels="rgba")

    assert target.name == "clip_cutout.webm"
    assert len(after.frames) == 25
    assert_same_times(look(source), after)
    assert after.frames[0][20, 8] == pytest.approx((200, 40, 30, 255), abs=10)
    assert after.frames[0][44, 40, 3] <= 2
    assert [sound["codec"] for sound in after.sounds] == ["opus"]


# --- Flicker ------------------------------------------------------------------------------------


def test_a_still_picture_flickers_less() -> None:
    draws = np.random.default_rng(0)
    picture, smoother = moving_square(0), Smoother()
    noisy = [draws.uniform(0.3, 0.9, (48, 64)).astype(np.float32) for _ in range(200)]
    smooth = [smoother.smooth(picture, each, number / 25) for number, each in enumerate(noisy)]

    # A running average of independent numbers has (1 - w) / (1 + w) of their variance.
    weight = np.exp(-1 / 25 / TIME_CONSTANT)
    ratio = np.var(smooth[20:], axis=0).mean() / np.var(noisy[20:], axis=0).mean()
    assert ratio == pytest.approx((1 - weight) / (1 + weight), rel=0.1)
    assert np.mean(smooth[20:]) == pytest.approx(0.6, abs=0.01)


def test_a_higher_frame_rate_is_smoothed_over_the_same_time() -> None:
    after = []
    for rate in (25, 100):
        smoother = Smoother()
        smoother.smooth(moving_square(0), np.ones((48, 64), np.float32), 0)
        for number in range(1, rate // 5 + 1):
            last = smoother.smooth(moving_square(0), np.zeros((48, 64), np.float32), number / rate)
        after.append(last[0, 0])

    assert after[0] == pytest.approx(after[1], rel=1e-3)


@pytest.mark.parametrize("speed", [1, 3, 9])
def test_a_moving_edge_does_not_lag(speed: int) -> None:
    smoother, network = Smoother(), Redness()
    for number in range(12):
        picture = moving_square(number * speed, 96, 192)
        [probability] = network.probs([picture])
        smooth = smoother.smooth(picture, probability, number / 25)

        assert np.abs((smooth >= 0.5).sum(1) - (probability >= 0.5).sum(1)).max() == 0
        assert ((smooth >= 0.5) == (probability >= 0.5)).all()


def test_a_cut_starts_over() -> None:
    smoother = Smoother()
    smoother.smooth(solid((40, 40, 40)), np.ones((48, 48), np.float32), 0)
    after = smoother.smooth(solid((90, 90, 90)), np.zeros((48, 48), np.float32), 0.04)

    assert after.max() == 0


def test_a_cut_starts_over_where_both_scenes_are_alike_too() -> None:
    smoother = Smoother()
    first, second = solid((40, 40, 40)), solid((40, 40, 40))
    second[:, :36] = 200
    smoother.smooth(first, np.ones((48, 48), np.float32), 0)
    after = smoother.smooth(second, np.zeros((48, 48), np.float32), 0.04)

    assert after.max() == 0


# --- Memory, stopping, leftovers ----------------------------------------------------------------


class Counting(Redness):
    """Notes how many pictures are alive at most."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: list[weakref.ref[Array]] = []
        self.most = 0

    def probs(self, pictures: Sequence[Array]) -> list[Array]:
        self._alive = [each for each in self._alive if each() is not None]
        self._alive += [weakref.ref(picture) for picture in pictures]
        self.most = max(self.most, len(self._alive))
        return super().probs(pictures)


def test_memory_does_not_grow_with_the_length() -> None:
    peaks, most = [], []
    for num_frames in (50, 200):
        source = Recipe(num_frames=num_frames).write(Path(f"{num_frames}.mp4"))
        network = Counting()
        predict(source, network, overwrite=True)  # what is imported and kept once is not counted
        gc.collect()
        tracemalloc.start()
        predict(source, network, overwrite=True)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        most.append(network.most)

    assert most[0] == most[1] <= 8
    assert peaks[1] < peaks[0] + 48 * 64 * 3 * 20


class StopsAt(Redness):
    """A signal comes while the network looks at a picture."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._number = number

    def probs(self, pictures: Sequence[Array]) -> list[Array]:
        if len(self.seen) == self._number:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().probs(pictures)


@pytest.mark.parametrize("number", [0, 12])
def test_a_stopped_run_leaves_what_was_there(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "_received", [])
    source = Recipe().write(Path("clip.mp4"))
    Path("out").mkdir()
    target = Path("out") / (source.stem + video_suffix_of(GREEN))
    target.write_text("precious")
    network = StopsAt(number)

    with stopping.listening(), pytest.raises(stopping.Stopped):
        predict(source, network, overwrite=True)
    assert len(network.seen) == number + 1
    assert [path.name for path in Path("out").iterdir()] == [target.name]
    assert target.read_text() == "precious"


def test_what_a_killed_run_left_is_swept_and_nothing_else() -> None:
    source = Recipe(num_frames=3).write(Path("clip.mp4"))
    Path("out").mkdir()
    Path("out/.clip_background.mp4.77.tmp").write_text("left by a killed run")
    Path("out/.other_background.mp4.78.tmp").write_text("being written by another run")

    predict(source)

    assert sorted(path.name for path in Path("out").iterdir()) == [
        ".other_background.mp4.78.tmp",
        "clip_background.mp4",
    ]


def test_a_killed_run_leaves_only_a_hidden_file() -> None:
    Recipe().write(Path("clip.mp4"))
    script = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "from video_cases import Redness\n"
        "from segtrain.prediction.backgrounds import background_maker\n"
        "from segtrain.prediction.video import predict_video\n"
        "class Kills(Redness):\n"
        "    def probs(self, pictures):\n"
        "        if len(self.seen) == 20: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return super().probs(pictures)\n"
        "predict_video(Path('clip.mp4'), Path('out/a.mp4'), Kills(), overwrite=False,\n"
        "    make_background=background_maker('blur'), tell=print)\n"
    )
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": paths})

    assert done.returncode == -signal.SIGKILL
    [left] = Path("out").iterdir()
    assert left.name.startswith(".a.mp4.")
    assert left.suffix == ".tmp"


def test_a_full_disk_is_a_resource_error() -> None:
    source = Recipe(num_frames=50, picture=lambda number: noise(number)).write(Path("clip.mp4"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(ResourceError, match="cannot write"):
            predict(source, Everything())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(Path("out").iterdir()) == []


def noise(number: int) -> Array:
    return np.random.default_rng(number).integers(0, 255, (48, 64, 3), dtype=np.uint8)


# --- Several, by the command ---------------------------------------------------------------------


def predict_all(
    monkeypatch: pytest.MonkeyPatch, network: Any, *sources: Path, background: str = GREEN
) -> list[str]:
    """As `segtrain predict SOURCES -o out` with a network that needs no checkpoint."""
    monkeypatch.setattr(command, "find_checkpoint", lambda path: (Path("best.pt"), "given"))
    monkeypatch.setattr(command, "open_network", lambda path, how: network)
    wishes = command.Wishes(background=background, max_pixels=10**8)
    jobs = plan_jobs([*map(str, sources)], Path("out"), ["background"], background=background)
    return command.predict(jobs, wishes, tell=print)


def test_the_background_is_read_once_for_all_clips_and_pictures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    beach, photo = Path("beach.png"), Path("photo.png")
    write_image(beach, solid((10, 20, 200)))
    write_image(photo, moving_square(0))
    clips = [Recipe(num_frames=3).write(Path(name)) for name in ("a.mp4", "b.mp4")]
    reads: list[Path] = []

    def reading(path: Path) -> Array:
        reads.append(path)
        return read_image(path)

    monkeypatch.setattr("segtrain.prediction.backgrounds.read_image", reading)

    assert predict_all(monkeypatch, Redness(), photo, *clips, background=str(beach)) == []
    assert reads == [beach]
    for clip in clips:
        frame = look(Path("out") / f"{clip.stem}_background.mp4").frames[0]
        assert frame[44, 32] == pytest.approx((10, 20, 200), abs=8)


@pytest.mark.parametrize(
    ("with_photo", "done"), [(False, ""), (True, "1 of 1 pictures and ")], ids=["clips", "both"]
)
def test_a_signal_between_clips_says_how_many_are_done(
    monkeypatch: pytest.MonkeyPatch, with_photo: bool, done: str
) -> None:
    monkeypatch.setattr(stopping, "_received", [])
    sources = [Recipe(num_frames=5).write(Path(name)) for name in ("a.mp4", "c.mp4", "d.mp4")]
    Path("b.mp4").write_text("no clip at all, which does not count as done")
    if with_photo:
        write_image(Path("photo.png"), moving_square(0))
        sources.append(Path("photo.png"))
    network = StopsAt(number=5 + 2 + with_photo)

    with (
        stopping.listening(),
        pytest.raises(stopping.Stopped, match=f"; {done}1 of 4 videos are done$"),
    ):
        predict_all(monkeypatch, network, sources[0], Path("b.mp4"), *sources[1:])
    assert {path.name for path in Path("out").iterdir()} == {
        "a_background.mp4",
        *(["photo_background.jpg"] if with_photo else []),
    }
    assert len(look(Path("out/a_background.mp4")).frames) == 5


# --- What cannot be used ------------------------------------------------------------------------


def cut_short(path: Path, share: float = 0.6) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def assert_refused(source: Path, match: str) -> None:
    with pytest.raises(DataError, match=match):
        predict(source)
    assert not list(Path().glob("out/*"))
    assert not list(Path().glob("out/.*"))


@pytest.mark.parametrize(
    ("suffix", "recipe"),
    [
        (".mkv", Recipe(num_frames=100)),
        (".mp4", Recipe(num_frames=100, movflags="faststart")),
        (".flv", Recipe(num_frames=100, ticks=Fraction(1, 1000), sounds=("libmp3lame",))),
    ],
)
def test_a_clip_that_was_cut_short_is_refused(suffix: str, recipe: Recipe) -> None:
    assert_refused(cut_short(recipe.write(Path("clip" + suffix))), r"clip.* cut short")


def test_a_clip_without_its_index_is_refused() -> None:
    assert_refused(cut_short(Recipe().write(Path("clip.mp4"))), "cannot read clip.mp4")


def test_sound_alone_is_refused() -> None:
    source = Recipe(num_frames=0, seconds_of_sound=1).write(Path("clip.mp4"))

    assert_refused(source, "no moving pictures")


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\0" * 5000, b"ffconcat version 1.0\nfile other.mp4\n"]
)
def test_what_is_no_video_is_refused(content: bytes) -> None:
    Recipe(num_frames=3).write(Path("other.mp4"))
    Path("clip.mp4").write_bytes(content)

    assert_refused(Path("clip.mp4"), r"cannot read clip\.mp4")


def test_a_missing_file_and_a_folder_are_refused() -> None:
    Path("folder.mp4").mkdir()

    assert_refused(Path("nope.mp4"), r"nope\.mp4 does not exist")
    assert_refused(Path("folder.mp4"), r"folder\.mp4 is not a file")


def test_frames_that_are_too_large_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Recipe(num_frames=3).write(Path("clip.mp4"))
    monkeypatch.setattr("segtrain.prediction.video.reading.MAX_PIXELS", 48 * 64 - 1)

    assert_refused(source, "megapixels")


def test_damage_in_the_middle_is_told_and_the_rest_is_kept() -> None:
    recipe = Recipe(num_frames=50, options={"g": "10"}, sounds=(), movflags="faststart")
    source = recipe.write(Path("clip.mp4"))
    content = bytearray(source.read_bytes())
    middle = len(content) * 3 // 4  # behind the index
    content[middle : middle + 60] = b"\xff" * 60
    source.write_bytes(content)
    told: list[str] = []
    after = look(predict(source, told=told))

    assert 40 <= len(after.frames) <= 50
    assert "damaged packets" in told[-1]


def test_metadata_need_not_be_utf_8() -> None:
    clip = Recipe(ticks=Fraction(1, 1000)).write(Path("clip.mkv"))
    content = clip.read_bytes()
    assert b"eng" in content
    clip.write_bytes(content.replace(b"eng", b"\xe9\xff\xe8"))

    assert len(look(predict(clip)).frames) == 25


def test_a_name_that_looks_like_an_address() -> None:
    source = Recipe(num_frames=3).write(Path("clip.mp4")).rename("12:30.mp4")

    assert predict(source).is_file()


def test_targets_are_protected() -> None:
    source = Recipe(num_frames=3).write(Path("clip.mp4"))
    target = predict(source)
    network = Redness()
    calls: dict[str, Any] = {"make_background": background_maker(GREEN), "tell": print}

    with pytest.raises(UsageError, match="--overwrite"):
        predict_video(source, target, network, overwrite=False, **calls)
    Path("link.mp4").symlink_to(source)
    with pytest.raises(UsageError, match="is the input"):
        predict_video(source, Path("link.mp4"), network, overwrite=True, **calls)
    assert network.seen == []


def test_missing_pyav_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)

    with pytest.raises(UsageError, match=r"pip install 'segtrain\[video\]'"):
        predict(Path("clip.mp4"))


# --- The house ----------------------------------------------------------------------------------


def test_the_package_is_light_and_knows_no_torch() -> None:
    script = (
        "import sys, segtrain.prediction.video.suffixes\n"
        "heavy = {'av', 'torch'} & sys.modules.keys()\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)\n"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
    for path in (Path(__file__).parents[1] / "segtrain/prediction/video").glob("*.py"):
        names = {
            alias.name if isinstance(node, ast.Import) else node.module
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        assert not any(str(name).startswith("torch") for name in names)
