"""Draws a demo person's head: a lit ellipsoid, pixel by pixel, with hair, face and hat."""

from typing import NamedTuple

import numpy as np

from segtrain.data.people.looks import Look
from segtrain.data.people.sketch import (
    SUPERSAMPLE,
    Colour,
    Plane,
    Points,
    Sketch,
    ellipse,
    hull,
    lighten,
    mix,
    moved,
    smooth,
)

_HALF_WIDTH, _HALF_DEPTH = 0.77, 0.86  # of the head's half-height
_LIFT = 0.05  # hair and hats sit this much higher than the skull, in half-heights
# Per style: size against the skull, and how low the hair reaches at the back, over the ears and
# in front (-1 chin, 1 crown).
_HAIR = {
    "buzz": (1.015, -0.6, -0.05, 0.52),
    "short": (1.09, -0.62, -0.15, 0.5),
    "fringe": (1.1, -0.75, -0.45, 0.27),
    "long": (1.1, -0.95, -0.75, 0.48),
    "bun": (1.05, -0.6, -0.1, 0.52),
    "ponytail": (1.06, -0.6, -0.1, 0.5),
    "afro": (1.38, -0.7, -0.3, 0.45),
    "balding": (1.04, -0.6, -0.2, 0.5),
}
_HAT = {
    "cap": (1.13, 0.3, 0.33, 0.36),
    "beanie": (1.16, 0.0, 0.1, 0.34),
    "brim": (1.14, 0.36, 0.38, 0.4),
}


class _Surface(NamedTuple):
    """The visible side of a head, per pixel of a sketch; all but the corner are planes."""

    left: Plane  # direction of the surface, in the head's own axes
    up: Plane
    forward: Plane
    shade: Plane  # what the light makes of its colour, about 1
    cover: Plane  # 0 outside the head, 1 inside
    x: int  # corner in the sketch's own pixels
    y: int


class Head:
    """A head at `centre` (frame pixels), `half_height` from centre to crown.

    The head's own unit directions are (to the person's left, up, forward).
    """

    def __init__(
        self, look: Look, centre: Points, half_height: float, yaw: float, roll: float
    ) -> None:
        self.look, self.centre, self.radius, self.roll = look, centre, half_height, roll
        self._cos, self._sin = np.cos(yaw), np.sin(yaw)
        self._half_width = half_height * np.hypot(_HALF_WIDTH * self._cos, _HALF_DEPTH * self._sin)
        self.neck_end = self._at(0, -0.35, -0.25)[:2]

    def draw(self, sketch: Sketch) -> None:
        self._ears(sketch, near=False)
        self._bun(sketch)
        self._skull(sketch)
        if self.radius > 4:
            self._face(sketch)
        self._ears(sketch, near=True)
        if self.look.hair != "bald":
            self._shell(sketch, self.look.hair_colour, _HAIR[self.look.hair], is_hair=True)
        if self.look.hat != "none":
            self._shell(sketch, self.look.hat_colour, _HAT[self.look.hat], is_hair=False)
            self._brim(sketch)

    def draw_hair_behind(self, sketch: Sketch) -> None:
        """What falls down the back: a ponytail, or long hair as one soft shape."""
        colour, r = self.look.hair_colour, self.radius
        if self.look.hair == "ponytail":
            joints = ((0, 0.4, -1.0), (0.1, 0.15, -1.5), (0, -1.0, -1.3))
            path = np.stack([self._at(*joint)[:2] for joint in joints])
            sketch.tube(path, r * np.array((0.22, 0.3, 0.12)), colour, counts=True)
        elif self.look.hair == "long":
            wide = self._half_width
            x, y = self.centre - (0.3 * self._sin * r, 0)
            half = np.array(((0.9, -0.6), (1.2, 0.4), (1.15, 1.45))) * (wide, r)
            outline = np.concatenate((half, ((0, 1.55 * r),), half[::-1] * (-1, 1)))
            sketch.shape(moved(smooth(outline, 3), x, y), colour, tone=-8, round_=0.8, counts=True)

    def _at(self, left: float, up: float, forward: float) -> Points:
        """A point of the unit head on the screen, as (x, y, nearness)."""
        across = (left * self._cos * _HALF_WIDTH + forward * self._sin * _HALF_DEPTH) * self.radius
        near = forward * self._cos - left * self._sin
        down = -up * self.radius
        c, s = np.cos(self.roll), np.sin(self.roll)
        x, y = self.centre
        return np.array((x + across * c - down * s, y + across * s + down * c, near))

    def _surface(self, sketch: Sketch, grow: float, taper: float, lift: float = 0.0) -> _Surface:
        """The head at `grow` times its size; `taper` narrows the jaw, `lift` moves it all up."""
        own_x, own_y = sketch.to_pixels(*self._at(0, lift, 0)[:2])
        reach = int(np.ceil(self.radius * SUPERSAMPLE * grow * 1.1)) + 2
        x0, y0 = int(own_x) - reach, int(own_y) - reach
        steps = np.arange(2 * reach + 1, dtype=np.float32) + 0.5
        dx, dy = np.meshgrid(steps + np.float32(x0 - own_x), steps + np.float32(y0 - own_y))
        c, s = np.float32(np.cos(self.roll)), np.float32(np.sin(self.roll))
        wide = np.float32(SUPERSAMPLE * grow * self._half_width)
        across = (dx * c + dy * s) / wide
        down = (dy * c - dx * s) / np.float32(SUPERSAMPLE * grow * self.radius)
        across = across / (1 - np.float32(taper) * np.clip(down, 0, 1) ** 2)
        square = across**2 + down**2
        near = np.sqrt(np.clip(1 - square, 0, 1))
        cover = np.clip((1 - np.sqrt(square)) * wide + 0.5, 0, 1)
        cos, sin = np.float32(self._cos), np.float32(self._sin)
        left, forward = across * cos - near * sin, across * sin + near * cos
        light = sketch.light
        lit = across * np.float32(light.x) + down * np.float32(light.y) + 0.7 * near - 0.5
        shade = 1 + np.float32(light.contrast / 90) * lit
        return _Surface(left, -down, forward, shade, cover, x0, y0)

    def _skull(self, sketch: Sketch) -> None:
        left, up, forward, shade, cover, x, y = self._surface(sketch, 1.0, taper=0.26)
        colour = np.array(self.look.skin, np.float32) * shade[..., None]
        # Blood shows in the cheeks, and the eyes lie in shallow hollows.
        cheeks = np.exp(-(((np.abs(left) - 0.5) / 0.22) ** 2) - ((up + 0.28) / 0.2) ** 2)
        hollows = np.exp(-(((np.abs(left) - 0.4) / 0.22) ** 2) - ((up - 0.1) / 0.13) ** 2)
        colour *= 1 + (forward > 0)[..., None] * (
            cheeks[..., None] * np.array((0.05, -0.06, -0.06), np.float32)
            - 0.1 * hollows[..., None]
        )
        if self.look.beard:
            mouth = np.hypot(left / 0.3, (up + 0.5) / 0.09) < 1
            beard = (up + 0.22 < 0.25 * np.abs(left)) & (forward > -0.1) & ~mouth
            hair = np.array(self.look.hair_colour, np.float32) * shade[..., None]
            colour = np.where(beard[..., None], 0.25 * colour + 0.75 * hair, colour)
        sketch.overlay(_bytes(colour), cover, x, y, counts=True)

    def _shell(
        self,
        sketch: Sketch,
        base: Colour,
        style: tuple[float, float, float, float],
        *,
        is_hair: bool,
    ) -> None:
        """Hair or a hat: a larger ellipsoid, down to a line that rises from back to front."""
        grow, back, side, front = style
        left, up, forward, shade, cover, x, y = self._surface(sketch, grow, taper=0.1, lift=_LIFT)
        above = up - np.interp(forward, (-0.8, -0.3, 0.1, 0.7), (back, back, side, front))
        colour = np.array(base, np.float32) * shade[..., None]
        if is_hair:
            # A parting, locks of uneven length, and strands with a sheen.
            above = above + 0.2 * left * (forward > 0) + 0.035 * np.sin(17 * left + 3 * forward)
            strands = 1 + 0.1 * np.sin(24 * left + 9 * up) * np.sin(11 * left - 5 * forward)
            sheen = 90 * np.clip(shade - 1.02, 0, 0.3)
            colour = colour * strands[..., None] + sheen[..., None]
            if self.look.hair == "balding":
                above = np.minimum(above, 0.5 - up)
        edge = np.float32(self.radius * SUPERSAMPLE * 0.5)
        cover = cover * np.clip(above * edge + 0.5, 0, 1)
        sketch.overlay(_bytes(colour), cover, x, y, counts=True)

    def _brim(self, sketch: Sketch) -> None:
        """A cap's peak in front, or a hat's brim all round."""
        if self.look.hat == "beanie":
            return
        up = _HAT[self.look.hat][3]
        if self.look.hat == "cap":
            angles, far = np.linspace(-0.9, 0.9, 11), 1.6
            if self._at(0, up, 1)[2] < -0.3:
                return
        else:
            angles, far = np.linspace(0, 2 * np.pi, 32), 1.75
        rim = np.array([self._at(np.sin(a) * 1.1, up, np.cos(a) * 1.1) for a in angles])
        outer = np.array([self._at(np.sin(a) * far, up, np.cos(a) * far) for a in angles])
        # Seen from slightly above, the near rim hangs lower.
        for points in (rim, outer):
            points[:, 1] += 0.12 * points[:, 2] * self.radius
        outline = hull(np.concatenate((rim, outer))[:, :2])
        sketch.shape(outline, lighten(self.look.hat_colour, -0.12), round_=0.5, counts=True)
        if self.look.hat == "brim":
            self._shell(sketch, self.look.hat_colour, _HAT["brim"], is_hair=False)

    def _bun(self, sketch: Sketch) -> None:
        if self.look.hair == "bun":
            x, y, _ = self._at(0, 1.14, -0.35)
            r = 0.36 * self.radius
            sketch.shape(ellipse(x, y, r, r), self.look.hair_colour, round_=1, counts=True)

    def _ears(self, sketch: Sketch, near: bool) -> None:
        for side in (-1.0, 1.0):
            x, y, depth = self._at(side * 1.0, -0.08, -0.05)
            if (depth > 0.25) != near:
                continue
            wide = self.radius * (0.1 + 0.07 * abs(depth))
            outline = ellipse(x, y, wide, self.radius * 0.2, self.roll)
            sketch.shape(
                outline,
                mix(lighten(self.look.skin, -0.07), (190, 90, 70), 0.15),
                round_=0.8,
                counts=True,
            )

    def _face(self, sketch: Sketch) -> None:
        skin, r = self.look.skin, self.radius
        dark = lighten(mix(skin, (120, 40, 30), 0.25), -0.4)
        self._nose(sketch, dark)
        for side in (-1.0, 1.0):
            self._eye(sketch, side)
        curve = ((-0.28, -0.5, 0.74), (-0.14, -0.54, 0.81), (0, -0.55, 0.83), (0.14, -0.54, 0.81),
                 (0.28, -0.5, 0.74))  # fmt: skip
        mouth = [self._at(*spot) for spot in curve]
        if mouth[2][2] > 0.1:
            path = np.stack(mouth)[:, :2]
            lips = mix(lighten(skin, -0.25), (170, 50, 55), 0.45)
            sketch.line(path, max(0.1 * r, 0.6), lips, counts=True)
            sketch.line(path, max(0.025 * r, 0.35), dark, counts=True)

    def _nose(self, sketch: Sketch, dark: Colour) -> None:
        bridge, tip = self._at(0, 0.08, 0.98), self._at(0, -0.22, 1.22)
        if tip[2] < 0:
            return
        wings = [self._at(a, -0.3, 0.97) for a in (-0.17, 0.17)]
        outline = hull(np.stack((bridge, tip, *wings))[:, :2])
        sketch.shape(smooth(outline, 1), lighten(self.look.skin, -0.07), round_=0.5, counts=True)
        if self.radius > 9:
            sketch.line(
                np.stack(wings)[:, :2],
                0.035 * self.radius,
                mix(self.look.skin, dark, 0.6),
                counts=True,
            )

    def _eye(self, sketch: Sketch, side: float) -> None:
        r = self.radius
        x, y, near = self._at(side * 0.42, 0.07, 0.9)
        if near < 0.12:
            return
        squeeze = min(1.0, 0.15 + 0.95 * near)
        iris = mix((40, 28, 20), (70, 110, 140), 0.8 * (sum(self.look.hair_colour) > 330))
        if r > 8:
            white = ellipse(x, y, 0.16 * r * squeeze, 0.075 * r, self.roll)
            sketch.shape(white, (236, 232, 226), tone=-10, counts=True)
        size = 0.085 * r
        sketch.shape(ellipse(x, y, size * squeeze, size), iris, counts=True)
        lid = self._line(side, ((0.23, 0.09, 0.95), (0.43, 0.16, 0.9), (0.62, 0.09, 0.78)))
        sketch.line(lid, max(0.045 * r, 0.4), (44, 30, 26), counts=True)
        brow = self._line(side, ((0.2, 0.27, 0.93), (0.45, 0.33, 0.84), (0.66, 0.26, 0.7)))
        sketch.line(brow, max(0.055 * r, 0.5), lighten(self.look.hair_colour, -0.2), counts=True)
        if r > 20:
            sketch.shape(
                ellipse(x - 0.03 * r, y - 0.03 * r, 0.022 * r, 0.022 * r),
                (250, 250, 250),
                counts=True,
            )
        if self.look.glasses:
            frame = ellipse(x, y, 0.26 * r * squeeze, 0.2 * r, self.roll)
            sketch.line(
                np.concatenate((frame, frame[:1])), max(0.03 * r, 0.3), (50, 46, 46), counts=True
            )

    def _line(self, side: float, spots: tuple[tuple[float, float, float], ...]) -> Points:
        """Points of the face, mirrored to one side, on the screen."""
        return np.stack([self._at(side * left, up, forward)[:2] for left, up, forward in spots])


def _bytes(colour: Plane) -> np.ndarray:
    return np.clip(colour, 0, 255).astype(np.uint8)
