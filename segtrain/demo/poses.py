"""Poses of demo people as joint angles, and the skeleton in space that follows from them.

Lengths are relative to the person's height. The body's own axes: x to the person's left, y up,
z forward; the origin is between the hip joints.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from segtrain.demo.appearance import Appearance

Vector = NDArray[np.float64]
SIDES = (1.0, -1.0)  # left, right

_ADULT_HEAD = 0.14
_SHOULDER_HEIGHT, _NECK_HEIGHT = 0.247, 0.3
_UPPER_ARM, _FOREARM, _HAND = 0.162, 0.14, 0.055
_THIGH, _SHIN, _FOOT = 0.25, 0.235, 0.085


@dataclass(frozen=True)
class Arm:
    """Angles in radians: forward `swing`, outward `spread`, and elbow `bend` towards a direction.

    `towards` is the direction in which the forearm bends, as (outward, up, forward).
    """

    swing: float = 0.0
    spread: float = 0.15
    bend: float = 0.2
    towards: tuple[float, float, float] = (0.0, 0.2, 1.0)


@dataclass(frozen=True)
class Leg:
    """Angles in radians: forward `swing` and outward `spread` of the thigh, flexion of the knee."""

    swing: float = 0.0
    spread: float = 0.06
    knee: float = 0.03


@dataclass(frozen=True)
class Pose:
    """Limbs as (left, right); `lean` forward and `sway` sideways tilt the back, in radians."""

    arms: tuple[Arm, Arm] = (Arm(), Arm())
    legs: tuple[Leg, Leg] = (Leg(), Leg())
    lean: float = 0.0
    sway: float = 0.0
    seated: bool = False


@dataclass(frozen=True)
class Skeleton:
    """Joints in space.

    arms: (2, 4, 3), from shoulder to fingertips. legs: (2, 4, 3), from hip to toes.
    neck: base of the neck. head: center of the head.
    scale: size of everything but the head, relative to an adult.
    """

    arms: Vector
    legs: Vector
    neck: Vector
    head: Vector
    scale: float


def _standing(rng: np.random.Generator) -> Pose:
    arms = [Arm(rng.normal(0, 0.12), rng.uniform(0.08, 0.25), rng.uniform(0.1, 0.5)) for _ in "lr"]
    legs = [Leg(rng.normal(0, 0.06), rng.uniform(0.03, 0.16), rng.uniform(0, 0.12)) for _ in "lr"]
    return Pose((arms[0], arms[1]), (legs[0], legs[1]), sway=rng.normal(0, 0.03))


def _walking(rng: np.random.Generator) -> Pose:
    stride, side = rng.uniform(0.25, 0.5), rng.choice(SIDES)
    legs = {side: Leg(stride, 0.03, 0.1), -side: Leg(-stride, 0.03, rng.uniform(0.15, 0.6))}
    arms = {
        side: Arm(-stride * 1.1, 0.12, rng.uniform(0.2, 0.5)),
        -side: Arm(stride, 0.12, rng.uniform(0.3, 0.8)),
    }
    return Pose((arms[1.0], arms[-1.0]), (legs[1.0], legs[-1.0]), lean=0.06)


def _running(rng: np.random.Generator) -> Pose:
    stride, side = rng.uniform(0.6, 0.95), rng.choice(SIDES)
    legs = {
        side: Leg(stride, 0.03, rng.uniform(0.7, 1.2)),
        -side: Leg(-stride * 0.6, 0.03, rng.uniform(0.9, 1.6)),
    }
    arms = {side: Arm(-stride * 1.1, 0.15, 1.5), -side: Arm(stride * 0.8, 0.15, 1.7)}
    return Pose((arms[1.0], arms[-1.0]), (legs[1.0], legs[-1.0]), lean=rng.uniform(0.12, 0.28))


def _cheering(rng: np.random.Generator) -> Pose:
    arms = [
        Arm(0, rng.uniform(2.1, 2.8), rng.uniform(0.1, 0.9), (-0.3, 1.0, 0.2)) for _ in "lr"
    ]  # fmt: skip
    spread = rng.uniform(0.05, 0.4)
    return Pose((arms[0], arms[1]), (Leg(0, spread), Leg(0, spread)))


def _akimbo(rng: np.random.Generator) -> Pose:
    arm = Arm(-0.1, rng.uniform(0.65, 0.85), rng.uniform(1.6, 1.85), (-1.0, -0.5, 0.25))
    other = arm if rng.random() < 0.65 else Arm(0, 0.15, 0.25)
    spread = rng.uniform(0.06, 0.22)
    return Pose((arm, other), (Leg(0, spread), Leg(0, spread)))


def _waving(rng: np.random.Generator) -> Pose:
    waving = Arm(rng.uniform(0, 0.4), rng.uniform(1.0, 1.7), rng.uniform(1.0, 1.7), (0, 1.0, 0.1))
    arms = [waving, Arm(0, 0.14, 0.3)]
    rng.shuffle(arms)
    return Pose((arms[0], arms[1]), (Leg(0, 0.05), Leg(0.05, 0.1, 0.1)), sway=rng.normal(0, 0.05))


def _pointing(rng: np.random.Generator) -> Pose:
    arms = [Arm(rng.uniform(1.2, 1.7), rng.uniform(0, 0.9), 0.1), Arm(0, 0.15, 0.2)]
    rng.shuffle(arms)
    return Pose((arms[0], arms[1]), (Leg(0.1, 0.06), Leg(-0.1, 0.08)))


def _phoning(rng: np.random.Generator) -> Pose:
    arms = [Arm(0.35, 0.35, 2.35, (-0.2, 1.0, 0.6)), Arm(0.05, 0.12, rng.uniform(0.2, 1.2))]
    rng.shuffle(arms)
    return Pose((arms[0], arms[1]), (Leg(0, 0.05), Leg(0.08, 0.09, 0.15)))


def _folded_arms(rng: np.random.Generator) -> Pose:
    arms = (Arm(0.35, 0.2, 1.75, (-1.0, 0.1, 0.45)), Arm(0.3, 0.2, 1.7, (-1.0, 0.2, 0.4)))
    return Pose(arms, (Leg(0, 0.05), Leg(rng.uniform(0, 0.1), 0.1)))


def _sitting(rng: np.random.Generator) -> Pose:
    knee, spread = rng.uniform(1.25, 1.65), rng.uniform(0.05, 0.3)
    swing = rng.uniform(1.35, 1.55)
    arm = Arm(rng.uniform(0.2, 0.5), 0.15, rng.uniform(0.6, 1.1))
    other = arm if rng.random() < 0.6 else Arm(0.1, 0.3, 0.3)
    legs = (Leg(swing, spread, knee), Leg(swing, spread, knee + rng.normal(0, 0.12)))
    return Pose((arm, other), legs, lean=rng.uniform(-0.15, 0.2), seated=True)


def _squatting(rng: np.random.Generator) -> Pose:
    arm = Arm(rng.uniform(0.7, 1.3), 0.15, rng.uniform(0.3, 0.9))
    leg = Leg(rng.uniform(1.5, 1.8), rng.uniform(0.15, 0.4), 2.25)
    return Pose((arm, arm), (leg, leg), lean=rng.uniform(0.3, 0.5))


def _jumping(rng: np.random.Generator) -> Pose:
    arm = Arm(0, rng.uniform(1.9, 2.6), 0.3, (0.0, 1.0, 0.0))
    leg = Leg(0.1, rng.uniform(0.3, 0.6), rng.uniform(0.1, 0.7))
    return Pose((arm, arm), (leg, Leg(0.2, leg.spread, leg.knee)))


_POSES: tuple[tuple[Callable[[np.random.Generator], Pose], float], ...] = (
    (_standing, 0.26), (_walking, 0.18), (_running, 0.09), (_cheering, 0.07), (_akimbo, 0.09),
    (_waving, 0.08), (_pointing, 0.04), (_phoning, 0.04), (_folded_arms, 0.05), (_sitting, 0.06),
    (_squatting, 0.02), (_jumping, 0.02),
)  # fmt: skip


def random_pose(rng: np.random.Generator) -> Pose:
    builders, odds = zip(*_POSES, strict=True)
    return builders[rng.choice(len(builders), p=odds)](rng)  # type: ignore[no-any-return]


def build_skeleton(pose: Pose, appearance: Appearance) -> Skeleton:
    """Compute the joints from the joint angles, starting at the pelvis."""
    scale = (1 - appearance.head) / (
        1 - _ADULT_HEAD
    )  # a child's larger head makes the rest smaller
    spine = np.array(
        (np.sin(pose.sway), np.cos(pose.lean) * np.cos(pose.sway), np.sin(pose.lean))
    )  # fmt: skip
    shoulders = 0.102 * (1 - 0.1 * appearance.build) * (0.8 + 0.2 * appearance.girth)
    hips = 0.05 * (1 + 0.1 * appearance.build) * (0.7 + 0.3 * appearance.girth)
    arms = [
        _arm(arm, side, np.array((side * shoulders, 0, 0)) + spine * _SHOULDER_HEIGHT)
        for arm, side in zip(pose.arms, SIDES, strict=True)
    ]
    legs = [
        _leg(leg, side, np.array((side * hips, 0, 0)))
        for leg, side in zip(pose.legs, SIDES, strict=True)
    ]
    neck = spine * _NECK_HEIGHT * scale
    head = neck + (0.5 * spine + (0, 0.5, 0.04)) * (0.57 * appearance.head + 0.005)
    return Skeleton(np.array(arms) * scale, np.array(legs) * scale, neck, head, scale)


def _direction(swing: float, spread: float, side: float) -> Vector:
    return np.array(
        (side * np.sin(spread), -np.cos(spread) * np.cos(swing), np.cos(spread) * np.sin(swing))
    )


def _arm(arm: Arm, side: float, shoulder: Vector) -> Vector:
    upper = _direction(arm.swing, arm.spread, side)
    towards = np.array(arm.towards) * (side, 1, 1)
    towards = towards - upper * (towards @ upper)
    towards /= np.linalg.norm(towards)
    fore = np.cos(arm.bend) * upper + np.sin(arm.bend) * towards
    elbow = shoulder + upper * _UPPER_ARM
    wrist = elbow + fore * _FOREARM
    return np.array((shoulder, elbow, wrist, wrist + fore * _HAND))


def _leg(leg: Leg, side: float, hip: Vector) -> Vector:
    knee = hip + _direction(leg.swing, leg.spread, side) * _THIGH
    ankle = knee + _direction(leg.swing - leg.knee, leg.spread * 0.6, side) * _SHIN
    # The foot stays flat below an upright shin and follows a shin that swings back.
    pitch = min(leg.swing - leg.knee, 0.3) * 0.7
    toe = np.array((side * 0.25, np.sin(pitch) - 0.22, np.cos(pitch)))
    return np.array((hip, knee, ankle, ankle + toe * _FOOT))
