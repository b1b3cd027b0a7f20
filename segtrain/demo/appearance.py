"""The random appearance of a demo person: body, skin, hair and clothes."""

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np

from segtrain.demo.canvas import Color, Paint, lighten, mix
from segtrain.types import Image

Hair = Literal["bald", "buzz", "short", "fringe", "long", "bun", "ponytail", "afro", "balding"]
Hat = Literal["none", "cap", "beanie", "brim"]
Top = Literal["tee", "tank", "long", "jacket", "coat"]
Bottom = Literal["trousers", "shorts", "skirt", "dress"]

_SKIN_RAMP = (
    (255, 226, 204), (243, 202, 170), (226, 176, 136), (202, 144, 100),
    (160, 106, 70), (115, 74, 48), (74, 46, 32),
)  # fmt: skip
_HAIR_COLORS: tuple[Color, ...] = (
    (28, 22, 20), (52, 34, 24), (88, 56, 34), (128, 84, 48), (178, 134, 78), (214, 182, 122),
    (150, 66, 34), (150, 148, 146), (216, 214, 210), (96, 60, 120),
)  # fmt: skip
_HAIR_ODDS = (0.24, 0.19, 0.15, 0.1, 0.08, 0.06, 0.05, 0.07, 0.05, 0.01)
_CLOTH_BASICS: tuple[Color, ...] = (
    (32, 33, 38), (236, 234, 228), (128, 130, 134), (44, 58, 92), (86, 108, 146), (196, 178, 148),
    (92, 84, 62), (118, 44, 46), (70, 74, 82),
)  # fmt: skip
_TILE = 48


@dataclass(frozen=True)
class Appearance:
    """Body proportions (1 is an average adult), colors and clothes of one person."""

    stature: float  # height relative to an adult
    head: float  # head height relative to the person's height
    girth: float
    build: float  # -1 broad shoulders, narrow hips; +1 the opposite
    skin: Color
    hair: Hair
    hair_color: Color
    beard: bool
    glasses: bool
    hat: Hat
    hat_color: Color
    top: Top
    top_paint: Paint
    inner: Color  # the shirt below an open jacket or coat
    logo: bool
    bottom: Bottom
    bottom_paint: Paint
    shoes: Color


def skin_color(rng: np.random.Generator) -> Color:
    position = rng.uniform(0, len(_SKIN_RAMP) - 1.001)
    low = int(position)
    base = mix(_SKIN_RAMP[low], _SKIN_RAMP[low + 1], position - low)
    warmth = rng.normal(0, 5)
    return mix((base[0] + warmth, base[1], base[2] - warmth), base, 0.3)


def cloth_color(rng: np.random.Generator) -> Color:
    """45 % wardrobe basics, else any hue from pastel to saturated, sometimes similar to skin."""
    if rng.random() < 0.45:
        base = _CLOTH_BASICS[rng.integers(len(_CLOTH_BASICS))]
        return lighten(base, rng.normal(0, 0.08))
    hsv = rng.integers((0, 40, 70), (180, 190, 240)).astype(np.uint8)
    red, green, blue = cv2.cvtColor(hsv[None, None], cv2.COLOR_HSV2RGB)[0, 0]
    return int(red), int(green), int(blue)


def cloth_paint(rng: np.random.Generator, stature_px: float, plain: float = 0.45) -> Paint:
    """Cloth for a person `stature_px` pixels tall; `plain` is the probability of no pattern."""
    color = cloth_color(rng)
    if rng.random() < plain:
        return Paint(color)
    other = cloth_color(rng) if rng.random() < 0.6 else lighten(color, rng.choice((-0.35, 0.45)))
    return Paint(color, pattern_tile(rng, color, other), stature_px * rng.uniform(0.03, 0.08))


def pattern_tile(rng: np.random.Generator, color: Color, other: Color) -> Image:
    """A repeating tile: stripes along or across, checks, dots, zigzag or a woven texture."""
    tile = np.empty((_TILE, _TILE, 3), np.uint8)
    tile[:] = color
    band = int(rng.integers(8, 28))
    match rng.choice(("across", "across", "along", "checks", "dots", "zigzag", "weave")):
        case "across":
            tile[:band] = other
        case "along":
            tile[:, :band] = other
        case "checks":
            tile[:band] = mix(color, other, 0.5)
            tile[:, :band] = mix(color, other, 0.5)
            tile[:band, :band] = other
        case "dots":
            for x, y in ((12, 12), (36, 36)):
                cv2.circle(tile, (x, y), 3 + band // 5, other, cv2.FILLED, cv2.LINE_AA)
        case "zigzag":
            corners = np.array(((-24, 30), (0, 10), (24, 30), (48, 10), (72, 30)), np.int32)
            cv2.polylines(tile, [corners], False, other, 4 + band // 3, cv2.LINE_AA)
        case _:
            grain = rng.normal(0, 14, (_TILE, _TILE, 1))
            tile = np.clip(tile + grain, 0, 255).astype(np.uint8)
    return tile


def random_appearance(rng: np.random.Generator, adult_px: float) -> Appearance:
    """A random person; `adult_px` is the height of an adult in pixels, for the patterns."""
    child = rng.random() < 0.2
    build = float(np.clip(rng.normal(0, 0.7), -1, 1))
    skin = skin_color(rng)
    # Dark skin mostly comes with dark hair.
    odds = np.array(_HAIR_ODDS) * ([3, 2] + [0.3] * 5 + [1, 1, 1] if sum(skin) < 400 else 1)
    hair: Hair = rng.choice(
        ("bald", "buzz", "short", "fringe", "long", "bun", "ponytail", "afro", "balding"),
        p=(0.05, 0.09, 0.27, 0.12, 0.22, 0.07, 0.1, 0.05, 0.03),
    )
    if child and hair in ("bald", "balding"):
        hair = "short"
    bottom: Bottom = rng.choice(
        ("trousers", "shorts", "skirt", "dress"),
        p=(0.5, 0.2, 0.14, 0.16) if build > 0 else (0.7, 0.27, 0.015, 0.015),
    )
    top_paint = cloth_paint(rng, adult_px)
    return Appearance(
        stature=rng.uniform(0.5, 0.85) if child else rng.uniform(0.92, 1.08),
        head=rng.uniform(0.155, 0.195) if child else rng.uniform(0.132, 0.148),
        girth=float(np.clip(rng.lognormal(0.02, 0.16), 0.78, 1.5)),
        build=0.0 if child else build,
        skin=skin,
        hair=hair,
        hair_color=lighten(_HAIR_COLORS[rng.choice(10, p=odds / odds.sum())], rng.normal(0, 0.1)),
        beard=build < -0.2 and not child and rng.random() < 0.35,
        glasses=rng.random() < 0.15,
        hat=rng.choice(("none", "cap", "beanie", "brim"), p=(0.76, 0.12, 0.07, 0.05)),
        hat_color=cloth_color(rng),
        top=rng.choice(("tee", "tank", "long", "jacket", "coat"), p=(0.36, 0.1, 0.32, 0.14, 0.08)),
        top_paint=top_paint,
        inner=cloth_color(rng),
        logo=top_paint.tile is None and rng.random() < 0.5,
        bottom=bottom,
        bottom_paint=top_paint if bottom == "dress" else cloth_paint(rng, adult_px, plain=0.85),
        shoes=lighten(cloth_color(rng), -0.2),
    )
