"""`from segtrain import Predictor` returns what the command writes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.command import Command
from PIL import Image

import segtrain as package
from segtrain import Predictor
from segtrain.errors import CheckpointError, DataError
from segtrain.imaging.images import read_image, write_image


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    write_image(path, np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    return path


def test_a_result_has_the_documented_shapes_and_units(trained_run: Path, photo: Path) -> None:
    result = Predictor(trained_run)(photo)

    assert result.image.shape == (30, 40, 3)
    assert (result.probability.shape, result.probability.dtype) == ((30, 40), np.float32)
    assert 0 <= result.probability.min() <= result.probability.max() <= 1
    assert (result.mask.shape, result.mask.dtype) == ((30, 40), np.uint8)
    assert np.array_equal(result.mask == 255, result.probability >= 0.5)
    assert (result.cutout().shape, result.cutout().dtype) == ((30, 40, 4), np.uint8)


@pytest.mark.parametrize("with_options", [False, True])
def test_a_result_equals_the_files_of_the_command(
    segtrain: Command, trained_run: Path, photo: Path, with_options: bool
) -> None:
    flags = ["--refine", "--clean", "--tta", "flip", "--size", "64"] if with_options else []
    options = {"refine": True, "clean": True, "tta": "flip", "size": 64} if with_options else {}
    command = ("predict", photo, "--checkpoint", trained_run, "-o", "out", *flags)
    assert segtrain(*command).code == 0

    result = Predictor(str(trained_run / "checkpoints" / "best.pt"), **options)(str(photo))

    with Image.open("out/photo_cutout.png") as written:
        assert np.array_equal(result.cutout(), np.asarray(written))
    with Image.open("out/photo_mask.png") as written:
        assert np.array_equal(result.mask, np.asarray(written))


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_path_a_pillow_image_and_an_array_give_the_same_result(
    trained_run: Path, photo: Path, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    with Image.open(photo) as image:
        image.save(photo, exif=exif)
    predictor = Predictor(trained_run)

    expected = predictor(photo)
    with Image.open(photo) as image:
        from_image = predictor(image)
    from_array = predictor(read_image(photo))

    for other in (from_image, from_array):
        assert np.array_equal(other.image, expected.image)
        assert np.array_equal(other.probability, expected.probability)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4), dtype=np.uint8),
        np.zeros((4, 4, 4), dtype=np.uint8),
        np.zeros((4, 4, 3), dtype=np.float32),
        np.zeros((0, 4, 3), dtype=np.uint8),
    ],
)
def test_an_array_that_is_not_rgb_is_rejected(trained_run: Path, array: object) -> None:
    with pytest.raises(ValueError, match="H W 3 uint8 RGB"):
        Predictor(trained_run)(array)  # type: ignore[arg-type]


def test_an_unreadable_checkpoint_or_image_has_its_own_error(
    trained_run: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        Predictor("nowhere.pt")
    with pytest.raises(DataError, match="nowhere"):
        Predictor(trained_run)("nowhere.jpg")


def test_importing_the_package_imports_no_heavy_library() -> None:
    script = (
        "import sys, segtrain\n"
        "heavy = {'torch', 'numpy', 'cv2', 'PIL', 'pydantic'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
        "from segtrain import Predictor\n"
        "assert 'torch' not in sys.modules\n"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_the_package_has_no_other_attribute() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        _ = package.nonsense
