"""Draw a demo person's head: an ellipsoid shaded per pixel, with hair, face and hat."""

from typing import NamedTuple

import numpy as np

from segtrain.demo.appearance import Appearance
from segtrain.demo.canvas import (
    SUPERSAMPLE,
    Canvas,
    Color,
    Plane,
    Points,
    convex_hull,
    ellipse,
    lighten,
    mix,
    smooth,
    translate,
)
from segtrain.types import Image

_HALF_WIDTH, _HALF_DEPTH = 0.77, 0.86  # relative to the half-height
_LIFT = 0.05  # how much higher than the skull hair and hats are, in half-heights
# Per style: size relative to the skull, and the lower edge at the back, over the ears and in front
# (-1 chin, 1 crown).
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
    """The visible side of a head, per pixel of a canvas; all fields but x and y are planes."""

    left: Plane  # direction of the surface, in the head's own axes
    up: Plane
    forward: Plane
    shade: Plane  # factor of the color, about 1
    cover: Plane  # 0 outside the head, 1 inside
    x: int  # upper left corner in the canvas's own pixels
    y: int


class Head:
    """A head at `center` (frame pixels), `half_height` from center to crown.

    The head's own axes are (to the person's left, up, forward).
    """

    def __init__(
        self, appearance: Appearance, center: Points, half_height: float, yaw: float, roll: float
    ) -> None:
        self.appearance, self.center, self.radius, self.roll = appearance, center, half_height, roll
        self._cos, self._sin = np.cos(yaw), np.sin(yaw)
        self._half_width = half_height * np.hypot(_HALF_WIDTH * self._cos, _HALF_DEPTH * self._sin)
        self.neck_end = self._at(0, -0.35, -0.25)[:2]

    def draw(self, canvas: Canvas) -> None:
        self._ears(canvas, near=False)
        self._bun(canvas)
        self._skull(canvas)
        if self.radius > 4:
            self._face(canvas)
        self._ears(canvas, near=True)
        if self.appearance.hair != "bald":
            self._shell(
                canvas, self.appearance.hair_color, _HAIR[self.appearance.hair], is_hair=True
            )
        if self.appearance.hat != "none":
            self._shell(canvas, self.appearance.hat_color, _HAT[self.appearance.hat], is_hair=False)
            self._brim(canvas)

    def draw_hair_behind(self, canvas: Canvas) -> None:
        """Hair on the back: a ponytail, or long hair as one soft shape."""
        color, r = self.appearance.hair_color, self.radius
        if self.appearance.hair == "ponytail":
            joints = ((0, 0.4, -1.0), (0.1, 0.15, -1.5), (0, -1.0, -1.3))
            path = np.stack([self._at(*joint)[:2] for joint in joints])
            canvas.tube(path, r * np.array((0.22, 0.3, 0.12)), color, person=True)
        elif self.appearance.hair == "long":
            wide = self._half_width
            x, y = self.center - (0.3 * self._sin * r, 0)
            half = np.array(((0.9, -0.6), (1.2, 0.4), (1.15, 1.45))) * (wide, r)
            outline = np.concatenate((half, ((0, 1.55 * r),), half[::-1] * (-1, 1)))
            canvas.shape(
                translate(smooth(outline, 3), x, y), color, tone=-8, bulge=0.8, person=True
            )

    def _at(self, left: float, up: float, forward: float) -> Points:
        """Project a point of the unit head to (x, y, nearness)."""
        across = (left * self._cos * _HALF_WIDTH + forward * self._sin * _HALF_DEPTH) * self.radius
        near = forward * self._cos - left * self._sin
        down = -up * self.radius
        c, s = np.cos(self.roll), np.sin(self.roll)
        x, y = self.center
        return np.array((x + across * c - down * s, y + across * s + down * c, near))

    def _surface(self, canvas: Canvas, grow: float, taper: float, lift: float = 0.0) -> _Surface:
        """The head at `grow` times its size; `taper` narrows the jaw, `lift` moves the head up."""
        own_x, own_y = canvas.to_pixels(*self._at(0, lift, 0)[:2])
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
        light = canvas.light
        lit = across * np.float32(light.x) + down * np.float32(light.y) + 0.7 * near - 0.5
        shade = 1 + np.float32(light.contrast / 90) * lit
        return _Surface(left, -down, forward, shade, cover, x0, y0)

    def _skull(self, canvas: Canvas) -> None:
        left, up, forward, shade, cover, x, y = self._surface(canvas, 1.0, taper=0.26)
        color = np.array(self.appearance.skin, np.float32) * shade[..., None]
        # The cheeks are red, and the eyes are in shallow hollows.
        cheeks = np.exp(-(((np.abs(left) - 0.5) / 0.22) ** 2) - ((up + 0.28) / 0.2) ** 2)
        hollows = np.exp(-(((np.abs(left) - 0.4) / 0.22) ** 2) - ((up - 0.1) / 0.13) ** 2)
        color *= 1 + (forward > 0)[..., None] * (
            cheeks[..., None] * np.array((0.05, -0.06, -0.06), np.float32)
            - 0.1 * hollows[..., None]
        )
        if self.appearance.beard:
            mouth = np.hypot(left / 0.3, (up + 0.5) / 0.09) < 1
            beard = (up + 0.22 < 0.25 * np.abs(left)) & (forward > -0.1) & ~mouth
            hair = np.array(self.appearance.hair_color, np.float32) * shade[..., None]
            color = np.where(beard[..., None], 0.25 * color + 0.75 * hair, color)
        canvas.overlay(_to_uint8(color), cover, x, y, person=True)

    def _shell(
        self,
        canvas: Canvas,
        base: Color,
        style: tuple[float, float, float, float],
        *,
        is_hair: bool,
    ) -> None:
        """Hair or a hat: a larger ellipsoid above an edge that rises from back to front."""
        grow, back, side, front = style
        left, up, forward, shade, cover, x, y = self._surface(canvas, grow, taper=0.1, lift=_LIFT)
        above = up - np.interp(forward, (-0.8, -0.3, 0.1, 0.7), (back, back, side, front))
        color = np.array(base, np.float32) * shade[..., None]
        if is_hair:
            # A part, locks of different length, and strands with a sheen.
            above = above + 0.2 * left * (forward > 0) + 0.035 * np.sin(17 * left + 3 * forward)
            strands = 1 + 0.1 * np.sin(24 * left + 9 * up) * np.sin(11 * left - 5 * forward)
            sheen = 90 * np.clip(shade - 1.02, 0, 0.3)
            color = color * strands[..., None] + sheen[..., None]
            if self.appearance.hair == "balding":
                above = np.minimum(above, 0.5 - up)
        edge = np.float32(self.radius * SUPERSAMPLE * 0.5)
        cover = cover * np.clip(above * edge + 0.5, 0, 1)
        canvas.overlay(_to_uint8(color), cover, x, y, person=True)

    def _brim(self, canvas: Canvas) -> None:
        """The peak of a cap, or the brim of a hat."""
        if self.appearance.hat == "beanie":
            return
        up = _HAT[self.appearance.hat][3]
        if self.appearance.hat == "cap":
            angles, far = np.linspace(-0.9, 0.9, 11), 1.6
            if self._at(0, up, 1)[2] < -0.3:
                return
        else:
            angles, far = np.linspace(0, 2 * np.pi, 32), 1.75
        rim = np.array([self._at(np.sin(a) * 1.1, up, np.cos(a) * 1.1) for a in angles])
        outer = np.array([self._at(np.sin(a) * far, up, np.cos(a) * far) for a in angles])
        # Seen from slightly above, the near rim is lower.
        for points in (rim, outer):
            points[:, 1] += 0.12 * points[:, 2] * self.radius
        outline = convex_hull(np.concatenate((rim, outer))[:, :2])
        canvas.shape(outline, lighten(self.appearance.hat_color, -0.12), bulge=0.5, person=True)
        if self.appearance.hat == "brim":
            self._shell(canvas, self.appearance.hat_color, _HAT["brim"], is_hair=False)

    def _bun(self, canvas: Canvas) -> None:
        if self.appearance.hair == "bun":
            x, y, _ = self._at(0, 1.14, -0.35)
            r = 0.36 * self.radius
            canvas.shape(ellipse(x, y, r, r), self.appearance.hair_color, bulge=1, person=True)

    def _ears(self, canvas: Canvas, near: bool) -> None:
        for side in (-1.0, 1.0):
            x, y, depth = self._at(side * 1.0, -0.08, -0.05)
            if (depth > 0.25) != near:
                continue
            wide = self.radius * (0.1 + 0.07 * abs(depth))
            outline = ellipse(x, y, wide, self.radius * 0.2, self.roll)
            canvas.shape(
                outline,
                mix(lighten(self.appearance.skin, -0.07), (190, 90, 70), 0.15),
                bulge=0.8,
                person=True,
            )

    def _face(self, canvas: Canvas) -> None:
        skin, r = self.appearance.skin, self.radius
        dark = lighten(mix(skin, (120, 40, 30), 0.25), -0.4)
        self._nose(canvas, dark)
        for side in (-1.0, 1.0):
            self._eye(canvas, side)
        curve = ((-0.28, -0.5, 0.74), (-0.14, -0.54, 0.81), (0, -0.55, 0.83), (0.14, -0.54, 0.81),
                 (0.28, -0.5, 0.74))  # fmt: skip
        mouth = [self._at(*point) for point in curve]
        if mouth[2][2] > 0.1:
            path = np.stack(mouth)[:, :2]
            lips = mix(lighten(skin, -0.25), (170, 50, 55), 0.45)
            canvas.line(path, max(0.1 * r, 0.6), lips, person=True)
            canvas.line(path, max(0.025 * r, 0.35), dark, person=True)

    def _nose(self, canvas: Canvas, dark: Color) -> None:
        bridge, tip = self._at(0, 0.08, 0.98), self._at(0, -0.22, 1.22)
        if tip[2] < 0:
            return
        wings = [self._at(a, -0.3, 0.97) for a in (-0.17, 0.17)]
        outline = convex_hull(np.stack((bridge, tip, *wings))[:, :2])
        canvas.shape(
            smooth(outline, 1), lighten(self.appearance.skin, -0.07), bulge=0.5, person=True
        )
        if self.radius > 9:
            canvas.line(
                np.stack(wings)[:, :2],
                0.035 * self.radius,
                mix(self.appearance.skin, dark, 0.6),
                person=True,
            )

    def _eye(self, canvas: Canvas, side: float) -> None:
        r = self.radius
        x, y, near = self._at(side * 0.42, 0.07, 0.9)
        if near < 0.12:
            return
        foreshortening = min(1.0, 0.15 + 0.95 * near)
        iris = mix((40, 28, 20), (70, 110, 140), 0.8 * (sum(self.appearance.hair_color) > 330))
        if r > 8:
            white = ellipse(x, y, 0.16 * r * foreshortening, 0.075 * r, self.roll)
            canvas.shape(white, (236, 232, 226), tone=-10, person=True)
        size = 0.085 * r
        canvas.shape(ellipse(x, y, size * foreshortening, size), iris, person=True)
        lid = self._line(side, ((0.23, 0.09, 0.95), (0.43, 0.16, 0.9), (0.62, 0.09, 0.78)))
        canvas.line(lid, max(0.045 * r, 0.4), (44, 30, 26), person=True)
        brow = self._line(side, ((0.2, 0.27, 0.93), (0.45, 0.33, 0.84), (0.66, 0.26, 0.7)))
        canvas.line(
            brow, max(0.055 * r, 0.5), lighten(self.appearance.hair_color, -0.2), person=True
        )
        if r > 20:
            canvas.shape(
                ellipse(x - 0.03 * r, y - 0.03 * r, 0.022 * r, 0.022 * r),
                (250, 250, 250),
                person=True,
            )
        if self.appearance.glasses:
            frame = ellipse(x, y, 0.26 * r * foreshortening, 0.2 * r, self.roll)
            canvas.line(
                np.concatenate((frame, frame[:1])), max(0.03 * r, 0.3), (50, 46, 46), person=True
            )

    def _line(self, side: float, points: tuple[tuple[float, float, float], ...]) -> Points:
        """Project points of the face, mirrored to one side."""
        return np.stack([self._at(side * left, up, forward)[:2] for left, up, forward in points])


def _to_uint8(color: Plane) -> Image:
    return np.clip(color, 0, 255).astype(np.uint8)
