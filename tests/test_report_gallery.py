"""The files of the gallery: the right pixels, few bytes kept, and nobody else's files touched."""

import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from evaluation_cases import smooth_case
from PIL import Image
from report_cases import DrawnSource, drawn_judgement, shape_of

from segtrain.errors import UsageError
from segtrain.evaluation.picture import Probs
from segtrain.evaluation.report.folder import Kind, picture_path, refuse_existing
from segtrain.evaluation.report.gallery import Gallery
from segtrain.evaluation.report.layers import INVENTED, MISSED
from segtrain.evaluation.report.page import write_report
from segtrain.images import Pixels

KINDS: tuple[Kind, ...] = ("photo", "thumb", "truth", "prediction", "errors")


def colour_at(path: Path, row: int, column: int) -> tuple[int, ...]:
    """Red, green, blue and opacity, as a browser sees them."""
    with Image.open(path) as picture:
        found = picture.convert("RGBA").getpixel((column, row))
    assert isinstance(found, tuple)
    return found


def labels_in(path: Path) -> "np.ndarray":
    with Image.open(path) as picture:
        assert picture.mode == "P"
        return np.asarray(picture)


def noise(shape: tuple[int, int]) -> tuple[Probs, Pixels]:
    """Every pixel another than its neighbours: one taken from beside the right place shows."""
    rng = np.random.default_rng(0)
    mask = rng.choice(np.array([0, 1, 255], dtype=np.uint8), shape)
    return rng.random(shape, dtype=np.float32), mask


def expected(index_in: str, probability: float, truth: int) -> set[int]:
    """The labels that a pixel may have, said once more and pixel by pixel."""
    called = probability >= 0.5
    if index_in == "prediction":
        return {int(called)}
    if truth == 255:
        return {3, 4}
    if index_in == "truth":
        return {truth}
    return {0} if called == bool(truth) else {1 if truth else 2}


@pytest.mark.parametrize("shape", [(48, 64), (1000, 1333), (1333, 1000), (1, 2000)])
def test_label_maps_are_the_classes_of_the_pixels(shape: tuple[int, int], tmp_path: Path) -> None:
    probs, mask = noise(shape)
    Gallery(tmp_path, DrawnSource(1, shape), 0.5).add(0, probs, mask)

    scale = min(1, 640 / max(shape))
    height, width = (max(1, round(side * scale)) for side in shape)
    for kind in ("truth", "prediction", "errors"):
        labels = labels_in(picture_path(tmp_path, 0, kind))
        assert labels.shape == (height, width)
        for row in range(0, height, 1 if max(shape) < 100 else 13):
            for column in range(width):
                # The pixel at the middle of this one.
                at = (
                    (2 * row + 1) * shape[0] // (2 * height),
                    (2 * column + 1) * shape[1] // (2 * width),
                )
                wanted = expected(kind, float(probs[at]), int(mask[at]))
                assert labels[row, column] in wanted, (kind, row, column)
    assert set(labels.flat) == {0, 1, 2, 3, 4}


def test_colours_show_what_is_wrong_and_leave_the_rest_clear(tmp_path: Path) -> None:
    mask = np.array([[0, 1, 1, 0, 255]], dtype=np.uint8)
    probs = np.array([[0.9, 0.1, 0.9, 0.1, 0.9]], dtype=np.float32)
    Gallery(tmp_path, DrawnSource(1, (1, 5)), 0.5).add(0, probs, mask)

    errors, truth = (picture_path(tmp_path, 0, kind) for kind in ("errors", "truth"))
    assert colour_at(errors, 0, 0) == INVENTED
    assert colour_at(errors, 0, 1) == MISSED
    assert colour_at(errors, 0, 2)[3] == colour_at(errors, 0, 3)[3] == 0
    assert colour_at(errors, 0, 4)[3] > 0
    # Person is left clear, the rest is veiled.
    assert [colour_at(truth, 0, column)[3] > 0 for column in range(5)] == [1, 0, 0, 1, 1]
    prediction = picture_path(tmp_path, 0, "prediction")
    assert [colour_at(prediction, 0, column)[3] > 0 for column in range(5)] == [0, 1, 0, 1, 0]


def test_the_threshold_itself_is_person(tmp_path: Path) -> None:
    probs = np.array([[0.3, 0.29999]], dtype=np.float32)
    Gallery(tmp_path, DrawnSource(1, (1, 2)), 0.3).add(0, probs, np.zeros((1, 2), np.uint8))

    assert labels_in(picture_path(tmp_path, 0, "prediction")).tolist() == [[1, 0]]


@pytest.mark.parametrize("shape", [(40, 30), (900, 1200), (30, 4000)])
def test_photos_have_the_size_of_their_layers(shape: tuple[int, int], tmp_path: Path) -> None:
    Gallery(tmp_path, DrawnSource(1, shape), 0.5).add(0, *noise(shape))

    sizes = {}
    for kind in KINDS:
        with Image.open(picture_path(tmp_path, 0, kind)) as picture:
            sizes[kind] = picture.size
    assert len({sizes[kind] for kind in KINDS if kind != "thumb"}) == 1
    assert max(sizes["photo"]) == min(640, max(shape))
    assert max(sizes["thumb"]) == min(288, max(shape))


def test_the_photo_is_the_picture(tmp_path: Path) -> None:
    flat = DrawnSource(1, (48, 64))
    flat.image = lambda index: np.full((48, 64, 3), (200, 40, 90), np.uint8)  # type: ignore
    Gallery(tmp_path, flat, 0.5).add(0, *smooth_case(0))

    for kind in ("photo", "thumb"):
        with Image.open(picture_path(tmp_path, 0, kind)) as picture:
            assert np.abs(np.asarray(picture).astype(int) - (200, 40, 90)).max() <= 4


def test_a_small_strip_is_shown_as_sharp_as_it_is(tmp_path: Path) -> None:
    Gallery(tmp_path, DrawnSource(1, (8, 600)), 0.5).add(0, *noise((8, 600)))

    with Image.open(picture_path(tmp_path, 0, "photo")) as picture:
        shown = np.asarray(picture.convert("L"), dtype=float)
    gray = DrawnSource(1, (8, 600)).image(0).mean(axis=2)
    assert np.corrcoef(shown.flat, gray.flat)[0, 1] > 0.85


def test_threads_write_the_same_files_as_one_after_the_other(tmp_path: Path) -> None:
    num = 12
    for folder, workers in (("one", 1), ("four", 4)):
        gallery = Gallery(tmp_path / folder, DrawnSource(num), 0.5)
        with ThreadPoolExecutor(workers) as pool:
            jobs = [pool.submit(gallery.add, i, *smooth_case(i, shape_of(i))) for i in range(num)]
        assert [job.result() for job in jobs] == [None] * num

    one, four = (
        {p.name: p.read_bytes() for p in (tmp_path / f).rglob("*.*")} for f in ("one", "four")
    )
    assert one == four
    assert one.keys() == {
        picture_path(tmp_path, i, kind).name for i in range(num) for kind in KINDS
    }


def test_memory_does_not_grow_with_the_pictures(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path, DrawnSource(100), 0.5)
    case = smooth_case(0)

    def held_after(indices: range) -> int:
        for index in indices:
            gallery.add(index, *case)
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        few = held_after(range(0, 99, 3))
        many = held_after(range(1, 99, 3))
    finally:
        tracemalloc.stop()
    # A picture's smallest layer alone would be ten times as much.
    assert many - few < 33 * 300


# --- The folder ---------------------------------------------------------------------------------


def test_a_report_that_exists_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    refuse_existing(tmp_path / "new", overwrite=False)
    refuse_existing(tmp_path, overwrite=False)
    page = tmp_path / "index.html"
    page.write_text("old")
    with pytest.raises(UsageError, match=r"index\.html exists; give --overwrite"):
        refuse_existing(tmp_path, overwrite=False)
    refuse_existing(tmp_path, overwrite=True)
    assert page.read_text() == "old"

    page.unlink()
    (tmp_path / "pictures").mkdir()
    with pytest.raises(UsageError, match="pictures exists"):
        refuse_existing(tmp_path, overwrite=False)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    file = tmp_path / "report"
    file.touch()
    with pytest.raises(UsageError, match="is a file"):
        refuse_existing(file, overwrite=True)


def test_what_an_earlier_report_left_goes_and_nothing_else(tmp_path: Path) -> None:
    gallery = Gallery(tmp_path, DrawnSource(9), 0.5)
    for index in range(9):
        gallery.add(index, *smooth_case(index, shape_of(index)))
    pictures = tmp_path / "pictures"
    theirs = ["9-photo.jpg.bak", "my-photo.jpg", "8-photo.png", ".notes.tmp", "x8-photo.jpg"]
    for name in theirs:
        (pictures / name).touch()
    (pictures / ".7-truth.png.4321.tmp").touch()
    (tmp_path / "notes.txt").touch()

    write_report(tmp_path, drawn_judgement(6))

    left = {path.name for path in pictures.iterdir()}
    assert left == {picture_path(tmp_path, i, kind).name for i in range(6) for kind in KINDS} | {
        *theirs
    }
    assert {path.name for path in tmp_path.iterdir()} == {"pictures", "index.html", "notes.txt"}


def test_a_new_gallery_takes_down_the_old_page(tmp_path: Path) -> None:
    write_report(tmp_path, drawn_judgement(2))
    Gallery(tmp_path, DrawnSource(2), 0.5)
    assert not (tmp_path / "index.html").exists()


def test_asking_for_room_imports_nothing_heavy() -> None:
    script = (
        "import sys, segtrain.evaluation.report.folder as f\n"
        "heavy = {'torch', 'numpy', 'cv2', 'PIL', 'jinja2', 'matplotlib'} & {*sys.modules}\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
