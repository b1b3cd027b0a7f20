"""The far end of a demo scene: rooms, streets, parks, beaches and studio walls."""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from segtrain.data.people.looks import cloth_colour, pattern_tile
from segtrain.data.people.props import any_colour
from segtrain.data.people.sketch import (
    Colour,
    Light,
    Paint,
    Plane,
    Sketch,
    blurred,
    ellipse,
    lighten,
    mix,
    moved,
    noise,
    rectangle,
    smooth,
)


@dataclass(frozen=True)
class Camera:
    """What ties size to place: someone `h` pixels tall stands at `horizon + eye * h` (row)."""

    horizon: float
    eye: float

    def ground(self, adult_px: float) -> float:
        return self.horizon + self.eye * adult_px


Backdrop = Callable[[np.random.Generator, Camera, Light, int, int], Plane]


def room(rng: np.random.Generator, camera: Camera, light: Light, width: int, height: int) -> Plane:
    """Wallpaper, skirting board and floor, with windows, pictures, doors or curtains."""
    sketch = _primed(light, width, height)
    wall = mix(any_colour(rng), (225, 218, 205), rng.uniform(0.1, 0.75))
    other = lighten(wall, rng.choice((-0.16, 0.14)))
    plain = rng.random() < 0.4
    tile = None if plain else pattern_tile(rng, wall, other)
    edge = camera.ground(0.3 * height)
    paint = Paint(wall, tile, height * rng.uniform(0.04, 0.14))
    sketch.shape(rectangle(-2, -2, width + 2, edge), paint)
    for slot in rng.permutation(3)[: rng.integers(0, 4)]:
        x = width * (0.18 + 0.32 * slot + rng.normal(0, 0.04))
        (_window, _picture, _picture, _door)[rng.integers(4)](sketch, rng, x, edge, 0.36 * height)
    board = mix(wall, (240, 236, 228), 0.7)
    sketch.shape(rectangle(-2, edge - 0.025 * height, width + 2, edge), board, tone=-4)
    canvas = _shaded(sketch, rng, height)
    _lay_floor(canvas, rng, camera, edge, mix(any_colour(rng), (150, 124, 98), 0.4))
    return canvas


def street(
    rng: np.random.Generator, camera: Camera, light: Light, width: int, height: int
) -> Plane:
    """Houses with rows of windows under the sky, and paving in front of them."""
    sketch = _primed(light, width, height)
    _sky(sketch, rng, width, height)
    edge = camera.ground(0.27 * height)
    left = -rng.uniform(0, 0.2) * width
    while left < width:
        wide, tall = width * rng.uniform(0.18, 0.45), height * rng.uniform(0.3, 1.1)
        _house(sketch, rng, (left, edge - tall, left + wide, edge), height)
        left += wide + (width * rng.uniform(0, 0.12)) * (rng.random() < 0.3)
    canvas = _shaded(sketch, rng, height)
    _lay_floor(canvas, rng, camera, edge, mix(any_colour(rng), (150, 146, 140), 0.7))
    return canvas


def park(rng: np.random.Generator, camera: Camera, light: Light, width: int, height: int) -> Plane:
    """Hills and a line of trees behind a meadow."""
    sketch = _primed(light, width, height)
    _sky(sketch, rng, width, height)
    edge = camera.ground(0.2 * height)
    far = (136, 156, 168)
    leaf = mix((92, 122, 60), any_colour(rng), rng.uniform(0, 0.35))
    for layer in range(3):
        xs = np.linspace(-0.1, 1.1, 14) * width
        rise = height * (0.3 - 0.09 * layer) * rng.uniform(0.4, 1.1)
        ys = edge - rise * (
            0.55 + 0.3 * np.sin(xs / width * rng.uniform(4, 12) + rng.uniform(0, 6))
        )
        ys += rng.normal(0, 0.012 * height, 14)
        outline = np.concatenate(
            (np.stack((xs, ys), axis=1), [(1.1 * width, edge), (-0.1 * width, edge)])
        )
        sketch.shape(smooth(outline, 2), mix(far, lighten(leaf, -0.2), 0.25 + 0.3 * layer))
    for x in rng.uniform(0, width, rng.integers(4, 16)):
        r = height * rng.uniform(0.03, 0.09)
        wobble = 1 + 0.12 * rng.standard_normal((24, 1))
        sketch.shape(
            moved(smooth(ellipse(0, 0, r, r * 1.3) * wobble, 1), x, edge - r),
            lighten(leaf, -0.3 + rng.normal(0, 0.1)),
            round_=0.8,
        )
    canvas = _shaded(sketch, rng, height)
    _grow_ground(canvas, rng, edge, leaf)
    return canvas


def beach(rng: np.random.Generator, camera: Camera, light: Light, width: int, height: int) -> Plane:
    """Sky, sea and skin-coloured sand."""
    sketch = _primed(light, width, height)
    _sky(sketch, rng, width, height)
    edge = camera.ground(0.22 * height)
    sea = mix((62, 110, 140), (90, 160, 160), rng.random())
    top = camera.horizon + 0.02 * height
    sketch.shape(rectangle(-2, top, width + 2, edge + 4), sea)
    for _ in range(12):
        y = rng.uniform(top, edge)
        x, reach = rng.uniform(0, width), width * rng.uniform(0.05, 0.25)
        sketch.line(np.array(((x, y), (x + reach, y))), 0.004 * height, lighten(sea, 0.35))
    canvas = _shaded(sketch, rng, height)
    _grow_ground(canvas, rng, edge, mix((222, 196, 154), any_colour(rng), 0.15))
    return canvas


def studio(
    rng: np.random.Generator, camera: Camera, light: Light, width: int, height: int
) -> Plane:
    """A wall of soft blots or loose shapes, as in a portrait or at a market stall."""
    sketch = _primed(light, width, height)
    base = any_colour(rng)
    sketch.shape(rectangle(-2, -2, width + 2, height + 2), base)
    for _ in range(rng.integers(8, 40)):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        rx, ry = height * rng.uniform(0.02, 0.2, 2)
        outline = (
            ellipse(x, y, rx, ry, rng.uniform(0, 3))
            if rng.random() < 0.5
            else rectangle(x - rx, y - ry * 2, x + rx, y + ry)
        )
        sketch.shape(
            outline, mix(base, any_colour(rng), rng.uniform(0.2, 0.9)), round_=rng.choice((0, 0.8))
        )
    canvas = _shaded(sketch, rng, height)
    if rng.random() < 0.6:
        canvas = blurred(canvas, height * rng.uniform(0.005, 0.04))
    return canvas


BACKDROPS: tuple[tuple[Backdrop, bool, float], ...] = (
    (room, True, 0.38), (street, False, 0.24), (park, False, 0.2), (beach, False, 0.08),
    (studio, True, 0.1),
)  # fmt: skip
"""Each backdrop, whether indoor things stand in front of it, and its odds."""


def _primed(light: Light, width: int, height: int) -> Sketch:
    """A sketch of the whole frame, opaque from the start."""
    sketch = Sketch((0, 0, width, height), light)
    sketch.shape(rectangle(-2, -2, width + 2, height + 2), (150, 150, 150))
    return sketch


def _shaded(sketch: Sketch, rng: np.random.Generator, height: int) -> Plane:
    """The sketch as an opaque picture, with coarse and fine unevenness."""
    canvas = sketch.flatten(softness=0.01 * height).colour
    grain = noise(rng, *canvas.shape[:2], height // 3, height // 12, 3)
    return canvas * (1 + np.float32(rng.uniform(0.01, 0.06)) * grain[..., None])


def _sky(sketch: Sketch, rng: np.random.Generator, width: int, height: int) -> None:
    zenith = mix((96, 146, 204), (176, 184, 194), rng.random())
    glow = mix((226, 232, 236), (244, 196, 150), rng.uniform(0, 0.7))
    for step in range(60):
        y = 0.7 * height * step / 60
        strip = rectangle(-2, y - 1, width + 2, y + 0.02 * height)
        sketch.shape(strip, mix(zenith, glow, step / 60))
    for _ in range(rng.integers(0, 5)):
        x, y, r = (
            rng.uniform(0, width),
            rng.uniform(0, 0.3) * height,
            height * rng.uniform(0.03, 0.08),
        )
        for shift in (-1.4, -0.5, 0.5, 1.3):
            puff = ellipse(x + shift * r, y - abs(rng.normal(0, 0.3)) * r, r * 1.1, r * 0.6)
            sketch.shape(puff, mix(glow, (255, 255, 255), 0.55), round_=0.2)


def _house(
    sketch: Sketch, rng: np.random.Generator, box: tuple[float, float, float, float], height: int
) -> None:
    left, top, right, bottom = box
    wall = mix(any_colour(rng), (176, 168, 158), 0.4)
    sketch.shape(rectangle(*box), wall, tone=rng.normal(0, 6))
    sketch.shape(rectangle(left, top, right, top + 0.02 * height), lighten(wall, -0.25))
    tile = np.empty((48, 48, 3), np.uint8)
    tile[:] = wall
    side, sill = rng.integers(8, 16), rng.integers(6, 12)
    tile[sill - 3 : 51 - sill, side - 3 : 51 - side] = lighten(wall, 0.3)
    tile[sill : 48 - sill, side : 48 - side] = mix((60, 74, 92), (206, 214, 214), rng.random())
    tile[23:25, side : 48 - side] = lighten(wall, 0.3)
    period = (right - left) / rng.integers(3, 6)
    rows = max(int((bottom - top - 0.05 * height) / period), 1)
    front = rectangle(left, bottom - rows * period, right, bottom)
    sketch.shape(front, Paint(wall, tile, period))


def _window(sketch: Sketch, rng: np.random.Generator, x: float, edge: float, size: float) -> None:
    left, top, right, bottom = (
        x - size * 0.4,
        edge - 1.65 * size,
        x + size * 0.4,
        edge - 0.65 * size,
    )
    sketch.shape(rectangle(left, top, right, bottom), (238, 234, 226))
    sky = mix((150, 190, 220), (236, 222, 196), rng.random())
    pad = 0.05 * size
    for a, b in ((left + pad, x - pad / 2), (x + pad / 2, right - pad)):
        sketch.shape(rectangle(a, top + pad, b, bottom - pad), sky)
        sketch.shape(
            rectangle(a, bottom - rng.uniform(0.2, 0.5) * size, b, bottom - pad), (112, 134, 96)
        )
    if rng.random() < 0.6:
        cloth = cloth_colour(rng)
        for side in (-1, 1):
            for fold in range(4):
                fx = x + side * size * (0.36 + 0.06 * fold)
                sketch.tube(
                    np.array(((fx, top - pad), (fx, bottom + 0.4 * size))),
                    np.full(2, 0.05 * size),
                    cloth,
                )


def _picture(sketch: Sketch, rng: np.random.Generator, x: float, edge: float, size: float) -> None:
    wide, tall = size * rng.uniform(0.2, 0.42), size * rng.uniform(0.2, 0.42)
    y = edge - 1.25 * size
    sketch.shape(rectangle(x - wide, y - tall, x + wide, y + tall), lighten(any_colour(rng), -0.3))
    wide, tall = wide * 0.86, tall * 0.84
    sketch.shape(rectangle(x - wide, y - tall, x + wide, y + tall), any_colour(rng))
    for _ in range(4):
        rx, ry = rng.uniform(0.1, 0.4, 2) * (wide, tall)
        spot = (x + rng.uniform(-0.5, 0.5) * wide, y + rng.uniform(-0.5, 0.5) * tall)
        sketch.shape(ellipse(*spot, rx, ry), any_colour(rng))


def _door(sketch: Sketch, rng: np.random.Generator, x: float, edge: float, size: float) -> None:
    wood = any_colour(rng)
    sketch.shape(
        rectangle(x - 0.34 * size, edge - 1.5 * size, x + 0.34 * size, edge), lighten(wood, 0.3)
    )
    sketch.shape(rectangle(x - 0.29 * size, edge - 1.45 * size, x + 0.29 * size, edge), wood)
    for low, high in ((0.15, 0.65), (0.8, 1.3)):
        sketch.shape(
            rectangle(x - 0.2 * size, edge - high * size, x + 0.2 * size, edge - low * size),
            lighten(wood, -0.14),
        )
    sketch.shape(
        ellipse(x + 0.23 * size, edge - 0.7 * size, 0.025 * size, 0.025 * size), (206, 180, 110)
    )


def _lay_floor(
    canvas: Plane, rng: np.random.Generator, camera: Camera, edge: float, colour: Colour
) -> None:
    """Boards or tiles running to the horizon, from row `edge` down."""
    height, width = canvas.shape[:2]
    top = int(np.clip(edge, 0, height))
    if top >= height:
        return
    tile = pattern_tile(rng, colour, lighten(colour, rng.choice((-0.2, 0.2))))
    tile[:2] = tile[:, :2] = lighten(colour, -0.35)
    # Board width and length, as shares of how far below the horizon a row lies.
    wide, long = rng.uniform(0.08, 0.25), rng.uniform(4, 12)
    across, deep = len(tile) / wide, len(tile) * height / long
    horizon = min(camera.horizon, edge - 0.05 * height) - top
    to_tile = np.array(((across, 0, -across * width / 2), (0, 0, deep), (0, 1, -horizon)))
    floor = cv2.warpPerspective(
        tile, to_tile, (width, height - top),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_WRAP,
    )  # fmt: skip
    rows = np.linspace(0, 1, height - top, dtype=np.float32)[:, None, None]
    # Far tiles are smaller than a pixel: fade them to their mean.
    sharp = np.clip(rows * 3, 0, 1)
    plain = np.array(colour, np.float32)
    laid = (floor * sharp + plain * (1 - sharp)) / 255 * (0.88 + 0.16 * rows)
    canvas[top:] = laid * (1 + 0.03 * noise(rng, height - top, width, 40, 9, 2)[..., None])


def _grow_ground(canvas: Plane, rng: np.random.Generator, edge: float, colour: Colour) -> None:
    """Grass or sand: noise whose grain widens towards the viewer."""
    height, width = canvas.shape[:2]
    top = int(np.clip(edge, 0, height))
    if top >= height:
        return
    deep = height - top
    grain = noise(rng, deep, width, max(deep // 2, 8), 24, 6, 2)
    rows = np.linspace(0.8, 1.1, deep, dtype=np.float32)[:, None, None]
    strength = np.float32(rng.uniform(0.05, 0.12))
    tint = np.array((1.0, 0.85, 0.7), np.float32)
    ground = np.array(colour, np.float32) / 255 * rows * (1 + strength * grain[..., None] * tint)
    canvas[top:] = np.clip(ground, 0, 1)
