"""Image files: each is decoded correctly or rejected with a DataError that names the file."""

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
import PIL.Image
import pytest
from PIL import EpsImagePlugin

import segtrain
from segtrain.errors import DataError, ResourceError
from segtrain.imaging.images import (
    count_pixels,
    decode_image,
    find_images,
    map_decode_errors,
    read_image,
    read_sized_image,
    resize_short_side,
    write_image,
)
from segtrain.runtime.files import atomic_write, remove_temp_files_beside, write_text
from segtrain.types import Image

HEIGHT, WIDTH = 40, 60
# Mean difference that a lossy encoder may leave in an image of four flat quarters.
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
def scene() -> Image:
    """Four quarters of different colors: every rotation and flip changes it."""
    pixels = np.empty((HEIGHT, WIDTH, 3), dtype=np.uint8)
    pixels[:20, :30], pixels[:20, 30:] = (220, 40, 40), (40, 200, 40)
    pixels[20:, :30], pixels[20:, 30:] = (40, 40, 220), (230, 230, 230)
    return pixels


def difference(a: Image, b: Image) -> float:
    assert a.shape == b.shape
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


def run_python(code: str, path: Path) -> "subprocess.CompletedProcess[str]":
    """Run code in a subprocess, which may set its own limits and be killed."""
    here = Path(segtrain.__file__).parents[1]
    return subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(here)},
    )


def file_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- Reading: formats and orientation -----------------------------------------------------------


@pytest.mark.parametrize("suffix", TOLERANCE)
def test_every_format_decodes_to_the_saved_pixels(
    suffix: str, scene: Image, tmp_path: Path
) -> None:
    path = tmp_path / f"a.{suffix}"
    PIL.Image.fromarray(scene).save(path)

    pixels = read_image(path)

    assert pixels.dtype == np.uint8
    assert difference(pixels, scene) <= TOLERANCE[suffix]


def test_the_format_is_detected_from_the_content(scene: Image, tmp_path: Path) -> None:
    path = tmp_path / "really_a_png.jpg"
    PIL.Image.fromarray(scene).save(path, format="PNG")
    assert np.array_equal(read_image(path), scene)


# EXIF 2.3, table "Orientation": how the upright image is stored in the file. In numpy, as an oracle
# independent of Pillow.
STORED_AS: dict[int, Callable[[Image], Image]] = {
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
def test_exif_orientation_is_applied_unless_upright_is_false(
    suffix: str, orientation: int, scene: Image, tmp_path: Path
) -> None:
    stored = np.ascontiguousarray(STORED_AS[orientation](scene))
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    PIL.Image.fromarray(stored).save(path, exif=exif, quality=95)

    assert difference(read_image(path), scene) <= TOLERANCE[suffix]
    if suffix != "tiff":  # Pillow rotates a TIFF upright while decoding
        assert difference(read_image(path, upright=False), stored) <= TOLERANCE[suffix]


@pytest.mark.parametrize(
    "exif", [b"garbage", b"II*\0", b"II*\0\xff\xff\xff\x7f", b"MM\0*\0\0\0\x08"]
)
def test_an_image_with_damaged_exif_is_read(exif: bytes, scene: Image, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    PIL.Image.fromarray(scene).save(path, exif=b"Exif\0\0" + exif)
    assert difference(read_image(path), scene) <= LOSSY


@pytest.fixture
def odd_image(scene: Image, tmp_path: Path) -> Path:
    """An image with truncated EXIF, about which Pillow warns."""
    path = tmp_path / "odd.jpg"
    PIL.Image.fromarray(scene).save(path, exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0")
    with pytest.warns(UserWarning, match="Corrupt EXIF"):
        PIL.Image.open(path).close()
    return path


def test_pillow_warnings_stay_ignored_in_overlapping_contexts(odd_image: Path) -> None:
    read_image(odd_image)
    before = list(warnings.filters)
    first, second = ExitStack(), ExitStack()  # like two threads
    first.enter_context(map_decode_errors(odd_image))
    second.enter_context(map_decode_errors(odd_image))
    first.close()

    PIL.Image.open(odd_image).close()  # tests turn warnings into errors
    second.close()

    assert list(warnings.filters) == before


def test_only_pillow_warnings_are_ignored(odd_image: Path) -> None:
    with pytest.warns(UserWarning, match="from other code"), map_decode_errors(odd_image):
        warnings.warn("from other code", stacklevel=1)


READ_IN_THREADS = """
import sys, warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from segtrain.imaging.images import read_image

path = Path(sys.argv[1])
read_image(path)
before = list(warnings.filters)
sys.setswitchinterval(1e-5)
with ThreadPoolExecutor(8) as pool:
    list(pool.map(read_image, [path] * 400))
assert list(warnings.filters) == before
"""


def test_reading_in_threads_prints_nothing_and_keeps_the_warning_filters(odd_image: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", READ_IN_THREADS, odd_image],
        env={**os.environ, "PYTHONPATH": str(Path(segtrain.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stderr) == (0, "")


# --- Reading: colors and bit depth --------------------------------------------------------------


def flat(mode: str, color: int | tuple[int, ...]) -> PIL.Image.Image:
    return PIL.Image.new(mode, (8, 8), color)


def palette(*, transparent: bool) -> PIL.Image.Image:
    image = flat("P", 1)
    image.putpalette([10, 20, 30, 200, 100, 50])
    if transparent:
        image.info["transparency"] = 1
    return image


WHITE = (255, 255, 255)
COLORS: dict[str, tuple[str, PIL.Image.Image, tuple[int, int, int]]] = {
    "one bit": ("png", flat("1", 1), WHITE),
    "gray": ("png", flat("L", 77), (77, 77, 77)),
    "gray jpeg": ("jpg", flat("L", 77), (77, 77, 77)),
    "gray with alpha, opaque": ("png", flat("LA", (77, 255)), (77, 77, 77)),
    "gray with alpha, clear": ("png", flat("LA", (77, 0)), WHITE),
    "color with alpha, opaque": ("png", flat("RGBA", (200, 100, 50, 255)), (200, 100, 50)),
    "color with alpha, clear": ("png", flat("RGBA", (200, 100, 50, 0)), WHITE),
    # A fifth of the color over white: 200 * 51/255 + 255 * 204/255 = 244, and so on.
    "color with alpha, a fifth": ("png", flat("RGBA", (200, 100, 50, 51)), (244, 224, 214)),
    "webp with alpha, clear": ("webp", flat("RGBA", (200, 100, 50, 0)), WHITE),
    "palette": ("png", palette(transparent=False), (200, 100, 50)),
    "palette gif": ("gif", palette(transparent=False), (200, 100, 50)),
    "palette, color made clear": ("png", palette(transparent=True), WHITE),
    "palette gif, color made clear": ("gif", palette(transparent=True), WHITE),
    # Full magenta and yellow without cyan and black are red.
    "cmyk jpeg": ("jpg", flat("CMYK", (0, 255, 255, 0)), (255, 0, 0)),
    "cmyk tiff": ("tiff", flat("CMYK", (0, 255, 255, 0)), (255, 0, 0)),
    "bright 16 bit": ("png", flat("I;16", 65535), WHITE),
    # Below 256 of 65535 is black, not a bright 8-bit image.
    "dark 16 bit": ("png", flat("I;16", 120), (0, 0, 0)),
    "dark 16 bit tiff": ("tiff", flat("I;16", 120), (0, 0, 0)),
    "32 bit tiff of small numbers": ("tiff", flat("I", 120), (120, 120, 120)),
    "float tiff, 0 to 1": (
        "tiff",
        PIL.Image.fromarray(np.full((8, 8), 0.4, np.float32)),
        (102,) * 3,
    ),
}


@pytest.mark.parametrize(("suffix", "image", "color"), COLORS.values(), ids=COLORS)
def test_every_color_mode_becomes_rgb(
    suffix: str, image: PIL.Image.Image, color: tuple[int, int, int], tmp_path: Path
) -> None:
    path = tmp_path / f"a.{suffix}"
    image.save(path, quality=100)

    pixels = read_image(path)

    assert pixels.shape == (8, 8, 3)
    assert np.abs(pixels.astype(int) - np.array(color)).max() <= 2


def test_a_transparent_16_bit_gray_becomes_white(tmp_path: Path) -> None:
    samples = np.array([[0, 20_000, 20_001, 65_535]], dtype=np.uint16)
    PIL.Image.fromarray(samples).save(tmp_path / "a.png", transparency=20_000)

    assert read_image(tmp_path / "a.png")[..., 0].tolist() == [[0, 255, 78, 255]]


@pytest.mark.parametrize("suffix", ["png", "tiff"])
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_are_scaled_to_8_instead_of_clipped(
    suffix: str, channels: int, tmp_path: Path
) -> None:
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    path = tmp_path / f"a.{suffix}"
    assert cv2.imwrite(str(path), np.squeeze(np.stack([ramp] * channels, axis=2)))

    pixels = read_image(path)

    assert np.abs(pixels.astype(float) - ramp[..., None] / 257).max() <= 1.0


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff", "mpo"])
def test_the_first_of_several_frames_is_decoded(suffix: str, scene: Image, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    second = PIL.Image.fromarray(255 - scene)
    PIL.Image.fromarray(scene).save(path, save_all=True, append_images=[second])

    with PIL.Image.open(path) as image:
        assert getattr(image, "n_frames", 1) == 2
    assert difference(read_image(path), scene) <= LOSSY


@pytest.mark.parametrize(
    ("suffix", "note"),
    [
        ("gif", "is animated; its first frame is taken"),
        ("webp", "is animated; its first frame is taken"),
        ("png", "is animated; its first frame is taken"),
        ("tiff", "has several pages; the first is taken"),
        ("mpo", None),  # as phones write it: a photo and its preview
    ],
)
def test_skipped_frames_are_noted(
    suffix: str, note: str | None, scene: Image, tmp_path: Path
) -> None:
    path = tmp_path / f"a.{suffix}"
    PIL.Image.fromarray(scene).save(path)
    assert decode_image(path).note is None
    PIL.Image.fromarray(scene).save(
        path, save_all=True, append_images=[PIL.Image.fromarray(255 - scene)]
    )
    assert decode_image(path).note == note


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_bytes_are_decoded_like_a_file(suffix: str, scene: Image, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    PIL.Image.fromarray(scene).save(path)
    decoded = decode_image(Path("stdin"), content=path.read_bytes())
    assert np.array_equal(decoded.pixels, read_image(path))
    with pytest.raises(DataError, match="stdin"):
        decode_image(Path("stdin"), content=path.read_bytes()[:100])


def test_strips_are_joined_without_a_seam(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The brightest strip of a 16-bit ramp determines the scale of all strips."""
    ramp = np.arange(40, dtype=np.int32).repeat(60).reshape(40, 60) * 1000
    path = tmp_path / "a.tiff"
    PIL.Image.fromarray(ramp).save(path)
    whole = read_image(path)
    monkeypatch.setattr("segtrain.imaging.rgb._STRIP_PIXELS", 7 * 60)

    assert np.array_equal(read_image(path), whole)
    assert np.abs(whole[..., 0] - ramp / 257).max() <= 1


def test_pixels_are_counted_without_decoding(scene: Image, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    PIL.Image.fromarray(scene).save(path)
    assert count_pixels(path) == HEIGHT * WIDTH
    path.write_text("not an image")
    assert count_pixels(path) == count_pixels(tmp_path / "missing.png") == 0


def test_pixels_are_counted_up_to_a_raised_limit(tmp_path: Path) -> None:
    """Just the header of a 225-megapixel PNG; a count of 0 would bypass the memory limit."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 15_000, 15_000, 8, 0, 0, 0, 0)
    content = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    (tmp_path / "large.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content + b"\0\0\0\0IDAT")
    assert count_pixels(tmp_path / "large.png", 300_000_000) == 225_000_000


READ_AND_MEASURE = """
import sys
from pathlib import Path
from segtrain.imaging.images import read_image
import cv2, numpy, PIL.Image
def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
before = peak()
height, width, _ = read_image(Path(sys.argv[1])).shape
print(1024 * (peak() - before) / (height * width))
"""


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "CMYK", "P"])
def test_decoding_copies_no_whole_image(mode: str, tmp_path: Path) -> None:
    """Bytes a pixel: 3 for the result and at most 4 in Pillow; it was once up to 20."""
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    PIL.Image.new(mode, (5000, 4000)).save(path, exif=exif)

    bytes_per_pixel = float(run_python(READ_AND_MEASURE, path).stdout)

    assert 3 <= bytes_per_pixel < 3 + 4 + 1.5


# --- Reading: bad files -------------------------------------------------------------------------


def make_missing(path: Path) -> None: ...


BAD_FILES: dict[str, Callable[[Path], object]] = {
    "missing": make_missing,
    "a folder": lambda path: path.mkdir(),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("this is not an image"),
    "zeros": lambda path: path.write_bytes(bytes(4096)),
    "a web page": lambda path: path.write_text("<!doctype html><title>404</title>"),
    "only a PNG signature": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n"),
    "a dangling link": lambda path: path.symlink_to("nowhere.jpg"),
    "a link to itself": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("make", BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_rejected_by_name(make: Callable[[Path], object], tmp_path: Path) -> None:
    path = tmp_path / "holiday.jpg"
    make(path)
    with pytest.raises(DataError, match=r"holiday\.jpg"):
        read_image(path)


def test_a_too_long_file_name_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="xxx"):
        read_image(tmp_path / ("x" * 300 + ".jpg"))


@pytest.mark.parametrize("suffix", TOLERANCE)
def test_a_truncated_file_is_rejected_or_gives_the_whole_image(
    suffix: str, scene: Image, tmp_path: Path
) -> None:
    """Only bytes after the last pixel may be missing; no image is padded with gray."""
    path = tmp_path / f"a.{suffix}"
    noise = np.random.default_rng(0).integers(0, 60, scene.shape, dtype=np.uint8)
    PIL.Image.fromarray(scene // 2 + noise).save(path)
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
def test_mutated_files_are_read_or_rejected(suffix: str, scene: Image, tmp_path: Path) -> None:
    """260 files in each of eight formats raise nothing but DataError and give nothing but H W 3."""
    path = tmp_path / f"a.{suffix}"
    PIL.Image.fromarray(scene).save(path)
    content = path.read_bytes()
    rng = random.Random(suffix)

    messages = []
    for _ in range(260):
        mutated = bytearray(content)
        # Half of them only in the header, with its sizes and offsets.
        end = rng.choice([min(64, len(mutated)), len(mutated)])
        for _ in range(rng.randint(1, 6)):
            mutated[rng.randrange(end)] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
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
    """Write a valid black PNG that is small on disk at any size."""

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
from segtrain.imaging.images import read_image
try:
    read_image(Path(sys.argv[1]))
except DataError as error:
    print(error)
# Not ru_maxrss, which starts at the peak of the parent process.
status = Path("/proc/self/status").read_text()
print(status.split("VmHWM:")[1].split()[0])
"""


# Pillow rejects more than 200 megapixels; segtrain rejects those between 100 and 200.
@pytest.mark.parametrize("size", [(10_001, 10_000), (15_000, 12_000), (25_000, 24_000)])
def test_a_decompression_bomb_is_rejected_before_it_takes_memory(
    size: tuple[int, int], tmp_path: Path
) -> None:
    path = tmp_path / "bomb.png"
    write_one_bit_png(path, *size)
    assert path.stat().st_size < 500_000

    message, peak_kb = run_python(READ_AND_REPORT, path).stdout.splitlines()

    assert "bomb.png" in message
    assert "megapixels" in message
    # Decoded, it needs more than 400 MB beside about 50 for the interpreter.
    assert int(peak_kb) < 200_000


def test_the_limit_counts_pixels_and_can_be_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Raising segtrain's limit must raise Pillow's own limit, too.
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 20)
    path = tmp_path / "a.png"
    write_one_bit_png(path, 10, 16)

    with pytest.raises(DataError, match="megapixels"):
        read_image(path, max_pixels=159)
    assert read_image(path, max_pixels=160).shape == (10, 16, 3)


def test_no_program_is_started_to_decode_an_image(
    scene: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow would pass PostScript to Ghostscript, which executes an untrusted program."""
    path = tmp_path / "photo.jpg"
    PIL.Image.fromarray(scene).save(path, format="EPS")
    trace = tmp_path / "started"
    program = tmp_path / "bin" / "gs"
    write_text(program, f"#!/bin/sh\ntouch {trace}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # make Pillow search again

    with pytest.raises(DataError, match=r"photo\.jpg"):
        read_image(path)
    assert not trace.exists()


# --- Writing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "mode"), [((9, 7), "L"), ((9, 7, 3), "RGB"), ((9, 7, 4), "RGBA")]
)
def test_png_keeps_every_byte(shape: tuple[int, ...], mode: str, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    path = tmp_path / "new" / "folder" / "a.png"
    write_image(path, pixels)

    with PIL.Image.open(path) as image:
        assert image.mode == mode
        assert np.array_equal(np.asarray(image), pixels)
    assert file_names(path.parent) == ["a.png"]


def test_jpeg_keeps_colors_and_applies_the_quality(scene: Image, tmp_path: Path) -> None:
    good, poor = tmp_path / "good.jpg", tmp_path / "poor.jpg"
    write_image(good, scene, jpeg_quality=95)
    write_image(poor, scene, jpeg_quality=10)

    with PIL.Image.open(good) as image:
        assert image.format == "JPEG"
        assert difference(np.asarray(image), scene) < LOSSY
    assert poor.stat().st_size < good.stat().st_size


@pytest.mark.parametrize("shape", [(65_501, 1), (1, 65_501, 3)])
def test_an_image_too_large_for_jpeg_is_a_data_error(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"long\.jpg.*65500"):
        write_image(tmp_path / "long.jpg", np.zeros(shape, dtype=np.uint8))
    assert file_names(tmp_path) == []


def raise_disk_full(_: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_keeps_the_old_image(
    scene: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    write_image(path, scene)
    old = path.read_bytes()
    monkeypatch.setattr(os, "fsync", raise_disk_full)

    with pytest.raises(ResourceError, match=r"a\.png: No space left"):
        write_image(path, 255 - scene)
    assert path.read_bytes() == old
    assert file_names(tmp_path) == ["a.png"]


def test_a_failing_encoder_keeps_the_old_image(
    scene: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    write_image(path, scene)
    old = path.read_bytes()
    monkeypatch.setattr(cv2, "imencode", lambda *_: (False, np.zeros(0, dtype=np.uint8)))

    with pytest.raises(ValueError, match=r"a\.png"):
        write_image(path, 255 - scene)
    assert path.read_bytes() == old
    assert file_names(tmp_path) == ["a.png"]


# --- atomic_write -------------------------------------------------------------------------------


def test_the_new_file_appears_only_when_it_is_complete_and_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    seen_when_synced: list[str] = []
    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        seen_when_synced.append(path.read_text())
        assert os.fstat(descriptor).st_size == len("new text")  # flushed before
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with atomic_write(path) as file:
        file.write(b"new ")
        assert path.read_text() == "old"
        file.write(b"text")

    assert seen_when_synced == ["old"]
    assert path.read_text() == "new text"
    assert file_names(tmp_path) == ["a.txt"]


def test_only_temp_files_of_the_given_file_are_removed(tmp_path: Path) -> None:
    # The third belongs to "[a]+.mp4.part"; as a pattern, the file's name would match the fourth.
    kept = [
        "[a]+.mp4",
        ".b.mp4.7.tmp",
        ".[a]+.mp4.part.7.tmp",
        ".aa.mp4.7.tmp",
        ".[a]+.mp4.own.tmp",
    ]
    for name in [*kept, ".[a]+.mp4.7.tmp", ".[a]+.mp4.12345.tmp"]:
        (tmp_path / name).touch()

    remove_temp_files_beside(tmp_path / "[a]+.mp4")

    assert file_names(tmp_path) == sorted(kept)
    remove_temp_files_beside(tmp_path / "not" / "there")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError])
def test_an_exception_in_the_block_keeps_the_old_file(
    error: type[BaseException], tmp_path: Path
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write_half() -> None:
        with atomic_write(path) as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        write_half()
    assert path.read_text() == "old"
    assert file_names(tmp_path) == ["a.txt"]


WRITE_PAST_A_LIMIT = """
import resource, sys
from pathlib import Path
from segtrain.errors import ResourceError
from segtrain.runtime.files import atomic_write
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
from segtrain.runtime.files import atomic_write
with atomic_write(Path(sys.argv[1])) as file:
    file.write(bytes(100_000))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_disk_full_while_writing_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    message = run_python(WRITE_PAST_A_LIMIT, path).stdout

    assert message.startswith(f"cannot write {path}: ")
    assert path.read_text() == "old"
    assert file_names(tmp_path) == ["a.txt"]


def test_a_kill_while_writing_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    assert run_python(WRITE_AND_BE_KILLED, path).returncode == -signal.SIGKILL
    assert path.read_text() == "old"


@pytest.mark.parametrize("name", ["file.txt/a.txt", "file.txt/deeper/a.txt", "x" * 300, "folder"])
def test_an_unwritable_path_is_a_resource_error(name: str, tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("old")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ResourceError, match="cannot write"):
        write_text(tmp_path / name, "new")
    assert file_names(tmp_path) == ["file.txt", "folder"]


def test_a_failing_cleanup_does_not_hide_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a read-only disk, even removing a missing file raises an error."""

    def raise_read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "open", raise_read_only)
    monkeypatch.setattr(Path, "unlink", raise_read_only)
    with pytest.raises(ResourceError, match=r"a\.txt: Read-only"):
        write_text(tmp_path / "a.txt", "new")


# --- Resizing and finding -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [
        ((480, 640), 224, (224, 299)),
        ((640, 480), 224, (299, 224)),
        ((10, 20), 40, (40, 80)),
        ((100, 100), 32, (32, 32)),
        ((50, 400), 25, (25, 200)),  # eight times as long as wide: not limited yet
        ((50, 3200), 50, (18, 1131)),  # 64 times: 8 * 50 * 50 = 20,000 pixels, aspect 64
        ((1, 10_000), 100, (3, 28_284)),  # 80,000 pixels, aspect 10,000: 2.83 by 28,284
    ],
)
def test_resize_short_side(
    size: tuple[int, int], short_side: int, expected: tuple[int, int]
) -> None:
    image = np.full((*size, 3), 200, dtype=np.uint8)
    resized = resize_short_side(image, short_side)
    assert resized.shape == (*expected, 3)
    assert (resized == 200).all()


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1), (7, 3000)])
def test_a_long_strip_is_limited_in_pixels(size: tuple[int, int]) -> None:
    resized = resize_short_side(np.zeros((*size, 3), dtype=np.uint8), 64)
    # Rounding three rows up to four adds a third.
    assert resized.shape[0] * resized.shape[1] <= 1.5 * 8 * 64 * 64


def test_an_image_of_the_right_size_is_unchanged(scene: Image) -> None:
    assert np.array_equal(resize_short_side(scene, HEIGHT), scene)


def test_shrinking_averages_pixels() -> None:
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::4] = 200
    assert (resize_short_side(stripes, 16) == 50).all()


@pytest.fixture
def large_jpeg(tmp_path: Path) -> Path:
    """A smooth image of 400 x 640 pixels."""
    rows, columns = np.mgrid[:400, :640]
    waves = [127 + 100 * np.sin(rows / a + columns / b) for a, b in ((40, 60), (70, 50), (90, 90))]
    path = tmp_path / "large.jpg"
    PIL.Image.fromarray(np.dstack(waves).astype(np.uint8)).save(path, quality=95)
    return path


@pytest.mark.parametrize(
    ("short_side", "factor"), [(None, 1), (400, 1), (201, 1), (200, 2), (101, 2), (100, 4), (9, 8)]
)
def test_a_large_jpeg_is_decoded_at_a_reduced_size(
    short_side: int | None, factor: int, large_jpeg: Path
) -> None:
    pixels, size = read_sized_image(large_jpeg, short_side=short_side)

    assert size == (400, 640)
    assert pixels.shape == (400 // factor, 640 // factor, 3)
    with PIL.Image.open(large_jpeg) as whole:
        expected = np.asarray(whole.reduce(factor))
    assert difference(pixels, expected) < 2


def test_plain_jpegs_equal_pillow_pixel_for_pixel(large_jpeg: Path) -> None:
    with PIL.Image.open(large_jpeg) as image:
        assert np.array_equal(read_image(large_jpeg), np.asarray(image))


@pytest.mark.parametrize("fraction", [0.3, 0.9, 0.999])
def test_a_truncated_jpeg_is_rejected_at_any_size(fraction: float, large_jpeg: Path) -> None:
    content = large_jpeg.read_bytes()
    large_jpeg.write_bytes(content[: int(len(content) * fraction)])
    for short_side in (None, 50):
        with pytest.raises(DataError, match=r"large\.jpg"):
            read_sized_image(large_jpeg, short_side=short_side)


def test_a_rotated_jpeg_is_upright_at_any_size(large_jpeg: Path) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    with PIL.Image.open(large_jpeg) as image:
        image.save(large_jpeg, exif=exif)
    pixels, size = read_sized_image(large_jpeg, short_side=50)
    assert size == (640, 400)
    assert pixels.shape[0] > pixels.shape[1]
    assert read_sized_image(large_jpeg, upright=False, short_side=50)[1] == (400, 640)


def test_find_images_sorts_and_skips_hidden_and_other_files(tmp_path: Path) -> None:
    expected = ["B.JPEG", "a.png", "deep/c.tiff", "deep/er/d.WebP", "e.avif"]
    others = ["notes.txt", "jpg", ".hidden.png", ".cache/x.png", "deep/.git/y.png", "z.png.part"]
    for name in [*expected, *others]:
        write_text(tmp_path / name, "")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "dangling.png").symlink_to("nowhere")

    found = list(find_images(tmp_path))

    assert [str(path.relative_to(tmp_path)) for path in found] == expected


def test_find_images_searches_a_hidden_folder_that_is_named(tmp_path: Path) -> None:
    """Only files hidden below the given folder are skipped."""
    write_text(tmp_path / ".cache" / "a.png", "")
    assert list(find_images(tmp_path / ".cache")) == [tmp_path / ".cache" / "a.png"]
