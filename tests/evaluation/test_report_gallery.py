"""The files of the gallery: their pixels, memory, and other files in the folder."""

import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from helpers.evaluation import smooth_case
from helpers.report import NoiseDataset, shape_of, smooth_result

from segtrain.errors import UsageError
from segtrain.evaluation.report.gallery import (
    FALSE_NEGATIVE_COLOR,
    FALSE_POSITIVE_COLOR,
    Gallery,
)
from segtrain.evaluation.report.page import write_report
from segtrain.evaluation.report.paths import AssetKind, check_report_dir, image_path
from segtrain.types import Mask, Probs

KINDS: tuple[AssetKind, ...] = ("photo", "thumb", "truth", "prediction", "errors")


def color_at(path: Path, row: int, column: int) -> tuple[int, ...]:
    """Red, green, blue and opacity, as a browser renders them."""
    with PIL.Image.open(path) as image:
        color = image.convert("RGBA").getpixel((column, row))
    assert isinstance(color, tuple)
    return color


def labels_in(path: Path) -> "np.ndarray":
    with PIL.Image.open(path) as image:
        assert image.mode == "P"
        return np.asarray(image)


def noise(shape: tuple[int, int]) -> tuple[Probs, Mask]:
    """Random pixels, so that sampling a neighbor of the right pixel is noticed."""
    rng = np.random.default_rng(0)
    mask = rng.choice(np.array([0, 1, 255], dtype=np.uint8), shape)
    return rng.random(shape, dtype=np.float32), mask


def expected_labels(kind: str, probability: float, truth: int) -> set[int]:
    """The labels that a pixel may have, as an independent implementation."""
    predicted = probability >= 0.5
    if kind == "prediction":
        return {int(predicted)}
    if truth == 255:
        return {3, 4}
    if kind == "truth":
        return {truth}
    return {0} if predicted == bool(truth) else {1 if truth else 2}


@pytest.mark.parametrize("shape", [(48, 64), (1000, 1333), (1333, 1000), (1, 2000)])
def test_label_maps_match_the_pixels(shape: tuple[int, int], tmp_path: Path) -> None:
    probs, mask = noise(shape)
    Gallery(tmp_path, NoiseDataset(1, shape), 0.5).add(0, probs, mask)

    scale = min(1, 640 / max(shape))
    height, width = (max(1, round(side * scale)) for side in shape)
    for kind in ("truth", "prediction", "errors"):
        labels = labels_in(image_path(tmp_path, 0, kind))
        assert labels.shape == (height, width)
        for row in range(0, height, 1 if max(shape) < 100 else 13):
            for column in range(width):
                # The source pixel at the center of this one.
                center = (
                    (2 * row + 1) * shape[0] // (2 * height),
                    (2 * column + 1) * shape[1] // (2 * width),
                )
                allowed = expected_labels(kind, float(probs[center]), int(mask[center]))
                assert labels[row, column] in allowed, (kind, row, column)
    assert set(labels.flat) == {0, 1, 2, 3, 4}


def test_errors_are_colored_and_correct_pixels_transparent(tmp_path: Path) -> None:
    mask = np.array([[0, 1, 1, 0, 255]], dtype=np.uint8)
    probs = np.array([[0.9, 0.1, 0.9, 0.1, 0.9]], dtype=np.float32)
    Gallery(tmp_path, NoiseDataset(1, (1, 5)), 0.5).add(0, probs, mask)

    errors, truth = (image_path(tmp_path, 0, kind) for kind in ("errors", "truth"))
    assert color_at(errors, 0, 0) == FALSE_POSITIVE_COLOR
    assert color_at(errors, 0, 1) == FALSE_NEGATIVE_COLOR
    assert color_at(errors, 0, 2)[3] == color_at(errors, 0, 3)[3] == 0
    assert color_at(errors, 0, 4)[3] > 0
    # Person is transparent, the rest veiled.
    assert [color_at(truth, 0, column)[3] > 0 for column in range(5)] == [1, 0, 0, 1, 1]
    prediction = image_path(tmp_path, 0, "prediction")
    assert [color_at(prediction, 0, column)[3] > 0 for column in range(5)] == [0, 1, 0, 1, 0]


def test_the_threshold_itself_is_person(tmp_path: Path) -> None:
    probs = np.array([[0.3, 0.29999]], dtype=np.float32)
    Gallery(tmp_path, NoiseDataset(1, (1, 2)), 0.3).add(0, probs, np.zeros((1, 2), np.uint8))

    assert labels_in(image_path(tmp_path, 0, "prediction")).tolist() == [[1, 0]]


@pytest.mark.parametrize("shape", [(40, 30), (900, 1200), (30, 4000)])
def test_photos_and_layers_have_the_same_size(shape: tuple[int, int], tmp_path: Path) -> None:
    Gallery(tmp_path, NoiseDataset(1, shape), 0.5).add(0, *noise(shape))

    sizes = {}
    for kind in KINDS:
        with PIL.Image.open(image_path(tmp_path, 0, kind)) as image:
            sizes[kind] = image.size
    assert len({sizes[kind] for kind in KINDS if kind != "thumb"}) == 1
    assert max(sizes["photo"]) == min(640, max(shape))
    assert max(sizes["thumb"]) == min(288, max(shape))


def test_the_photo_is_the_image(tmp_path: Path) -> None:
    dataset = NoiseDataset(1, (48, 64))
    dataset.image = lambda index: np.full((48, 64, 3), (200, 40, 90), np.uint8)  # type: ignore
    Gallery(tmp_path, dataset, 0.5).add(0, *smooth_case(0))

    for kind in ("photo", "thumb"):
        with PIL.Image.open(image_path(tmp_path, 0, kind)) as image:
            assert np.abs(np.asarray(image).astype(int) - (200, 40, 90)).max() <= 4


def test_a_small_strip_keeps_its_resolution(tmp_path: Path) -> None:
    Gallery(tmp_path, NoiseDataset(1, (8, 600)), 0.5).add(0, *noise((8, 600)))

    with PIL.Image.open(image_path(tmp_path, 0, "photo")) as image:
        shown = np.asarray(image.convert("L"), dtype=float)
    gray = NoiseDataset(1, (8, 600)).image(0).mean(axis=2)
    assert np.corrcoef(shown.flat, gray.flat)[0, 1] > 0.85


def test_threads_write_the_same_files_as_a_single_one(tmp_path: Path) -> None:
    num = 12
    for folder, workers in (("one", 1), ("four", 4)):
        gallery = Gallery(tmp_path / folder, NoiseDataset(num), 0.5)
        with ThreadPoolExecutor(workers) as pool:
            jobs = [pool.submit(gallery.add, i, *smooth_case(i, shape_of(i))) for i in range(num)]
        assert [job.result() for job in jobs] == [None] * num

    one, four = (
        {p.name: p.read_bytes() for p in (tmp_path / f).rglob("*.*")} for f in ("one", "four")
    )
    assert one == four
    assert one.keys() == {image_path(tmp_path, i, kind).name for i in range(num) for kind in KINDS}


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path, NoiseDataset(100), 0.5)
    case = smooth_case(0)

    def memory_after(indices: range) -> int:
        for index in indices:
            gallery.add(index, *case)
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        few = memory_after(range(0, 99, 3))
        many = memory_after(range(1, 99, 3))
    finally:
        tracemalloc.stop()
    # The smallest layer of an image alone is ten times as large.
    assert many - few < 33 * 300


# --- Folder ---------------------------------------------------------------------------------------


def test_an_existing_report_is_refused_and_not_changed(tmp_path: Path) -> None:
    check_report_dir(tmp_path / "new", overwrite=False)
    check_report_dir(tmp_path, overwrite=False)
    page = tmp_path / "index.html"
    page.write_text("old")
    with pytest.raises(UsageError, match=r"index\.html exists; use --overwrite"):
        check_report_dir(tmp_path, overwrite=False)
    check_report_dir(tmp_path, overwrite=True)
    assert page.read_text() == "old"

    page.unlink()
    (tmp_path / "images").mkdir()
    with pytest.raises(UsageError, match="images exists"):
        check_report_dir(tmp_path, overwrite=False)


def test_a_file_as_folder_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "report"
    file.touch()
    with pytest.raises(UsageError, match="is a file"):
        check_report_dir(file, overwrite=True)


def test_only_files_of_an_earlier_report_are_removed(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path, NoiseDataset(9), 0.5)
    for index in range(9):
        gallery.add(index, *smooth_case(index, shape_of(index)))
    images = tmp_path / "images"
    other_files = ["9-photo.jpg.bak", "my-photo.jpg", "8-photo.png", ".notes.tmp", "x8-photo.jpg"]
    for name in other_files:
        (images / name).touch()
    (images / ".7-truth.png.4321.tmp").touch()
    (tmp_path / "notes.txt").touch()

    write_report(tmp_path, smooth_result(6))

    remaining = {path.name for path in images.iterdir()}
    assert remaining == {image_path(tmp_path, i, kind).name for i in range(6) for kind in KINDS} | {
        *other_files
    }
    assert {path.name for path in tmp_path.iterdir()} == {"images", "index.html", "notes.txt"}


def test_a_new_gallery_removes_the_old_page(tmp_path: Path) -> None:
    write_report(tmp_path, smooth_result(2))
    Gallery(tmp_path, NoiseDataset(2), 0.5)
    assert not (tmp_path / "index.html").exists()


def test_the_module_of_paths_imports_nothing_heavy() -> None:
    script = (
        "import sys, segtrain.evaluation.report.paths\n"
        "heavy = {'torch', 'numpy', 'cv2', 'PIL', 'jinja2', 'matplotlib'} & {*sys.modules}\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
