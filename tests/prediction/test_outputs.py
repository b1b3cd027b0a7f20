"""Masks, alpha mattes, cutouts, backgrounds, overlays and panels, to the pixel."""

from pathlib import Path

import cv2
import numpy as np
import PIL.Image
import pytest

from segtrain.errors import DataError, UsageError
from segtrain.imaging.contact_sheet import OUTLINE_COLOR
from segtrain.imaging.images import write_image
from segtrain.prediction.backgrounds import BackgroundFn, build_background_fn
from segtrain.prediction.matting import make_alpha, make_cutout, make_mask
from segtrain.prediction.outputs import (
    OUTPUTS,
    Composite,
    Result,
    checkerboard,
    make_overlay,
    make_panel,
    output_suffix,
    paste_cutout,
)
from segtrain.types import Image, Mask, Probs

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)
PROBS = np.linspace(0, 1, 20 * 30, dtype=np.float32).reshape(20, 30)
ALPHA = np.rint(255 * PROBS).astype(np.uint8)


def call(make_background: BackgroundFn, image: Image, alpha: Mask | None = None) -> Image:
    background = make_background(image, alpha)
    assert background is not None
    return background


def ramp(width: int, rows: int = 40, columns: int = 120) -> Probs:
    """0 at the left, 1 at the right, and a slope of `width` pixels in the center."""
    line = (np.arange(columns) - (columns - 1) / 2) / width + 0.5
    return np.tile(line.clip(0, 1).astype(np.float32), (rows, 1))


def test_the_mask_is_255_from_a_probability_of_one_half() -> None:
    probs = np.array([[0.0, 0.4999, 0.5, 1.0]], dtype=np.float32)

    mask = make_mask(probs)

    assert mask.dtype == np.uint8
    assert mask.tolist() == [[0, 0, 255, 255]]


def test_a_steep_edge_maps_0_3_to_0_and_0_7_to_1() -> None:
    # 3 pixels from 0 to 1, so 0.3..0.7 within little more than one: no sharpening needed.
    probs = ramp(3)

    expected = np.rint(255 * ((probs - 0.3) / 0.4).clip(0, 1))

    assert np.abs(make_alpha(probs).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("width", [10, 30, 60])
def test_a_wide_upsampled_edge_becomes_three_pixels_wide(width: int) -> None:
    probs = ramp(width)

    alpha = make_alpha(probs)

    # On the slope, alpha rises by a third of 255 per pixel.
    assert np.abs(alpha[:, 58:62] - np.array([0, 85, 170, 255])).max() <= 2
    assert (alpha[:, :58] == 0).all()
    assert (alpha[:, 62:] == 255).all()


def test_edges_of_large_images_have_half_a_percent_of_the_short_side() -> None:
    alpha = make_alpha(ramp(300, rows=1400, columns=1400))

    assert ((alpha > 0) & (alpha < 255)).sum(axis=1).tolist() == [pytest.approx(7, abs=1)] * 1400


@pytest.mark.parametrize(("prob", "opacity"), [(0.55, 255), (0.45, 0), (0.5, 128)])
def test_an_uncertain_region_is_not_half_transparent(prob: float, opacity: int) -> None:
    probs = np.full((60, 60), 0.95 if prob >= 0.5 else 0.05, dtype=np.float32)
    probs[10:50, 10:50] = prob

    assert (make_alpha(cv2.blur(probs, (5, 5)))[25:35, 25:35] == opacity).all()


def test_a_single_hair_stays_soft_along_its_ridge() -> None:
    # The probability is flat along the ridge and steep only at its sides.
    probs = np.full((30, 31), 0.02, dtype=np.float32)
    probs[:, 15] = 0.45
    probs[:, [14, 16]] = 0.35

    alpha = make_alpha(probs)

    assert alpha[15, 15] == pytest.approx(255 * 0.375, abs=2)
    assert alpha[15, 14] == pytest.approx(255 * 0.125, abs=2)


def test_alpha_is_above_one_half_exactly_on_the_mask() -> None:
    noise = RNG.random((40, 50), dtype=np.float32)
    just_below = np.nextafter(np.float32(0.5), np.float32(0))
    noise[::3] = np.float32(0.5)
    noise[1::3] = just_below

    for probs in (noise, cv2.GaussianBlur(noise, (0, 0), 3), PROBS):
        probs = np.asarray(probs, dtype=np.float32)
        assert np.array_equal(make_alpha(probs) >= 128, make_mask(probs) > 0)


def test_alpha_has_no_seams_between_blocks() -> None:
    # 1100 x 1100 has many blocks; shifted by 300, block borders cross the scene elsewhere.
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
def test_tiny_images_have_an_alpha(size: tuple[int, int], value: float) -> None:
    probs = np.full(size, value, dtype=np.float32)

    assert make_alpha(probs).shape == size


def test_a_cutout_is_the_foreground_with_its_alpha() -> None:
    cutout = make_cutout(IMAGE, ALPHA)

    assert np.array_equal(cutout[..., 3], ALPHA)
    assert np.array_equal(cutout[ALPHA == 255, :3], IMAGE[ALPHA == 255])
    assert (cutout[ALPHA == 0] == 0).all()


def test_a_new_background_is_blended_by_alpha() -> None:
    background = RNG.integers(0, 256, IMAGE.shape, dtype=np.uint8)
    weight = ALPHA[..., None] / 255
    expected = IMAGE * weight + background * (1 - weight)

    composed = background.copy()
    paste_cutout(np.dstack([IMAGE, ALPHA]), composed)

    assert np.abs(composed - expected).max() <= 0.51
    assert np.array_equal(composed[ALPHA == 255], IMAGE[ALPHA == 255])
    assert np.array_equal(composed[ALPHA == 0], background[ALPHA == 0])


def test_a_color_background_fills_the_image() -> None:
    background = call(build_background_fn("#00fF80"), IMAGE)

    assert background.shape == IMAGE.shape
    assert (background == (0, 255, 128)).all()


def test_blur_keeps_size_and_mean_and_removes_detail() -> None:
    photo = RNG.integers(0, 256, (300, 500, 3), dtype=np.uint8)

    background = call(build_background_fn("blur"), photo)

    assert background.shape == photo.shape
    assert background.mean() == pytest.approx(photo.mean(), abs=2)
    assert background.std() < photo.std() / 5


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (700, 3)])
def test_blur_works_on_tiny_images(size: tuple[int, int]) -> None:
    image = np.full((*size, 3), 77, dtype=np.uint8)

    alpha = np.full(size, 255, dtype=np.uint8)

    assert np.array_equal(call(build_background_fn("blur"), image), image)
    assert np.array_equal(call(build_background_fn("blur"), image, alpha), image)


def test_a_blurred_background_excludes_the_person() -> None:
    # A white person on gray: a blur that includes the person brightens the gray around it.
    photo = np.full((200, 300, 3), 90, dtype=np.uint8)
    alpha = np.zeros((200, 300), dtype=np.uint8)
    photo[40:160, 100:200], alpha[40:160, 100:200] = 255, 255
    outside = np.asarray(cv2.dilate(alpha, np.ones((5, 5), dtype=np.uint8)) == 0)

    with_person = call(build_background_fn("blur"), photo).astype(int)
    without = call(build_background_fn("blur"), photo, alpha).astype(int)

    assert np.abs(with_person[outside] - 90).max() > 50
    assert np.abs(without[outside] - 90).max() <= 4


def test_a_transparent_background_is_none() -> None:
    assert build_background_fn("transparent")(IMAGE) is None


@pytest.mark.parametrize("size", [(20, 30), (60, 20), (7, 200), (1, 1)])
def test_an_image_background_is_scaled_to_cover_and_center_cropped(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    # Thirds in red, green, blue from left to right: the center of a wide image is green.
    image = np.zeros((30, 90, 3), dtype=np.uint8)
    for third in range(3):
        image[:, 30 * third : 30 * third + 30, third] = 255
    write_image(tmp_path / "b.png", image)

    make_background = build_background_fn(str(tmp_path / "b.png"))
    background = call(make_background, np.zeros((*size, 3), dtype=np.uint8))

    assert background.shape == (*size, 3)
    assert background[size[0] // 2, size[1] // 2].tolist() == [0, 255, 0]


def test_a_very_wide_background_takes_no_more_memory_than_the_photo(tmp_path: Path) -> None:
    write_image(tmp_path / "strip.png", np.full((4, 20_000, 3), 9, dtype=np.uint8))
    photo = np.zeros((1000, 800, 3), dtype=np.uint8)

    # Resized before cropping, it would have 1000 x 5,000,000 pixels.
    background = call(build_background_fn(str(tmp_path / "strip.png")), photo)

    assert background.shape == photo.shape
    assert (background == 9).all()


def test_an_image_background_of_the_same_size_is_unchanged(tmp_path: Path) -> None:
    write_image(tmp_path / "b.png", IMAGE)

    make_background = build_background_fn(str(tmp_path / "b.png"))

    assert np.array_equal(call(make_background, np.zeros_like(IMAGE)), IMAGE)


@pytest.mark.parametrize("description", ["nowhere.jpg", "#12345", "green", "#gggggg"])
def test_an_unknown_background_is_a_usage_error(description: str) -> None:
    with pytest.raises(UsageError, match="--background"):
        build_background_fn(description)


def test_a_broken_background_image_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "b.png").write_bytes(b"no image")

    with pytest.raises(DataError, match=r"b\.png"):
        build_background_fn(str(tmp_path / "b.png"))


def test_a_panel_shows_original_new_background_and_mask() -> None:
    new_background = 255 - IMAGE
    mask = make_mask(PROBS)

    panel = make_panel(IMAGE, new_background, mask)

    gap = (panel.shape[1] - 90) // 2
    assert panel.shape[0] == 20
    assert np.array_equal(panel[:, :30], IMAGE)
    assert np.array_equal(panel[:, 30 + gap : 60 + gap], new_background)
    assert np.array_equal(panel[:, 60 + 2 * gap :, 0], mask)


def test_an_overlay_tints_and_outlines_only_the_person() -> None:
    photo = RNG.integers(0, 256, (900, 1000, 3), dtype=np.uint8)
    mask = np.zeros((900, 1000), dtype=np.uint8)
    mask[200:600, 300:700] = 255

    overlay = make_overlay(photo, mask)

    far_outside = np.asarray(cv2.dilate(mask, np.ones((9, 9), dtype=np.uint8)) == 0)
    assert np.array_equal(overlay[far_outside], photo[far_outside])
    # The person has 40 % of (255, 0, 140), as on the contact sheets of doctor.
    expected = 0.6 * photo[400, 500] + 0.4 * np.array([255, 0, 140])
    assert np.abs(overlay[400, 500] - expected).max() <= 0.51
    # The outline is 900 / 400 pixels wide, on the outermost pixels of the person.
    assert (overlay[200, 300:700] == OUTLINE_COLOR).all()
    assert 1.5 * 1600 < (overlay == OUTLINE_COLOR).all(axis=2).sum() < 4 * 1600


def test_a_checkerboard_has_alternating_squares() -> None:
    checks = checkerboard(200, 300)

    assert checks.shape == (200, 300, 3)
    for row, column, color in ((0, 0, 255), (0, 5, 204), (5, 0, 204), (5, 5, 255), (4, 9, 204)):
        assert checks[row, column].tolist() == [color] * 3


def make_composite(background: str) -> Composite:
    return Composite(Result(IMAGE, PROBS), build_background_fn(background))


@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize("background", ["blur", "#102030", "transparent"])
def test_every_output_has_the_height_of_the_photo(
    tmp_path: Path, kind: str, background: str
) -> None:
    path = tmp_path / f"photo{output_suffix(kind, background)}"

    write_image(path, OUTPUTS[kind].make(make_composite(background)))

    with PIL.Image.open(path) as image:
        assert image.height == 20
        assert image.width == 30 or kind == "panel"


def test_on_a_transparent_background_the_output_is_the_cutout_as_png() -> None:
    composite = make_composite("transparent")

    assert np.array_equal(composite.pixels, composite.result.cutout())
    assert output_suffix("background", "transparent") == "_background.png"
    assert output_suffix("background", "blur") == "_background.jpg"
    assert output_suffix("cutout", "transparent") == "_cutout.png"


def test_a_panel_shows_a_checkerboard_for_a_transparent_background() -> None:
    panel = make_composite("transparent").panel()
    center = panel[:, 34:64]

    assert np.array_equal(center[0, :4], checkerboard(20, 30)[0, :4])
    assert np.array_equal(center[-1, -4:], IMAGE[-1, -4:])


def test_probabilities_are_written_in_16_bits(tmp_path: Path) -> None:
    write_image(tmp_path / "p.png", OUTPUTS["probability"].make(make_composite("blur")))

    with PIL.Image.open(tmp_path / "p.png") as image:
        levels = np.asarray(image, dtype=np.float64)
        assert image.mode.startswith("I;16")
    assert np.abs(levels / 65535 - PROBS).max() <= 0.5 / 65535 + 1e-7
