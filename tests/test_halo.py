"""The old background must not travel with a cut-out: neither as a halo nor hidden."""

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from segtrain.images import Pixels
from segtrain.prediction import regions as tiling
from segtrain.prediction.foreground import blurred_fusion, make_cutout
from segtrain.prediction.outputs import Result
from segtrain.prediction.probability import Values
from segtrain.prediction.refine import refine

GREEN, RED = (30, 200, 60), (210, 40, 40)
FINE = 8


def person_on(colour: tuple[int, int, int]) -> tuple[Pixels, Pixels]:
    """A drawn person with single hairs before a wall of one colour, and the true opacity.

    Drawn at eight times the size and shrunk, as a lens does it: edge pixels are true mixtures.
    """
    height, width = 240, 200
    body = np.zeros((height * FINE, width * FINE), dtype=np.uint8)
    middle = width * FINE // 2
    cv2.ellipse(body, (middle, 80 * FINE), (34 * FINE, 46 * FINE), 0, 0, 360, 255, -1)
    cv2.ellipse(body, (middle, 250 * FINE), (80 * FINE, 120 * FINE), 0, 0, 360, 255, -1)
    rng = np.random.default_rng(1)
    for angle in rng.uniform(np.pi, 2 * np.pi, 60):
        direction = np.array([np.cos(angle), np.sin(angle)])
        root = np.array([middle, 75 * FINE]) + direction * 36 * FINE
        tip = root + direction * rng.uniform(8, 26) * FINE
        cv2.line(body, root.astype(int).tolist(), tip.astype(int).tolist(), 255, FINE // 2)
    opacity = cv2.resize(body, (width, height), interpolation=cv2.INTER_AREA) / 255
    rows = np.linspace(0, 1, height)[:, None, None]
    person = (1 - rows) * (90, 60, 45) + rows * (60, 80, 150) + rng.normal(0, 3, (height, width, 3))
    photo = person * opacity[..., None] + np.array(colour) * (1 - opacity[..., None])
    return np.rint(photo.clip(0, 255)).astype(np.uint8), np.rint(opacity * 255).astype(np.uint8)


def difference(first: Pixels, second: Pixels, alpha: Pixels) -> tuple[float, float]:
    """Mean and 99th percentile over the edge of how far two colourings of it are apart, 0..255.

    Of each pixel the largest of its three channels, by the opacity with which it shows.
    """
    edge = (alpha > 0) & (alpha < 255)
    apart = np.abs(first.astype(int) - second).max(axis=2) * (alpha / 255)
    return float(apart[edge].mean()), float(np.percentile(apart[edge], 99))


def foreground(photo: Pixels, alpha: Pixels) -> Pixels:
    return make_cutout(photo, alpha)[..., :3]


MEAN_BOUND, WORST_BOUND = 3.0, 9.0
"""Of 255: by how much edges cut out of two walls may differ, in the mean and at the worst 1 %."""


def test_a_person_on_green_and_on_red_gives_the_same_colours() -> None:
    (green, alpha), (red, _) = person_on(GREEN), person_on(RED)

    mean, worst = difference(foreground(green, alpha), foreground(red, alpha), alpha)
    # The fault that this is about: the photo's own colours, with a fifth of the wall in them.
    uncleaned_mean, uncleaned_worst = difference(green, red, alpha)

    assert mean < MEAN_BOUND
    assert worst < WORST_BOUND
    assert uncleaned_mean > 5 * MEAN_BOUND
    assert uncleaned_worst > 2 * WORST_BOUND


def as_seen(alpha: Pixels) -> Values:
    """What a network of a quarter of the resolution would say, enlarged."""
    height, width = alpha.shape
    small = cv2.resize(alpha, (width // 4, height // 4), interpolation=cv2.INTER_AREA)
    seen = cv2.resize(cv2.GaussianBlur(small / 255.0, (0, 0), 1.0), (width, height))
    return seen.astype(np.float32)


def test_cutouts_by_a_coarse_network_agree_on_white() -> None:
    (green, alpha), (red, _) = person_on(GREEN), person_on(RED)

    def on_white(cutout: Pixels) -> npt.NDArray[np.float64]:
        weight = cutout[..., 3:] / 255
        return cutout[..., :3] * weight + 255 * (1 - weight)

    def apart(first: Result, second: Result) -> float:
        return float(np.abs(on_white(first.cutout()) - on_white(second.cutout()))[rim].mean())

    rim = np.asarray(cv2.dilate(((alpha > 0) & (alpha < 255)).view(np.uint8), np.ones((5, 5)))) > 0
    seen = as_seen(alpha)
    coarse = apart(Result(green, seen), Result(red, seen))
    fine = apart(Result(green, refine(green, seen)), Result(red, refine(red, seen)))

    assert fine < 3
    assert coarse > 3.5


def test_over_the_old_background_a_cutout_gives_the_photo_back() -> None:
    photo, alpha = person_on(GREEN)
    weight = alpha[..., None] / 255

    again = foreground(photo, alpha) * weight + np.array(GREEN) * (1 - weight)

    assert np.abs(again - photo).mean(axis=2)[alpha > 0].max() < 12
    assert np.abs(again - photo)[(alpha > 0) & (alpha < 255)].mean() < 2


def test_the_inside_is_the_photo_and_the_outside_is_nothing() -> None:
    photo, alpha = person_on(RED)
    before = photo.copy()
    result = Result(photo, (alpha / 255).astype(np.float32))

    cutout = result.cutout()

    inside, outside = cutout[..., 3] == 255, cutout[..., 3] == 0
    assert inside.any()
    assert outside.any()
    assert np.array_equal(cutout[inside, :3], photo[inside])
    assert (cutout[outside] == 0).all()
    assert np.array_equal(photo, before)


def fusion_by_the_paper(image: Pixels, alpha: Pixels) -> npt.NDArray[np.float64]:
    """The paper's equations box by box, in double precision."""
    colours, opacity = image.astype(np.float64), alpha[..., None] / 255.0

    def box(plane: npt.NDArray[np.float64], side: int) -> npt.NDArray[np.float64]:
        padding = ((side // 2, side // 2), (side // 2, side // 2), (0, 0))
        padded = np.pad(plane, padding, mode="symmetric")
        means = np.empty_like(plane)
        for row in range(plane.shape[0]):
            for column in range(plane.shape[1]):
                means[row, column] = padded[row : row + side, column : column + side].mean((0, 1))
        return means

    foreground, background = colours, colours
    for side in (90, 6):
        weight = box(opacity, side)
        smooth = box(foreground * opacity, side) / np.maximum(weight, 1e-12)
        background = box(background * (1 - opacity), side) / np.maximum(1 - weight, 1e-12)
        rest = colours - opacity * smooth - (1 - opacity) * background
        foreground = (smooth + opacity * rest).clip(0, 255)
    return foreground


def test_blurred_fusion_is_that_of_the_paper() -> None:
    rng = np.random.default_rng(3)
    image = rng.integers(0, 256, (31, 44, 3), dtype=np.uint8)
    alpha = rng.integers(0, 256, (31, 44), dtype=np.uint8)
    alpha[:, :15], alpha[:, 30:] = 255, 0

    estimated = blurred_fusion(image, alpha)

    assert np.abs(estimated - fusion_by_the_paper(image, alpha)).max() <= 0.51


def test_tiles_leave_no_seams(monkeypatch: pytest.MonkeyPatch) -> None:
    photo, alpha = (np.tile(plane, (3, 3) + (1,) * (plane.ndim - 2)) for plane in person_on(RED))

    by_tiles = foreground(photo, alpha)
    monkeypatch.setattr(tiling, "_SIDE", 10_000)
    at_once = foreground(photo, alpha)

    assert np.array_equal(by_tiles, at_once)


@pytest.mark.parametrize("size", [(1, 1), (1, 70), (70, 1), (2, 3)])
@pytest.mark.parametrize("opacity", [0, 1, 128, 254, 255])
def test_slivers_of_one_colour_keep_it(size: tuple[int, int], opacity: int) -> None:
    # With one opacity everywhere both F and B are the colour itself.
    image = np.full((*size, 3), 77, dtype=np.uint8)
    alpha = np.full(size, opacity, dtype=np.uint8)

    assert (foreground(image, alpha) == (77 if opacity else 0)).all()
