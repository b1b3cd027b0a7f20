"""What a demo person looks like: body, skin, hair and clothes, drawn by lot."""

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np

from segtrain.data.people.sketch import Colour, Image, Paint, lighten, mix

Hair = Literal["bald", "buzz", "short", "fringe", "long", "bun", "ponytail", "afro", "balding"]
Hat = Literal["none", "cap", "beanie", "brim"]
Top = Literal["tee", "tank", "long", "jacket", "coat"]
Bottom = Literal["trousers", "shorts", "skirt", "dress"]

_SKIN_RAMP = (
    (255, 226, 204), (243, 202, 170), (226, 176, 136), (202, 144, 100),
    (160, 106, 70), (115, 74, 48), (74, 46, 32),
)  # fmt: skip
_HAIR_COLOURS: tuple[Colour, ...] = (
    (28, 22, 20), (52, 34, 24), (88, 56, 34), (128, 84, 48), (178, 134, 78), (214, 182, 122),
    (150, 66, 34), (150, 148, 146), (216, 214, 210), (96, 60, 120),
)  # fmt: skip
_HAIR_ODDS = (0.24, 0.19, 0.15, 0.1, 0.08, 0.06, 0.05, 0.07, 0.05, 0.01)
_CLOTH_BASICS: tuple[Colour, ...] = (
    (32, 33, 38), (236, 234, 228), (128, 130, 134), (44, 58, 92), (86, 108, 146), (196, 178, 148),
    (92, 84, 62), (118, 44, 46), (70, 74, 82),
)  # fmt: skip
_TILE = 48


@dataclass(frozen=True)
class Look:
    """Body proportions (1 is an average adult), colours and clothes of one person."""

    stature: float  # height against an adult's
    head: float  # head height against the person's own
    girth: float
    build: float  # -1 broad shoulders, narrow hips; +1 the other way about
    skin: Colour
    hair: Hair
    hair_colour: Colour
    beard: bool
    glasses: bool
    hat: Hat
    hat_colour: Colour
    top: Top
    top_paint: Paint
    inner: Colour  # the shirt below an open jacket or coat
    logo: bool
    bottom: Bottom
    bottom_paint: Paint
    shoes: Colour


def skin_colour(rng: np.random.Generator) -> Colour:
    place = rng.uniform(0, len(_SKIN_RAMP) - 1.001)
    low = int(place)
    base = mix(_SKIN_RAMP[low], _SKIN_RAMP[low + 1], place - low)
    warmth = rng.normal(0, 5)
    return mix((base[0] + warmth, base[1], base[2] - warmth), base, 0.3)


def cloth_colour(rng: np.random.Generator) -> Colour:
    """Half wardrobe basics, half anything from pastel to saturated, now and then skin-like."""
    if rng.random() < 0.45:
        base = _CLOTH_BASICS[rng.integers(len(_CLOTH_BASICS))]
        return lighten(base, rng.normal(0, 0.08))
    hsv = rng.integers((0, 40, 70), (180, 190, 240)).astype(np.uint8)
    red, green, blue = cv2.cvtColor(hsv[None, None], cv2.COLOR_HSV2RGB)[0, 0]
    return int(red), int(green), int(blue)


def cloth_paint(rng: np.random.Generator, stature_px: float, plain: float = 0.45) -> Paint:
    """A cloth for a person `stature_px` pixels tall; `plain` is the odds of no pattern."""
    colour = cloth_colour(rng)
    if rng.random() < plain:
        return Paint(colour)
    other = cloth_colour(rng) if rng.random() < 0.6 else lighten(colour, rng.choice((-0.35, 0.45)))
    return Paint(colour, pattern_tile(rng, colour, other), stature_px * rng.uniform(0.03, 0.08))


def pattern_tile(rng: np.random.Generator, colour: Colour, other: Colour) -> Image:
    """A repeating tile: stripes along or across, checks, dots, zigzag or a woven grain."""
    tile = np.empty((_TILE, _TILE, 3), np.uint8)
    tile[:] = colour
    band = int(rng.integers(8, 28))
    match rng.choice(("across", "across", "along", "checks", "dots", "zigzag", "weave")):
        case "across":
            tile[:band] = other
        case "along":
            tile[:, :band] = other
        case "checks":
            tile[:band] = mix(colour, other, 0.5)
            tile[:, :band] = mix(colour, other, 0.5)
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


def random_look(rng: np.random.Generator, adult_px: float) -> Look:
    """A person drawn by lot; `adult_px` is how tall an adult stands here, for the patterns."""
    child = rng.random() < 0.2
    build = float(np.clip(rng.normal(0, 0.7), -1, 1))
    skin = skin_colour(rng)
    # Dark skin mostly goes with dark hair.
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
    return Look(
        stature=rng.uniform(0.5, 0.85) if child else rng.uniform(0.92, 1.08),
        head=rng.uniform(0.155, 0.195) if child else rng.uniform(0.132, 0.148),
        girth=float(np.clip(rng.lognormal(0.02, 0.16), 0.78, 1.5)),
        build=0.0 if child else build,
        skin=skin,
        hair=hair,
        hair_colour=lighten(_HAIR_COLOURS[rng.choice(10, p=odds / odds.sum())], rng.normal(0, 0.1)),
        beard=build < -0.2 and not child and rng.random() < 0.35,
        glasses=rng.random() < 0.15,
        hat=rng.choice(("none", "cap", "beanie", "brim"), p=(0.76, 0.12, 0.07, 0.05)),
        hat_colour=cloth_colour(rng),
        top=rng.choice(("tee", "tank", "long", "jacket", "coat"), p=(0.36, 0.1, 0.32, 0.14, 0.08)),
        top_paint=top_paint,
        inner=cloth_colour(rng),
        logo=top_paint.tile is None and rng.random() < 0.5,
        bottom=bottom,
        bottom_paint=top_paint if bottom == "dress" else cloth_paint(rng, adult_px, plain=0.85),
        shoes=lighten(cloth_colour(rng), -0.2),
    )
