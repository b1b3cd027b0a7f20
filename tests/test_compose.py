"""Masks, cut-outs, backgrounds and panels to the pixel."""

from pathlib import Path

import numpy as np
import pytest

from segtrain.errors import DataError, UsageError
from segtrain.images import write_image
from segtrain.prediction.compose import (
    background_maker,
    make_alpha,
    make_cutout,
    make_mask,
    make_panel,
    put_on_background,
)

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)
PROBABILITY = np.linspace(0, 1, 20 * 30, dtype=np.float32).reshape(20, 30)


def test_mask_is_0_or_255_with_the_threshold_at_one_half() -> None:
    probability = np.array([[0.0, 0.4999, 0.5, 1.0]], dtype=np.float32)

    mask = make_mask(probability)

    assert mask.dtype == np.uint8
    assert mask.tolist() == [[0, 0, 255, 255]]


def test_alpha_is_soft_at_the_edge_and_solid_inside() -> None:
    alpha = make_alpha(np.array([[0.0, 0.3, 0.5, 0.7, 1.0]], dtype=np.float32))

    assert alpha.dtype == np.float32
    assert alpha[0].tolist() == pytest.approx([0, 0, 0.5, 1, 1], abs=1e-6)


def test_cutout_keeps_the_persons_colours_and_wipes_what_is_fully_transparent() -> None:
    cutout = make_cutout(IMAGE, PROBABILITY)

    alpha = cutout[..., 3]
    assert cutout.shape == (20, 30, 4)
    assert np.array_equal(cutout[alpha > 0, :3], IMAGE[alpha > 0])
    assert (cutout[alpha == 0] == 0).all()
    assert (alpha[PROBABILITY > 0.7] == 255).all()
    assert (alpha[PROBABILITY < 0.3] == 0).all()


def test_a_new_background_is_blended_by_alpha() -> None:
    background = RNG.integers(0, 256, IMAGE.shape, dtype=np.uint8)
    alpha = np.clip((PROBABILITY.astype(np.float64) - 0.3) / 0.4, 0, 1)[..., None]
    expected = IMAGE * alpha + background * (1 - alpha)

    composed = put_on_background(IMAGE, PROBABILITY, background)

    assert np.abs(composed - expected).max() <= 0.51
    assert np.array_equal(composed[PROBABILITY > 0.7], IMAGE[PROBABILITY > 0.7])
    assert np.array_equal(composed[PROBABILITY < 0.3], background[PROBABILITY < 0.3])


def test_a_colour_background_fills_the_picture() -> None:
    background = background_maker("#00fF80")(IMAGE)

    assert background.shape == IMAGE.shape
    assert (background == (0, 255, 128)).all()


def test_blur_keeps_size_and_mean_and_takes_the_detail() -> None:
    photo = RNG.integers(0, 256, (300, 500, 3), dtype=np.uint8)

    background = background_maker("blur")(photo)

    assert background.shape == photo.shape
    assert background.mean() == pytest.approx(photo.mean(), abs=2)
    assert background.std() < photo.std() / 5


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (700, 3)])
def test_blur_works_on_slivers(size: tuple[int, int]) -> None:
    sliver = np.full((*size, 3), 77, dtype=np.uint8)

    assert np.array_equal(background_maker("blur")(sliver), sliver)


@pytest.mark.parametrize("size", [(20, 30), (60, 20), (7, 200), (1, 1)])
def test_a_picture_background_covers_and_keeps_its_middle(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    # Thirds in red, green, blue from left to right: the middle of a wide picture is green.
    picture = np.zeros((30, 90, 3), dtype=np.uint8)
    for third in range(3):
        picture[:, 30 * third : 30 * third + 30, third] = 255
    write_image(tmp_path / "b.png", picture)

    background = background_maker(str(tmp_path / "b.png"))(np.zeros((*size, 3), dtype=np.uint8))

    assert background.shape == (*size, 3)
    assert background[size[0] // 2, size[1] // 2].tolist() == [0, 255, 0]


def test_an_endless_strip_as_background_takes_no_more_memory_than_the_photo(tmp_path: Path) -> None:
    write_image(tmp_path / "strip.png", np.full((4, 20_000, 3), 9, dtype=np.uint8))
    photo = np.zeros((1000, 800, 3), dtype=np.uint8)

    # Scaled whole it would be 1000 x 5,000,000.
    background = background_maker(str(tmp_path / "strip.png"))(photo)

    assert background.shape == photo.shape
    assert (background == 9).all()


def test_a_picture_background_of_the_same_size_is_taken_as_it_is(tmp_path: Path) -> None:
    write_image(tmp_path / "b.png", IMAGE)

    assert np.array_equal(background_maker(str(tmp_path / "b.png"))(np.zeros_like(IMAGE)), IMAGE)


@pytest.mark.parametrize("description", ["nowhere.jpg", "#12345", "green", "#gggggg"])
def test_an_unknown_background_is_a_usage_error(description: str) -> None:
    with pytest.raises(UsageError, match="--background"):
        background_maker(description)


def test_a_broken_background_picture_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "b.png").write_bytes(b"no picture")

    with pytest.raises(DataError, match=r"b\.png"):
        background_maker(str(tmp_path / "b.png"))


def test_panel_is_original_new_background_mask_side_by_side() -> None:
    other = 255 - IMAGE
    mask = make_mask(PROBABILITY)

    panel = make_panel(IMAGE, other, mask)

    gap = (panel.shape[1] - 90) // 2
    assert panel.shape[0] == 20
    assert np.array_equal(panel[:, :30], IMAGE)
    assert np.array_equal(panel[:, 30 + gap : 60 + gap], other)
    assert np.array_equal(panel[:, 60 + 2 * gap :, 0], mask)
