"""Anti-aliased vector drawing with soft shading, used for people, props and backdrops.

A `Canvas` holds one object (a person, a tree, a whole backdrop) on a transparent ground, drawn at
twice the frame's resolution. Besides the colors it has a *tone* plane, to which every shape adds a
dark side, a middle and a lit side; blurred, they become rounded shading. `Canvas.flatten` reduces
everything to frame resolution. All coordinates are frame pixels, x to the right and y down; pixel
(0, 0) covers [0, 1) x [0, 1).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from segtrain.types import Image, Mask

Points = NDArray[np.float64]
"""Vertices, shape (N, 2), frame pixels."""
Color = tuple[int, int, int]
"""RGB, each 0-255."""
Plane = NDArray[np.float32]
"""H W, or H W 3 for colors."""

SUPERSAMPLE = 2
_SHIFT = 4  # fractional bits of coordinates passed to OpenCV
_NEUTRAL = 128  # the tone that does not change a color
_LIT = (0.64, 0.34)  # width of the lit core of a shaded shape, and its shift towards the light
_ARC = np.linspace(-np.pi / 2, np.pi / 2, 8)
_CIRCLE = np.linspace(0, 2 * np.pi, 24, endpoint=False)


@dataclass(frozen=True)
class Light:
    """Direction of the light (unit vector in the image plane) and its contrast (tone steps)."""

    x: float
    y: float
    contrast: float


@dataclass(frozen=True)
class Paint:
    """A color, or a repeating pattern `tile` (HW3 uint8) whose side spans `period` pixels."""

    color: Color
    tile: Image | None = None
    period: float = 1.0


class Cutout(NamedTuple):
    """A flattened canvas: its corner in the frame, and planes in [0, 1] (color premultiplied)."""

    left: int
    top: int
    color: Plane
    alpha: Plane
    person: Plane


def ellipse(x: float, y: float, rx: float, ry: float, angle: float = 0.0) -> Points:
    """Outline of an ellipse rotated by `angle` radians."""
    cos, sin = np.cos(_CIRCLE) * rx, np.sin(_CIRCLE) * ry
    c, s = np.cos(angle), np.sin(angle)
    return np.stack((x + c * cos - s * sin, y + s * cos + c * sin), axis=1)


def rectangle(left: float, top: float, right: float, bottom: float) -> Points:
    return np.array(((left, top), (right, top), (right, bottom), (left, bottom)), np.float64)


def translate(points: Points, x: float, y: float) -> Points:
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


def convex_hull(points: Points) -> Points:
    return cv2.convexHull(points.astype(np.float32)).reshape(-1, 2).astype(np.float64)


def segment_outlines(path: Points, radii: Points) -> tuple[Points, Points]:
    """Outlines of a limb's rounded, tapering segments, as centers and offsets.

    Both are (segments, points, 2). An outline is centers + offsets; scaling the offsets gives a
    slimmer limb. Neighboring segments share a full joint.
    """
    steps = np.diff(path, axis=0)
    angles = np.arctan2(steps[:, 1], steps[:, 0])[:, None]
    angles = np.concatenate((angles + np.pi + _ARC, angles + _ARC), axis=1)
    half = len(_ARC)
    centers = np.concatenate(
        (path[:-1, None].repeat(half, axis=1), path[1:, None].repeat(half, axis=1)), axis=1
    )
    reach = np.concatenate(
        (radii[:-1, None].repeat(half, axis=1), radii[1:, None].repeat(half, axis=1)), axis=1
    )
    offsets = np.empty_like(centers)
    offsets[..., 0], offsets[..., 1] = np.cos(angles) * reach, np.sin(angles) * reach
    return centers, offsets


def ribbon(path: Points, widths: Points) -> Points:
    """Outline of a band around `path` with half-widths `widths`, perpendicular to the path."""
    along = np.gradient(path, axis=0)
    along /= np.maximum(np.hypot(along[:, 0], along[:, 1]), 1e-6)[:, None]
    across = np.stack((-along[:, 1], along[:, 0]), axis=1) * widths[:, None]
    return np.concatenate((path + across, (path - across)[::-1]))


class Canvas:
    """A drawing of one object in the box (left, top, right, bottom) of the frame.

    With `with_person_mask`, only shapes with `person=True` are part of the person: a bag drawn over
    a figure removes its pixels from the person mask.
    """

    def __init__(
        self, box: tuple[int, int, int, int], light: Light, *, with_person_mask: bool = False
    ) -> None:
        self.left, self.top, right, bottom = box
        size = ((bottom - self.top) * SUPERSAMPLE, (right - self.left) * SUPERSAMPLE)
        self.light = light
        # Drawing (r, g, b, 255) over zeros leaves premultiplied colors on soft edges.
        self._rgba: Image = np.zeros((*size, 4), np.uint8)
        self._tone: Image = np.full(size, _NEUTRAL, np.uint8)
        self._person: Image | None = np.zeros(size, np.uint8) if with_person_mask else None

    def shape(
        self,
        outline: Points,
        paint: Paint | Color,
        *,
        tone: float = 0.0,
        bulge: float = 0.0,
        person: bool = False,
    ) -> None:
        """Fill a closed outline; `bulge` > 0 shades it like a convex body around its center."""
        self._fill(outline[None], paint, person, outline[0], 0.0)
        if bulge == 0:
            self._fill_tone(outline[None], tone)
            return
        center = outline.mean(axis=0)
        offsets = outline - center
        reach = float(np.abs(offsets).mean())
        self._shade_body(center[None, None], offsets[None], reach, tone, bulge)

    def tube(
        self,
        path: Points,
        radii: Points,
        paint: Paint | Color,
        *,
        tone: float = 0.0,
        person: bool = False,
    ) -> None:
        """Fill a chain of rounded, tapering segments, lit like a limb."""
        centers, offsets = segment_outlines(path, radii)
        direction = path[-1] - path[0]
        angle = float(np.arctan2(direction[1], direction[0]) - np.pi / 2)
        self._fill(centers + offsets, paint, person, path[0], angle)
        self._shade_body(centers, offsets, float(radii.mean()), tone, 1.0)

    def band(
        self,
        path: Points,
        widths: Points,
        paint: Paint | Color,
        *,
        tone: float = 0.0,
        person: bool = False,
    ) -> None:
        """Fill a smooth band around `path`, lit like a torso."""
        direction = path[-1] - path[0]
        angle = float(np.arctan2(direction[1], direction[0]) + np.pi / 2)
        outline = ribbon(path, widths)
        self._fill(smooth(outline)[None], paint, person, path[0], angle)
        centers = np.concatenate((path, path[::-1]))
        reach = float(widths.mean())
        self._shade_body(centers[None], (outline - centers)[None], reach, tone, 1.0)

    def line(self, path: Points, thickness: float, color: Color, *, person: bool = False) -> None:
        """Draw an open line; the shading below it stays."""
        width = max(1, round(thickness * SUPERSAMPLE))
        points = [self._to_fixed_point(path)]
        cv2.polylines(self._rgba, points, False, (*color, 255), width, cv2.LINE_AA, _SHIFT)
        if self._person is not None:
            cv2.polylines(self._person, points, False, 255 * person, width, cv2.LINE_AA, _SHIFT)

    def crease(self, path: Points, thickness: float, step: float) -> None:
        """Darken (step < 0) or lighten along an open line, like a fold."""
        width = max(1, round(thickness * SUPERSAMPLE))
        tone = round(_NEUTRAL + step)
        cv2.polylines(
            self._tone, [self._to_fixed_point(path)], False, tone, width, cv2.LINE_8, _SHIFT
        )

    def overlay(self, color: Image, alpha: Plane, left: int, top: int, *, person: bool) -> None:
        """Blend an image in: `color` HW3, `alpha` HW, corner in the canvas's own pixels.

        Its colors are already shaded, so the tone below is reset to neutral.
        """
        height, width = self._tone.shape
        rows = slice(max(top, 0), min(top + alpha.shape[0], height))
        cols = slice(max(left, 0), min(left + alpha.shape[1], width))
        if rows.start >= rows.stop or cols.start >= cols.stop:
            return
        visible = (
            slice(rows.start - top, rows.stop - top),
            slice(cols.start - left, cols.stop - left),
        )
        cover = alpha[visible][..., None]
        source = np.dstack((color[visible], np.full(alpha[visible].shape, 255, np.uint8)))
        below = self._rgba[rows, cols]
        self._rgba[rows, cols] = below + (source.astype(np.float32) - below) * cover
        if self._person is not None:
            mask = self._person[rows, cols]
            self._person[rows, cols] = mask + (255.0 * person - mask) * cover[..., 0]
        self._tone[rows, cols][cover[..., 0] > 0.5] = _NEUTRAL

    def to_pixels(self, x: float, y: float) -> tuple[float, float]:
        """Convert frame coordinates to the canvas's own pixels, for `overlay`."""
        return (x - self.left) * SUPERSAMPLE, (y - self.top) * SUPERSAMPLE

    def flatten(self, softness: float) -> Cutout:
        """Reduce the drawn part to frame resolution.

        `softness` (frame pixels) blurs the shading only.
        """
        alpha = np.ascontiguousarray(self._rgba[..., 3])
        # Whole frame pixels around everything drawn.
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
        color = rgba[..., :3] * (tone * np.float32(1 / (_NEUTRAL * 255)))[..., None]
        cover = rgba[..., 3] * np.float32(1 / 255)
        if self._person is None:
            person = np.zeros_like(cover)
        else:
            small = cv2.resize(self._person[used], size, interpolation=cv2.INTER_AREA)
            person = small * np.float32(1 / 255)
        return Cutout(self.left + x, self.top + y, color, cover, person)

    def _to_fixed_point(self, points: Points) -> NDArray[np.int32]:
        """Frame coordinates as OpenCV's fixed-point pixel-center coordinates of the canvas."""
        own = (points - (self.left, self.top)) * SUPERSAMPLE - 0.5
        return np.rint(own * (1 << _SHIFT)).astype(np.int32)

    def _fill(
        self, outlines: Points, paint: Paint | Color, person: bool, origin: Points, angle: float
    ) -> None:
        """Paint outlines (N, points, 2); a pattern is rotated by `angle` around `origin`."""
        if not isinstance(paint, Paint):
            paint = Paint(paint)
        fixed = self._to_fixed_point(outlines)
        for points in fixed:
            cv2.fillPoly(self._rgba, [points], (*paint.color, 255), cv2.LINE_AA, _SHIFT)
            if self._person is not None:
                cv2.fillPoly(self._person, [points], 255 * person, cv2.LINE_AA, _SHIFT)
        if paint.tile is not None:
            self._fill_pattern(fixed, paint.tile, paint.period, origin, angle)

    def _fill_pattern(
        self, fixed: NDArray[np.int32], tile: Image, period: float, origin: Points, angle: float
    ) -> None:
        """Fill the outlines with the tile."""
        height, width = self._tone.shape
        x0, y0 = np.maximum(fixed.min(axis=(0, 1)) >> _SHIFT, 0)
        x1, y1 = np.minimum((fixed.max(axis=(0, 1)) >> _SHIFT) + 1, (width, height))
        if x0 >= x1 or y0 >= y1:
            return
        mask: Mask = np.zeros((y1 - y0, x1 - x0), np.uint8)
        for points in fixed - (np.array((x0, y0), np.int32) << _SHIFT):
            cv2.fillPoly(mask, [points], 255, cv2.LINE_AA, _SHIFT)
        tile_pixels = tile.shape[0] / (period * SUPERSAMPLE)
        c, s = np.cos(angle) * tile_pixels, np.sin(angle) * tile_pixels
        start = self._to_fixed_point(origin) / (1 << _SHIFT) - (x0, y0)
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
        # Not on the soft edge, which stays premultiplied.
        _, inside = cv2.threshold(mask, 254, 255, cv2.THRESH_BINARY)
        cv2.copyTo(pattern, inside, self._rgba[y0:y1, x0:x1])

    def _shade_body(
        self, centers: Points, offsets: Points, reach: float, tone: float, strength: float
    ) -> None:
        """Shade a body: dark everywhere, then bright in a narrower core nearer to the light."""
        width, shift = _LIT
        towards_light = np.array((self.light.x, self.light.y)) * (shift * reach)
        step = self.light.contrast * strength
        self._fill_tone(centers + offsets, tone - step)
        self._fill_tone(centers + offsets * width + towards_light, tone + 0.75 * step)

    def _fill_tone(self, outlines: Points, tone: float) -> None:
        level = round(_NEUTRAL + tone)
        for points in self._to_fixed_point(outlines):
            cv2.fillPoly(self._tone, [points], level, cv2.LINE_8, _SHIFT)


def blur(plane: Plane, sigma: float) -> Plane:
    return cv2.GaussianBlur(plane, (0, 0), sigma).astype(np.float32, copy=False)


def noise(rng: np.random.Generator, height: int, width: int, *cells: int) -> Plane:
    """Smooth noise of unit variance; each of `cells` is the grain size of one octave in pixels."""
    total = np.zeros((height, width), np.float32)
    for cell in cells:
        grid = rng.standard_normal((height // cell + 2, width // cell + 2)).astype(np.float32)
        total += cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
    return total / np.float32(np.sqrt(len(cells)))


def mix(a: Sequence[float], b: Sequence[float], fraction: float) -> Color:
    """Interpolate colors: `a` at fraction 0, `b` at fraction 1."""
    red, green, blue = (
        round(min(max(p + (q - p) * fraction, 0), 255)) for p, q in zip(a, b, strict=True)
    )
    return red, green, blue


def lighten(color: Color, fraction: float) -> Color:
    """Mix with white for a positive fraction, with black for a negative one."""
    return mix(color, (255, 255, 255) if fraction > 0 else (0, 0, 0), abs(fraction))
