"""COCO datasets, valid and broken. The oracle for valid masks is annToMask of pycocotools."""

import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from helpers.coco import (
    Row,
    annotation_file,
    annotation_row,
    image_row,
    make_toy_coco,
    write_annotations,
    write_coco,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

import segtrain
from segtrain.data.coco.dataset import CocoDataset, _decode_runs, is_coco
from segtrain.data.datasets import open_dataset
from segtrain.data.sample import LabelRules
from segtrain.errors import DataError
from segtrain.types import Mask

HEIGHT, WIDTH = 20, 30
SQUARE = [4.0, 3.0, 16.0, 3.0, 16.0, 15.0, 4.0, 15.0]
TRIANGLE = [10.5, 1.0, 28.0, 9.2, 12.0, 18.7]


def read_masks(root: Path, rows: list[Row], **options: Any) -> list[Mask]:
    """Read the masks of a dataset with these annotations; one image unless `images` is given."""
    images = options.pop("images", [image_row(1, HEIGHT, WIDTH)])
    write_coco(root, "val", images, rows, **options)
    dataset = CocoDataset(root, "val")
    return [dataset.sample(index).mask for index in range(len(dataset))]


def read_mask(root: Path, *segmentations: Any) -> Mask:
    """Read the mask of one image with these segmentations."""
    rows = [annotation_row(i, 1, segmentation) for i, segmentation in enumerate(segmentations)]
    return read_masks(root, rows)[0]


def pycocotools_mask(root: Path, image_id: int = 1) -> Mask:
    """Draw the union of one image's annotations by pycocotools."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(annotation_file(root, "val")))
    masks = [coco.annToMask(row) for row in coco.imgToAnns[image_id]]
    return np.any(masks, axis=0).astype(np.uint8)


def encode_runs(mask: npt.NDArray[Any]) -> Row:
    """Encode uncompressed COCO run lengths, counted pixel by pixel down the columns."""
    counts, current = [0], 0
    for value in mask.T.ravel().tolist():
        if value != current:
            counts.append(0)
            current = value
        counts[-1] += 1
    return {"size": list(mask.shape), "counts": counts}


def compress_runs(mask: npt.NDArray[Any]) -> Row:
    """Encode compressed COCO run lengths."""
    encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode()}


def ring() -> Mask:
    """Draw a region with a hole."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[2:18, 5:25] = 1
    mask[6:12, 10:20] = 0
    return mask


# --------------------------------------------------------------------------- valid regions


VALID_REGIONS: dict[str, list[Any]] = {
    "a polygon": [[SQUARE]],
    "a polygon with fractional coordinates": [[TRIANGLE]],
    "one person in several polygons": [[SQUARE, TRIANGLE]],
    "overlapping people": [[SQUARE], [TRIANGLE]],
    "plain run lengths with a hole": [encode_runs(ring())],
    "compressed run lengths with a hole": [compress_runs(ring())],
    "polygon and run lengths": [[SQUARE], compress_runs(ring()), encode_runs(ring()[::-1])],
    "a polygon partly outside the image": [[[-50.0, -9.0, 500.0, 8.0, 7.0, 900.0]]],
    "a polygon outside the image": [[[100.0, 100.0, 200.0, 100.0, 200.0, 200.0]]],
    "a self-intersecting polygon": [[[2.0, 2.0, 20.0, 18.0, 20.0, 2.0, 2.0, 18.0]]],
    "a polygon of one point": [[[5.0, 5.0] * 4]],
    "integers": [[[4, 3, 16, 3, 16, 15]]],
    "three points": [[[1.0, 1.0, 9.0, 1.0, 5.0, 9.0]]],
    "the whole image": [encode_runs(np.ones((HEIGHT, WIDTH), dtype=np.uint8))],
    "an empty region": [encode_runs(np.zeros((HEIGHT, WIDTH), dtype=np.uint8))],
}


@pytest.mark.parametrize("segmentations", VALID_REGIONS.values(), ids=VALID_REGIONS)
def test_valid_regions_match_pycocotools(segmentations: list[Any], tmp_path: Path) -> None:
    mask = read_mask(tmp_path, *segmentations)
    assert mask.dtype == np.uint8
    assert np.array_equal(mask, pycocotools_mask(tmp_path))


@pytest.mark.parametrize("encode", [encode_runs, compress_runs])
def test_a_hole_in_run_lengths_stays_background(encode: Any, tmp_path: Path) -> None:
    assert np.array_equal(read_mask(tmp_path, encode(ring())), ring())


def test_a_polygon_covers_the_pixels_inside(tmp_path: Path) -> None:
    expected = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    expected[3:15, 4:16] = 1
    assert np.array_equal(read_mask(tmp_path, [SQUARE]), expected)


def test_run_lengths_are_column_major(tmp_path: Path) -> None:
    image = [image_row(1, 3, 2)]
    row = annotation_row(1, 1, {"size": [3, 2], "counts": [1, 3, 2]})
    (mask,) = read_masks(tmp_path, [row], images=image)
    assert mask.tolist() == [[0, 1], [1, 0], [1, 0]]


def test_a_crowd_is_ignored_except_where_a_person_is_drawn(tmp_path: Path) -> None:
    crowd = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    crowd[:, 10:] = 1
    rows = [
        annotation_row(1, 1, [SQUARE]),
        annotation_row(2, 1, encode_runs(crowd), iscrowd=1),
        annotation_row(3, 1, [[20.0, 5.0, 24.0, 5.0, 24.0, 9.0, 20.0, 9.0]]),
    ]
    (mask,) = read_masks(tmp_path, rows)

    expected = crowd * 255
    expected[3:15, 4:16] = 1
    expected[5:9, 20:24] = 1
    assert np.array_equal(mask, expected)


def two_people_and_a_crowd(root: Path) -> Path:
    rows = [
        annotation_row(1, 1, [[1.0, 1.0, 3.0, 1.0, 3.0, 4.0, 1.0, 4.0]]),  # 6 of 600 pixels
        annotation_row(2, 1, [SQUARE]),  # 144
        annotation_row(3, 1, [[20.0, 5.0, 28.0, 5.0, 28.0, 9.0, 20.0, 9.0]], iscrowd=1),  # 32
    ]
    write_coco(root, "val", [image_row(1, HEIGHT, WIDTH)], rows)
    return root


@pytest.mark.parametrize(
    ("rules", "small", "large", "crowd"),
    [
        (LabelRules(), 1, 1, 255),
        (LabelRules(crowd="person"), 1, 1, 1),
        (LabelRules(largest_only=True), 255, 1, 255),
        (LabelRules(min_person_area=0.02), 255, 1, 255),
        (LabelRules(min_person_area=0.5), 255, 255, 255),
        (LabelRules(largest_only=True, crowd="person"), 255, 1, 1),
    ],
)
def test_label_rules_set_person_and_ignored_regions(
    rules: LabelRules, small: int, large: int, crowd: int, tmp_path: Path
) -> None:
    dataset = CocoDataset(two_people_and_a_crowd(tmp_path), "val", rules)

    expected = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    expected[5:9, 20:28] = crowd
    expected[1:4, 1:3] = small
    expected[3:15, 4:16] = large
    assert np.array_equal(dataset.sample(0).mask, expected)
    assert dataset.index.num_people.tolist() == [2]
    assert dataset.index.has_crowd.tolist() == [True]
    assert dataset.index.person_fraction[0] == pytest.approx((expected == 1).mean())


def test_masks_are_drawn_at_the_requested_size(tmp_path: Path) -> None:
    """A circle keeps its center and its area fraction; the runs of a crowd keep their position."""
    height, width = 120, 160
    angles = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    circle = np.stack([60 + 40 * np.cos(angles), 60 + 40 * np.sin(angles)], axis=1)
    crowd = np.zeros((height, width), dtype=np.uint8)
    crowd[20:60, 110:150] = 1
    rows = [
        annotation_row(1, 1, [circle.ravel().tolist()]),
        annotation_row(2, 1, encode_runs(crowd), iscrowd=1),
    ]
    write_coco(tmp_path, "val", [image_row(1, height, width)], rows)
    dataset = CocoDataset(tmp_path, "val")
    for short_side in (30, 60, 90, 240):
        sample = dataset.sample(0, short_side)
        factor = short_side / height
        assert sample.mask.shape == sample.image.shape[:2] == (short_side, round(width * factor))
        y, x = np.nonzero(sample.mask == 1)
        assert [y.mean() / factor, x.mean() / factor] == pytest.approx([60, 60], abs=1 / factor)
        assert (sample.mask == 1).mean() == pytest.approx(
            np.pi * 40**2 / (height * width), rel=0.06
        )
        y, x = np.nonzero(sample.mask == 255)
        center = (y.mean() + 0.5) / factor, (x.mean() + 0.5) / factor
        assert center == pytest.approx((40, 130), abs=1 / factor)


def test_scaling_run_lengths_does_not_shift_them() -> None:
    """Regions right of every column keep their width on average."""
    height, width, scaled = 8, 160, (6, 120)
    errors = []
    for start in range(1, width):
        runs = np.array([start * height, (width - start) * height], dtype=np.int32)
        columns = _decode_runs(runs, (height, width), scaled)[0].sum()
        errors.append(columns / 0.75 - (width - start))
    assert abs(np.mean(errors)) < 0.1


# --------------------------------------------------------------------------- the cached index


def test_a_second_start_does_not_read_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = two_people_and_a_crowd(tmp_path)
    first = CocoDataset(root, "val")
    monkeypatch.setattr("segtrain.data.coco.index._read_json", None)
    second = CocoDataset(root, "val")

    assert np.array_equal(first.sample(0).mask, second.sample(0).mask)
    for name in ("sizes", "person_fraction", "num_people", "has_crowd", "identities"):
        assert np.array_equal(getattr(first.index, name), getattr(second.index, name)), name


def test_an_edited_file_is_read_again(tmp_path: Path) -> None:
    root = two_people_and_a_crowd(tmp_path)
    before = CocoDataset(root, "val").sample(0).mask
    path = annotation_file(root, "val")
    old = path.stat()
    path.write_text(path.read_text().replace("16.0, 15.0", "16.0, 14.0"))
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))  # size and time do not change

    assert path.stat().st_size == old.st_size
    assert not np.array_equal(CocoDataset(root, "val").sample(0).mask, before)


def test_a_damaged_cache_is_rebuilt(tmp_path: Path) -> None:
    root = two_people_and_a_crowd(tmp_path / "coco")
    before = CocoDataset(root, "val").sample(0).mask
    cached = sorted((tmp_path / "cache").glob("*.npz"))
    assert len(cached) == 2
    for content in (
        b"",
        b"nothing",
        cached[0].read_bytes()[:-40],
        flip_bit(cached[0].read_bytes()),
    ):
        cached[0].write_bytes(content)
        assert np.array_equal(CocoDataset(root, "val").sample(0).mask, before)
        assert cached[0].read_bytes() != content


def flip_bit(content: bytes) -> bytes:
    """Flip one bit of a number in the first array."""
    at = content.index(b"\x93NUMPY") + 128 + 1
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def test_an_unwritable_cache_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SEGTRAIN_CACHE", str(tmp_path / "file" / "cache"))
    assert CocoDataset(two_people_and_a_crowd(tmp_path / "coco"), "val").sample(0).mask.any()


def test_the_cache_stores_skipped_annotations(tmp_path: Path) -> None:
    rows = [annotation_row(1, 1, [[1.0, 2.0]]), annotation_row(2, 1, [SQUARE])]
    write_coco(tmp_path, "val", [image_row(1, HEIGHT, WIDTH)], rows)
    skipped = [CocoDataset(tmp_path, "val").skipped for _ in range(2)]
    assert skipped == [{"polygon malformed": 1}] * 2


@pytest.mark.parametrize("value", [1 / 3, 12.345, 7.1, 1e-9])
def test_coordinates_are_stored_exactly(value: float, tmp_path: Path) -> None:
    outline = [4.0, 3.0, 16.0, 3.25, 16.5, 15.01, value, 15.0]
    read_masks(tmp_path, [annotation_row(1, 1, [outline])])
    [stored] = CocoDataset(tmp_path, "val").coco.polygons(0)
    assert stored.tolist() == outline


def test_a_crowd_may_be_a_polygon_or_compressed(tmp_path: Path) -> None:
    rows = [
        annotation_row(1, 1, [SQUARE], iscrowd=1),
        annotation_row(2, 1, compress_runs(ring()), iscrowd=1),
    ]
    (mask,) = read_masks(tmp_path, rows)
    assert np.array_equal(mask, pycocotools_mask(tmp_path) * 255)


def test_images_without_people_stay_in_the_dataset(tmp_path: Path) -> None:
    images = [image_row(i, HEIGHT, WIDTH) for i in (1, 2, 3)]
    rows = [annotation_row(1, 2, [SQUARE]), annotation_row(2, 3, [SQUARE], category_id=18)]
    masks = read_masks(tmp_path, rows, images=images)
    assert [int(mask.max()) for mask in masks] == [0, 1, 0]


def test_the_category_is_found_by_its_name(tmp_path: Path) -> None:
    """Id 1 is a dog, and two ids have the name person."""
    categories = [
        {"id": 1, "name": "dog"},
        {"id": 7, "name": "person"},
        {"id": 70, "name": "person"},
        {"id": 8, "name": "Person"},
        {"name": "nameless"},
    ]
    rows = [
        annotation_row(i, i, [SQUARE], category_id=category)
        for i, category in enumerate([1, 7, 70, 8], start=1)
    ]
    images = [image_row(i, HEIGHT, WIDTH) for i in (1, 2, 3, 4)]
    masks = read_masks(tmp_path, rows, images=images, categories=categories)
    assert [int(mask.max()) for mask in masks] == [0, 1, 1, 0]


# --------------------------------------------------------------------------- images


def test_samples_have_the_order_of_the_file_and_their_own_image(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sizes = {30: (20, 30), 4: (8, 9), 17: (12, 7)}
    photos = {i: rng.integers(0, 256, (*size, 3), np.uint8) for i, size in sizes.items()}
    images = [image_row(i, *size) for i, size in sizes.items()]
    write_coco(tmp_path, "train", images, [], pixels=photos)

    dataset = CocoDataset(tmp_path, "train")

    assert len(dataset) == 3
    assert dataset.index.sizes.tolist() == [list(size) for size in sizes.values()]
    for index, (image_id, pixels) in enumerate(photos.items()):
        sample = dataset.sample(index)
        assert sample.image_id == str(image_id)
        assert np.array_equal(sample.image, pixels)
        assert sample.mask.shape == pixels.shape[:2]


def test_a_gray_jpeg_becomes_three_channels(tmp_path: Path) -> None:
    images = [image_row(1, HEIGHT, WIDTH, "a.jpg")]
    gray = np.full((HEIGHT, WIDTH), 77, dtype=np.uint8)
    write_coco(tmp_path, "val", images, [], pixels={1: gray})
    assert (CocoDataset(tmp_path, "val").sample(0).image == np.full((HEIGHT, WIDTH, 3), 77)).all()


def test_exif_orientation_is_not_applied(tmp_path: Path) -> None:
    """Annotations refer to the stored pixels."""
    write_coco(tmp_path, "val", [image_row(1, HEIGHT, WIDTH, "a.jpg")], [])
    exif = Image.Exif()
    exif[0x0112] = 6
    plane = Image.new("RGB", (WIDTH, HEIGHT))
    plane.save(tmp_path / "val2017" / "a.jpg", exif=exif)
    assert CocoDataset(tmp_path, "val").sample(0).image.shape == (HEIGHT, WIDTH, 3)


def test_an_image_that_differs_from_the_annotated_size_is_an_error(tmp_path: Path) -> None:
    write_coco(tmp_path, "val", [image_row(1, HEIGHT, WIDTH, "a.png")], [])
    Image.new("RGB", (WIDTH, HEIGHT + 1)).save(tmp_path / "val2017" / "a.png")
    dataset = CocoDataset(tmp_path, "val")
    with pytest.raises(DataError, match=r"a\.png is 30x21, but its annotation says 30x20"):
        dataset.sample(0)


@pytest.mark.parametrize("content", [b"", b"no image", b"\xff\xd8\xff"])
def test_a_damaged_image_is_a_data_error(content: bytes, tmp_path: Path) -> None:
    write_coco(tmp_path, "val", [image_row(1, HEIGHT, WIDTH, "a.jpg")], [])
    (tmp_path / "val2017" / "a.jpg").write_bytes(content)
    dataset = CocoDataset(tmp_path, "val")
    with pytest.raises(DataError, match=r"a\.jpg"):
        dataset.sample(0)


def write_coco_without_images(root: Path, *, total: int, missing: int) -> None:
    write_coco(root, "val", [image_row(i, 4, 4) for i in range(total)], [])
    for i in range(missing):
        (root / "val2017" / f"{i:012d}.png").unlink()


@pytest.mark.parametrize(("total", "missing"), [(2, 1), (99, 1), (200, 2)])
def test_a_few_missing_images_are_skipped_and_counted(
    total: int, missing: int, tmp_path: Path
) -> None:
    write_coco_without_images(tmp_path, total=total, missing=missing)
    dataset = CocoDataset(tmp_path, "val")
    assert dataset.skipped == {"image missing": missing}
    assert len(dataset) == len(dataset.index.sizes) == total - missing
    assert dataset.sample(0).image_id == str(missing)


@pytest.mark.parametrize(("total", "missing"), [(4, 2), (4, 4), (150, 2), (200, 3)])
def test_many_missing_images_are_an_error(total: int, missing: int, tmp_path: Path) -> None:
    write_coco_without_images(tmp_path, total=total, missing=missing)
    with pytest.raises(DataError, match=f"{missing} of {total} images .*first 000000000000.png"):
        CocoDataset(tmp_path, "val")


def test_a_split_whose_only_image_is_missing_is_an_error(tmp_path: Path) -> None:
    write_coco_without_images(tmp_path, total=1, missing=1)
    with pytest.raises(DataError, match="lists no image that exists"):
        CocoDataset(tmp_path, "val")


def test_images_may_be_in_subfolders(tmp_path: Path) -> None:
    images = [image_row(1, 4, 4, "a/b/x.png"), image_row(2, 4, 4, "./y.png"), image_row(3, 4, 4)]
    write_coco(tmp_path, "val", images, [])
    dataset = CocoDataset(tmp_path, "val")
    assert [dataset.sample(i).image_id for i in range(len(dataset))] == ["1", "2", "3"]


@pytest.mark.parametrize(
    "name", ["gone/x.png", "a\0b.png", "\ud800.png", "n" * 300, "n" * 300 + "/x"]
)
def test_names_that_are_invalid_on_disk_are_missing_images(name: str, tmp_path: Path) -> None:
    write_coco(tmp_path, "val", [image_row(1, 4, 4)], [])
    rows = [image_row(1, 4, 4), image_row(2, 4, 4, name)]
    change_annotations(tmp_path, images=rows)
    assert CocoDataset(tmp_path, "val").skipped == {"image missing": 1}


def test_reading_does_not_change_the_dataset(tmp_path: Path) -> None:
    root = make_toy_coco(tmp_path / "data")
    (root / "val2017" / "000001000003.png").write_bytes(b"damaged")

    def fingerprint() -> dict[str, tuple[str, int]]:
        files = [path for path in root.rglob("*") if path.is_file()]
        return {
            str(path): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
            for path in files
        }

    before = fingerprint()
    for split in ("train", "val"):
        dataset = CocoDataset(root, split)
        for index in range(len(dataset)):
            with contextlib.suppress(DataError):
                dataset.sample(index)
    assert fingerprint() == before


# --------------------------------------------------------------------------- broken regions


def runs(counts: Any, size: Any = (HEIGHT, WIDTH)) -> Row:
    """Build a segmentation of run lengths."""
    return {"size": size, "counts": counts}


AREA = HEIGHT * WIDTH
GOOD_TEXT = compress_runs(ring())["counts"]

BROKEN_REGIONS: dict[str, Any] = {
    "no polygon": [],
    "an empty polygon": [[]],
    "an empty polygon among good ones": [SQUARE, []],
    "two numbers": [[1.0, 2.0]],
    "four numbers": [[1.0, 2.0, 9.0, 9.0]],
    "five numbers": [SQUARE[:5]],
    "seven numbers": [SQUARE[:7]],
    "numbers without a polygon": SQUARE,
    "a polygon nested too deeply": [[SQUARE]],
    "NaN": [[float("nan"), *SQUARE[1:]]],
    "infinity": [[float("inf"), *SQUARE[1:]]],
    "minus infinity": [[*SQUARE[:-1], float("-inf")]],
    "1e8": [[1e8, *SQUARE[1:]]],
    "-1e8": [[*SQUARE[:-1], -1e8]],
    "an enormous integer": [[10**400, *SQUARE[1:]]],
    "text among numbers": [["4", *SQUARE[1:]]],
    "text": ["4,3,16,3,16,15"],
    "null among numbers": [[None, *SQUARE[1:]]],
    "true among numbers": [[True, *SQUARE[1:]]],
    "null among polygons": [None],
    "null": None,
    "a number": 7,
    "true": True,
    "a string": "abc",
    "an empty object": {},
    "run lengths without size": {"counts": [AREA]},
    "run lengths without counts": {"size": [HEIGHT, WIDTH]},
    "the size transposed": runs([AREA], (WIDTH, HEIGHT)),
    "the size of another image": runs([AREA * 4], (HEIGHT * 2, WIDTH * 2)),
    "an enormous size": runs([2**62], (2**31, 2**31)),
    "a size of one number": runs([AREA], [AREA]),
    "a size that is a number": runs([AREA], AREA),
    "a size that is text": runs([AREA], "20x30"),
    "counts too short": runs([10, 20]),
    "counts too long": runs([10, AREA]),
    "no counts": runs([]),
    "a negative count": runs([AREA + 5, -5]),
    "a count as float": runs([10.0, AREA - 10.0]),
    "NaN as count": runs([float("nan"), AREA]),
    "an enormous count": runs([10**400]),
    "true as count": runs([True, AREA - 1]),
    "null as count": runs([None, AREA]),
    "nested counts": runs([[10], [AREA - 10]]),
    "counts null": runs(None),
    "counts a number": runs(AREA),
    "counts an object": runs({}),
    "text: empty": runs(""),
    "text: garbage": runs("!!not run lengths!!"),
    "text: truncated": runs(GOOD_TEXT[:-1]),
    "text: half": runs(GOOD_TEXT[: len(GOOD_TEXT) // 2]),
    "text: too long": runs(GOOD_TEXT + GOOD_TEXT),
    "text: ends within a number": runs(GOOD_TEXT + "o"),
    "text: an unterminated number": runs("o" * 10_000),
    "text: a million zeros": runs("0" * 1_000_000),
    "text: a negative count": runs("N"),
    "text: beyond ASCII": runs(GOOD_TEXT[:-1] + "\u20ac"),
    # Differs from the valid text only above the six significant bits.
    "text: outside the alphabet": runs(GOOD_TEXT[:-1] + chr(ord(GOOD_TEXT[-1]) + 64)),
    "text: a lone surrogate": runs("\ud800" + GOOD_TEXT),
}


@pytest.mark.parametrize("broken", BROKEN_REGIONS.values(), ids=BROKEN_REGIONS)
def test_a_broken_region_is_skipped_and_counted(broken: Any, tmp_path: Path) -> None:
    rows = [annotation_row(1, 1, [SQUARE]), annotation_row(2, 1, broken)]
    write_coco(tmp_path, "val", [image_row(1, HEIGHT, WIDTH)], rows)

    dataset = CocoDataset(tmp_path, "val")

    assert dataset.skipped.total() == 1
    expected = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    expected[3:15, 4:16] = 1
    assert np.array_equal(dataset.sample(0).mask, expected)


def test_an_annotation_without_segmentation_is_skipped_and_counted(tmp_path: Path) -> None:
    rows = [annotation_row(1, 1, [SQUARE]), annotation_row(2, 1, None)]
    del rows[1]["segmentation"]
    write_coco(tmp_path, "val", [image_row(1, HEIGHT, WIDTH)], rows)
    assert CocoDataset(tmp_path, "val").skipped == {"segmentation missing": 1}


def test_a_number_too_large_for_a_float_is_skipped(tmp_path: Path) -> None:
    """The JSON number 1e400 is read as infinity."""
    path = write_coco(
        tmp_path, "val", [image_row(1, HEIGHT, WIDTH)], [annotation_row(1, 1, [SQUARE])]
    )
    path.write_text(path.read_text().replace("16.0", "1e400", 1))
    dataset = CocoDataset(tmp_path, "val")
    assert dataset.skipped == {"polygon malformed": 1}
    assert not dataset.sample(0).mask.any()


@pytest.mark.parametrize(("good", "broken"), [(0, 1), (1, 1), (98, 1), (198, 2)])
def test_one_percent_of_the_regions_may_be_broken(good: int, broken: int, tmp_path: Path) -> None:
    rows = [annotation_row(i, 1, [SQUARE]) for i in range(good)]
    rows += [annotation_row(1000 + i, 1, [[]]) for i in range(broken)]
    write_coco(tmp_path, "val", [image_row(1, HEIGHT, WIDTH)], rows)
    assert CocoDataset(tmp_path, "val").skipped == {"polygon malformed": broken}


@pytest.mark.parametrize(("good", "broken"), [(0, 2), (2, 2), (197, 2), (296, 3)])
def test_more_broken_regions_are_an_error(good: int, broken: int, tmp_path: Path) -> None:
    rows = [annotation_row(i, 1, [SQUARE]) for i in range(good)]
    rows += [annotation_row(1000 + i, 1, [[]]) for i in range(broken)]
    # Broken annotations of other categories do not count.
    rows += [annotation_row(2000 + i, 1, [[]], category_id=18) for i in range(500)]
    path = write_coco(tmp_path, "val", [image_row(1, HEIGHT, WIDTH)], rows)
    expected = f"{path}: {broken} of {good + broken} person annotations .*polygon malformed"
    with pytest.raises(DataError, match=expected):
        CocoDataset(tmp_path, "val")


READ_WITH_LIMITED_MEMORY = """
import resource, sys
from pathlib import Path
from segtrain.data.coco.dataset import CocoDataset
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
limit = used + 500_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
dataset = CocoDataset(Path(sys.argv[1]), "val")
print(set(dataset.sample(0).mask.ravel().tolist()) <= {0, 1}, dataset.skipped.total())
"""


@pytest.mark.parametrize("points", [400, 40_000])
def test_a_long_outline_outside_the_image_does_not_exhaust_memory(
    points: int, tmp_path: Path
) -> None:
    """pycocotools stores five points per pixel of the outline, and crashes without memory."""
    zigzag = [99_999.0, 99_999.0, -99_999.0, -99_999.0] * (points // 2)
    write_coco(tmp_path, "val", [image_row(1, 20, 30)], [annotation_row(1, 1, [zigzag])])

    package_root = Path(segtrain.__file__).parents[1]
    process = subprocess.run(
        [sys.executable, "-c", READ_WITH_LIMITED_MEMORY, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(package_root)},
    )
    assert (process.returncode, process.stdout) == (0, "True 1\n"), process.stderr[-500:]


# --------------------------------------------------------------------------- broken files


def change_annotations(root: Path, **changes: Any) -> Path:
    """Replace lists of the annotation file; None removes a list."""
    path = annotation_file(root, "val")
    content = json.loads(path.read_text()) | changes
    kept = {key: value for key, value in content.items() if value is not None}
    return write_annotations(root, "val", json.dumps(kept))


@pytest.fixture
def small_coco(tmp_path: Path) -> Path:
    images = [image_row(1, HEIGHT, WIDTH), image_row(2, HEIGHT, WIDTH)]
    write_coco(tmp_path, "val", images, [annotation_row(1, 1, [SQUARE])])
    return tmp_path


NOT_COCO: dict[str, bytes] = {
    "empty": b"",
    "truncated": b'{"images": [',
    "null": b"null",
    "a number": b"42",
    "text": b'"images"',
    "a list": b"[]",
    "an empty object": b"{}",
    "binary": bytes(range(256)),
    "zeros": bytes(100),
    "nested too deeply for Python": b"[" * 100_000,
    "an integer of 5,000 digits": b'{"images": [' + b"9" * 5000 + b"]}",
    "a web page": b"<html>404</html>",
}


@pytest.mark.parametrize("content", NOT_COCO.values(), ids=NOT_COCO)
def test_a_file_that_is_not_coco_is_an_error_with_its_name(
    content: bytes, small_coco: Path
) -> None:
    path = annotation_file(small_coco, "val")
    path.write_bytes(content)
    with pytest.raises(DataError, match=path.name):
        CocoDataset(small_coco, "val")


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
@pytest.mark.parametrize("value", [None, {}, "text", 3, [None], [[]], ["text"], [{}, 1]])
def test_each_list_must_contain_objects(key: str, value: Any, small_coco: Path) -> None:
    change_annotations(small_coco, **{key: value})
    with pytest.raises(DataError, match=key):
        CocoDataset(small_coco, "val")


@pytest.mark.parametrize(
    "categories",
    [
        [],
        [{"id": 1, "name": "dog"}],
        [{"id": 1, "name": "People"}],
        [{"name": "person"}],
        [{"id": "1", "name": "person"}],
        [{"id": True, "name": "person"}],
        [{"id": [1], "name": "person"}],
        [{"id": 1, "name": ["person"]}],
    ],
)
def test_a_missing_person_category_is_an_error(categories: list[Row], small_coco: Path) -> None:
    change_annotations(small_coco, categories=categories)
    with pytest.raises(DataError, match="no category named 'person'"):
        CocoDataset(small_coco, "val")


@pytest.mark.parametrize("image_id", [3, -1, None, "1", 1.0, True, [1], 10**30])
def test_annotations_without_image_are_an_error_with_the_first_five(
    image_id: Any, small_coco: Path
) -> None:
    rows = [annotation_row(i, image_id, [SQUARE]) for i in range(41, 48)]
    change_annotations(small_coco, annotations=rows)
    with pytest.raises(DataError, match=r"7 annotations .* 41, 42, 43, 44, 45;"):
        CocoDataset(small_coco, "val")


def test_annotations_of_other_categories_may_have_no_image(small_coco: Path) -> None:
    """They are not read."""
    rows = [annotation_row(1, 99, [SQUARE], category_id=18), {}, {"category_id": [1]}]
    change_annotations(small_coco, annotations=rows)
    assert len(CocoDataset(small_coco, "val")) == 2


@pytest.mark.parametrize("key", ["id", "file_name", "height", "width"])
@pytest.mark.parametrize("value", [None, [], {}, 1.5, True, float("nan")])
def test_an_image_row_must_have_all_values(key: str, value: Any, small_coco: Path) -> None:
    row = image_row(77, HEIGHT, WIDTH) | {key: value}
    change_annotations(small_coco, images=[image_row(1, HEIGHT, WIDTH), row])
    with pytest.raises(DataError, match="1 images lack a valid id, file_name, height or width"):
        CocoDataset(small_coco, "val")


@pytest.mark.parametrize("side", [0, -1, 100_000, 2**31, 10**30])
@pytest.mark.parametrize("key", ["height", "width"])
def test_an_image_side_must_be_in_range(key: str, side: int, small_coco: Path) -> None:
    row = image_row(77, HEIGHT, WIDTH) | {key: side}
    change_annotations(small_coco, images=[image_row(1, HEIGHT, WIDTH), row])
    with pytest.raises(DataError, match="first ids 77;"):
        CocoDataset(small_coco, "val")


def test_duplicate_image_ids_are_an_error(small_coco: Path) -> None:
    images = [image_row(i, HEIGHT, WIDTH) for i in (1, 5, 6, 5, 6, 6)]
    change_annotations(small_coco, images=images)
    with pytest.raises(DataError, match="duplicate image ids, first 5, 6, 6;"):
        CocoDataset(small_coco, "val")


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png",
        "../val2017/000000000001.png",
        "a/../../secret.png",
        "a/..",
        "/etc/passwd",
        "//server/x.png",
        "..\\secret.png",
        "a\\..\\..\\secret.png",
        "\\\\server\\x.png",
        "",
    ],
)
def test_a_file_name_outside_the_root_is_an_error_before_any_file_is_opened(
    name: str, small_coco: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []
    monkeypatch.setattr(
        "segtrain.data.coco.dataset.read_sized_image", lambda path, **_: opened.append(path)
    )
    Image.new("RGB", (WIDTH, HEIGHT)).save(small_coco / "secret.png")
    rows = [image_row(1, HEIGHT, WIDTH), image_row(13, HEIGHT, WIDTH) | {"file_name": name}]
    change_annotations(small_coco, images=rows)
    with pytest.raises(DataError, match="of image 13 is outside the dataset"):
        CocoDataset(small_coco, "val")
    assert opened == []


def test_a_missing_split_or_folder_is_an_error_with_its_name(small_coco: Path) -> None:
    with pytest.raises(DataError, match=r"instances_train2017\.json is missing"):
        CocoDataset(small_coco, "train")
    (small_coco / "val2017").rename(small_coco / "elsewhere")
    with pytest.raises(DataError, match="val2017 is missing"):
        CocoDataset(small_coco, "val")


def test_a_folder_in_place_of_the_annotations_is_an_error(small_coco: Path) -> None:
    path = annotation_file(small_coco, "val")
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match=r"cannot read .*instances_val2017\.json"):
        CocoDataset(small_coco, "val")


def test_open_dataset_recognizes_the_layout(small_coco: Path, tmp_path: Path) -> None:
    assert is_coco(small_coco)
    assert isinstance(open_dataset(small_coco, "val"), CocoDataset)
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match="bare: unknown dataset layout"):
        open_dataset(tmp_path / "bare", "val")
    with pytest.raises(DataError, match="nowhere: not a folder"):
        open_dataset(tmp_path / "nowhere", "val")


# --------------------------------------------------------------------------- arbitrary input


@pytest.fixture(scope="module")
def one_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root whose annotations are replaced by each hypothesis example."""
    root = tmp_path_factory.mktemp("hypothesis")
    write_coco(root, "val", [image_row(1, HEIGHT, WIDTH)], [])
    return root


def mask_and_skipped(root: Path, segmentation: Any, *, iscrowd: int = 0) -> tuple[Mask, int]:
    """Read the mask of the image, and the number of skipped annotations."""
    row = annotation_row(1, 1, segmentation, iscrowd=iscrowd)
    change_annotations(root, annotations=[row])
    dataset = CocoDataset(root, "val")
    return dataset.sample(0).mask, dataset.skipped.total()


NUMBERS = st.one_of(
    st.floats(),
    st.floats(-10, 50),
    st.integers(-(10**6), 10**6),
    st.integers(0, AREA),
    st.sampled_from([10**400, -(2**63), 2**31, 99_999.9, -99_999.9, 1e308, 0.5, -0.0]),
)
JSON_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=5)),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)
POLYGON_LIKE = st.lists(st.lists(NUMBERS, max_size=12) | JSON_VALUES, max_size=3)
RLE_TEXT = st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=30)
RLE_LIKE = st.fixed_dictionaries(
    {},
    optional={
        "size": st.just([HEIGHT, WIDTH]) | st.lists(NUMBERS, max_size=3) | JSON_VALUES,
        "counts": RLE_TEXT | st.lists(NUMBERS, max_size=6) | JSON_VALUES,
    },
)


@settings(max_examples=400, deadline=None)
@given(
    segmentation=st.one_of(JSON_VALUES, POLYGON_LIKE, RLE_LIKE),
    iscrowd=st.sampled_from([0, 1]),
)
def test_any_segmentation_gives_a_valid_mask(
    one_image: Path, segmentation: Any, iscrowd: int
) -> None:
    mask, skipped = mask_and_skipped(one_image, segmentation, iscrowd=iscrowd)
    assert mask.shape == (HEIGHT, WIDTH)
    assert set(np.unique(mask)) <= ({0, 255} if iscrowd else {0, 1})
    if skipped:
        assert not mask.any()


COORDINATES = st.floats(-20, 50, width=32) | st.integers(-20, 50)


@settings(max_examples=150, deadline=None)
@given(
    polygons=st.lists(
        st.lists(COORDINATES, min_size=6, max_size=16).filter(lambda p: len(p) % 2 == 0),
        min_size=1,
        max_size=3,
    )
)
def test_any_valid_polygons_match_pycocotools(one_image: Path, polygons: list[list[float]]) -> None:
    mask, skipped = mask_and_skipped(one_image, polygons)
    assert skipped == 0
    assert np.array_equal(mask, pycocotools_mask(one_image))


@settings(max_examples=150, deadline=None)
@given(mask=npst.arrays(np.bool_, (HEIGHT, WIDTH)))
def test_any_encoded_mask_is_decoded_exactly(one_image: Path, mask: npt.NDArray[Any]) -> None:
    for segmentation in (compress_runs(mask), encode_runs(mask)):
        decoded, skipped = mask_and_skipped(one_image, segmentation)
        assert skipped == 0
        assert np.array_equal(decoded, mask)


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (700, 1), (640, 480), (1500, 2000)])
@pytest.mark.parametrize("block", [1, 37, 5000])
def test_long_and_short_runs_are_decoded_exactly(
    size: tuple[int, int], block: int, tmp_path: Path
) -> None:
    """Runs of one to several characters in the text form, and differences of either sign."""
    length = size[0] * size[1]
    rng = np.random.default_rng(length + block)
    changes = rng.random(length) < 1 / block
    mask = (np.cumsum(changes) % 2).astype(np.uint8).reshape(size)
    row = annotation_row(1, 1, compress_runs(mask))
    (decoded,) = read_masks(tmp_path, [row], images=[image_row(1, *size)])
    assert np.array_equal(decoded, mask)


@settings(max_examples=200, deadline=None)
@given(
    position=st.integers(0, len(GOOD_TEXT) - 1),
    character=st.characters(max_codepoint=200),
    replaced=st.integers(0, 1),
)
def test_one_wrong_character_never_gives_a_partial_mask(
    one_image: Path, position: int, character: str, replaced: int
) -> None:
    """Either the runs still cover the image exactly, or the region is skipped."""
    text = GOOD_TEXT[:position] + character + GOOD_TEXT[position + replaced :]
    mask, skipped = mask_and_skipped(one_image, runs(text))
    if skipped:
        assert not mask.any()
    else:
        assert np.array_equal(mask, pycocotools_mask(one_image))
