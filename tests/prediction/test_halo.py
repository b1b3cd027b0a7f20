"""A cutout must not contain the old background, neither as a halo nor in hidden pixels."""

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from segtrain.imaging import blocks as image_blocks
from segtrain.prediction.matting import blurred_fusion, make_cutout
from segtrain.prediction.outputs import Result
from segtrain.prediction.refine import refine_probs
from segtrain.types import Image, Mask, Probs

GREEN, RED = (30, 200, 60), (210, 40, 40)
SUPERSAMPLING = 8


def person_on(color: tuple[int, int, int]) -> tuple[Image, Image]:
    """A drawn person with single hairs in front of a wall of one color, and the true alpha.

    Drawn at eight times the size and downsampled, as by a lens: edge pixels are true mixtures.
    """
    height, width = 240, 200
    body = np.zeros((height * SUPERSAMPLING, width * SUPERSAMPLING), dtype=np.uint8)
    middle = width * SUPERSAMPLING // 2
    cv2.ellipse(
        body,
        (middle, 80 * SUPERSAMPLING),
        (34 * SUPERSAMPLING, 46 * SUPERSAMPLING),
        0,
        0,
        360,
        255,
        -1,
    )
    cv2.ellipse(
        body,
        (middle, 250 * SUPERSAMPLING),
        (80 * SUPERSAMPLING, 120 * SUPERSAMPLING),
        0,
        0,
        360,
        255,
        -1,
    )
    rng = np.random.default_rng(1)
    for angle in rng.uniform(np.pi, 2 * np.pi, 60):
        direction = np.array([np.cos(angle), np.sin(angle)])
        root = np.array([middle, 75 * SUPERSAMPLING]) + direction * 36 * SUPERSAMPLING
        tip = root + direction * rng.uniform(8, 26) * SUPERSAMPLING
        cv2.line(body, root.astype(int).tolist(), tip.astype(int).tolist(), 255, SUPERSAMPLING // 2)
    opacity = cv2.resize(body, (width, height), interpolation=cv2.INTER_AREA) / 255
    rows = np.linspace(0, 1, height)[:, None, None]
    person = (1 - rows) * (90, 60, 45) + rows * (60, 80, 150) + rng.normal(0, 3, (height, width, 3))
    photo = person * opacity[..., None] + np.array(color) * (1 - opacity[..., None])
    return np.rint(photo.clip(0, 255)).astype(np.uint8), np.rint(opacity * 255).astype(np.uint8)


def difference(first: Image, second: Image, alpha: Mask) -> tuple[float, float]:
    """Mean and 99th percentile, over the edge, of the color difference of two images, 0..255.

    The difference of a pixel is the largest of its three channels, weighted by alpha.
    """
    edge = (alpha > 0) & (alpha < 255)
    distance = np.abs(first.astype(int) - second).max(axis=2) * (alpha / 255)
    return float(distance[edge].mean()), float(np.percentile(distance[edge], 99))


def foreground(photo: Image, alpha: Mask) -> Image:
    return make_cutout(photo, alpha)[..., :3]


MAX_MEAN, MAX_PERCENTILE = 3.0, 9.0
"""Of 255: limits of the difference between edges cut out from two walls."""


def test_a_person_on_green_and_on_red_gives_the_same_colors() -> None:
    (green, alpha), (red, _) = person_on(GREEN), person_on(RED)

    mean, percentile = difference(foreground(green, alpha), foreground(red, alpha), alpha)
    # Without foreground estimation, a fifth of the edge color comes from the wall.
    photo_mean, photo_percentile = difference(green, red, alpha)

    assert mean < MAX_MEAN
    assert percentile < MAX_PERCENTILE
    assert photo_mean > 5 * MAX_MEAN
    assert photo_percentile > 2 * MAX_PERCENTILE


def coarse_probs(alpha: Mask) -> Probs:
    """Upsampled probabilities of a network at a quarter of the resolution."""
    height, width = alpha.shape
    small = cv2.resize(alpha, (width // 4, height // 4), interpolation=cv2.INTER_AREA)
    probs = cv2.resize(cv2.GaussianBlur(small / 255.0, (0, 0), 1.0), (width, height))
    return probs.astype(np.float32)


def test_cutouts_from_coarse_probabilities_agree_on_white() -> None:
    (green, alpha), (red, _) = person_on(GREEN), person_on(RED)

    def on_white(cutout: Image) -> npt.NDArray[np.float64]:
        weight = cutout[..., 3:] / 255
        return cutout[..., :3] * weight + 255 * (1 - weight)

    def distance(first: Result, second: Result) -> float:
        return float(np.abs(on_white(first.cutout()) - on_white(second.cutout()))[rim].mean())

    rim = np.asarray(cv2.dilate(((alpha > 0) & (alpha < 255)).view(np.uint8), np.ones((5, 5)))) > 0
    probs = coarse_probs(alpha)
    coarse = distance(Result(green, probs), Result(red, probs))
    refined = distance(
        Result(green, refine_probs(green, probs)), Result(red, refine_probs(red, probs))
    )

    assert refined < 3
    assert coarse > 3.5


def test_a_cutout_on_the_old_background_reproduces_the_photo() -> None:
    photo, alpha = person_on(GREEN)
    weight = alpha[..., None] / 255

    composite = foreground(photo, alpha) * weight + np.array(GREEN) * (1 - weight)

    assert np.abs(composite - photo).mean(axis=2)[alpha > 0].max() < 12
    assert np.abs(composite - photo)[(alpha > 0) & (alpha < 255)].mean() < 2


def test_a_cutout_equals_the_photo_inside_and_is_zero_outside() -> None:
    photo, alpha = person_on(RED)
    original = photo.copy()
    result = Result(photo, (alpha / 255).astype(np.float32))

    cutout = result.cutout()

    inside, outside = cutout[..., 3] == 255, cutout[..., 3] == 0
    assert inside.any()
    assert outside.any()
    assert np.array_equal(cutout[inside, :3], photo[inside])
    assert (cutout[outside] == 0).all()
    assert np.array_equal(photo, original)


def reference_fusion(image: Image, alpha: Mask) -> npt.NDArray[np.float64]:
    """The equations of the paper, box by box, in double precision."""
    colors, opacity = image.astype(np.float64), alpha[..., None] / 255.0

    def box_mean(plane: npt.NDArray[np.float64], side: int) -> npt.NDArray[np.float64]:
        padding = ((side // 2, side // 2), (side // 2, side // 2), (0, 0))
        padded = np.pad(plane, padding, mode="symmetric")
        means = np.empty_like(plane)
        for row in range(plane.shape[0]):
            for column in range(plane.shape[1]):
                means[row, column] = padded[row : row + side, column : column + side].mean((0, 1))
        return means

    foreground, background = colors, colors
    for side in (90, 6):
        weight = box_mean(opacity, side)
        smooth = box_mean(foreground * opacity, side) / np.maximum(weight, 1e-12)
        background = box_mean(background * (1 - opacity), side) / np.maximum(1 - weight, 1e-12)
        residual = colors - opacity * smooth - (1 - opacity) * background
        foreground = (smooth + opacity * residual).clip(0, 255)
    return foreground


def test_blurred_fusion_matches_the_paper() -> None:
    rng = np.random.default_rng(3)
    image = rng.integers(0, 256, (31, 44, 3), dtype=np.uint8)
    alpha = rng.integers(0, 256, (31, 44), dtype=np.uint8)
    alpha[:, :15], alpha[:, 30:] = 255, 0

    estimate = blurred_fusion(image, alpha)

    assert np.abs(estimate - reference_fusion(image, alpha)).max() <= 0.51


def test_a_cutout_has_no_seams_between_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    photo, alpha = (np.tile(plane, (3, 3) + (1,) * (plane.ndim - 2)) for plane in person_on(RED))

    by_blocks = foreground(photo, alpha)
    monkeypatch.setattr(image_blocks, "_SIDE", 10_000)
    whole = foreground(photo, alpha)

    assert np.array_equal(by_blocks, whole)


@pytest.mark.parametrize("size", [(1, 1), (1, 70), (70, 1), (2, 3)])
@pytest.mark.parametrize("opacity", [0, 1, 128, 254, 255])
def test_tiny_images_of_one_color_keep_it(size: tuple[int, int], opacity: int) -> None:
    # With constant alpha, F and B both equal the color.
    image = np.full((*size, 3), 77, dtype=np.uint8)
    alpha = np.full(size, opacity, dtype=np.uint8)

    assert (foreground(image, alpha) == (77 if opacity else 0)).all()
