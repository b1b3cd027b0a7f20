"""Draw a demo person: a posed skeleton, seen from any direction, dressed part by part."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from segtrain.demo.appearance import Appearance
from segtrain.demo.canvas import (
    Canvas,
    Color,
    Cutout,
    Light,
    Paint,
    Points,
    convex_hull,
    ellipse,
    lighten,
    smooth,
    translate,
)
from segtrain.demo.heads import Head
from segtrain.demo.poses import Pose, build_skeleton

_CAMERA_PITCH = 0.12  # the camera looks slightly down, so nearer feet are lower
_LEG_RADII = (0.052, 0.035, 0.020)
_ARM_RADII = (0.028, 0.022, 0.016)
# Torso cross-sections from crotch to neck: height, half-width, half-depth, forward shift.
_SECTIONS = np.array(
    (
        (-0.045, 0.070, 0.055, 0.0),
        (0.010, 0.094, 0.075, -0.012),
        (0.060, 0.090, 0.068, -0.004),
        (0.125, 0.080, 0.058, 0.006),
        (0.210, 0.097, 0.068, 0.010),
        (0.262, 0.106, 0.058, 0.0),
        (0.285, 0.086, 0.045, -0.004),
        (0.300, 0.050, 0.038, -0.002),
        (0.312, 0.034, 0.034, 0.0),
    )
)
_SLEEVES = {"tee": 0.42, "tank": 0.0, "long": 1.0, "jacket": 1.0, "coat": 1.0}
_BAGS = ("none", "backpack", "handbag", "shoulder bag")


@dataclass(frozen=True)
class Placement:
    """Position of a person: `x` and `ground` in frame pixels, and an adult's height there.

    `yaw` is 0 facing the camera and pi/2 facing right.
    """

    x: float
    ground: float
    adult_px: float
    yaw: float


class Figure:
    """One person at a position, ready to be drawn."""

    def __init__(
        self, appearance: Appearance, pose: Pose, place: Placement, rng: np.random.Generator
    ) -> None:
        self.appearance, self.pose = appearance, pose
        self.height = place.adult_px * appearance.stature
        self.bones = build_skeleton(pose, appearance)
        self.bag = rng.choice(_BAGS, p=(0.76, 0.1, 0.07, 0.07))
        self.bag_color = lighten(appearance.hat_color, -0.15)
        self._cos, self._sin = np.cos(place.yaw), np.sin(place.yaw)
        self._origin = np.zeros(2)
        feet = self._project(self.bones.legs[:, 2:])[..., 1].max() + 0.03 * self.height
        self._origin = np.array((place.x, place.ground - feet))
        self.head = Head(
            appearance,
            center=self._project(self.bones.head),
            half_height=appearance.head * self.height / 2,
            yaw=place.yaw + float(np.clip(rng.normal(0, 0.3), -0.6, 0.6)),
            roll=pose.sway + float(rng.normal(0, 0.05)),
        )
        self.seat_y = float(self._project(np.zeros(3))[1]) + 0.055 * self.height

    def box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Bounding box of the drawing in frame pixels, clipped to the frame."""
        joints = np.concatenate((self.bones.arms.reshape(-1, 3), self.bones.legs.reshape(-1, 3)))
        points = np.concatenate((self._project(joints), self.head.center[None]))
        margin = max(0.16, self.appearance.head * 1.2) * self.height
        left, top = np.floor(points.min(axis=0) - margin)
        right, bottom = np.ceil(points.max(axis=0) + margin)
        return (
            int(np.clip(left, 0, width)), int(np.clip(top, 0, height)),
            int(np.clip(right, 0, width)), int(np.clip(bottom, 0, height)),
        )  # fmt: skip

    def draw(self, light: Light, width: int, height: int) -> Cutout | None:
        """The figure at frame resolution, or None if it is outside the frame."""
        box = self.box(width, height)
        if box[0] >= box[2] or box[1] >= box[3]:
            return None
        canvas = Canvas(box, light, with_person_mask=True)
        for _, part in sorted(self._parts(), key=lambda part: part[0]):
            part(canvas)
        return canvas.flatten(softness=0.009 * self.height)

    def _parts(self) -> list[tuple[float, Callable[[Canvas], None]]]:
        """All parts to draw, with their nearness to the camera (relative to the height)."""
        legs = [self._depth(leg[:2]) - 0.06 for leg in self.bones.legs]
        arms = [self._depth(arm[1:3]) + 0.04 for arm in self.bones.arms]
        parts: list[tuple[float, Callable[[Canvas], None]]] = [
            (0.0, self._torso),
            (0.035, self.head.draw),
            (0.034 - 0.12 * self._cos, self.head.draw_hair_behind),
        ]
        for i in range(2):
            parts.append((legs[i], partial(self._leg, i)))
            parts.append((arms[i], partial(self._arm, i)))
        if self.appearance.bottom in ("skirt", "dress"):
            parts.append((max(legs) + 0.001, self._skirt))
        if self.appearance.top == "coat" and not self.pose.seated:
            parts.append((max(*legs, -0.001) + 0.002, self._coat_tails))
        if self.bag == "backpack":
            parts.append((0.02 - 0.1 * self._cos, self._backpack))
        elif self.bag == "handbag":
            parts.append((arms[0] - 0.001, self._handbag))
        elif self.bag == "shoulder bag":
            parts.append((0.03, self._shoulder_bag))
        return parts

    def _project(self, joints: Points) -> Points:
        """Project joints in space (..., 3) to frame pixels (..., 2)."""
        across = joints[..., 0] * self._cos + joints[..., 2] * self._sin
        near = joints[..., 2] * self._cos - joints[..., 0] * self._sin
        down = -joints[..., 1] * np.cos(_CAMERA_PITCH) + near * np.sin(_CAMERA_PITCH)
        return self._origin + self.height * np.stack((across, down), axis=-1)

    def _depth(self, joints: Points) -> float:
        return float((joints[:, 2] * self._cos - joints[:, 0] * self._sin).mean())

    def _torso(self, canvas: Canvas) -> None:
        appearance = self.appearance
        lower = appearance.bottom_paint
        self._trunk(canvas, -0.045, 0.09, lower, 0.0)
        neck = np.stack((self._project(self.bones.neck * 0.95), self.head.neck_end))
        radius = (
            (0.029 + 0.004 * (appearance.girth - 1) - 0.003 * appearance.build)
            * self.height
            * self.bones.scale
        )
        canvas.tube(neck, np.array((radius * 1.15, radius)), appearance.skin, tone=-14, person=True)
        hem = -0.02 if appearance.top in ("long", "jacket", "coat") else 0.0
        if appearance.bottom in ("skirt", "dress"):
            hem = 0.085
        self._trunk(canvas, hem, 0.312, appearance.top_paint, 0.006)
        self._waist_folds(canvas)
        facing = self._cos
        if appearance.top in ("jacket", "coat") and facing > 0.2:
            self._open_front(canvas, hem)
        elif appearance.logo and facing > 0.35:
            self._logo(canvas)
        self._neckline(canvas, neck, radius)
        canvas.tube(neck, np.array((radius, radius)), appearance.skin, tone=-12, person=True)

    def _waist_folds(self, canvas: Canvas) -> None:
        """Creases from both sides of the waist and below the arms towards the middle."""
        path, widths = self._spine(np.array((0.06, 0.1, 0.135, 0.235)))
        for row, (side, reach) in enumerate(((1, 0.3), (-1, 0.15), (1, 0.45), (-1, 0.5))):
            start = path[row] + (side * widths[row] * 0.95, 0)
            end = path[row] + (side * widths[row] * reach, 0.018 * self.height)
            canvas.crease(np.stack((start, end)), 0.008 * self.height, -20)

    def _trunk(
        self, canvas: Canvas, bottom: float, top: float, paint: Paint | Color, grow: float
    ) -> None:
        """The torso's outline between two heights above the hips, `grow` wider on all sides."""
        heights = np.linspace(bottom, top, 14)
        path, widths = self._spine(heights)
        canvas.band(path, widths + grow * self.height, paint, person=True)

    def _spine(self, heights: Points) -> tuple[Points, Points]:
        """Center line (N, 2) and visible half-widths (N,) of the torso, frame pixels."""
        appearance = self.appearance
        _, wide, deep, shift = (
            np.interp(heights, _SECTIONS[:, 0], column) for column in _SECTIONS.T
        )
        # Broad shoulders or broad hips; weight is added at the waist.
        wide = wide * (1 + 0.1 * appearance.build * np.interp(heights, (0.0, 0.28), (1, -1)))
        waist = np.interp(heights, (-0.05, 0.11, 0.29), (0.6, 1.0, 0.25))
        wide = wide * (1 + (appearance.girth - 1) * waist)
        deep = deep * (1 + (appearance.girth - 1) * waist * 1.3)
        shift = shift + (appearance.girth - 1) * 0.06 * np.interp(
            heights, (0, 0.1, 0.2), (0.2, 1, 0.2)
        )
        spine = self.bones.neck / np.linalg.norm(self.bones.neck)
        centers = heights[:, None] * spine + shift[:, None] * np.array((0, 0, 1.0))
        widths = np.hypot(wide * self._cos, deep * self._sin)
        return self._project(centers * self.bones.scale), widths * self.bones.scale * self.height

    def _point_on_chest(self, across: float, height: float) -> Points:
        """A point on the chest: `across` in half-widths to the person's left."""
        path, _ = self._spine(np.array((height, height + 0.01)))
        _, wide, deep, shift = (np.interp(height, _SECTIONS[:, 0], col) for col in _SECTIONS.T)
        offset = np.array(
            (across * wide, 0, (deep - abs(across) * 0.03) * self.appearance.girth + shift)
        )
        spot: Points = path[0] + self._project(offset * self.bones.scale) - self._origin
        return spot

    def _open_front(self, canvas: Canvas, hem: float) -> None:
        """The shirt between the sides of an open jacket, and the two edges."""
        left = np.array([self._point_on_chest(0.14, h) for h in (hem + 0.01, 0.12, 0.2)])
        right = np.array([self._point_on_chest(-0.14, h) for h in (hem + 0.01, 0.12, 0.2)])
        top = np.array([self._point_on_chest(a, 0.3) for a in (0.42, -0.42)])
        outline = np.concatenate((left, top, right[::-1]))
        canvas.shape(outline, self.appearance.inner, tone=-6, person=True)
        edge = lighten(self.appearance.top_paint.color, -0.35)
        for side, corner in ((left, top[:1]), (right, top[1:])):
            path = np.concatenate((side, corner))
            canvas.line(path, 0.008 * self.height, edge, person=True)

    def _logo(self, canvas: Canvas) -> None:
        color = self.appearance.inner
        x, y = self._point_on_chest(0.0, 0.215)
        size = 0.035 * self.height
        if sum(color) % 2:
            canvas.shape(ellipse(x, y, size * self._cos, size), color, tone=4, person=True)
            return
        for row, reach in ((-0.5, 0.9), (0.0, 0.65), (0.5, 0.8)):
            ends = np.array(
                ((x - size * reach, y + row * size), (x + size * reach, y + row * size))
            )
            canvas.line(ends, size * 0.24, color, person=True)

    def _neckline(self, canvas: Canvas, neck: Points, radius: float) -> None:
        """Bare skin below the throat; nothing when seen from behind."""
        x, y = neck[0]
        if self._cos > 0.1:
            depth = radius * (1.7 if self.appearance.top == "tank" else 0.95)
            scoop = ellipse(
                x + self._sin * radius * 0.5, y, radius * (0.45 + 0.95 * self._cos), depth
            )  # fmt: skip
            canvas.shape(scoop, self.appearance.skin, tone=-4, person=True)

    def _leg(self, i: int, canvas: Canvas) -> None:
        appearance, joints = self.appearance, self._project(self.bones.legs[i])
        thickness = self.bones.scale * self.height * (0.55 + 0.45 * appearance.girth)
        tone = -14.0 if self._depth(self.bones.legs[i][:2]) < -0.02 else 0.0
        radii = np.array(_LEG_RADII) * thickness
        self._shoe(canvas, joints, radii[2], tone)
        bare = appearance.bottom != "trousers"
        if bare:
            path, widths = _add_muscle(joints[:3], radii, bulge=0.12)
            canvas.tube(path, widths, appearance.skin, tone=tone, person=True)
        if appearance.bottom in ("trousers", "shorts"):
            loose = radii * (1.03, 1.1, 1.3) + 0.003 * self.height
            fraction = 0.5 if bare else 0.985
            path, widths = _truncate_limb(joints[:3], loose, fraction)
            canvas.tube(path, widths, appearance.bottom_paint, tone=tone, person=True)
            if not bare:
                self._folds(canvas, joints, widths[1])

    def _folds(self, canvas: Canvas, joints: Points, radius: float) -> None:
        """Creases across the bend of a clothed limb."""
        along = joints[2] - joints[0]
        along /= np.linalg.norm(along) + 1e-6
        across = np.array((-along[1], along[0])) * radius
        for position, reach, step in ((-0.9, 0.7, -18), (0.1, 0.95, -26), (0.9, 0.6, -16)):
            middle = joints[1] + along * position * radius
            fold = np.stack(
                (middle - across * reach, middle + across * reach * 0.4 + along * radius * 0.35)
            )
            canvas.crease(fold, 0.2 * radius, step)

    def _shoe(self, canvas: Canvas, joints: Points, ankle: float, tone: float) -> None:
        heel, toe = joints[2], joints[3]
        down = np.array((0, ankle * 0.55))
        back = heel + (heel - toe) * 0.18 + down
        path = np.stack((back, heel + (toe - heel) * 0.45 + down * 0.8, toe + down * 0.4))
        radii = ankle * np.array((1.0, 1.12, 0.82))
        canvas.tube(
            translate(path, 0, ankle * 0.35),
            radii,
            lighten(self.appearance.shoes, 0.6),
            person=True,
        )
        canvas.tube(path, radii, self.appearance.shoes, tone=tone, person=True)

    def _arm(self, i: int, canvas: Canvas) -> None:
        appearance, joints = self.appearance, self._project(self.bones.arms[i])
        thickness = (
            self.bones.scale
            * self.height
            * (0.6 + 0.4 * appearance.girth)
            * (1 - 0.08 * appearance.build)
        )
        radii = np.array(_ARM_RADII) * thickness
        tone = -12.0 if self._depth(self.bones.arms[i][:2]) < -0.05 else 0.0
        sleeve = _SLEEVES[appearance.top]
        if sleeve < 1:
            path, widths = _add_muscle(joints[:3], radii, bulge=0.1)
            canvas.tube(path, widths, appearance.skin, tone=tone, person=True)
        self._hand(canvas, joints, radii[2], tone)
        if sleeve > 0:
            loose = radii * (0.98, 1.16, 1.3) + 0.003 * self.height
            path, widths = _truncate_limb(joints[:3], loose, sleeve * 0.96)
            canvas.tube(path, widths, appearance.top_paint, tone=tone + 3, person=True)
            if sleeve == 1:
                self._folds(canvas, joints, widths[1])

    def _hand(self, canvas: Canvas, joints: Points, wrist: float, tone: float) -> None:
        """Palm, fingers held together, and a thumb on the side away from the body."""
        start, tip = joints[2], joints[3]
        along = tip - start
        across = np.array((-along[1], along[0]))
        if across[0] * (self.head.center[0] - start[0]) > 0:
            across = -across
        palm = np.stack((start, start + along * 0.5, tip))
        canvas.tube(
            palm,
            wrist * np.array((0.95, 1.2, 0.7)),
            self.appearance.skin,
            tone=tone + 4,
            person=True,
        )
        thumb = np.stack((start + along * 0.2, start + along * 0.55 - across * 0.42))
        canvas.tube(
            thumb, wrist * np.array((0.55, 0.42)), self.appearance.skin, tone=tone + 6, person=True
        )

    def _skirt(self, canvas: Canvas) -> None:
        self._draped_cloth(
            canvas, self.appearance.bottom_paint, waist=0.1, fraction=0.5, flare=1.45
        )

    def _coat_tails(self, canvas: Canvas) -> None:
        self._draped_cloth(canvas, self.appearance.top_paint, waist=0.03, fraction=0.34, flare=1.2)

    def _draped_cloth(
        self, canvas: Canvas, paint: Paint, waist: float, fraction: float, flare: float
    ) -> None:
        """Cloth from the waist around both legs, down to `fraction` of their length."""
        path, widths = self._spine(np.array((0.0, waist)))
        slack = 0.004 * self.height
        rim = [translate(path, side * (widths.max() + slack), 0) for side in (-1, 1)]
        for leg in self.bones.legs:
            joints, _ = _truncate_limb(self._project(leg[:3]), np.ones(3), fraction)
            radius = _LEG_RADII[0] * self.height * self.bones.scale * flare * self.appearance.girth
            rim.append(
                translate(ellipse(0, 0, radius, radius * 0.25), joints[-1, 0], joints[-1, 1])
            )
        outline = convex_hull(np.concatenate(rim))
        canvas.shape(outline, paint, bulge=0.8, person=True)

    def _backpack(self, canvas: Canvas) -> None:
        """Not part of the person, as in COCO."""
        back = self._project(np.array((0, 0.19, -0.1)) * self.bones.scale)
        size = 0.08 * self.height * self.bones.scale
        wide = 0.65 + 0.45 * abs(self._cos)
        top = ellipse(back[0], back[1] - size * 0.6, size * wide, size)
        bottom = ellipse(back[0], back[1] + size * 0.7, size * (wide + 0.08), size * 0.7)
        canvas.shape(convex_hull(np.concatenate((top, bottom))), self.bag_color, bulge=1.0)
        pocket = ellipse(back[0], back[1] + size * 0.7, size * 0.6, size * 0.45)
        canvas.shape(pocket, lighten(self.bag_color, -0.2), bulge=0.6)

    def _handbag(self, canvas: Canvas) -> None:
        x, y = self._project(self.bones.arms[0][3])
        size = 0.055 * self.height
        loop = ellipse(x, y + size * 0.7, size * 0.55, size * 0.9)
        canvas.line(loop[13:], size * 0.16, self.bag_color)
        corners = np.array(((-0.8, 0.8), (0.8, 0.8), (1.05, 2.3), (-1.05, 2.3))) * size
        canvas.shape(translate(smooth(corners, 1), x, y), self.bag_color, bulge=0.7)

    def _shoulder_bag(self, canvas: Canvas) -> None:
        path, widths = self._spine(np.array((0.02, 0.29)))
        side = 1 if self._cos > 0 else -1
        low, high = path[0] + (side * widths[0], 0), path[1] - (side * widths[1] * 0.7, 0)
        canvas.line(np.stack((low, high)), 0.013 * self.height, self.bag_color)
        size = 0.055 * self.height
        corners = np.array(((-1, -0.4), (1, -0.4), (1, 1), (-1, 1))) * size
        canvas.shape(
            translate(smooth(corners, 1), low[0], low[1]), lighten(self.bag_color, -0.1), bulge=0.7
        )


def _truncate_limb(joints: Points, radii: Points, fraction: float) -> tuple[Points, Points]:
    """The first `fraction` of a three-joint limb, with its radii."""
    if fraction >= 0.999:
        return joints, radii
    middle = np.linalg.norm(joints[1] - joints[0]) + 1e-6
    total = middle + np.linalg.norm(joints[2] - joints[1]) + 1e-6
    stations = np.array((0, middle / total, 1))
    keep = np.append(stations[stations < fraction], fraction)
    cut = np.stack([np.interp(keep, stations, joints[:, axis]) for axis in (0, 1)], axis=1)
    return cut, np.interp(keep, stations, radii)


def _add_muscle(joints: Points, radii: Points, bulge: float) -> tuple[Points, Points]:
    """Both limb segments with a bulge below the middle joint."""
    path = np.stack(
        (joints[0], joints[1], joints[1] + 0.3 * (joints[2] - joints[1]), joints[2])
    )  # fmt: skip
    calf = (0.7 * radii[1] + 0.3 * radii[2]) * (1 + bulge * 1.8)
    return path, np.array((radii[0], radii[1], calf, radii[2]))
