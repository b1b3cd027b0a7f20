"""Masks, opacities, cut-outs, backgrounds, overlays and panels to the pixel."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from segtrain.errors import DataError, UsageError
from segtrain.images import Pixels, write_image
from segtrain.prediction.alpha import make_alpha, make_mask
from segtrain.prediction.backgrounds import MakeBackground, background_maker
from segtrain.prediction.compose import (
    checkerboard,
    make_overlay,
    make_panel,
    put_on_background,
)
from segtrain.prediction.foreground import make_cutout
from segtrain.prediction.outputs import OUTPUTS, Composition, Result, suffix_of
from segtrain.prediction.probability import Values
from segtrain.sheets import OUTLINE_COLOUR

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)
PROBABILITY = np.linspace(0, 1, 20 * 30, dtype=np.float32).reshape(20, 30)
ALPHA = np.rint(255 * PROBABILITY).astype(np.uint8)


def made(make: MakeBackground, image: Pixels, alpha: Pixels | None = None) -> Pixels:
    background = make(image, alpha)
    assert background is not None
    return background


def ramp(width: int, rows: int = 40, columns: int = 120) -> Values:
    """0 at the left, 1 at the right, and `width` pixels of slope around the middle."""
    line = (np.arange(columns) - (columns - 1) / 2) / width + 0.5
    return np.tile(line.clip(0, 1).astype(np.float32), (rows, 1))


def test_mask_is_0_or_255_with_the_threshold_at_one_half() -> None:
    probability = np.array([[0.0, 0.4999, 0.5, 1.0]], dtype=np.float32)

    mask = make_mask(probability)

    assert mask.dtype == np.uint8
    assert mask.tolist() == [[0, 0, 255, 255]]


def test_a_steep_edge_is_as_soft_as_the_network_says() -> None:
    # 3 pixels from 0 to 1, so 0.3 .. 0.7 within little more than one: nothing to steepen.
    probability = ramp(3)

    expected = np.rint(255 * ((probability - 0.3) / 0.4).clip(0, 1))

    assert np.abs(make_alpha(probability).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("width", [10, 30, 60])
def test_an_edge_that_enlarging_made_wide_is_drawn_three_pixels_wide(width: int) -> None:
    probability = ramp(width)

    alpha = make_alpha(probability)

    # Within the straight slope opacity rises by a third of 255 a pixel.
    assert np.abs(alpha[:, 58:62] - np.array([0, 85, 170, 255])).max() <= 2
    assert (alpha[:, :58] == 0).all()
    assert (alpha[:, 62:] == 255).all()


def test_edges_of_large_pictures_are_wider_but_half_a_percent_at_most() -> None:
    alpha = make_alpha(ramp(300, rows=1400, columns=1400))

    assert ((alpha > 0) & (alpha < 255)).sum(axis=1).tolist() == [pytest.approx(7, abs=1)] * 1400


@pytest.mark.parametrize(("unsure", "opacity"), [(0.55, 255), (0.45, 0), (0.5, 128)])
def test_a_region_the_network_is_unsure_of_is_not_half_transparent(
    unsure: float, opacity: int
) -> None:
    probability = np.full((60, 60), 0.95 if unsure >= 0.5 else 0.05, dtype=np.float32)
    probability[10:50, 10:50] = unsure

    assert (make_alpha(cv2.blur(probability, (5, 5)))[25:35, 25:35] == opacity).all()


def test_a_single_hair_stays_soft_along_its_ridge() -> None:
    # On the ridge the probability is flat, only its sides are steep.
    probability = np.full((30, 31), 0.02, dtype=np.float32)
    probability[:, 15] = 0.45
    probability[:, [14, 16]] = 0.35

    alpha = make_alpha(probability)

    assert alpha[15, 15] == pytest.approx(255 * 0.375, abs=2)
    assert alpha[15, 14] == pytest.approx(255 * 0.125, abs=2)


def test_opacity_is_above_one_half_exactly_on_the_mask() -> None:
    wobbly = RNG.random((40, 50), dtype=np.float32)
    just_below = np.nextafter(np.float32(0.5), np.float32(0))
    wobbly[::3] = np.float32(0.5)
    wobbly[1::3] = just_below

    for probability in (wobbly, cv2.GaussianBlur(wobbly, (0, 0), 3), PROBABILITY):
        probability = np.asarray(probability, dtype=np.float32)
        assert np.array_equal(make_alpha(probability) >= 128, make_mask(probability) > 0)


def test_opacity_of_a_picture_does_not_show_its_tiles() -> None:
    # 1100 x 1100 has many tiles; shifted by 300 the same scene is cut elsewhere.
    scene = cv2.GaussianBlur(RNG.random((1400, 1400), dtype=np.float32), (0, 0), 25)
    scene = np.asarray((scene - scene.mean()) / scene.std() * 0.3 + 0.5, dtype=np.float32).clip(
        0, 1
    )

    alpha = make_alpha(scene[:1100, :1100])
    shifted = make_alpha(scene[300:, 300:])

    inside = slice(10, 790)
    assert np.array_equal(alpha[300:, 300:][inside, inside], shifted[:800, :800][inside, inside])


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (2, 3)])
@pytest.mark.parametrize("value", [0.0, 0.4, 0.5, 1.0])
def test_slivers_have_an_opacity(size: tuple[int, int], value: float) -> None:
    probability = np.full(size, value, dtype=np.float32)

    assert make_alpha(probability).shape == size


def test_a_cutout_is_the_foreground_with_its_opacity() -> None:
    cutout = make_cutout(IMAGE, ALPHA)

    assert np.array_equal(cutout[..., 3], ALPHA)
    assert np.array_equal(cutout[ALPHA == 255, :3], IMAGE[ALPHA == 255])
    assert (cutout[ALPHA == 0] == 0).all()


def test_a_new_background_is_blended_by_alpha() -> None:
    background = RNG.integers(0, 256, IMAGE.shape, dtype=np.uint8)
    weight = ALPHA[..., None] / 255
    expected = IMAGE * weight + background * (1 - weight)

    composed = background.copy()
    put_on_background(np.dstack([IMAGE, ALPHA]), composed)

    assert np.abs(composed - expected).max() <= 0.51
    assert np.array_equal(composed[ALPHA == 255], IMAGE[ALPHA == 255])
    assert np.array_equal(composed[ALPHA == 0], background[ALPHA == 0])


def test_a_colour_background_fills_the_picture() -> None:
    background = made(background_maker("#00fF80"), IMAGE)

    assert background.shape == IMAGE.shape
    assert (background == (0, 255, 128)).all()


def test_blur_keeps_size_and_mean_and_takes_the_detail() -> None:
    photo = RNG.integers(0, 256, (300, 500, 3), dtype=np.uint8)

    background = made(background_maker("blur"), photo)

    assert background.shape == photo.shape
    assert background.mean() == pytest.approx(photo.mean(), abs=2)
    assert background.std() < photo.std() / 5


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (700, 3)])
def test_blur_works_on_slivers(size: tuple[int, int]) -> None:
    sliver = np.full((*size, 3), 77, dtype=np.uint8)

    alpha = np.full(size, 255, dtype=np.uint8)

    assert np.array_equal(made(background_maker("blur"), sliver), sliver)
    assert np.array_equal(made(background_maker("blur"), sliver, alpha), sliver)


def test_a_blurred_background_has_no_glow_of_the_person_in_it() -> None:
    # A white person on gray: blurred with the person in it, the gray around would be lighter.
    photo = np.full((200, 300, 3), 90, dtype=np.uint8)
    alpha = np.zeros((200, 300), dtype=np.uint8)
    photo[40:160, 100:200], alpha[40:160, 100:200] = 255, 255
    outside = np.asarray(cv2.dilate(alpha, np.ones((5, 5), dtype=np.uint8)) == 0)

    with_person = made(background_maker("blur"), photo).astype(int)
    without = made(background_maker("blur"), photo, alpha).astype(int)

    assert np.abs(with_person[outside] - 90).max() > 50
    assert np.abs(without[outside] - 90).max() <= 4


def test_a_transparent_background_is_none() -> None:
    assert background_maker("transparent")(IMAGE) is None


@pytest.mark.parametrize("size", [(20, 30), (60, 20), (7, 200), (1, 1)])
def test_a_picture_background_covers_and_keeps_its_middle(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    # Thirds in red, green, blue from left to right: the middle of a wide picture is green.
    picture = np.zeros((30, 90, 3), dtype=np.uint8)
    for third in range(3):
        picture[:, 30 * third : 30 * third + 30, third] = 255
    write_image(tmp_path / "b.png", picture)

    make = background_maker(str(tmp_path / "b.png"))
    background = made(make, np.zeros((*size, 3), dtype=np.uint8))

    assert background.shape == (*size, 3)
    assert background[size[0] // 2, size[1] // 2].tolist() == [0, 255, 0]


def test_an_endless_strip_as_background_takes_no_more_memory_than_the_photo(tmp_path: Path) -> None:
    write_image(tmp_path / "strip.png", np.full((4, 20_000, 3), 9, dtype=np.uint8))
    photo = np.zeros((1000, 800, 3), dtype=np.uint8)

    # Scaled whole it would be 1000 x 5,000,000.
    background = made(background_maker(str(tmp_path / "strip.png")), photo)

    assert background.shape == photo.shape
    assert (background == 9).all()


def test_a_picture_background_of_the_same_size_is_taken_as_it_is(tmp_path: Path) -> None:
    write_image(tmp_path / "b.png", IMAGE)

    make = background_maker(str(tmp_path / "b.png"))

    assert np.array_equal(made(make, np.zeros_like(IMAGE)), IMAGE)


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


def test_an_overlay_tints_and_outlines_the_person_and_leaves_the_rest() -> None:
    photo = RNG.integers(0, 256, (900, 1000, 3), dtype=np.uint8)
    mask = np.zeros((900, 1000), dtype=np.uint8)
    mask[200:600, 300:700] = 255

    overlay = make_overlay(photo, mask)

    far_outside = np.asarray(cv2.dilate(mask, np.ones((9, 9), dtype=np.uint8)) == 0)
    assert np.array_equal(overlay[far_outside], photo[far_outside])
    # 40 % of (255, 0, 140) in the person, as on the doctor's sheets.
    expected = 0.6 * photo[400, 500] + 0.4 * np.array([255, 0, 140])
    assert np.abs(overlay[400, 500] - expected).max() <= 0.51
    # 900 / 400 pixels wide, on the outermost pixels of the person.
    assert (overlay[200, 300:700] == OUTLINE_COLOUR).all()
    assert 1.5 * 1600 < (overlay == OUTLINE_COLOUR).all(axis=2).sum() < 4 * 1600


def test_checks_are_square_and_alternate() -> None:
    checks = checkerboard(200, 300)

    assert checks.shape == (200, 300, 3)
    for row, column, colour in ((0, 0, 255), (0, 5, 204), (5, 0, 204), (5, 5, 255), (4, 9, 204)):
        assert checks[row, column].tolist() == [colour] * 3


def composition(background: str) -> Composition:
    return Composition(Result(IMAGE, PROBABILITY), background_maker(background))


@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize("background", ["blur", "#102030", "transparent"])
def test_every_output_is_a_file_of_the_photos_height(
    tmp_path: Path, kind: str, background: str
) -> None:
    path = tmp_path / f"photo{suffix_of(kind, background)}"

    write_image(path, OUTPUTS[kind].make(composition(background)))

    with Image.open(path) as picture:
        assert picture.height == 20
        assert picture.width == 30 or kind == "panel"


def test_on_no_background_the_picture_is_the_cutout_and_a_png() -> None:
    nothing = composition("transparent")

    assert np.array_equal(nothing.composed, nothing.result.cutout())
    assert suffix_of("background", "transparent") == "_background.png"
    assert suffix_of("background", "blur") == "_background.jpg"
    assert suffix_of("cutout", "transparent") == "_cutout.png"


def test_a_panel_shows_no_background_as_checks() -> None:
    panel = composition("transparent").panel()
    middle = panel[:, 34:64]

    assert np.array_equal(middle[0, :4], checkerboard(20, 30)[0, :4])
    assert np.array_equal(middle[-1, -4:], IMAGE[-1, -4:])


def test_probabilities_survive_in_16_bits(tmp_path: Path) -> None:
    write_image(tmp_path / "p.png", OUTPUTS["probability"].make(composition("blur")))

    with Image.open(tmp_path / "p.png") as picture:
        levels = np.asarray(picture, dtype=np.float64)
        assert picture.mode.startswith("I;16")
    assert np.abs(levels / 65535 - PROBABILITY).max() <= 0.5 / 65535 + 1e-7
