"""Compose a demo scene: backdrop, people and props from far to near, light and camera."""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from segtrain.demo.appearance import random_appearance
from segtrain.demo.backdrops import BACKDROPS, Camera
from segtrain.demo.canvas import Canvas, Cutout, Light, Plane, blur, ellipse
from segtrain.demo.figures import Figure, Placement
from segtrain.demo.poses import random_pose
from segtrain.demo.props import (
    INDOOR,
    INDOOR_COVER,
    OUTDOOR,
    OUTDOOR_COVER,
    Prop,
    WeightedProp,
    chair,
    choose_prop,
    crate,
    sofa,
)
from segtrain.types import BoolMask, Image, Mask

_NO_PEOPLE = 0.12
_PORTRAIT = 0.13
_COUNT_ODDS = (0.42, 0.27, 0.17, 0.09, 0.05)  # probability of one to five people
_MIN_COMPONENT_AREA = 16  # pixels; smaller visible parts of a person are dropped


@dataclass(frozen=True)
class Scene:
    """An image (HW3 uint8 RGB) and the visible mask of each person (HW uint8, 0 or 1)."""

    image: Image
    people: tuple[Mask, ...]


@dataclass(frozen=True)
class _SceneItem:
    """An object to draw; larger `ground` is nearer. `owner` is the person's number, else 0."""

    ground: float
    x: float
    size: float
    draw: Callable[[], Cutout | None]
    owner: int = 0


def draw_person_scene(seed: int, index: int, *, width: int = 320, height: int = 240) -> Scene:
    """Draw scene `index` of the series `seed`; the same arguments give the same scene."""
    rng = np.random.default_rng([seed, index])
    angle = rng.uniform(-2.6, -0.55)  # from above, left or right
    light = Light(float(np.cos(angle)), float(np.sin(angle)), rng.uniform(9, 24))
    portrait = rng.random() < _PORTRAIT
    count = 0 if rng.random() < _NO_PEOPLE else int(rng.choice(5, p=_COUNT_ODDS)) + 1
    adult_px = height * (rng.uniform(2.2, 3.6) if portrait else rng.lognormal(0.0, 0.36))
    count = min(count, 2) if portrait else count
    camera = _camera(rng, adult_px, height)

    backdrops, _, odds = zip(*BACKDROPS, strict=True)
    choice = int(rng.choice(len(backdrops), p=odds))
    indoor = BACKDROPS[choice][1]
    frame = backdrops[choice](rng, camera, light, width, height)
    if rng.random() < (0.7 if portrait else 0.3):
        frame = blur(frame, height * rng.uniform(0.003, 0.012))

    builder = _SceneBuilder(rng, camera, light, width, height)
    props = INDOOR if indoor else OUTDOOR
    items = [builder.prop(props, adult_px) for _ in range(rng.integers(2, 8))]
    for owner in range(1, count + 1):
        items += builder.person(owner, count, adult_px)
    if rng.random() < 0.3:
        cover = INDOOR_COVER if indoor else OUTDOOR_COVER
        items.append(builder.cover(cover[rng.integers(len(cover))], adult_px))

    owners = _compose(frame, items, light, shadow=rng.uniform(0.2, 0.5))
    people = (_remove_specks(owners == owner) for owner in range(1, count + 1))
    return Scene(_apply_camera_effects(frame, rng), tuple(mask for mask in people if mask.any()))


def _camera(rng: np.random.Generator, adult_px: float, height: int) -> Camera:
    """Place the main person's head inside the image, and the feet too if the person fits."""
    horizon = height * rng.uniform(0.28, 0.46)
    headroom = height * rng.uniform(0.03, 0.16)
    eye = 1 - (horizon - headroom) / adult_px
    if adult_px < 0.9 * height:
        eye = min(eye, (height * 0.97 - horizon) / adult_px)
    return Camera(horizon, float(np.clip(eye, 0.45, 1.6)))


class _SceneBuilder:
    """Places people and props in one scene."""

    def __init__(
        self, rng: np.random.Generator, camera: Camera, light: Light, width: int, height: int
    ) -> None:
        self.rng, self.camera, self.light = rng, camera, light
        self.width, self.height = width, height

    def person(self, owner: int, count: int, adult_px: float) -> list[_SceneItem]:
        """A person at a random position, with a seat if the pose is seated."""
        rng = self.rng
        size = adult_px * (1 if owner == 1 else rng.uniform(0.55, 1.05))
        slots = (np.arange(count) + 0.5) / count
        x = self.width * float(slots[owner - 1] + rng.normal(0, 0.16))
        yaw = rng.normal(0, 0.9) if rng.random() < 0.75 else rng.uniform(-np.pi, np.pi)
        if adult_px > 1.6 * self.height:
            yaw *= 0.6
        appearance = random_appearance(rng, size)
        place = Placement(x, self.camera.ground(size), size, float(yaw))
        figure = Figure(appearance, random_pose(rng), place, rng)
        items = []
        if figure.pose.seated:
            items.append(self._seat(figure, place))
        items.append(
            _SceneItem(
                place.ground, x, 0.16 * size,
                lambda: figure.draw(self.light, self.width, self.height), owner,
            )
        )  # fmt: skip
        return items

    def prop(self, choices: tuple[WeightedProp, ...], adult_px: float) -> _SceneItem:
        """A prop among the people or, mostly, behind them."""
        prop, relative_size = choose_prop(self.rng, choices)
        near = min(adult_px, 1.1 * self.height)
        scale = near * float(self.rng.uniform(0.4, 1.0))
        x = self.rng.uniform(-0.05, 1.05) * self.width
        return self._item(prop, x, self.camera.ground(scale), scale * relative_size)

    def cover(self, prop: Prop, adult_px: float) -> _SceneItem:
        """A prop in front of all people."""
        size = self.height * float(self.rng.uniform(0.4, 0.75))
        ground = max(self.camera.ground(adult_px) + 1, self.height * self.rng.uniform(0.95, 1.15))
        ground = min(ground, self.height * 1.2)
        item = self._item(prop, self.rng.uniform(0, 1) * self.width, ground, size)
        return _SceneItem(1e6, item.x, item.size, item.draw)

    def _seat(self, figure: Figure, place: Placement) -> _SceneItem:
        seat_height = place.ground - figure.seat_y
        prop, relative_height = ((chair, 0.43), (crate, 0.52), (sofa, 0.4))[self.rng.integers(3)]
        return self._item(prop, place.x, place.ground - 0.01, seat_height / relative_height)

    def _item(self, prop: Prop, x: float, ground: float, size: float) -> _SceneItem:
        seed = int(self.rng.integers(2**32))

        def draw() -> Cutout | None:
            reach = 1.3 * size  # foliage may extend slightly beyond its size
            left, right = np.clip((x - reach, x + reach), 0, self.width).astype(int)
            top, bottom = np.clip((ground - reach, ground + 0.1 * size), 0, self.height).astype(int)
            if left >= right or top >= bottom:
                return None
            canvas = Canvas((int(left), int(top), int(right), int(bottom)), self.light)
            prop(canvas, np.random.default_rng(seed), x, ground, size)
            return canvas.flatten(softness=0.008 * size)

        return _SceneItem(ground, x, 0.2 * size, draw)


def _compose(frame: Plane, items: list[_SceneItem], light: Light, shadow: float) -> Mask:
    """Draw all items onto the frame, far to near; returns the visible owner at each pixel."""
    owners = np.zeros(frame.shape[:2], np.uint8)
    for item in sorted(items, key=lambda item: item.ground):
        cutout = item.draw()
        if cutout is not None:
            _draw_shadow(frame, item, light, shadow)
            _blend_cutout(frame, owners, cutout, item.owner)
    return owners


def _draw_shadow(frame: Plane, item: _SceneItem, light: Light, strength: float) -> None:
    """Darken the ground around an item's foot, away from the light."""
    height, width = frame.shape[:2]
    rx, ry = item.size * 1.1, item.size * 0.28
    x, y = item.x - light.x * item.size * 0.7, item.ground
    sigma = max(ry * 0.5, 0.8)
    reach = 2 * sigma
    left, right = np.clip((x - rx - reach, x + rx + reach), 0, width).astype(int)
    top, bottom = np.clip((y - ry - reach, y + ry + reach), 0, height).astype(int)
    if left >= right or top >= bottom:
        return
    shade = np.zeros((bottom - top, right - left), np.float32)
    outline = np.rint(ellipse(x - left, y - top, rx, ry)).astype(np.int32)
    cv2.fillPoly(shade, [outline], strength)
    shade = blur(shade, sigma)
    frame[top:bottom, left:right] *= (1 - shade)[..., None]


def _blend_cutout(frame: Plane, owners: Mask, cutout: Cutout, owner: int) -> None:
    """Blend a cutout in; it becomes the owner of the pixels that it covers by at least half."""
    height, width = cutout.alpha.shape
    region = (slice(cutout.top, cutout.top + height), slice(cutout.left, cutout.left + width))
    frame[region] = frame[region] * (1 - cutout.alpha[..., None]) + cutout.color
    covered = cutout.alpha >= 0.5
    owners[region][covered] = 0
    if owner:
        owners[region][covered & (cutout.person >= 0.5 * cutout.alpha)] = owner


def _remove_specks(mask: BoolMask) -> Mask:
    """The mask without its smallest components."""
    out = mask.astype(np.uint8)
    x, y, width, height = cv2.boundingRect(out)
    box = (slice(y, y + height), slice(x, x + width))
    _, labels, stats, _ = cv2.connectedComponentsWithStats(out[box], connectivity=4)
    keep = stats[:, cv2.CC_STAT_AREA] >= _MIN_COMPONENT_AREA
    keep[0] = False
    out[box] = keep[labels]
    return out


def _apply_camera_effects(frame: Plane, rng: np.random.Generator) -> Image:
    """Camera effects: exposure, color cast, vignette, blur and sensor noise."""
    height, width = frame.shape[:2]
    cast = (rng.uniform(0.95, 1.3) * (1 + rng.normal(0, 0.04, 3))).astype(np.float32)
    ys = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    xs = np.linspace(-1, 1, width, dtype=np.float32)[None]
    tilt = rng.normal(0, 0.08, 2).astype(np.float32)
    falloff = (
        1 - np.float32(rng.uniform(0, 0.22)) * (xs**2 + ys**2) / 2 + tilt[0] * xs + tilt[1] * ys
    )
    frame = np.clip(frame * falloff[..., None] * cast, 0, 1)
    sigma = rng.uniform(0.3, 0.9) if rng.random() < 0.85 else rng.uniform(0.9, 1.6)
    frame = blur(frame, sigma)
    strength = np.float32(rng.uniform(0.003, 0.02))
    grain = rng.standard_normal((height, width), dtype=np.float32)
    frame += strength * grain[..., None]
    blotches = rng.standard_normal((height // 3, width // 3, 3), dtype=np.float32)
    frame += np.float32(0.5) * strength * cv2.resize(blotches, (width, height))
    return (np.clip(frame, 0, 1) * 255 + 0.5).astype(np.uint8)
