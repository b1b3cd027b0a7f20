"""Pictures come from strangers: each is read right, or refused with a DataError that names it."""

import errno
import os
import random
import signal
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from PIL import EpsImagePlugin, Image

import segtrain
from segtrain.errors import DataError, ResourceError
from segtrain.files import atomic_write, sweep_beside, write_text
from segtrain.images import (
    decoding,
    find_images,
    pixels_in,
    read_image,
    read_picture,
    read_sized_image,
    resize_short_side,
    write_image,
)

Pixels = npt.NDArray[np.uint8]

HEIGHT, WIDTH = 40, 60
# Mean difference a lossy encoder may leave in a picture of four flat quarters.
LOSSY = 4.0
TOLERANCE = {
    "png": 0.0,
    "bmp": 0.0,
    "tiff": 0.0,
    "gif": 0.0,
    "jpg": LOSSY,
    "webp": LOSSY,
    "avif": 6,
}


@pytest.fixture
def scene() -> Pixels:
    """Four quarters of different colours: no turn or mirroring leaves it as it is."""
    pixels = np.empty((HEIGHT, WIDTH, 3), dtype=np.uint8)
    pixels[:20, :30], pixels[:20, 30:] = (220, 40, 40), (40, 200, 40)
    pixels[20:, :30], pixels[20:, 30:] = (40, 40, 220), (230, 230, 230)
    return pixels


def difference(a: Pixels, b: Pixels) -> float:
    assert a.shape == b.shape
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


def run_python(code: str, path: Path) -> "subprocess.CompletedProcess[str]":
    """In a process of its own, which may set limits on itself and be killed."""
    here = Path(segtrain.__file__).parents[1]
    return subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(here)},
    )


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------- reading: formats and orientation


@pytest.mark.parametrize("suffix", TOLERANCE)
def test_every_format_gives_the_pixels_that_were_saved(
    suffix: str, scene: Pixels, tmp_path: Path
) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(scene).save(path)

    pixels = read_image(path)

    assert pixels.dtype == np.uint8
    assert difference(pixels, scene) <= TOLERANCE[suffix]


def test_the_content_decides_not_the_extension(scene: Pixels, tmp_path: Path) -> None:
    path = tmp_path / "really_a_png.jpg"
    Image.fromarray(scene).save(path, format="PNG")
    assert np.array_equal(read_image(path), scene)


# EXIF 2.3, table "Orientation": how a camera laid the upright picture down in the file. In numpy,
# so that Pillow's own table is not its own judge.
STORED_AS: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", STORED_AS)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff", "avif"])
def test_exif_orientation_is_undone_unless_stored_pixels_are_meant(
    suffix: str, orientation: int, scene: Pixels, tmp_path: Path
) -> None:
    stored = np.ascontiguousarray(STORED_AS[orientation](scene))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(stored).save(path, exif=exif, quality=95)

    assert difference(read_image(path), scene) <= TOLERANCE[suffix]
    if suffix != "tiff":  # Pillow turns a TIFF by itself while it decodes
        assert difference(read_image(path, upright=False), stored) <= TOLERANCE[suffix]


@pytest.mark.parametrize(
    "exif", [b"garbage", b"II*\0", b"II*\0\xff\xff\xff\x7f", b"MM\0*\0\0\0\x08"]
)
def test_damaged_exif_does_not_cost_the_picture(exif: bytes, scene: Pixels, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(scene).save(path, exif=b"Exif\0\0" + exif)
    assert difference(read_image(path), scene) <= LOSSY


@pytest.fixture
def odd_picture(scene: Pixels, tmp_path: Path) -> Path:
    """Pillow warns of its EXIF, which is cut short."""
    path = tmp_path / "odd.jpg"
    Image.fromarray(scene).save(path, exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0")
    with pytest.warns(UserWarning, match="Corrupt EXIF"):
        Image.open(path).close()
    return path


def test_pillows_warnings_stay_hidden_while_others_begin_and_end(odd_picture: Path) -> None:
    read_image(odd_picture)
    before = list(warnings.filters)
    one, other = ExitStack(), ExitStack()  # as two threads would
    one.enter_context(decoding(odd_picture))
    other.enter_context(decoding(odd_picture))
    one.close()

    Image.open(odd_picture).close()  # in tests a warning is an error
    other.close()

    assert list(warnings.filters) == before


def test_only_pillows_warnings_are_hidden(odd_picture: Path) -> None:
    with pytest.warns(UserWarning, match="of somebody else"), decoding(odd_picture):
        warnings.warn("of somebody else", stacklevel=1)


READ_IN_THREADS = """
import sys, warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from segtrain.images import read_image

path = Path(sys.argv[1])
read_image(path)
before = list(warnings.filters)
sys.setswitchinterval(1e-5)
with ThreadPoolExecutor(8) as pool:
    list(pool.map(read_image, [path] * 400))
assert list(warnings.filters) == before
"""


def test_threads_that_read_leave_the_filters_and_the_screen_alone(odd_picture: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", READ_IN_THREADS, odd_picture],
        env={**os.environ, "PYTHONPATH": str(Path(segtrain.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stderr) == (0, "")


# ------------------------------------------------------------------------- reading: colours, depth


def flat(mode: str, colour: int | tuple[int, ...]) -> Image.Image:
    return Image.new(mode, (8, 8), colour)


def palette(*, transparent: bool) -> Image.Image:
    picture = flat("P", 1)
    picture.putpalette([10, 20, 30, 200, 100, 50])
    if transparent:
        picture.info["transparency"] = 1
    return picture


WHITE = (255, 255, 255)
COLOURS: dict[str, tuple[str, Image.Image, tuple[int, int, int]]] = {
    "one bit": ("png", flat("1", 1), WHITE),
    "gray": ("png", flat("L", 77), (77, 77, 77)),
    "gray jpeg": ("jpg", flat("L", 77), (77, 77, 77)),
    "gray with alpha, opaque": ("png", flat("LA", (77, 255)), (77, 77, 77)),
    "gray with alpha, clear": ("png", flat("LA", (77, 0)), WHITE),
    "colour with alpha, opaque": ("png", flat("RGBA", (200, 100, 50, 255)), (200, 100, 50)),
    "colour with alpha, clear": ("png", flat("RGBA", (200, 100, 50, 0)), WHITE),
    # 200 * 51/255 + 255 * 204/255 = 244, and so on: a fifth of the colour over white.
    "colour with alpha, a fifth": ("png", flat("RGBA", (200, 100, 50, 51)), (244, 224, 214)),
    "webp with alpha, clear": ("webp", flat("RGBA", (200, 100, 50, 0)), WHITE),
    "palette": ("png", palette(transparent=False), (200, 100, 50)),
    "palette gif": ("gif", palette(transparent=False), (200, 100, 50)),
    "palette, colour made clear": ("png", palette(transparent=True), WHITE),
    "palette gif, colour made clear": ("gif", palette(transparent=True), WHITE),
    # Magenta and yellow ink at full, no cyan, no black: red.
    "cmyk jpeg": ("jpg", flat("CMYK", (0, 255, 255, 0)), (255, 0, 0)),
    "cmyk tiff": ("tiff", flat("CMYK", (0, 255, 255, 0)), (255, 0, 0)),
    "bright 16 bit": ("png", flat("I;16", 65535), WHITE),
    # Darker than 256 of 65535 is black; it must not be taken for a bright 8-bit picture.
    "dark 16 bit": ("png", flat("I;16", 120), (0, 0, 0)),
    "dark 16 bit tiff": ("tiff", flat("I;16", 120), (0, 0, 0)),
    "32 bit tiff of small numbers": ("tiff", flat("I", 120), (120, 120, 120)),
    "float tiff, 0 to 1": ("tiff", Image.fromarray(np.full((8, 8), 0.4, np.float32)), (102,) * 3),
}


@pytest.mark.parametrize(("suffix", "picture", "colour"), COLOURS.values(), ids=COLOURS)
def test_every_kind_of_colour_becomes_rgb(
    suffix: str, picture: Image.Image, colour: tuple[int, int, int], tmp_path: Path
) -> None:
    path = tmp_path / f"a.{suffix}"
    picture.save(path, quality=100)

    pixels = read_image(path)

    assert pixels.shape == (8, 8, 3)
    assert np.abs(pixels.astype(int) - np.array(colour)).max() <= 2


def test_a_gray_of_16_bits_that_is_transparent_is_laid_on_white(tmp_path: Path) -> None:
    samples = np.array([[0, 20_000, 20_001, 65_535]], dtype=np.uint16)
    Image.fromarray(samples).save(tmp_path / "a.png", transparency=20_000)

    assert read_image(tmp_path / "a.png")[..., 0].tolist() == [[0, 255, 78, 255]]


@pytest.mark.parametrize("suffix", ["png", "tiff"])
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_are_scaled_to_8_not_clipped(suffix: str, channels: int, tmp_path: Path) -> None:
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    path = tmp_path / f"a.{suffix}"
    assert cv2.imwrite(str(path), np.squeeze(np.stack([ramp] * channels, axis=2)))

    pixels = read_image(path)

    assert np.abs(pixels.astype(float) - ramp[..., None] / 257).max() <= 1.0


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff", "mpo"])
def test_of_several_frames_the_first_is_taken(suffix: str, scene: Pixels, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    second = Image.fromarray(255 - scene)
    Image.fromarray(scene).save(path, save_all=True, append_images=[second])

    with Image.open(path) as picture:
        assert getattr(picture, "n_frames", 1) == 2
    assert difference(read_image(path), scene) <= LOSSY


@pytest.mark.parametrize(
    ("suffix", "note"),
    [
        ("gif", "is animated; its first frame is taken"),
        ("webp", "is animated; its first frame is taken"),
        ("png", "is animated; its first frame is taken"),
        ("tiff", "has several pages; the first is taken"),
        ("mpo", None),  # what phones write: a photo and its preview
    ],
)
def test_what_is_left_out_of_a_file_is_noted(
    suffix: str, note: str | None, scene: Pixels, tmp_path: Path
) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(scene).save(path)
    assert read_picture(path).note is None
    Image.fromarray(scene).save(path, save_all=True, append_images=[Image.fromarray(255 - scene)])
    assert read_picture(path).note == note


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_bytes_are_read_like_a_file(suffix: str, scene: Pixels, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(scene).save(path)
    read = read_picture(Path("stdin"), content=path.read_bytes())
    assert np.array_equal(read.pixels, read_image(path))
    with pytest.raises(DataError, match="stdin"):
        read_picture(Path("stdin"), content=path.read_bytes()[:100])


def test_strips_are_put_together_without_a_seam(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ramp of 16 bits whose brightest strip decides on how all are scaled."""
    ramp = np.arange(40, dtype=np.int32).repeat(60).reshape(40, 60) * 1000
    path = tmp_path / "a.tiff"
    Image.fromarray(ramp).save(path)
    whole = read_image(path)
    monkeypatch.setattr("segtrain.rgb._PIXELS_AT_ONCE", 7 * 60)

    assert np.array_equal(read_image(path), whole)
    assert np.abs(whole[..., 0] - ramp / 257).max() <= 1


def test_the_size_is_seen_at_a_glance(scene: Pixels, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(scene).save(path)
    assert pixels_in(path) == HEIGHT * WIDTH
    path.write_text("no picture")
    assert pixels_in(path) == pixels_in(tmp_path / "missing.png") == 0


def test_pixels_are_counted_as_far_as_the_limit_was_raised(tmp_path: Path) -> None:
    """Nothing but a header, of 225 megapixels: where they weighed nothing, all would be let in."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 15_000, 15_000, 8, 0, 0, 0, 0)
    content = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    (tmp_path / "large.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content + b"\0\0\0\0IDAT")
    assert pixels_in(tmp_path / "large.png", 300_000_000) == 225_000_000


READ_AND_MEASURE = """
import sys
from pathlib import Path
from segtrain.images import read_image
import cv2, numpy, PIL.Image
def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
before = peak()
height, width, _ = read_image(Path(sys.argv[1])).shape
print(1024 * (peak() - before) / (height * width))
"""


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "CMYK", "P"])
def test_decoding_takes_no_copies_of_the_whole(mode: str, tmp_path: Path) -> None:
    """Bytes a pixel: 3 for the result and at most 4 for Pillow's; once it was up to 20."""
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new(mode, (5000, 4000)).save(path, exif=exif)

    taken = float(run_python(READ_AND_MEASURE, path).stdout)

    assert 3 <= taken < 3 + 4 + 1.5


# ---------------------------------------------------------------------------- reading: what is bad


def make_missing(path: Path) -> None: ...


BAD_FILES: dict[str, Callable[[Path], object]] = {
    "missing": make_missing,
    "a folder": lambda path: path.mkdir(),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("this is no picture"),
    "zeros": lambda path: path.write_bytes(bytes(4096)),
    "a web page": lambda path: path.write_text("<!doctype html><title>404</title>"),
    "only a PNG signature": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n"),
    "a dangling link": lambda path: path.symlink_to("nowhere.jpg"),
    "a link to itself": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("make", BAD_FILES.values(), ids=BAD_FILES)
def test_what_is_no_picture_is_refused_by_name(
    make: Callable[[Path], object], tmp_path: Path
) -> None:
    path = tmp_path / "holiday.jpg"
    make(path)
    with pytest.raises(DataError, match=r"holiday\.jpg"):
        read_image(path)


def test_a_name_too_long_for_the_disk_is_bad_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="xxx"):
        read_image(tmp_path / ("x" * 300 + ".jpg"))


@pytest.mark.parametrize("suffix", TOLERANCE)
def test_a_cut_file_is_refused_or_gives_the_whole_picture(
    suffix: str, scene: Pixels, tmp_path: Path
) -> None:
    """Never half a picture filled with gray; only bytes after the last pixel may be missing."""
    path = tmp_path / f"a.{suffix}"
    noise = np.random.default_rng(0).integers(0, 60, scene.shape, dtype=np.uint8)
    Image.fromarray(scene // 2 + noise).save(path)
    whole, content = read_image(path), path.read_bytes()

    messages = []
    for length in sorted({*range(40), *range(40, len(content), max(1, len(content) // 80))}):
        path.write_bytes(content[:length])
        try:
            pixels = read_image(path)
        except DataError as error:
            messages.append(str(error))
        else:
            assert np.array_equal(pixels, whole), f"{length} of {len(content)} bytes"
            assert length > 0.9 * len(content)
    assert len(messages) > 80
    assert all(path.name in message for message in messages)


@pytest.mark.parametrize("suffix", [*TOLERANCE, "mpo"])
def test_mutated_files_are_read_or_refused(suffix: str, scene: Pixels, tmp_path: Path) -> None:
    """Eight formats of 260 files: nothing but DataError comes out, and nothing but H W 3."""
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(scene).save(path)
    content = path.read_bytes()
    draw = random.Random(suffix)

    messages = []
    for _ in range(260):
        mutated = bytearray(content)
        # Half of them in the header, where the sizes and offsets are.
        end = draw.choice([min(64, len(mutated)), len(mutated)])
        for _ in range(draw.randint(1, 6)):
            mutated[draw.randrange(end)] = draw.choice([0, 1, 127, 128, 255, draw.randrange(256)])
        path.write_bytes(mutated)
        try:
            pixels = read_image(path, max_pixels=1_000_000)
        except DataError as error:
            messages.append(str(error))
        else:
            assert pixels.dtype == np.uint8
            assert pixels.ndim == 3
            assert pixels.shape[2] == 3
    assert all(path.name in message for message in messages)


def write_one_bit_png(path: Path, height: int, width: int) -> None:
    """A valid black PNG, small on disk however many pixels it has."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((width // 8 + 1) * height))
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


READ_AND_REPORT = """
import sys
from pathlib import Path
from segtrain.errors import DataError
from segtrain.images import read_image
try:
    read_image(Path(sys.argv[1]))
except DataError as error:
    print(error)
# Not ru_maxrss: that one starts at the peak of the process that started this one.
status = Path("/proc/self/status").read_text()
print(status.split("VmHWM:")[1].split()[0])
"""


# Pillow itself objects above 200 megapixels, segtrain has to between 100 and that.
@pytest.mark.parametrize("size", [(10_001, 10_000), (15_000, 12_000), (25_000, 24_000)])
def test_a_decompression_bomb_is_refused_before_it_takes_memory(
    size: tuple[int, int], tmp_path: Path
) -> None:
    path = tmp_path / "bomb.png"
    write_one_bit_png(path, *size)
    assert path.stat().st_size < 500_000

    message, peak_kb = run_python(READ_AND_REPORT, path).stdout.splitlines()

    assert "bomb.png" in message
    assert "megapixels" in message
    # Decoded it is more than 400 MB, on top of some 50 for the interpreter.
    assert int(peak_kb) < 200_000


def test_the_limit_counts_pixels_and_can_be_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Pillow's own limit, set low: a user who raises segtrain's must not be stopped by that one.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    path = tmp_path / "a.png"
    write_one_bit_png(path, 10, 16)

    with pytest.raises(DataError, match="megapixels"):
        read_image(path, max_pixels=159)
    assert read_image(path, max_pixels=160).shape == (10, 16, 3)


def test_no_program_is_started_to_decode_a_picture(
    scene: Pixels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow hands PostScript to Ghostscript, an interpreter for a stranger's program."""
    path = tmp_path / "photo.jpg"
    Image.fromarray(scene).save(path, format="EPS")
    trace = tmp_path / "started"
    program = tmp_path / "bin" / "gs"
    write_text(program, f"#!/bin/sh\ntouch {trace}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # look for it again

    with pytest.raises(DataError, match=r"photo\.jpg"):
        read_image(path)
    assert not trace.exists()


# ----------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize(
    ("shape", "mode"), [((9, 7), "L"), ((9, 7, 3), "RGB"), ((9, 7, 4), "RGBA")]
)
def test_png_keeps_every_byte(shape: tuple[int, ...], mode: str, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    path = tmp_path / "new" / "folder" / "a.png"
    write_image(path, pixels)

    with Image.open(path) as picture:
        assert picture.mode == mode
        assert np.array_equal(np.asarray(picture), pixels)
    assert files_in(path.parent) == ["a.png"]


def test_jpeg_keeps_colours_and_obeys_its_quality(scene: Pixels, tmp_path: Path) -> None:
    good, poor = tmp_path / "good.jpg", tmp_path / "poor.jpg"
    write_image(good, scene, jpeg_quality=95)
    write_image(poor, scene, jpeg_quality=10)

    with Image.open(good) as picture:
        assert picture.format == "JPEG"
        assert difference(np.asarray(picture), scene) < LOSSY
    assert poor.stat().st_size < good.stat().st_size


@pytest.mark.parametrize("shape", [(65_501, 1), (1, 65_501, 3)])
def test_a_picture_too_long_for_jpeg_is_told(shape: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"long\.jpg.*65500"):
        write_image(tmp_path / "long.jpg", np.zeros(shape, dtype=np.uint8))
    assert files_in(tmp_path) == []


def full_disk(_: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_keeps_the_old_picture(
    scene: Pixels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    write_image(path, scene)
    old = path.read_bytes()
    monkeypatch.setattr(os, "fsync", full_disk)

    with pytest.raises(ResourceError, match=r"a\.png: No space left"):
        write_image(path, 255 - scene)
    assert path.read_bytes() == old
    assert files_in(tmp_path) == ["a.png"]


def test_a_failing_encoder_keeps_the_old_picture(
    scene: Pixels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    write_image(path, scene)
    old = path.read_bytes()
    monkeypatch.setattr(cv2, "imencode", lambda *_: (False, np.zeros(0, dtype=np.uint8)))

    with pytest.raises(ValueError, match=r"a\.png"):
        write_image(path, 255 - scene)
    assert path.read_bytes() == old
    assert files_in(tmp_path) == ["a.png"]


# ------------------------------------------------------------------------------------ atomic_write


def test_the_new_file_appears_only_when_it_is_whole_and_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    seen_when_synced: list[str] = []
    synced = os.fsync

    def fsync(descriptor: int) -> None:
        seen_when_synced.append(path.read_text())
        assert os.fstat(descriptor).st_size == len("new text")  # flushed before
        synced(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with atomic_write(path) as file:
        file.write(b"new ")
        assert path.read_text() == "old"
        file.write(b"text")

    assert seen_when_synced == ["old"]
    assert path.read_text() == "new text"
    assert files_in(tmp_path) == ["a.txt"]


def test_only_what_killed_writers_of_a_file_left_is_swept(tmp_path: Path) -> None:
    # The third is of "[a]+.mp4.part", and as a pattern the name would fit the fourth.
    kept = [
        "[a]+.mp4",
        ".b.mp4.7.tmp",
        ".[a]+.mp4.part.7.tmp",
        ".aa.mp4.7.tmp",
        ".[a]+.mp4.own.tmp",
    ]
    for name in [*kept, ".[a]+.mp4.7.tmp", ".[a]+.mp4.12345.tmp"]:
        (tmp_path / name).touch()

    sweep_beside(tmp_path / "[a]+.mp4")

    assert files_in(tmp_path) == sorted(kept)
    sweep_beside(tmp_path / "not" / "there")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError])
def test_an_exception_in_the_block_keeps_the_old_file(
    error: type[BaseException], tmp_path: Path
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def interrupted() -> None:
        with atomic_write(path) as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert path.read_text() == "old"
    assert files_in(tmp_path) == ["a.txt"]


WRITE_PAST_A_LIMIT = """
import resource, sys
from pathlib import Path
from segtrain.errors import ResourceError
from segtrain.files import atomic_write
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    with atomic_write(Path(sys.argv[1])) as file:
        for _ in range(200):
            file.write(bytes(1000))
except ResourceError as error:
    print(error)
"""

WRITE_AND_BE_KILLED = """
import os, signal, sys
from pathlib import Path
from segtrain.files import atomic_write
with atomic_write(Path(sys.argv[1])) as file:
    file.write(bytes(100_000))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_disk_that_fills_up_while_writing_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    message = run_python(WRITE_PAST_A_LIMIT, path).stdout

    assert message.startswith(f"cannot write {path}: ")
    assert path.read_text() == "old"
    assert files_in(tmp_path) == ["a.txt"]


def test_a_kill_while_writing_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    assert run_python(WRITE_AND_BE_KILLED, path).returncode == -signal.SIGKILL
    assert path.read_text() == "old"


@pytest.mark.parametrize("name", ["file.txt/a.txt", "file.txt/deeper/a.txt", "x" * 300, "folder"])
def test_a_place_that_cannot_be_written_is_a_resource_error(name: str, tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("old")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ResourceError, match="cannot write"):
        write_text(tmp_path / name, "new")
    assert files_in(tmp_path) == ["file.txt", "folder"]


def test_a_failing_clean_up_does_not_hide_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a read-only disk even removing a file that is not there is an error of its own."""

    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "open", read_only)
    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(ResourceError, match=r"a\.txt: Read-only"):
        write_text(tmp_path / "a.txt", "new")


# ------------------------------------------------------------------------- resize_short_side, find


@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [
        ((480, 640), 224, (224, 299)),
        ((640, 480), 224, (299, 224)),
        ((10, 20), 40, (40, 80)),
        ((100, 100), 32, (32, 32)),
        ((50, 400), 25, (25, 200)),  # eight times as long as wide: still the plain rule
        ((50, 3200), 50, (18, 1131)),  # 64 times: 8 * 50 * 50 = 20,000 pixels, aspect 64
        ((1, 10_000), 100, (3, 28_284)),  # 80,000 pixels, aspect 10,000: 2.83 by 28,284
    ],
)
def test_resize_short_side(
    size: tuple[int, int], short_side: int, expected: tuple[int, int]
) -> None:
    picture = np.full((*size, 3), 200, dtype=np.uint8)
    resized = resize_short_side(picture, short_side)
    assert resized.shape == (*expected, 3)
    assert (resized == 200).all()


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1), (7, 3000)])
def test_a_strip_does_not_outgrow_the_square(size: tuple[int, int]) -> None:
    resized = resize_short_side(np.zeros((*size, 3), dtype=np.uint8), 64)
    # Rounding three rows up to four is a third more.
    assert resized.shape[0] * resized.shape[1] <= 1.5 * 8 * 64 * 64


def test_a_picture_of_the_right_size_is_not_touched(scene: Pixels) -> None:
    assert np.array_equal(resize_short_side(scene, HEIGHT), scene)


def test_shrinking_averages_instead_of_picking() -> None:
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::4] = 200
    assert (resize_short_side(stripes, 16) == 50).all()


@pytest.fixture
def large_jpeg(tmp_path: Path) -> Path:
    """A smooth picture of 400 x 640 pixels."""
    rows, columns = np.mgrid[:400, :640]
    waves = [127 + 100 * np.sin(rows / a + columns / b) for a, b in ((40, 60), (70, 50), (90, 90))]
    path = tmp_path / "large.jpg"
    Image.fromarray(np.dstack(waves).astype(np.uint8)).save(path, quality=95)
    return path


@pytest.mark.parametrize(
    ("short_side", "smaller"), [(None, 1), (400, 1), (201, 1), (200, 2), (101, 2), (100, 4), (9, 8)]
)
def test_a_large_jpeg_is_decoded_as_small_as_allowed(
    short_side: int | None, smaller: int, large_jpeg: Path
) -> None:
    pixels, size = read_sized_image(large_jpeg, short_side=short_side)

    assert size == (400, 640)
    assert pixels.shape == (400 // smaller, 640 // smaller, 3)
    with Image.open(large_jpeg) as whole:
        expected = np.asarray(whole.reduce(smaller))
    assert difference(pixels, expected) < 2


def test_plain_jpegs_are_decoded_to_pillows_very_pixels(large_jpeg: Path) -> None:
    with Image.open(large_jpeg) as picture:
        assert np.array_equal(read_image(large_jpeg), np.asarray(picture))


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_a_cut_jpeg_is_refused_at_any_size(share: float, large_jpeg: Path) -> None:
    content = large_jpeg.read_bytes()
    large_jpeg.write_bytes(content[: int(len(content) * share)])
    for short_side in (None, 50):
        with pytest.raises(DataError, match=r"large\.jpg"):
            read_sized_image(large_jpeg, short_side=short_side)


def test_a_turned_jpeg_is_upright_at_any_size(large_jpeg: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(large_jpeg) as picture:
        picture.save(large_jpeg, exif=exif)
    pixels, size = read_sized_image(large_jpeg, short_side=50)
    assert size == (640, 400)
    assert pixels.shape[0] > pixels.shape[1]
    assert read_sized_image(large_jpeg, upright=False, short_side=50)[1] == (400, 640)


def test_find_images_sorts_and_leaves_out_what_is_hidden_or_no_picture(tmp_path: Path) -> None:
    wanted = ["B.JPEG", "a.png", "deep/c.tiff", "deep/er/d.WebP", "e.avif"]
    others = ["notes.txt", "jpg", ".hidden.png", ".cache/x.png", "deep/.git/y.png", "z.png.part"]
    for name in [*wanted, *others]:
        write_text(tmp_path / name, "")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "dangling.png").symlink_to("nowhere")

    found = list(find_images(tmp_path))

    assert [str(path.relative_to(tmp_path)) for path in found] == wanted


def test_find_images_in_a_hidden_place_finds_what_is_below(tmp_path: Path) -> None:
    """The user named that folder; only what is hidden below it is left out."""
    write_text(tmp_path / ".cache" / "a.png", "")
    assert list(find_images(tmp_path / ".cache")) == [tmp_path / ".cache" / "a.png"]
