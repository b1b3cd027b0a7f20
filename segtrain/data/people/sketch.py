"""Anti-aliased, softly lit vector drawing: the brush that the demo people and scenes share.

A `Sketch` is one see-through thing (a person, a tree, a whole backdrop) drawn at twice the frame's
resolution. Beside its colours it keeps a *tone* plane, on which every shape leaves a dark side, a
middle and a lit side; blurred, that becomes rounded shading. `Sketch.flatten` reduces everything
to frame resolution. All coordinates are frame pixels, x to the right and y down, with pixel (0, 0)
covering [0, 1) x [0, 1).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]
"""Vertices, shape (N, 2), frame pixels."""
Colour = tuple[int, int, int]
"""RGB, each 0-255."""
Image = NDArray[np.uint8]
Plane = NDArray[np.float32]

SUPERSAMPLE = 2
_SHIFT = 4  # fractional bits of the coordinates handed to OpenCV
_NEUTRAL = 128  # tone that leaves a colour as it is
_LIT = (0.64, 0.34)  # width of a body's lit core, and its shift towards the light
_ARC = np.linspace(-np.pi / 2, np.pi / 2, 8)
_CIRCLE = np.linspace(0, 2 * np.pi, 24, endpoint=False)


@dataclass(frozen=True)
class Light:
    """Where the light comes from (unit vector on the screen) and how hard it is (tone steps)."""

    x: float
    y: float
    contrast: float


@dataclass(frozen=True)
class Paint:
    """A colour, or a repeating pattern `tile` (HW3 uint8) whose side spans `period` pixels."""

    colour: Colour
    tile: Image | None = None
    period: float = 1.0


class Cutout(NamedTuple):
    """A flattened sketch: its corner in the frame and planes in [0, 1] (colour premultiplied)."""

    left: int
    top: int
    colour: Plane
    alpha: Plane
    person: Plane


def ellipse(x: float, y: float, rx: float, ry: float, angle: float = 0.0) -> Points:
    """Outline of an ellipse turned by `angle` radians."""
    cos, sin = np.cos(_CIRCLE) * rx, np.sin(_CIRCLE) * ry
    c, s = np.cos(angle), np.sin(angle)
    return np.stack((x + c * cos - s * sin, y + s * cos + c * sin), axis=1)


def rectangle(left: float, top: float, right: float, bottom: float) -> Points:
    return np.array(((left, top), (right, top), (right, bottom), (left, bottom)), np.float64)


def moved(points: Points, x: float, y: float) -> Points:
    shift: Points = np.array((x, y), np.float64)
    return points + shift


def smooth(outline: Points, rounds: int = 2) -> Points:
    """Round the corners of a closed outline (Chaikin's corner cutting)."""
    for _ in range(rounds):
        following = np.roll(outline, -1, axis=0)
        outline = np.stack(
            (0.75 * outline + 0.25 * following, 0.25 * outline + 0.75 * following), axis=1
        ).reshape(-1, 2)
    return outline


def hull(points: Points) -> Points:
    return cv2.convexHull(points.astype(np.float32)).reshape(-1, 2).astype(np.float64)


def ends(path: Points, radii: Points) -> tuple[Points, Points]:
    """Outlines of a limb's rounded, tapering segments, as centres and offsets from them.

    Both are (segments, points, 2); an outline is centres + offsets, and scaling the offsets gives
    a slimmer limb. Neighbouring segments share a full joint.
    """
    steps = np.diff(path, axis=0)
    angles = np.arctan2(steps[:, 1], steps[:, 0])[:, None]
    angles = np.concatenate((angles + np.pi + _ARC, angles + _ARC), axis=1)
    half = len(_ARC)
    centres = np.concatenate(
        (path[:-1, None].repeat(half, axis=1), path[1:, None].repeat(half, axis=1)), axis=1
    )
    reach = np.concatenate(
        (radii[:-1, None].repeat(half, axis=1), radii[1:, None].repeat(half, axis=1)), axis=1
    )
    offsets = np.empty_like(centres)
    offsets[..., 0], offsets[..., 1] = np.cos(angles) * reach, np.sin(angles) * reach
    return centres, offsets


def ribbon(path: Points, widths: Points) -> Points:
    """Outline of a band of half-width `widths` around `path`, square to it at every point."""
    along = np.gradient(path, axis=0)
    along /= np.maximum(np.hypot(along[:, 0], along[:, 1]), 1e-6)[:, None]
    across = np.stack((-along[:, 1], along[:, 0]), axis=1) * widths[:, None]
    return np.concatenate((path + across, (path - across)[::-1]))


class Sketch:
    """One thing being drawn, inside the box (left, top, right, bottom) of the frame.

    In a sketch `of_person`, shapes count as person only where `counts` says so: a bag drawn over a
    figure takes its pixels away from the person mask.
    """

    def __init__(
        self, box: tuple[int, int, int, int], light: Light, *, of_person: bool = False
    ) -> None:
        self.left, self.top, right, bottom = box
        size = ((bottom - self.top) * SUPERSAMPLE, (right - self.left) * SUPERSAMPLE)
        self.light = light
        # Drawing (r, g, b, 255) over zeros leaves premultiplied colours on soft edges.
        self._rgba: Image = np.zeros((*size, 4), np.uint8)
        self._tone: Image = np.full(size, _NEUTRAL, np.uint8)
        self._person: Image | None = np.zeros(size, np.uint8) if of_person else None

    def shape(
        self,
        outline: Points,
        paint: Paint | Colour,
        *,
        tone: float = 0.0,
        round_: float = 0.0,
        counts: bool = False,
    ) -> None:
        """Fill a closed outline; `round_` > 0 shades it like a bulging body, about its centre."""
        self._fill(outline[None], paint, counts, outline[0], 0.0)
        if round_ == 0:
            self._fill_tone(outline[None], tone)
            return
        centre = outline.mean(axis=0)
        offsets = outline - centre
        reach = float(np.abs(offsets).mean())
        self._model(centre[None, None], offsets[None], reach, tone, round_)

    def tube(
        self,
        path: Points,
        radii: Points,
        paint: Paint | Colour,
        *,
        tone: float = 0.0,
        counts: bool = False,
    ) -> None:
        """Fill a chain of rounded, tapering segments, lit like a limb."""
        centres, offsets = ends(path, radii)
        direction = path[-1] - path[0]
        angle = float(np.arctan2(direction[1], direction[0]) - np.pi / 2)
        self._fill(centres + offsets, paint, counts, path[0], angle)
        self._model(centres, offsets, float(radii.mean()), tone, 1.0)

    def band(
        self,
        path: Points,
        widths: Points,
        paint: Paint | Colour,
        *,
        tone: float = 0.0,
        counts: bool = False,
    ) -> None:
        """Fill a smooth band around `path`, lit like a torso."""
        direction = path[-1] - path[0]
        angle = float(np.arctan2(direction[1], direction[0]) + np.pi / 2)
        outline = ribbon(path, widths)
        self._fill(smooth(outline)[None], paint, counts, path[0], angle)
        centres = np.concatenate((path, path[::-1]))
        reach = float(widths.mean())
        self._model(centres[None], (outline - centres)[None], reach, tone, 1.0)

    def line(self, path: Points, thickness: float, colour: Colour, *, counts: bool = False) -> None:
        """Draw an open line; it takes over the shading of what lies below."""
        width = max(1, round(thickness * SUPERSAMPLE))
        points = [self._fixed(path)]
        cv2.polylines(self._rgba, points, False, (*colour, 255), width, cv2.LINE_AA, _SHIFT)
        if self._person is not None:
            cv2.polylines(self._person, points, False, 255 * counts, width, cv2.LINE_AA, _SHIFT)

    def crease(self, path: Points, thickness: float, step: float) -> None:
        """Darken (step < 0) or lighten along an open line, as a fold does."""
        width = max(1, round(thickness * SUPERSAMPLE))
        tone = round(_NEUTRAL + step)
        cv2.polylines(self._tone, [self._fixed(path)], False, tone, width, cv2.LINE_8, _SHIFT)

    def overlay(self, colour: Image, alpha: Plane, left: int, top: int, *, counts: bool) -> None:
        """Blend a ready picture in: `colour` HW3, `alpha` HW, corner in this sketch's own pixels.

        Its colours carry their own light, so the tone below them is put back to neutral.
        """
        height, width = self._tone.shape
        rows = slice(max(top, 0), min(top + alpha.shape[0], height))
        cols = slice(max(left, 0), min(left + alpha.shape[1], width))
        if rows.start >= rows.stop or cols.start >= cols.stop:
            return
        here = (
            slice(rows.start - top, rows.stop - top),
            slice(cols.start - left, cols.stop - left),
        )
        cover = alpha[here][..., None]
        source = np.dstack((colour[here], np.full(alpha[here].shape, 255, np.uint8)))
        below = self._rgba[rows, cols]
        self._rgba[rows, cols] = below + (source.astype(np.float32) - below) * cover
        if self._person is not None:
            person = self._person[rows, cols]
            self._person[rows, cols] = person + (255.0 * counts - person) * cover[..., 0]
        self._tone[rows, cols][cover[..., 0] > 0.5] = _NEUTRAL

    def to_pixels(self, x: float, y: float) -> tuple[float, float]:
        """Frame coordinates in this sketch's own pixels, for `overlay`."""
        return (x - self.left) * SUPERSAMPLE, (y - self.top) * SUPERSAMPLE

    def flatten(self, softness: float) -> Cutout:
        """Reduce to frame resolution what has been drawn on.

        `softness` (frame pixels) blurs the shading only.
        """
        alpha = np.ascontiguousarray(self._rgba[..., 3])
        # Whole frame pixels round everything drawn.
        x, y, wide, high = (v // SUPERSAMPLE for v in cv2.boundingRect(alpha))
        size = (max(min(wide + 2, alpha.shape[1] // SUPERSAMPLE - x), 1),
                max(min(high + 2, alpha.shape[0] // SUPERSAMPLE - y), 1))  # fmt: skip
        used = (
            slice(y * SUPERSAMPLE, (y + size[1]) * SUPERSAMPLE),
            slice(x * SUPERSAMPLE, (x + size[0]) * SUPERSAMPLE),
        )
        rgba = cv2.resize(self._rgba[used], size, interpolation=cv2.INTER_AREA)
        tone = cv2.resize(self._tone[used], size, interpolation=cv2.INTER_AREA)
        tone = cv2.GaussianBlur(tone, (0, 0), max(softness, 0.3)).astype(np.float32)
        colour = rgba[..., :3] * (tone * np.float32(1 / (_NEUTRAL * 255)))[..., None]
        cover = rgba[..., 3] * np.float32(1 / 255)
        if self._person is None:
            person = np.zeros_like(cover)
        else:
            small = cv2.resize(self._person[used], size, interpolation=cv2.INTER_AREA)
            person = small * np.float32(1 / 255)
        return Cutout(self.left + x, self.top + y, colour, cover, person)

    def _fixed(self, points: Points) -> NDArray[np.int32]:
        """Frame coordinates as OpenCV's fixed-point pixel-centre coordinates of this sketch."""
        own = (points - (self.left, self.top)) * SUPERSAMPLE - 0.5
        return np.rint(own * (1 << _SHIFT)).astype(np.int32)

    def _fill(
        self,
        outlines: Points,
        paint: Paint | Colour,
        counts: bool,
        origin: Points,
        angle: float,
    ) -> None:
        """Paint outlines (N, points, 2); a pattern is turned by `angle` about `origin`."""
        if not isinstance(paint, Paint):
            paint = Paint(paint)
        fixed = self._fixed(outlines)
        for points in fixed:
            cv2.fillPoly(self._rgba, [points], (*paint.colour, 255), cv2.LINE_AA, _SHIFT)
            if self._person is not None:
                cv2.fillPoly(self._person, [points], 255 * counts, cv2.LINE_AA, _SHIFT)
        if paint.tile is not None:
            self._fill_pattern(fixed, paint.tile, paint.period, origin, angle)

    def _fill_pattern(
        self,
        fixed: NDArray[np.int32],
        tile: Image,
        period: float,
        origin: Points,
        angle: float,
    ) -> None:
        """Lay the tile inside the outlines."""
        height, width = self._tone.shape
        x0, y0 = np.maximum(fixed.min(axis=(0, 1)) >> _SHIFT, 0)
        x1, y1 = np.minimum((fixed.max(axis=(0, 1)) >> _SHIFT) + 1, (width, height))
        if x0 >= x1 or y0 >= y1:
            return
        mask = np.zeros((y1 - y0, x1 - x0), np.uint8)
        for points in fixed - (np.array((x0, y0), np.int32) << _SHIFT):
            cv2.fillPoly(mask, [points], 255, cv2.LINE_AA, _SHIFT)
        tile_pixels = tile.shape[0] / (period * SUPERSAMPLE)
        c, s = np.cos(angle) * tile_pixels, np.sin(angle) * tile_pixels
        start = self._fixed(origin) / (1 << _SHIFT) - (x0, y0)
        to_tile = np.array(
            ((c, s, -c * start[0] - s * start[1]), (-s, c, s * start[0] - c * start[1]))
        )
        pattern = cv2.warpAffine(
            cv2.cvtColor(tile, cv2.COLOR_RGB2RGBA),
            to_tile,
            (int(x1 - x0), int(y1 - y0)),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_WRAP,
        )
        # Not on the soft rim, which stays premultiplied.
        _, inside = cv2.threshold(mask, 254, 255, cv2.THRESH_BINARY)
        cv2.copyTo(pattern, inside, self._rgba[y0:y1, x0:x1])

    def _model(
        self, centres: Points, offsets: Points, reach: float, tone: float, strength: float
    ) -> None:
        """Shade a body: dark all over, then bright in a narrower core nearer to the light."""
        width, shift = _LIT
        towards_light = np.array((self.light.x, self.light.y)) * (shift * reach)
        step = self.light.contrast * strength
        self._fill_tone(centres + offsets, tone - step)
        self._fill_tone(centres + offsets * width + towards_light, tone + 0.75 * step)

    def _fill_tone(self, outlines: Points, tone: float) -> None:
        level = round(_NEUTRAL + tone)
        for points in self._fixed(outlines):
            cv2.fillPoly(self._tone, [points], level, cv2.LINE_8, _SHIFT)


def blurred(plane: Plane, sigma: float) -> Plane:
    return cv2.GaussianBlur(plane, (0, 0), sigma).astype(np.float32, copy=False)


def noise(rng: np.random.Generator, height: int, width: int, *cells: int) -> Plane:
    """Smooth noise of about unit spread; each of `cells` is the grain of one octave in pixels."""
    total = np.zeros((height, width), np.float32)
    for cell in cells:
        grid = rng.standard_normal((height // cell + 2, width // cell + 2)).astype(np.float32)
        total += cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
    return total / np.float32(np.sqrt(len(cells)))


def mix(a: Sequence[float], b: Sequence[float], share: float) -> Colour:
    """Colour `share` of the way from `a` to `b`."""
    red, green, blue = (
        round(min(max(p + (q - p) * share, 0), 255)) for p, q in zip(a, b, strict=True)
    )
    return red, green, blue


def lighten(colour: Colour, share: float) -> Colour:
    """Towards white for a positive share, towards black for a negative one."""
    return mix(colour, (255, 255, 255) if share > 0 else (0, 0, 0), abs(share))
