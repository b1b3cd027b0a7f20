"""Backdrops of demo scenes: rooms, streets, parks, beaches and studio walls."""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from segtrain.demo.appearance import cloth_color, pattern_tile
from segtrain.demo.canvas import (
    Canvas,
    Color,
    Light,
    Paint,
    Plane,
    blur,
    ellipse,
    lighten,
    mix,
    noise,
    rectangle,
    smooth,
    translate,
)
from segtrain.demo.props import random_color


@dataclass(frozen=True)
class Camera:
    """Relates size to position: a person `h` pixels tall stands at row `horizon + eye * h`."""

    horizon: float
    eye: float

    def ground(self, adult_px: float) -> float:
        return self.horizon + self.eye * adult_px


Backdrop = Callable[[np.random.Generator, Camera, Light, int, int], Plane]


def room(rng: np.random.Generator, camera: Camera, light: Light, width: int, height: int) -> Plane:
    """Wallpaper, skirting board and floor, with windows, paintings, doors or curtains."""
    canvas = _new_canvas(light, width, height)
    wall = mix(random_color(rng), (225, 218, 205), rng.uniform(0.1, 0.75))
    other = lighten(wall, rng.choice((-0.16, 0.14)))
    plain = rng.random() < 0.4
    tile = None if plain else pattern_tile(rng, wall, other)
    edge = camera.ground(0.3 * height)
    paint = Paint(wall, tile, height * rng.uniform(0.04, 0.14))
    canvas.shape(rectangle(-2, -2, width + 2, edge), paint)
    for slot in rng.permutation(3)[: rng.integers(0, 4)]:
        x = width * (0.18 + 0.32 * slot + rng.normal(0, 0.04))
        (_draw_window, _draw_painting, _draw_painting, _draw_door)[rng.integers(4)](
            canvas, rng, x, edge, 0.36 * height
        )
    board = mix(wall, (240, 236, 228), 0.7)
    canvas.shape(rectangle(-2, edge - 0.025 * height, width + 2, edge), board, tone=-4)
    frame = _finish(canvas, rng, height)
    _draw_floor(frame, rng, camera, edge, mix(random_color(rng), (150, 124, 98), 0.4))
    return frame


def street(
    rng: np.random.Generator, camera: Camera, light: Light, width: int, height: int
) -> Plane:
    """Houses with rows of windows below the sky, and pavement in front of them."""
    canvas = _new_canvas(light, width, height)
    _draw_sky(canvas, rng, width, height)
    edge = camera.ground(0.27 * height)
    left = -rng.uniform(0, 0.2) * width
    while left < width:
        wide, tall = width * rng.uniform(0.18, 0.45), height * rng.uniform(0.3, 1.1)
        _draw_house(canvas, rng, (left, edge - tall, left + wide, edge), height)
        left += wide + (width * rng.uniform(0, 0.12)) * (rng.random() < 0.3)
    frame = _finish(canvas, rng, height)
    _draw_floor(frame, rng, camera, edge, mix(random_color(rng), (150, 146, 140), 0.7))
    return frame


def park(rng: np.random.Generator, camera: Camera, light: Light, width: int, height: int) -> Plane:
    """Hills and a line of trees behind a meadow."""
    canvas = _new_canvas(light, width, height)
    _draw_sky(canvas, rng, width, height)
    edge = camera.ground(0.2 * height)
    far = (136, 156, 168)
    leaf = mix((92, 122, 60), random_color(rng), rng.uniform(0, 0.35))
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
        canvas.shape(smooth(outline, 2), mix(far, lighten(leaf, -0.2), 0.25 + 0.3 * layer))
    for x in rng.uniform(0, width, rng.integers(4, 16)):
        r = height * rng.uniform(0.03, 0.09)
        wobble = 1 + 0.12 * rng.standard_normal((24, 1))
        canvas.shape(
            translate(smooth(ellipse(0, 0, r, r * 1.3) * wobble, 1), x, edge - r),
            lighten(leaf, -0.3 + rng.normal(0, 0.1)),
            bulge=0.8,
        )
    frame = _finish(canvas, rng, height)
    _draw_ground(frame, rng, edge, leaf)
    return frame


def beach(rng: np.random.Generator, camera: Camera, light: Light, width: int, height: int) -> Plane:
    """Sky, sea and skin-colored sand."""
    canvas = _new_canvas(light, width, height)
    _draw_sky(canvas, rng, width, height)
    edge = camera.ground(0.22 * height)
    sea = mix((62, 110, 140), (90, 160, 160), rng.random())
    top = camera.horizon + 0.02 * height
    canvas.shape(rectangle(-2, top, width + 2, edge + 4), sea)
    for _ in range(12):
        y = rng.uniform(top, edge)
        x, reach = rng.uniform(0, width), width * rng.uniform(0.05, 0.25)
        canvas.line(np.array(((x, y), (x + reach, y))), 0.004 * height, lighten(sea, 0.35))
    frame = _finish(canvas, rng, height)
    _draw_ground(frame, rng, edge, mix((222, 196, 154), random_color(rng), 0.15))
    return frame


def studio(
    rng: np.random.Generator, camera: Camera, light: Light, width: int, height: int
) -> Plane:
    """A wall of soft blobs or loose shapes, as in a portrait or at a market stall."""
    canvas = _new_canvas(light, width, height)
    base = random_color(rng)
    canvas.shape(rectangle(-2, -2, width + 2, height + 2), base)
    for _ in range(rng.integers(8, 40)):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        rx, ry = height * rng.uniform(0.02, 0.2, 2)
        outline = (
            ellipse(x, y, rx, ry, rng.uniform(0, 3))
            if rng.random() < 0.5
            else rectangle(x - rx, y - ry * 2, x + rx, y + ry)
        )
        canvas.shape(
            outline, mix(base, random_color(rng), rng.uniform(0.2, 0.9)), bulge=rng.choice((0, 0.8))
        )
    frame = _finish(canvas, rng, height)
    if rng.random() < 0.6:
        frame = blur(frame, height * rng.uniform(0.005, 0.04))
    return frame


BACKDROPS: tuple[tuple[Backdrop, bool, float], ...] = (
    (room, True, 0.38), (street, False, 0.24), (park, False, 0.2), (beach, False, 0.08),
    (studio, True, 0.1),
)  # fmt: skip
"""Each backdrop, whether its props are indoor props, and its probability."""


def _new_canvas(light: Light, width: int, height: int) -> Canvas:
    """An opaque canvas of the whole frame."""
    canvas = Canvas((0, 0, width, height), light)
    canvas.shape(rectangle(-2, -2, width + 2, height + 2), (150, 150, 150))
    return canvas


def _finish(canvas: Canvas, rng: np.random.Generator, height: int) -> Plane:
    """The canvas as an opaque image, with coarse and fine noise."""
    frame = canvas.flatten(softness=0.01 * height).color
    grain = noise(rng, *frame.shape[:2], height // 3, height // 12, 3)
    return frame * (1 + np.float32(rng.uniform(0.01, 0.06)) * grain[..., None])


def _draw_sky(canvas: Canvas, rng: np.random.Generator, width: int, height: int) -> None:
    zenith = mix((96, 146, 204), (176, 184, 194), rng.random())
    glow = mix((226, 232, 236), (244, 196, 150), rng.uniform(0, 0.7))
    for step in range(60):
        y = 0.7 * height * step / 60
        strip = rectangle(-2, y - 1, width + 2, y + 0.02 * height)
        canvas.shape(strip, mix(zenith, glow, step / 60))
    for _ in range(rng.integers(0, 5)):
        x, y, r = (
            rng.uniform(0, width),
            rng.uniform(0, 0.3) * height,
            height * rng.uniform(0.03, 0.08),
        )
        for shift in (-1.4, -0.5, 0.5, 1.3):
            puff = ellipse(x + shift * r, y - abs(rng.normal(0, 0.3)) * r, r * 1.1, r * 0.6)
            canvas.shape(puff, mix(glow, (255, 255, 255), 0.55), bulge=0.2)


def _draw_house(
    canvas: Canvas, rng: np.random.Generator, box: tuple[float, float, float, float], height: int
) -> None:
    left, top, right, bottom = box
    wall = mix(random_color(rng), (176, 168, 158), 0.4)
    canvas.shape(rectangle(*box), wall, tone=rng.normal(0, 6))
    canvas.shape(rectangle(left, top, right, top + 0.02 * height), lighten(wall, -0.25))
    tile = np.empty((48, 48, 3), np.uint8)
    tile[:] = wall
    side, sill = rng.integers(8, 16), rng.integers(6, 12)
    tile[sill - 3 : 51 - sill, side - 3 : 51 - side] = lighten(wall, 0.3)
    tile[sill : 48 - sill, side : 48 - side] = mix((60, 74, 92), (206, 214, 214), rng.random())
    tile[23:25, side : 48 - side] = lighten(wall, 0.3)
    period = (right - left) / rng.integers(3, 6)
    rows = max(int((bottom - top - 0.05 * height) / period), 1)
    front = rectangle(left, bottom - rows * period, right, bottom)
    canvas.shape(front, Paint(wall, tile, period))


def _draw_window(
    canvas: Canvas, rng: np.random.Generator, x: float, edge: float, size: float
) -> None:
    left, top, right, bottom = (
        x - size * 0.4,
        edge - 1.65 * size,
        x + size * 0.4,
        edge - 0.65 * size,
    )
    canvas.shape(rectangle(left, top, right, bottom), (238, 234, 226))
    sky = mix((150, 190, 220), (236, 222, 196), rng.random())
    pad = 0.05 * size
    for a, b in ((left + pad, x - pad / 2), (x + pad / 2, right - pad)):
        canvas.shape(rectangle(a, top + pad, b, bottom - pad), sky)
        canvas.shape(
            rectangle(a, bottom - rng.uniform(0.2, 0.5) * size, b, bottom - pad), (112, 134, 96)
        )
    if rng.random() < 0.6:
        cloth = cloth_color(rng)
        for side in (-1, 1):
            for fold in range(4):
                fx = x + side * size * (0.36 + 0.06 * fold)
                canvas.tube(
                    np.array(((fx, top - pad), (fx, bottom + 0.4 * size))),
                    np.full(2, 0.05 * size),
                    cloth,
                )


def _draw_painting(
    canvas: Canvas, rng: np.random.Generator, x: float, edge: float, size: float
) -> None:
    wide, tall = size * rng.uniform(0.2, 0.42), size * rng.uniform(0.2, 0.42)
    y = edge - 1.25 * size
    canvas.shape(
        rectangle(x - wide, y - tall, x + wide, y + tall), lighten(random_color(rng), -0.3)
    )
    wide, tall = wide * 0.86, tall * 0.84
    canvas.shape(rectangle(x - wide, y - tall, x + wide, y + tall), random_color(rng))
    for _ in range(4):
        rx, ry = rng.uniform(0.1, 0.4, 2) * (wide, tall)
        spot = (x + rng.uniform(-0.5, 0.5) * wide, y + rng.uniform(-0.5, 0.5) * tall)
        canvas.shape(ellipse(*spot, rx, ry), random_color(rng))


def _draw_door(
    canvas: Canvas, rng: np.random.Generator, x: float, edge: float, size: float
) -> None:
    wood = random_color(rng)
    canvas.shape(
        rectangle(x - 0.34 * size, edge - 1.5 * size, x + 0.34 * size, edge), lighten(wood, 0.3)
    )
    canvas.shape(rectangle(x - 0.29 * size, edge - 1.45 * size, x + 0.29 * size, edge), wood)
    for low, high in ((0.15, 0.65), (0.8, 1.3)):
        canvas.shape(
            rectangle(x - 0.2 * size, edge - high * size, x + 0.2 * size, edge - low * size),
            lighten(wood, -0.14),
        )
    canvas.shape(
        ellipse(x + 0.23 * size, edge - 0.7 * size, 0.025 * size, 0.025 * size), (206, 180, 110)
    )


def _draw_floor(
    frame: Plane, rng: np.random.Generator, camera: Camera, edge: float, color: Color
) -> None:
    """Boards or tiles that run to the horizon, from row `edge` down."""
    height, width = frame.shape[:2]
    top = int(np.clip(edge, 0, height))
    if top >= height:
        return
    tile = pattern_tile(rng, color, lighten(color, rng.choice((-0.2, 0.2))))
    tile[:2] = tile[:, :2] = lighten(color, -0.35)
    # Board width and length, relative to the distance of a row below the horizon.
    wide, long = rng.uniform(0.08, 0.25), rng.uniform(4, 12)
    across, deep = len(tile) / wide, len(tile) * height / long
    horizon = min(camera.horizon, edge - 0.05 * height) - top
    to_tile = np.array(((across, 0, -across * width / 2), (0, 0, deep), (0, 1, -horizon)))
    floor = cv2.warpPerspective(
        tile, to_tile, (width, height - top),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_WRAP,
    )  # fmt: skip
    rows = np.linspace(0, 1, height - top, dtype=np.float32)[:, None, None]
    # Distant tiles are smaller than a pixel: fade them to their mean.
    sharp = np.clip(rows * 3, 0, 1)
    plain = np.array(color, np.float32)
    textured = (floor * sharp + plain * (1 - sharp)) / 255 * (0.88 + 0.16 * rows)
    frame[top:] = textured * (1 + 0.03 * noise(rng, height - top, width, 40, 9, 2)[..., None])


def _draw_ground(frame: Plane, rng: np.random.Generator, edge: float, color: Color) -> None:
    """Grass or sand: noise that gets coarser towards the viewer."""
    height, width = frame.shape[:2]
    top = int(np.clip(edge, 0, height))
    if top >= height:
        return
    deep = height - top
    grain = noise(rng, deep, width, max(deep // 2, 8), 24, 6, 2)
    rows = np.linspace(0.8, 1.1, deep, dtype=np.float32)[:, None, None]
    strength = np.float32(rng.uniform(0.05, 0.12))
    tint = np.array((1.0, 0.85, 0.7), np.float32)
    ground = np.array(color, np.float32) / 255 * rows * (1 + strength * grain[..., None] * tint)
    frame[top:] = np.clip(ground, 0, 1)
