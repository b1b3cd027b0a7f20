"""Props of demo scenes: furniture, trees, animals, statues and other objects.

Many have colors and upright, long-limbed shapes like people, so that neither color nor shape
gives people away. Each prop is a function (canvas, rng, x, ground, size): its foot is at
(x, ground), frame pixels, and it stays within `size` of its foot sideways and upwards.
"""

from collections.abc import Callable

import numpy as np

from segtrain.demo.appearance import cloth_color, cloth_paint, pattern_tile, skin_color
from segtrain.demo.canvas import (
    Canvas,
    Color,
    Paint,
    Points,
    ellipse,
    lighten,
    mix,
    rectangle,
    smooth,
    translate,
)

Prop = Callable[[Canvas, np.random.Generator, float, float, float], None]

_WOODS: tuple[Color, ...] = ((120, 84, 54), (154, 112, 74), (88, 60, 42), (186, 150, 106))
_LEAVES: tuple[Color, ...] = ((62, 92, 44), (88, 116, 52), (48, 78, 52), (130, 122, 56))


def random_color(rng: np.random.Generator) -> Color:
    """Cloth, skin or wood, so that the color of a prop does not depend on its kind."""
    draw = rng.random()
    if draw < 0.6:
        return cloth_color(rng)
    return skin_color(rng) if draw < 0.82 else _choose_color(rng, _WOODS)


def tree(canvas: Canvas, rng: np.random.Generator, x: float, ground: float, size: float) -> None:
    bark, lean = _choose_color(rng, _WOODS), rng.normal(0, 0.06) * size
    top = np.array((x + lean, ground - 0.55 * size))
    trunk = np.array(((x, ground), (x + lean * 0.3, ground - 0.3 * size), top))
    canvas.band(trunk, size * np.array((0.085, 0.05, 0.04)), bark)
    canvas.tube(trunk[1:], size * np.array((0.048, 0.038)), bark)
    for side in (-1, 1):
        fork = translate(top, side * size * rng.uniform(0.12, 0.25), -size * rng.uniform(0.1, 0.25))
        canvas.tube(np.stack((trunk[1], fork)), size * np.array((0.03, 0.012)), bark)
    if rng.random() < 0.8:
        crown = translate(top, 0, -0.12 * size)
        _foliage(canvas, rng, crown, 0.3 * size, _choose_color(rng, _LEAVES))


def bush(canvas: Canvas, rng: np.random.Generator, x: float, ground: float, size: float) -> None:
    leaf = _choose_color(rng, _LEAVES)
    for shift in (-0.45, 0.4, 0.0):
        spot = np.array((x + shift * size, ground - 0.3 * size))
        _foliage(canvas, rng, spot, 0.34 * size, leaf)


def potted_plant(
    canvas: Canvas, rng: np.random.Generator, x: float, ground: float, size: float
) -> None:
    leaf = _choose_color(rng, _LEAVES)
    root = np.array((x, ground - 0.22 * size))
    for angle in rng.uniform(-1.1, 1.1, 9):
        reach = size * rng.uniform(0.45, 0.75)
        tip = root + reach * np.array((np.sin(angle), -np.cos(angle)))
        middle = (root + tip) / 2 + (0, -0.08 * size)
        shade = lighten(leaf, rng.normal(0, 0.12))
        canvas.tube(np.stack((root, middle, tip)), size * np.array((0.015, 0.05, 0.01)), shade)
    pot = np.array(((-0.17, -0.27), (0.17, -0.27), (0.12, 0), (-0.12, 0))) * size
    canvas.shape(translate(pot, x, ground), random_color(rng), bulge=0.7)


def lamp_post(
    canvas: Canvas, rng: np.random.Generator, x: float, ground: float, size: float
) -> None:
    metal = lighten(cloth_color(rng), -0.4)
    pole = np.array(((x, ground), (x, ground - 0.86 * size)))
    canvas.tube(pole, size * np.array((0.022, 0.014)), metal)
    canvas.shape(
        ellipse(x, ground - 0.9 * size, 0.06 * size, 0.075 * size), (244, 232, 196), bulge=0.8
    )
    cap = np.array(((-0.08, -0.95), (0.08, -0.95), (0, -1.0))) * size
    canvas.shape(translate(cap, x, ground), metal)


def floor_lamp(
    canvas: Canvas, rng: np.random.Generator, x: float, ground: float, size: float
) -> None:
    metal = lighten(cloth_color(rng), -0.3)
    canvas.shape(ellipse(x, ground - 0.015 * size, 0.13 * size, 0.03 * size), metal)
    canvas.tube(np.array(((x, ground), (x, ground - 0.75 * size))), size * np.full(2, 0.014), metal)
    shade = np.array(((-0.1, -1.0), (0.1, -1.0), (0.18, -0.7), (-0.18, -0.7))) * size
    canvas.shape(translate(shade, x, ground), lighten(random_color(rng), 0.3), bulge=0.8)


def coat_stand(
    canvas: Canvas, rng: np.random.Generator, x: float, ground: float, size: float
) -> None:
    """Clothes on a stand with a hat on top: like a person, without the person."""
    wood = _choose_color(rng, _WOODS)
    for foot in (-0.14, 0.14):
        leg = np.array(((x + foot * size, ground), (x, ground - 0.1 * size)))
        canvas.tube(leg, size * np.full(2, 0.016), wood)
    canvas.tube(
        np.array(((x, ground - 0.05 * size), (x, ground - size * 0.95))),
        size * np.full(2, 0.018),
        wood,
    )
    for side in (-1, 1):
        hook = np.array(((x, ground - 0.86 * size), (x + side * 0.12 * size, ground - 0.93 * size)))
        canvas.tube(hook, size * np.full(2, 0.012), wood)
    cloth = cloth_paint(rng, size)
    for side in (-1, 1):
        sleeve = np.array(((side * 0.12, -0.78), (side * 0.17, -0.6), (side * 0.15, -0.42))) * size
        canvas.tube(translate(sleeve, x, ground), size * np.array((0.04, 0.04, 0.035)), cloth)
    path = np.array(((x, ground - 0.3 * size), (x, ground - 0.6 * size), (x, ground - 0.84 * size)))
    canvas.band(path, size * np.array((0.16, 0.13, 0.07)), cloth)
    if rng.random() < 0.5:
        hat = cloth_color(rng)
        canvas.shape(ellipse(x, ground - 0.97 * size, 0.06 * size, 0.05 * size), hat, bulge=1)
        canvas.shape(ellipse(x, ground - 0.94 * size, 0.11 * size, 0.02 * size), hat)


def dress_form(
    canvas: Canvas, rng: np.random.Generator, x: float, ground: float, size: float
) -> None:
    """A tailor's dummy: a torso on a pole."""
    canvas.tube(
        np.array(((x, ground), (x, ground - 0.5 * size))), size * np.full(2, 0.015), (60, 50, 44)
    )
    canvas.shape(ellipse(x, ground - 0.02 * size, 0.14 * size, 0.035 * size), (60, 50, 44))
    heights = np.linspace(0.42, 0.92, 11)
    widths = np.interp(
        heights,
        (0.42, 0.5, 0.64, 0.76, 0.84, 0.88, 0.92),
        (0.1, 0.13, 0.085, 0.125, 0.12, 0.05, 0.035),
    )
    path = np.stack((np.full(11, x), ground - heights * size), axis=1)
    skin_like = Paint(skin_color(rng))
    canvas.band(path, widths * size, skin_like if rng.random() < 0.6 else cloth_paint(rng, size))


def statue(canvas: Canvas, rng: np.random.Generator, x: float, ground: float, size: float) -> None:
    """A lathed shape like a chess pawn or a bottle, with a round head."""
    color = mix(random_color(rng), (168, 164, 156), rng.uniform(0, 0.8))
    heights = np.linspace(0, 0.8, 17)
    knots = np.sort(rng.uniform(0.1, 0.7, 3))
    widths = np.interp(
        heights, (0, 0.05, *knots, 0.8), (0.17, 0.17, *rng.uniform(0.06, 0.17, 3), 0.05)
    )
    path = np.stack((np.full(17, x), ground - heights * size), axis=1)
    canvas.band(path, widths * size, color)
    canvas.shape(ellipse(x, ground - 0.87 * size, 0.085 * size, 0.11 * size), color, bulge=1)


def animal(canvas: Canvas, rng: np.random.Generator, x: float, ground: float, size: float) -> None:
    """A dog, cat or horse from the side."""
    coat = random_color(rng) if rng.random() < 0.5 else _choose_color(rng, _WOODS)
    direction, leg = float(rng.choice((-1.0, 1.0))), rng.uniform(0.32, 0.5)
    thickness, neck = rng.uniform(0.1, 0.15), rng.uniform(0.15, 0.32)

    def point(along: float, up: float) -> Points:
        return np.array((x + direction * along * size, ground - up * size))

    for far in (True, False):
        for hip in (-0.28, 0.24):
            step = rng.normal(0, 0.05)
            path = np.stack(
                (
                    point(hip, leg + 0.05),
                    point(hip + step / 2 - 0.03, leg * 0.5),
                    point(hip + step, 0.02),
                )
            )
            radii = size * np.array((0.07, 0.035, 0.028))
            canvas.tube(path, radii, lighten(coat, -0.2 if far else 0.0))
    tail = np.stack((point(-0.36, leg + 0.12), point(-0.47, leg + 0.1), point(-0.52, leg - 0.12)))
    canvas.tube(tail, size * np.array((0.03, 0.03, 0.015)), coat)
    body = np.stack((point(-0.27, leg + 0.08), point(0, leg + 0.06), point(0.25, leg + 0.09)))
    canvas.tube(body, size * thickness * np.array((1, 0.95, 1.08)), coat)
    head = point(0.36, leg + 0.14 + neck)
    canvas.tube(np.stack((body[2], head)), size * np.array((0.1, 0.065)), coat)
    ear = point(0.31, leg + 0.27 + neck)
    canvas.tube(np.stack((head, ear)), size * np.array((0.03, 0.015)), lighten(coat, -0.3))
    muzzle = point(0.49, leg + 0.08 + neck)
    canvas.tube(np.stack((head, muzzle)), size * np.array((0.075, 0.045)), coat, tone=6)
    eye = point(0.39, leg + 0.17 + neck)
    canvas.shape(ellipse(eye[0], eye[1], 0.013 * size, 0.013 * size), (24, 20, 18))


def table(canvas: Canvas, rng: np.random.Generator, x: float, ground: float, size: float) -> None:
    wood, height, half = random_color(rng), 0.5 * size, 0.75 * size
    for side in (-0.9, 0.9):
        leg = np.array(((x + side * half, ground - height), (x + side * half, ground)))
        canvas.tube(leg, size * np.array((0.035, 0.025)), lighten(wood, -0.15))
    top = np.array(((-0.95, -0.08), (0.95, -0.08), (1, 0), (-1, 0))) * (half, size)
    canvas.shape(translate(top, x, ground - height), lighten(wood, 0.12))
    canvas.shape(
        rectangle(x - half, ground - height, x + half, ground - height + 0.05 * size), wood
    )
    for position in rng.uniform(-0.7, 0.7, rng.integers(0, 4)):
        left, bottom = x + position * half, ground - height - 0.02 * size
        tall = size * rng.uniform(0.06, 0.2)
        canvas.shape(
            rectangle(left, bottom - tall, left + 0.09 * size, bottom), random_color(rng), bulge=0.5
        )


def chair(canvas: Canvas, rng: np.random.Generator, x: float, ground: float, size: float) -> None:
    wood = random_color(rng)
    seat, half = ground - 0.45 * size, 0.22 * size
    for side in (-1, 1):
        post = np.array(((x + side * half, ground), (x + side * half, ground - 0.95 * size)))
        canvas.tube(post, size * np.array((0.024, 0.02)), wood)
    for up in (0.6, 0.74, 0.88):
        canvas.line(
            np.array(((x - half, ground - up * size), (x + half, ground - up * size))),
            0.04 * size,
            lighten(wood, -0.1),
        )
    cushion = rectangle(x - half * 1.15, seat, x + half * 1.15, seat + 0.08 * size)
    canvas.shape(smooth(cushion, 1), lighten(wood, 0.15), bulge=0.4)


def sofa(canvas: Canvas, rng: np.random.Generator, x: float, ground: float, size: float) -> None:
    paint = cloth_paint(rng, size * 1.5, plain=0.6)
    shade = lighten(paint.color, -0.18)
    canvas.shape(
        smooth(
            rectangle(x - 0.85 * size, ground - 0.75 * size, x + 0.85 * size, ground - 0.1 * size),
            1,
        ),
        paint,
        bulge=0.4,
    )
    for side in (-1, 1):
        cushion = rectangle(
            x + min(0, side) * 0.72 * size,
            ground - 0.42 * size,
            x + max(0, side) * 0.72 * size,
            ground - 0.22 * size,
        )
        canvas.shape(smooth(cushion, 1), lighten(paint.color, 0.08), bulge=0.6)
        arm = rectangle(
            x + side * 0.85 * size - 0.12 * size,
            ground - 0.55 * size,
            x + side * 0.85 * size + 0.12 * size,
            ground - 0.05 * size,
        )
        canvas.shape(smooth(arm, 1), shade, bulge=0.8)
    canvas.shape(
        rectangle(x - 0.75 * size, ground - 0.24 * size, x + 0.75 * size, ground - 0.06 * size),
        shade,
    )


def crate(canvas: Canvas, rng: np.random.Generator, x: float, ground: float, size: float) -> None:
    color = random_color(rng)
    half, tall = 0.32 * size, 0.46 * size
    canvas.shape(rectangle(x - half, ground - tall, x + half, ground), color, tone=-4)
    lid = np.array(((-half, 0), (half, 0), (half * 0.8, -0.1 * size), (-half * 0.8, -0.1 * size)))
    canvas.shape(translate(lid, x, ground - tall), lighten(color, 0.18))
    for up in (0.33, 0.66):
        canvas.line(
            np.array(((x - half, ground - up * tall), (x + half, ground - up * tall))),
            0.02 * size,
            lighten(color, -0.25),
        )


def cabinet(canvas: Canvas, rng: np.random.Generator, x: float, ground: float, size: float) -> None:
    """A shelf of books and bottles, as tall as a person."""
    wood, half, tall = _choose_color(rng, _WOODS), 0.26 * size, 0.95 * size
    canvas.shape(rectangle(x - half, ground - tall, x + half, ground), wood)
    for row in range(4):
        bottom = ground - tall * (0.05 + row * 0.24)
        canvas.shape(
            rectangle(x - half * 0.88, bottom - tall * 0.19, x + half * 0.88, bottom),
            lighten(wood, -0.5),
        )
        left = x - half * 0.85
        while (wide := size * rng.uniform(0.025, 0.07)) + left < x + half * 0.85:
            high = tall * rng.uniform(0.09, 0.18)
            canvas.shape(
                rectangle(left, bottom - high, left + wide * 0.92, bottom), random_color(rng)
            )
            left += wide


def sign(canvas: Canvas, rng: np.random.Generator, x: float, ground: float, size: float) -> None:
    canvas.tube(
        np.array(((x, ground), (x, ground - 0.8 * size))), size * np.full(2, 0.018), (110, 112, 116)
    )
    face, edge = cloth_color(rng), cloth_color(rng)
    y, r = ground - 0.8 * size, 0.17 * size
    if rng.random() < 0.5:
        outlines = [ellipse(x, y, r * k, r * k) for k in (1.0, 0.78)]
    else:
        outlines = [rectangle(x - r * k, y - r * k, x + r * k, y + r * k) for k in (1.0, 0.82)]
    for outline, color in zip(outlines, (edge, face), strict=True):
        canvas.shape(outline, color)
    for row in (-0.25, 0.15):
        canvas.line(
            np.array(((x - 0.5 * r, y + row * r), (x + 0.5 * r, y + row * r))), 0.14 * r, edge
        )


def ball(canvas: Canvas, rng: np.random.Generator, x: float, ground: float, size: float) -> None:
    r = size * rng.uniform(0.1, 0.2)
    color = random_color(rng)
    paint = Paint(color, pattern_tile(rng, color, cloth_color(rng)), r * 1.3)
    canvas.shape(ellipse(x, ground - r, r, r), paint if rng.random() < 0.5 else color, bulge=1.2)


def trash_bin(
    canvas: Canvas, rng: np.random.Generator, x: float, ground: float, size: float
) -> None:
    color = random_color(rng)
    body = np.array(((-0.16, -0.5), (0.16, -0.5), (0.13, 0), (-0.13, 0))) * size
    canvas.shape(translate(body, x, ground), color, bulge=0.8)
    canvas.shape(
        ellipse(x, ground - 0.5 * size, 0.18 * size, 0.05 * size), lighten(color, -0.3), bulge=0.4
    )


def column(canvas: Canvas, rng: np.random.Generator, x: float, ground: float, size: float) -> None:
    stone = mix(random_color(rng), (205, 200, 188), 0.6)
    path = np.array(((x, ground), (x, ground - 0.5 * size), (x, ground - 0.95 * size)))
    canvas.band(path, size * np.array((0.1, 0.09, 0.085)), stone)
    for up in (0.03, 0.96):
        canvas.shape(
            rectangle(
                x - 0.13 * size,
                ground - (up + 0.04) * size,
                x + 0.13 * size,
                ground - (up - 0.03) * size,
            ),
            lighten(stone, 0.1),
            bulge=0.3,
        )


def railing(canvas: Canvas, rng: np.random.Generator, x: float, ground: float, size: float) -> None:
    """A run of bars, wider than it is tall."""
    metal = lighten(cloth_color(rng), -0.25)
    tall, half = 0.45 * size, 0.95 * size
    for bar in np.arange(-half, half, rng.uniform(0.11, 0.2) * size):
        canvas.tube(
            np.array(((x + bar, ground), (x + bar, ground - tall))), size * np.full(2, 0.012), metal
        )
    for up in (1.0, 0.15):
        rail = np.array(((x - half, ground - tall * up), (x + half, ground - tall * up)))
        canvas.tube(rail, size * np.full(2, 0.022), metal)


WeightedProp = tuple[Prop, float, float, float]
"""A prop, its weight, and the range of its size relative to an adult's height."""

OUTDOOR: tuple[WeightedProp, ...] = (
    (tree, 3, 1.2, 2.2), (bush, 1.5, 0.5, 1.1), (lamp_post, 1, 1.3, 2.0), (statue, 1.5, 0.7, 1.2),
    (animal, 1.6, 0.35, 0.95), (sign, 1, 0.9, 1.4), (ball, 0.7, 0.4, 0.8),
    (trash_bin, 0.8, 0.7, 1.1), (column, 0.7, 1.1, 1.8), (crate, 0.6, 0.5, 0.9),
    (railing, 0.8, 0.9, 1.2),
)  # fmt: skip
INDOOR: tuple[WeightedProp, ...] = (
    (coat_stand, 1.0, 0.9, 1.1), (dress_form, 1, 0.85, 1.0), (floor_lamp, 1.2, 0.8, 1.1),
    (potted_plant, 1.3, 0.4, 0.9), (statue, 1, 0.4, 1.0), (animal, 0.8, 0.3, 0.5),
    (cabinet, 1.1, 0.9, 1.2), (chair, 1.2, 0.55, 0.65), (sofa, 0.9, 0.65, 0.75),
    (table, 1, 0.75, 0.9), (ball, 0.5, 0.4, 0.7), (crate, 0.6, 0.4, 0.7), (column, 0.5, 1.1, 1.6),
)  # fmt: skip
OUTDOOR_COVER: tuple[Prop, ...] = (bush, railing, table, crate, trash_bin, potted_plant)
INDOOR_COVER: tuple[Prop, ...] = (table, sofa, chair, chair, potted_plant, crate)


def choose_prop(rng: np.random.Generator, choices: tuple[WeightedProp, ...]) -> tuple[Prop, float]:
    """A random prop, and its size relative to an adult's height."""
    odds = np.array([choice[1] for choice in choices])
    prop, _, low, high = choices[rng.choice(len(choices), p=odds / odds.sum())]
    return prop, float(rng.uniform(low, high))


def _foliage(
    canvas: Canvas, rng: np.random.Generator, center: Points, radius: float, leaf: Color
) -> None:
    """Overlapping clumps of leaves, darker below and brighter towards the light."""
    for layer in range(3):
        spots = rng.normal(0, 0.42, (4, 2)) * radius
        for spot in spots:
            clump = radius * rng.uniform(0.4, 0.62)
            wobble = 1 + 0.12 * rng.standard_normal(24)
            middle = center + spot + (0, (1 - layer) * 0.18 * radius)
            rim = middle + (ellipse(0, 0, clump, clump * 0.85) * wobble[:, None])
            canvas.shape(smooth(rim, 1), lighten(leaf, -0.22 + 0.16 * layer), bulge=0.6)


def _choose_color(rng: np.random.Generator, colors: tuple[Color, ...]) -> Color:
    return lighten(colors[rng.integers(len(colors))], rng.normal(0, 0.07))
