"""Scenes about which everything is known: solids and jointed figures on a floor, drawn by an analytic ray caster.

``draw_scene(size, seed, index)`` gives a picture, captions in several wordings, and the truth of every pixel: depth,
normals, classes, things, edges, straight lines, body joints. A scene depends on its seed and index alone, whatever the
size; its truth is the same on every machine, its colours within 1/255 (powers may differ in their last bit).

World: x right, y up, z towards the viewer, metres, the floor at y = 0. Camera space: the same axes, turned with the
camera, which looks along -z.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from controlkit.errors import UserError
from controlkit.hub import cache_dir
from controlkit.images import write_atomic
from controlkit.seeds import numpy_rng

try:
    from numba import njit
except ImportError as error:
    raise UserError("Drawing scenes needs numba. Install it with: pip install 'controlkit[world]'") from error

CLASSES = (
    "sky", "floor", "ball", "box", "cylinder", "cone", "ring", "skin", "hair", "shirt", "trousers", "shoes"
)  # fmt: skip
"""What a pixel can show; ``Scene.labels`` are indices into this."""
PALETTE = np.array(
    [(120, 180, 230), (110, 100, 90), (230, 60, 60), (250, 170, 50), (60, 170, 80), (150, 80, 200), (40, 200, 200),
     (250, 200, 170), (90, 50, 20), (220, 80, 160), (50, 70, 200), (20, 20, 20)], np.uint8
)  # fmt: skip
"""The colour of each class in segmentation hints, (classes, 3)."""

SOLIDS = ("ball", "box", "cylinder", "cone", "ring")
COLOURS = {
    "red": (200, 40, 40),
    "orange": (235, 130, 35),
    "yellow": (240, 205, 60),
    "green": (60, 150, 70),
    "teal": (20, 140, 140),
    "blue": (50, 90, 205),
    "purple": (125, 65, 175),
    "pink": (240, 150, 185),
    "white": (235, 235, 235),
    "black": (40, 40, 45),
    "brown": (125, 80, 50),
}
"""Of solids and clothes: name -> sRGB."""
MATERIALS = ("", "shiny", "metal", "striped")
"""What a solid is made of, as captions say it; the first is plain and matt."""
FLOORS = {
    "grey": ((150, 150, 155), (150, 150, 155)),
    "green": ((95, 150, 80), (95, 150, 80)),
    "brown": ((165, 125, 90), (165, 125, 90)),
    "white": ((225, 225, 225), (225, 225, 225)),
    "blue": ((105, 140, 185), (105, 140, 185)),
    "wooden": ((175, 125, 80), (150, 100, 62)),
    "checkered": ((225, 225, 225), (90, 90, 95)),
}
"""Floors: name -> the two sRGB colours of its pattern."""
SKIES = {
    "blue": ((120, 170, 235), (215, 232, 250)),
    "grey": ((165, 170, 180), (225, 228, 232)),
    "pink": ((235, 160, 180), (252, 226, 205)),
    "purple": ((95, 75, 150), (225, 170, 190)),
    "dark": ((25, 30, 60), (80, 90, 130)),
}
"""Skies: name -> sRGB at the zenith and at the horizon."""
_SKIN = ((250, 215, 185), (230, 180, 140), (190, 135, 95), (125, 80, 55), (85, 55, 40))
_HAIR = ((35, 25, 20), (90, 55, 30), (190, 140, 70), (150, 70, 30), (170, 170, 170))

POSES: dict[str, dict[str, tuple[float, float, float]]] = {
    "standing": {"arms": (0.15, -1, 0.05), "forearms": (0.1, -1, 0.15)},
    "with arms up": {"arms": (0.45, 1, 0.05), "forearms": (0.15, 1, 0.1)},
    "with arms wide": {"arms": (1, 0.05, 0), "forearms": (1, 0.1, 0.05)},
    "with hands on hips": {"arms": (0.75, -0.8, -0.15), "forearms": (-0.75, -0.55, 0.3)},
    "waving": {"right arm": (0.9, 0.2, 0), "right forearm": (0.25, 1, 0.1)},
    "pointing": {"left arm": (1, 0.15, 0.3), "left forearm": (1, 0.15, 0.3)},
    "walking": {
        "right arm": (0.15, -1, 0.45), "right forearm": (0.05, -0.9, 0.7), "left arm": (0.15, -1, -0.45),
        "left forearm": (0.1, -1, -0.1), "right thigh": (0.05, -1, -0.4), "right shin": (0, -1, -0.6),
        "left thigh": (0.05, -1, 0.5), "left shin": (0, -1, 0.1),
    },
    "running": {
        "right arm": (0.2, -0.8, 0.7), "right forearm": (-0.2, 0.5, 0.9), "left arm": (0.25, -0.7, -0.8),
        "left forearm": (0.1, -0.8, 0.6), "right thigh": (0.05, -0.9, -0.55), "right shin": (0, -0.35, -1),
        "left thigh": (0.05, -0.5, 0.9), "left shin": (0, -1, 0),
    },
    "jumping": {
        "arms": (0.8, 0.75, 0), "forearms": (0.6, 0.9, 0), "thighs": (0.55, -1, 0.1), "shins": (0.45, -1, -0.15)
    },
    "crouching": {
        "arms": (0.3, -0.6, 0.8), "forearms": (0, -0.1, 1), "thighs": (0.35, -0.35, 1), "shins": (0.1, -1, -0.55)
    },
    "kicking": {
        "arms": (0.7, -0.6, -0.2), "forearms": (0.7, -0.3, 0.3), "right thigh": (0.15, -0.25, 1),
        "right shin": (0.1, 0.05, 1),
    },
    "dancing": {
        "right arm": (0.5, 0.9, 0), "right forearm": (-0.3, 1, 0.1), "left arm": (1, -0.2, 0),
        "left forearm": (0.7, 0.5, 0.2), "left thigh": (0.7, -0.6, 0.3), "left shin": (-0.5, -1, -0.1),
    },
}  # fmt: skip
"""Poses: name -> directions of limbs (outwards, up, forwards), each side's or both sides'; the rest hang straight."""
_HANG = {"arm": (0.18, -1, 0), "forearm": (0.1, -1, 0.15), "thigh": (0.1, -1, 0.02), "shin": (0.03, -1, -0.02)}

HELDOUT = frozenset(
    {"red cone", "blue ball", "green box", "yellow ring", "purple cylinder", "orange cone", "pink ball", "teal box",
     "white ring", "brown cylinder", "kicking", "with hands on hips"}
)  # fmt: skip
"""Pairings of colour and solid, and poses, that the base has seen in scenes and no control has."""

_SPHERE, _BOX, _CYLINDER, _CONE, _RING, _CAPSULE = range(6)


# --- what a scene is made of --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """A primitive. ``turn`` maps its own axes to the world's; ``size`` is by kind:

    ball (radius), box (three half sides), cylinder, cone, capsule (radius, half height, along y), ring (radii of the
    circle, about y, and of its body).
    """

    kind: int
    centre: np.ndarray
    turn: np.ndarray
    size: tuple[float, float, float]
    colour: tuple[float, float, float]  # linear
    material: int
    label: int

    @property
    def reach(self) -> float:
        """Radius of a sphere about the centre that holds it."""
        a, b, c = self.size
        around = (a, math.sqrt(a * a + b * b + c * c), math.hypot(a, b), math.hypot(a, b), a + b, a + b)
        return around[self.kind]


@dataclass
class _Thing:
    """A solid or a figure, its feet at the origin: primitives, joints, and what captions call it."""

    name: str
    keys: tuple[str, ...]  # what of it may be held out
    parts: list[_Part]
    joints: np.ndarray | None = None  # (18, 3)
    at: tuple[float, float] = (0.0, 0.0)  # x, z on the floor
    radius: float = field(init=False)
    height: float = field(init=False)

    def __post_init__(self) -> None:
        ends = [(np.hypot(p.centre[0], p.centre[2]), p) for p in self.parts]
        self.radius = max(d + p.reach for d, p in ends)
        self.height = max(p.centre[1] + p.reach for p in self.parts)


def _linear(colour: Sequence[float]) -> tuple[float, float, float]:
    """sRGB 0-255 as light (by a plain power of 2.2)."""
    r, g, b = (min(max(c, 0.0), 255.0) / 255.0 for c in colour)
    return r**2.2, g**2.2, b**2.2


def _jittered(rng: np.random.Generator, colour: Sequence[int], by: float = 12.0) -> tuple[float, float, float]:
    return _linear([c + rng.uniform(-by, by) for c in colour])


def _yaw(angle: float) -> np.ndarray:
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, 0.0, s], [0.0, 1.0, 0.0], [-s, 0.0, c]])


def _along(direction: np.ndarray) -> np.ndarray:
    """A turn whose own y axis points in ``direction``."""
    y = direction / np.linalg.norm(direction)
    x = np.cross(y, (0.0, 0.0, 1.0) if abs(y[2]) < 0.9 else (1.0, 0.0, 0.0))
    x /= np.linalg.norm(x)
    return np.stack([x, y, np.cross(x, y)], axis=1)


def _solid(rng: np.random.Generator) -> _Thing:
    kind = int(rng.integers(len(SOLIDS)))
    name = SOLIDS[kind]
    colour = list(COLOURS)[rng.integers(len(COLOURS))]
    material = int(rng.choice(4, p=(0.4, 0.25, 0.15, 0.2)))
    turn = _yaw(rng.uniform(0, 2 * math.pi))
    a = rng.uniform(0.3, 0.55)
    if name == "ball":
        size, height = (a, 0.0, 0.0), a
    elif name == "box":
        half = rng.uniform(0.28, 0.5, 3)
        size, height = (float(half[0]), float(half[1]), float(half[2])), float(half[1])
    elif name == "ring":
        body = a * rng.uniform(0.25, 0.4)
        size, height = (a, body, 0.0), body
        if rng.random() < 0.5:  # standing on its edge
            turn, height = turn @ _along(np.array([0.0, 0.0, 1.0])), a + body
    else:
        half_height = rng.uniform(0.35, 0.65)
        size, height = (a * 0.85, half_height, 0.0), half_height
    part = _Part(kind, np.array([0.0, height, 0.0]), turn, size, _jittered(rng, COLOURS[colour]), material,
                 CLASSES.index(name))  # fmt: skip
    words = " ".join(filter(None, (MATERIALS[material], colour, name)))
    return _Thing(words, (f"{colour} {name}",), [part])


def _figure(rng: np.random.Generator) -> _Thing:
    """A person of capsules and balls, about 1.7 m tall, in a pose with some jitter, turned about."""
    pose_name = list(POSES)[rng.integers(len(POSES))]
    pose = POSES[pose_name]
    shirt, trousers = (list(COLOURS)[i] for i in rng.choice(len(COLOURS), 2, replace=False))
    skin = _jittered(rng, _SKIN[rng.integers(len(_SKIN))], 8)
    hair, shoes = _jittered(rng, _HAIR[rng.integers(len(_HAIR))], 8), _jittered(rng, (70, 60, 60), 30)
    above, below = _jittered(rng, COLOURS[shirt]), _jittered(rng, COLOURS[trousers])
    bare = rng.random() < 0.5  # forearms
    mirrored = rng.random() < 0.5

    def direction(side: str, limb: str) -> np.ndarray:
        named = {"left": "right", "right": "left"}[side] if mirrored else side
        way = pose.get(f"{named} {limb}", pose.get(f"{limb}s", _HANG[limb]))
        vector = np.array(way, float)
        vector = vector / np.linalg.norm(vector) + rng.normal(0, 0.09, 3)
        return vector / np.linalg.norm(vector) * (-1.0 if side == "right" else 1.0, 1.0, 1.0)

    lean = np.array([rng.normal(0, 0.04), 1.0, rng.normal(0.03, 0.05)])
    spine = lean / np.linalg.norm(lean)
    neck = 0.5 * spine
    joints = np.zeros((18, 3))
    joints[1] = neck
    head = neck + 0.21 * spine
    parts: list[_Part] = []

    def limb(a: np.ndarray, b: np.ndarray, radius: float, colour: tuple[float, float, float], name: str) -> None:
        half = float(np.linalg.norm(b - a)) / 2
        parts.append(_Part(_CAPSULE, (a + b) / 2, _along(b - a), (radius, half, 0.0), colour, 0, CLASSES.index(name)))

    def ball(centre: np.ndarray, radius: float, colour: tuple[float, float, float], name: str) -> None:
        parts.append(_Part(_SPHERE, centre, np.eye(3), (radius, 0.0, 0.0), colour, 0, CLASSES.index(name)))

    limb(0.02 * spine, neck - 0.12 * spine, 0.14, above, "shirt")
    limb(neck - 0.05 * spine, neck + 0.1 * spine, 0.05, skin, "skin")
    ball(head, 0.115, skin, "skin")
    ball(head + np.array([0, 0.025, -0.03]), 0.118, hair, "hair")
    ball(head + np.array([0, -0.01, 0.115]), 0.022, skin, "skin")
    joints[0] = head + np.array([0, -0.01, 0.125])
    for sign, eye, ear in ((-1, 14, 16), (1, 15, 17)):
        joints[eye] = head + np.array([0.042 * sign, 0.025, 0.1])
        joints[ear] = head + np.array([0.112 * sign, 0.0, 0.01])
        ball(joints[eye], 0.02, _linear((30, 25, 25)), "skin")
    shoulders, hips = [], []
    for side, sign, s, e, w, h, k, a in (("right", -1, 2, 3, 4, 8, 9, 10), ("left", 1, 5, 6, 7, 11, 12, 13)):
        joints[s] = neck + np.array([0.185 * sign, -0.03, 0])
        joints[e] = joints[s] + 0.28 * direction(side, "arm")
        joints[w] = joints[e] + 0.25 * direction(side, "forearm")
        joints[h] = np.array([0.095 * sign, -0.02, 0])
        joints[k] = joints[h] + 0.43 * direction(side, "thigh")
        joints[a] = joints[k] + 0.42 * direction(side, "shin")
        shoulders.append(joints[s])
        hips.append(joints[h])
        limb(joints[s], joints[e], 0.062, above, "shirt")
        limb(joints[e], joints[w], 0.05, skin if bare else above, "skin" if bare else "shirt")
        ball(joints[w] + 0.05 * (joints[w] - joints[e]) / 0.25, 0.055, skin, "skin")
        limb(joints[h], joints[k], 0.085, below, "trousers")
        limb(joints[k], joints[a], 0.065, below, "trousers")
        limb(joints[a] + np.array([0, -0.035, -0.02]), joints[a] + np.array([0.02 * sign, -0.05, 0.13]), 0.05, shoes,
             "shoes")  # fmt: skip
    limb(shoulders[0], shoulders[1], 0.075, above, "shirt")
    limb(hips[0], hips[1], 0.105, below, "trousers")
    # Feet on the floor, turned about: mostly towards the viewer, one in six away.
    low = min(float(p.centre[1] - abs(p.turn[1, 1]) * p.size[1] - p.size[0]) for p in parts)
    up = -low + (0.12 if pose_name == "jumping" else 0.0)
    spin = _yaw(rng.normal(0, 0.5) + (math.pi if rng.random() < 1 / 6 else 0.0))
    lifted = [
        _Part(p.kind, spin @ (p.centre + (0, up, 0)), spin @ p.turn, p.size, p.colour, p.material, p.label)
        for p in parts
    ]
    words = f"person in a {shirt} shirt and {trousers} trousers, {pose_name}"
    return _Thing(words, (pose_name,), lifted, (joints + (0, up, 0)) @ spin.T)


@dataclass(frozen=True)
class _Camera:
    """At (0, height, distance), looking along -z, turned down by ``pitch``; ``focal`` in widths of the picture."""

    height: float
    distance: float
    pitch: float
    focal: float

    @property
    def turn(self) -> np.ndarray:
        """Camera space to world."""
        c, s = math.cos(self.pitch), math.sin(self.pitch)
        return np.array([[1.0, 0.0, 0.0], [0.0, c, s], [0.0, -s, c]])

    @property
    def place(self) -> np.ndarray:
        return np.array([0.0, self.height, self.distance])

    def project(self, points: np.ndarray, size: int) -> np.ndarray:
        """World points (N, 3) as (x, y in pixels, depth), (N, 3)."""
        seen = (points - self.place) @ self.turn
        depth = np.maximum(-seen[:, 2], 1e-6)
        x = size * (0.5 + self.focal * seen[:, 0] / depth)
        y = size * (0.5 - self.focal * seen[:, 1] / depth)
        return np.stack([x, y, -seen[:, 2]], axis=1)


def _arranged(rng: np.random.Generator) -> tuple[list[_Thing], _Camera]:
    """Things side by side on the floor, none inside another, and a camera that holds them all."""
    drawn = rng.random()
    figures = 0 if drawn < 0.5 else 1 if drawn < 0.92 else 2
    solids = int(rng.choice((1, 2, 3), p=(0.4, 0.4, 0.2))) if not figures else int(rng.choice(3, p=(0.45, 0.4, 0.15)))
    things = [_figure(rng) for _ in range(figures)] + [_solid(rng) for _ in range(solids)]
    placed: list[_Thing] = []
    reach = 0.35
    for thing in things:
        while True:
            x, z = rng.uniform(-1, 1) * reach, rng.uniform(-1, 0.6) * reach
            apart = [math.hypot(x - o.at[0], z - o.at[1]) - 0.85 * (thing.radius + o.radius) for o in placed]
            if all(gap > 0 for gap in apart):
                break
            reach *= 1.05
        thing.at = (x, z)
        placed.append(thing)
    height, pitch, focal = rng.uniform(0.9, 1.9), 0.2, rng.uniform(1.1, 1.5)
    margin = rng.uniform(0.05, 0.14)
    distance = 2.0
    corners = np.array(
        [(t.at[0] + sx * 0.8 * t.radius, y, t.at[1]) for t in placed for sx in (-1, 1) for y in (0.0, t.height)]
    )
    while True:
        for _ in range(3):  # look at the middle of what stands there
            seen = _Camera(height, distance, pitch, focal).project(corners, 1)
            pitch += math.atan(((seen[:, 1].min() + seen[:, 1].max()) / 2 - 0.5) / focal)
        pitch = min(max(pitch, -0.1), 0.5)
        camera = _Camera(height, distance, pitch, focal)
        seen = camera.project(corners, 1)
        fits = seen[:, :2].min() > margin and seen[:, :2].max() < 1 - margin and seen[:, 2].min() > 0.5
        if fits or distance > 12:
            return placed, camera
        distance *= 1.05


# --- captions -----------------------------------------------------------------------------------------------------


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _captions(things: Sequence[_Thing], floor: str, sky: str) -> tuple[str, ...]:
    """The same scene in several wordings, the fullest first."""
    named = [_article(t.name) for t in things]
    listed = " and ".join(named)
    short = " and ".join(_article(" ".join(t.name.split(",")[0].split(" shirt and ")[0].split()[:6])) for t in things)
    other = listed.replace("ball", "sphere").replace("ring", "torus").replace("trousers", "pants")
    ground = f"on {_article(floor)} floor"
    return (
        f"{listed}, {ground}",
        f"{listed}, {ground}, {sky} sky",
        f"{other}, {ground}",
        f"{' and '.join(reversed(named))}, {ground}",
        f"3d scene, {listed}",
        f"{short}, {ground}",
    )


# --- the ray caster -----------------------------------------------------------------------------------------------
# Rays are (o, d); d need not have length 1. Camera rays have depth 1 along the view, so that t is depth.

_FAR = 1e30
_NEAR = 1e-6
_LIGHT_SAMPLES = 16
_fast: Callable = njit(cache=True, nogil=True)


@_fast
def _hit(kind, a, b, c, ox, oy, oz, dx, dy, dz):  # type: ignore[no-untyped-def]
    """The first t > 0 at which a ray meets a primitive in its own axes, with the outward normal there."""
    best, nx, ny, nz = _FAR, 0.0, 0.0, 0.0
    if kind == _BOX:
        near, far, axis, sign = -_FAR, _FAR, 0, 1.0
        for k in range(3):
            o = ox if k == 0 else (oy if k == 1 else oz)
            d = dx if k == 0 else (dy if k == 1 else dz)
            h = a if k == 0 else (b if k == 1 else c)
            if abs(d) < 1e-12:
                if abs(o) > h:
                    return _FAR, 0.0, 0.0, 0.0
                continue
            t0, t1, s = (-h - o) / d, (h - o) / d, -1.0
            if t0 > t1:
                t0, t1, s = t1, t0, 1.0
            if t0 > near:
                near, axis, sign = t0, k, s
            far = min(far, t1)
        if near <= far and near > _NEAR:
            best = near
            nx, ny, nz = sign if axis == 0 else 0.0, sign if axis == 1 else 0.0, sign if axis == 2 else 0.0
        return best, nx, ny, nz
    if kind == _RING:
        # Steps as long as the distance to the ring, which never pass through it.
        length = math.sqrt(dx * dx + dy * dy + dz * dz)
        ux, uy, uz = dx / length, dy / length, dz / length
        along = -(ox * ux + oy * uy + oz * uz)
        past = along + (a + b)
        t = max(along - (a + b), _NEAR)
        for _ in range(96):
            x, y, z = ox + t * ux, oy + t * uy, oz + t * uz
            ring = math.sqrt(x * x + z * z)
            q = ring - a
            reach = math.sqrt(q * q + y * y)
            gap = reach - b
            if gap < 1e-6:
                return t / length, q * x / (ring * reach), y / reach, q * z / (ring * reach)
            t += gap
            if t > past:
                break
        return _FAR, 0.0, 0.0, 0.0
    if kind in (_CYLINDER, _CAPSULE):
        qa = dx * dx + dz * dz
        qb = ox * dx + oz * dz
        qc = ox * ox + oz * oz - a * a
        disc = qb * qb - qa * qc
        if disc > 0 and qa > 1e-14:
            t = (-qb - math.sqrt(disc)) / qa
            y = oy + t * dy
            if t > _NEAR and abs(y) <= b:
                best, nx, ny, nz = t, (ox + t * dx) / a, 0.0, (oz + t * dz) / a
        if kind == _CYLINDER and abs(dy) > 1e-12:
            s = 1.0 if dy < 0 else -1.0
            t = (s * b - oy) / dy
            x, z = ox + t * dx, oz + t * dz
            if t > _NEAR and t < best and x * x + z * z <= a * a:
                best, nx, ny, nz = t, 0.0, s, 0.0
        if kind == _CYLINDER:
            return best, nx, ny, nz
    if kind == _CONE:
        k = (a / (2 * b)) ** 2
        h = b - oy
        qa = dx * dx + dz * dz - k * dy * dy
        qb = ox * dx + oz * dz + k * h * dy
        qc = ox * ox + oz * oz - k * h * h
        disc = qb * qb - qa * qc
        if disc > 0 and abs(qa) > 1e-14:
            root = math.sqrt(disc)
            for s in (-1.0, 1.0):
                t = (-qb + s * root) / qa
                y = oy + t * dy
                if t > _NEAR and t < best and abs(y) <= b:
                    x, z = ox + t * dx, oz + t * dz
                    m = math.sqrt(x * x + z * z + (k * (b - y)) ** 2) + 1e-12
                    best, nx, ny, nz = t, x / m, k * (b - y) / m, z / m
        if abs(dy) > 1e-12:
            t = (-b - oy) / dy
            x, z = ox + t * dx, oz + t * dz
            if t > _NEAR and t < best and x * x + z * z <= a * a:
                best, nx, ny, nz = t, 0.0, -1.0, 0.0
        return best, nx, ny, nz
    # A ball, or a capsule's two ends.
    for s in (-1.0, 1.0):
        y0 = oy - s * b if kind == _CAPSULE else oy
        qa = dx * dx + dy * dy + dz * dz
        qb = ox * dx + y0 * dy + oz * dz
        qc = ox * ox + y0 * y0 + oz * oz - a * a
        disc = qb * qb - qa * qc
        if disc > 0:
            t = (-qb - math.sqrt(disc)) / qa
            if t > _NEAR and t < best:
                best, nx, ny, nz = t, (ox + t * dx) / a, (y0 + t * dy) / a, (oz + t * dz) / a
        if kind == _SPHERE:
            break
    return best, nx, ny, nz


@_fast
def _misses(centre, reach, o, d):  # type: ignore[no-untyped-def]
    """Whether a ray passes by a bounding sphere, or has it behind."""
    x, y, z = o[0] - centre[0], o[1] - centre[1], o[2] - centre[2]
    out = x * x + y * y + z * z - reach * reach
    if out <= 0:
        return False
    b = x * d[0] + y * d[1] + z * d[2]
    return b > 0 or b * b < out * (d[0] * d[0] + d[1] * d[1] + d[2] * d[2])


@_fast
def _first(o, d, limit, anything, groups, bounds, kinds, centres, turns, sizes, n):  # type: ignore[no-untyped-def]
    """The nearest part before ``limit`` (or any, for shadows): (index or -1, t); its normal goes into ``n``."""
    best, found = limit, -1
    for g in range(len(groups)):
        if _misses(bounds[g, :3], bounds[g, 3], o, d):
            continue
        for i in range(groups[g, 0], groups[g, 1]):
            if _misses(centres[i], centres[i, 3], o, d):
                continue
            m = turns[i]
            x, y, z = o[0] - centres[i, 0], o[1] - centres[i, 1], o[2] - centres[i, 2]
            t, nx, ny, nz = _hit(
                kinds[i], sizes[i, 0], sizes[i, 1], sizes[i, 2],
                m[0, 0] * x + m[1, 0] * y + m[2, 0] * z, m[0, 1] * x + m[1, 1] * y + m[2, 1] * z,
                m[0, 2] * x + m[1, 2] * y + m[2, 2] * z,
                m[0, 0] * d[0] + m[1, 0] * d[1] + m[2, 0] * d[2], m[0, 1] * d[0] + m[1, 1] * d[1] + m[2, 1] * d[2],
                m[0, 2] * d[0] + m[1, 2] * d[1] + m[2, 2] * d[2],
            )  # fmt: skip
            if t < best:
                best, found = t, i
                if anything:
                    return found, best
                for k in range(3):
                    n[k] = m[k, 0] * nx + m[k, 1] * ny + m[k, 2] * nz
    return found, best


@_fast
def _lit(p, light, spots, groups, bounds, kinds, centres, turns, sizes, spare):  # type: ignore[no-untyped-def]
    """The share of a ball-shaped light seen from ``p``: five of its points, and all where those disagree."""
    to = np.empty(3)
    across = np.empty(3)
    for k in range(3):
        to[k] = light[k] - p[k]
    length = math.sqrt(to[0] ** 2 + to[1] ** 2 + to[2] ** 2)
    # Two directions across the way to the light.
    flat = math.sqrt(to[0] ** 2 + to[2] ** 2) + 1e-12
    ax, az = to[2] / flat, -to[0] / flat
    bx, by, bz = to[1] * az / length, (to[2] * ax - to[0] * az) / length, -to[1] * ax / length
    seen = 0
    for s in range(len(spots)):
        u, v = spots[s, 0] * light[3], spots[s, 1] * light[3]
        across[0], across[1], across[2] = to[0] + u * ax + v * bx, to[1] + v * by, to[2] + u * az + v * bz
        if _first(p, across, 1.0, True, groups, bounds, kinds, centres, turns, sizes, spare)[0] < 0:
            seen += 1
        if s == 4 and (seen == 0 or seen == 5):
            return seen / 5.0
    return seen / len(spots)


@_fast
def _sky(y, skies):  # type: ignore[no-untyped-def]
    """Colour of the sky in a direction of this height (0 at the horizon, 1 at the zenith)."""
    s = min(max(y, 0.0), 1.0) ** 0.6
    return (
        skies[1, 0] + s * (skies[0, 0] - skies[1, 0]),
        skies[1, 1] + s * (skies[0, 1] - skies[1, 1]),
        skies[1, 2] + s * (skies[0, 2] - skies[1, 2]),
    )


@_fast
def _shade(  # type: ignore[no-untyped-def]
    o, d, groups, bounds, kinds, centres, turns, sizes, colours, looks, lights, spots, skies, floors,
    pattern, n, rgb, p, spare,
):  # fmt: skip
    """What a ray sees: (part, or -1 for the floor, -2 for the sky; t). Normal into ``n``, light into ``rgb``."""
    part, t = _first(o, d, _FAR, False, groups, bounds, kinds, centres, turns, sizes, n)
    if d[1] < 0:
        ground = -o[1] / d[1]
        if ground < t:
            part, t = -1, ground
            n[0], n[1], n[2] = 0.0, 1.0, 0.0
    elif part < 0:
        part = -2
    length = math.sqrt(d[0] * d[0] + d[1] * d[1] + d[2] * d[2])
    if part == -2:
        rgb[0], rgb[1], rgb[2] = _sky(d[1] / length, skies)
        n[0], n[1], n[2] = 0.0, 0.0, 0.0
        return part, _FAR
    for k in range(3):
        p[k] = o[k] + t * d[k]
    gloss, mirror, base = 0.0, 0.0, np.empty(3)
    if part == -1:
        which = 0
        if pattern == 1:  # planks
            which = math.floor(p[0] / 0.3) & 1
        elif pattern == 2:
            which = (math.floor(p[0] / 0.5) + math.floor(p[2] / 0.5)) & 1
        for k in range(3):
            base[k] = floors[which, k]
    else:
        look = looks[part]
        for k in range(3):
            base[k] = colours[part, k]
        if look == 1:
            gloss = 0.7
        elif look == 2:
            gloss, mirror = 1.0, 0.55
        elif look == 3:
            m = turns[part]
            y = m[0, 1] * (p[0] - centres[part, 0]) + m[1, 1] * (p[1] - centres[part, 1])
            y += m[2, 1] * (p[2] - centres[part, 2])
            if kinds[part] == _RING:  # stripes around its body
                x = m[0, 0] * (p[0] - centres[part, 0]) + m[1, 0] * (p[1] - centres[part, 1])
                x += m[2, 0] * (p[2] - centres[part, 2])
                z = m[0, 2] * (p[0] - centres[part, 0]) + m[1, 2] * (p[1] - centres[part, 1])
                z += m[2, 2] * (p[2] - centres[part, 2])
                y = 0.2 * math.atan2(z, x) * 8 / math.pi
            if math.floor(y / 0.2 + 0.5) & 1:
                for k in range(3):
                    base[k] = 0.25 * base[k] + 0.75 * 0.85
    for k in range(3):
        p[k] += 2e-4 * n[k]
    side = 0.5 + 0.5 * n[1]
    zenith = _sky(0.5, skies)
    for k in range(3):  # light from the sky above and, weaker, from the floor below
        around = 0.42 * zenith[k] * side + 0.2 * floors[0, k] * (1 - side)
        rgb[k] = base[k] * around
    dot = (n[0] * d[0] + n[1] * d[1] + n[2] * d[2]) / length
    rx, ry, rz = d[0] / length - 2 * dot * n[0], d[1] / length - 2 * dot * n[1], d[2] / length - 2 * dot * n[2]
    for i in range(len(lights)):
        x, y, z = lights[i, 0] - p[0], lights[i, 1] - p[1], lights[i, 2] - p[2]
        far = math.sqrt(x * x + y * y + z * z)
        facing = (n[0] * x + n[1] * y + n[2] * z) / far
        if facing <= 0:
            continue
        lit = _lit(p, lights[i], spots, groups, bounds, kinds, centres, turns, sizes, spare)
        if lit == 0:
            continue
        shine = max((rx * x + ry * y + rz * z) / far, 0.0) ** 40 * gloss
        for k in range(3):
            tint = base[k] if mirror > 0 else 1.0
            rgb[k] += lit * lights[i, 4] * (facing * base[k] * (1 - 0.6 * mirror) + 0.6 * shine * tint)
    if mirror > 0:
        above = _sky(ry, skies)
        for k in range(3):
            around = above[k] if ry > 0 else floors[0, k] * (0.35 + 0.3 * (1 + ry))
            rgb[k] += mirror * around * base[k]
    if part == -1:  # haze, so that the floor meets the sky softly
        haze = 1.0 - math.exp(-(t * length) / 60.0)
        rgb[0] += haze * (skies[1, 0] - rgb[0])
        rgb[1] += haze * (skies[1, 1] - rgb[1])
        rgb[2] += haze * (skies[1, 2] - rgb[2])
    return part, t


@_fast
def _cast(  # type: ignore[no-untyped-def]
    size, focal, turn, place, groups, bounds, kinds, centres, turns, sizes, colours, looks, lights, spots, skies,
    floors, pattern,
):  # fmt: skip
    """One ray a pixel for the truth; four more for the colour where neighbours differ."""
    seen = np.empty((size, size), np.int64)
    depth = np.empty((size, size))
    normals = np.empty((size, size, 3))
    light = np.empty((size, size, 3))
    n, rgb, p, d, spare = np.empty(3), np.empty(3), np.empty(3), np.empty(3), np.empty(3)
    for y in range(size):
        for x in range(size):
            u, v = ((x + 0.5) / size - 0.5) / focal, (0.5 - (y + 0.5) / size) / focal
            for k in range(3):
                d[k] = turn[k, 0] * u + turn[k, 1] * v - turn[k, 2]
            part, t = _shade(
                place, d, groups, bounds, kinds, centres, turns, sizes, colours, looks, lights, spots, skies,
                floors, pattern, n, rgb, p, spare,
            )  # fmt: skip
            seen[y, x], depth[y, x] = part, t
            for k in range(3):
                light[y, x, k] = min(rgb[k], 1.0)
                normals[y, x, k] = turn[0, k] * n[0] + turn[1, k] * n[1] + turn[2, k] * n[2]
    smooth = light.copy()
    for y in range(size):
        for x in range(size):
            rough = False
            for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0)):
                v, u = y + dy, x + dx
                if 0 <= v < size and 0 <= u < size:
                    if seen[v, u] != seen[y, x]:
                        rough = True
                    for k in range(3):
                        if abs(light[v, u, k] - light[y, x, k]) > 0.06:
                            rough = True
            if rough:
                total0, total1, total2 = 0.0, 0.0, 0.0
                for i in range(4):
                    fx, fy = 0.25 + 0.5 * (i & 1), 0.25 + 0.5 * (i >> 1)
                    u, v = ((x + fx) / size - 0.5) / focal, (0.5 - (y + fy) / size) / focal
                    for k in range(3):
                        d[k] = turn[k, 0] * u + turn[k, 1] * v - turn[k, 2]
                    _shade(
                        place, d, groups, bounds, kinds, centres, turns, sizes, colours, looks, lights, spots,
                        skies, floors, pattern, n, rgb, p, spare,
                    )  # fmt: skip
                    total0 += min(rgb[0], 1.0)
                    total1 += min(rgb[1], 1.0)
                    total2 += min(rgb[2], 1.0)
                smooth[y, x, 0], smooth[y, x, 1], smooth[y, x, 2] = total0 / 4, total1 / 4, total2 / 4
    return seen, depth, normals, smooth


# --- the scene ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """A picture and its truth; H = W = the size asked for.

    picture: uint8 (H, W, 3).  captions: the same in several wordings, the fullest first.
    depth: float32 (H, W), metres along the view; infinite where there is sky.
    normals: float32 (H, W, 3), camera space (x right, y up, z towards the camera); zero where there is sky.
    labels: uint8 (H, W), indices into ``CLASSES``.  instances: uint8 (H, W), 0 for floor and sky, things from 1 on.
    edges: bool (H, W), borders of things, of classes, of depth, and creases.
    lines: float32 (L, 4), visible straight edges x0, y0, x1, y1 in pixels.
    keypoints: float32 (P, 18, 3), x, y and whether it is visible, of each figure's joints in OpenPose's order.
    heldout: whether something in it is in ``HELDOUT``.
    """

    picture: np.ndarray
    captions: tuple[str, ...]
    depth: np.ndarray
    normals: np.ndarray
    labels: np.ndarray
    instances: np.ndarray
    edges: np.ndarray
    lines: np.ndarray
    keypoints: np.ndarray
    heldout: bool


def _spots() -> np.ndarray:
    """Points of a disc: the middle, four of the rim, and a spiral."""
    first = [(0.0, 0.0), (0.97, 0.0), (-0.97, 0.0), (0.0, 0.97), (0.0, -0.97)]
    golden = math.pi * (3 - math.sqrt(5))
    rest = [
        (math.sqrt((i + 0.5) / 11) * math.cos(i * golden), math.sqrt((i + 0.5) / 11) * math.sin(i * golden))
        for i in range(_LIGHT_SAMPLES - len(first))
    ]
    return np.array(first + rest)


def _edges(seen: np.ndarray, labels: np.ndarray, instances: np.ndarray, depth: np.ndarray, normals: np.ndarray):  # type: ignore[no-untyped-def]
    edges = np.zeros(seen.shape, bool)
    near = np.where(np.isfinite(depth), 1 / np.maximum(depth, 1e-3), 0.0)
    for axis in (0, 1):
        a = (slice(None, -1), slice(None)) if axis == 0 else (slice(None), slice(None, -1))
        b = (slice(1, None), slice(None)) if axis == 0 else (slice(None), slice(1, None))
        other = (labels[a] != labels[b]) | (instances[a] != instances[b])
        step = np.abs(near[a] - near[b]) > 0.06 * np.maximum(near[a], near[b])
        inside = (instances[a] > 0) & (instances[a] == instances[b])
        crease = (normals[a] * normals[b]).sum(-1) < math.cos(math.radians(40))
        edges[a] |= other | (inside & (crease | (step & (seen[a] != seen[b]))))
    return edges


def _straight(parts: Sequence[_Part], camera: _Camera) -> Iterator[np.ndarray]:
    """Straight edges of the solids, whether visible or not: pairs of world points (2, 3)."""
    for part in parts:
        a, b, c = part.size
        eye = part.turn.T @ (camera.place - part.centre)
        own: list[tuple] = []
        if part.kind == _BOX:
            corners = [np.array((x, y, z)) for x in (-a, a) for y in (-b, b) for z in (-c, c)]
            own = [(p, q) for i, p in enumerate(corners) for q in corners[i + 1 :] if (p != q).sum() == 1]
        elif part.kind in (_CYLINDER, _CONE):
            # Planes through the eye that touch the solid: they meet its circle where lines from a point touch that, the
            # eye's own place for a cylinder, for a cone where the line from its apex through the eye meets the base.
            away = math.hypot(eye[0], eye[2])
            towards = math.atan2(eye[2], eye[0])
            if part.kind == _CONE:
                below = b - eye[1]
                towards += math.pi if below < 0 else 0.0
                away *= 2 * b / max(abs(below), 1e-6)
            if away > a:
                spread = math.acos(a / away)
                for t in (towards - spread, towards + spread):
                    x, z = a * math.cos(t), a * math.sin(t)
                    top = (0.0, b, 0.0) if part.kind == _CONE else (x, b, z)
                    own.append((np.array((x, -b, z)), np.array(top)))
        for p, q in own:
            yield np.stack([p, q]) @ part.turn.T + part.centre


def _visible_lines(edges: Iterator[np.ndarray], camera: _Camera, depth: np.ndarray) -> list[list[float]]:
    """The visible runs of world edges, as segments in pixels."""
    size = len(depth)
    found = []
    steps = np.linspace(0.02, 0.98, 33)[:, None]
    for a, b in edges:
        points = camera.project(a + steps * (b - a), size)
        x, y = (np.clip(np.floor(points[:, k]).astype(int), 0, size - 1) for k in (0, 1))
        # The surface beside an edge may be either side's: the farthest of the neighbours counts.
        around = np.stack([depth[np.clip(y + i, 0, size - 1), np.clip(x + j, 0, size - 1)] for i in (-1, 0, 1)
                           for j in (-1, 0, 1)])  # fmt: skip
        seen = around.max(0) >= points[:, 2] - 0.05
        runs = np.flatnonzero(np.diff(np.concatenate([[0], seen.astype(int), [0]])))
        for first, last in zip(runs[::2], runs[1::2], strict=True):
            start, end = points[first], points[last - 1]
            if last - first >= 4 and np.hypot(*(end - start)[:2]) >= size / 20:
                found.append([*start[:2], *end[:2]])
    return found


def _horizon(labels: np.ndarray) -> list[list[float]]:
    """The runs of columns in which sky stands right above floor, as one segment each."""
    meet = (labels[:-1] == 0) & (labels[1:] == 1)
    found = []
    for y in np.flatnonzero(meet.any(1)):
        runs = np.flatnonzero(np.diff(np.concatenate([[0], meet[y].astype(int), [0]])))
        for first, last in zip(runs[::2], runs[1::2], strict=True):
            if last - first >= len(labels) / 20:
                found.append([float(first), y + 1.0, float(last), y + 1.0])
    return found


_SLACK = np.array([0.05, 0.16] + [0.14, 0.12, 0.1] * 2 + [0.2, 0.15, 0.13] * 2 + [0.035] * 2 + [0.06] * 2)
"""How far the body's surface may lie before a joint that counts as visible, in metres."""


def _seen_joints(things: Sequence[_Thing], camera: _Camera, depth: np.ndarray) -> np.ndarray:
    size = len(depth)
    found = []
    for thing in things:
        if thing.joints is not None:
            points = camera.project(thing.joints + (thing.at[0], 0.0, thing.at[1]), size)
            inside = ((points[:, :2] >= 0) & (points[:, :2] < size)).all(1)
            x, y = np.clip(points[:, :2].astype(int), 0, size - 1).T
            seen = inside & (depth[y, x] >= points[:, 2] - _SLACK)
            found.append(np.stack([points[:, 0], points[:, 1], seen], axis=1))
    return np.array(found, np.float32).reshape(-1, 18, 3)


def draw_scene(size: int, seed: int, index: int) -> Scene:
    """Scene ``index`` of a seed, ``size`` pixels wide and high."""
    rng = numpy_rng("scene", seed, index)
    things, camera = _arranged(rng)
    floor, sky = (list(names)[rng.integers(len(names))] for names in (FLOORS, SKIES))
    angle = rng.uniform(-1.1, 1.1)
    lights = np.array(
        [
            (5 * math.sin(angle), rng.uniform(4, 6), 5 * math.cos(angle), rng.uniform(0.25, 0.6), 0.62),
            (-4 * math.sin(angle), rng.uniform(2.5, 4.5), 4, rng.uniform(0.4, 0.8), 0.24),
        ]
    )  # x, y, z, radius, strength
    skies = np.array([_jittered(rng, colour, 8) for colour in SKIES[sky]])
    floors = np.array([_jittered(rng, colour, 8) for colour in FLOORS[floor]])
    pattern = {"wooden": 1, "checkered": 2}.get(floor, 0)
    if not pattern:
        floors[1] = floors[0]

    parts = [
        (i, _Part(p.kind, p.centre + (t.at[0], 0.0, t.at[1]), p.turn, p.size, p.colour, p.material, p.label))
        for i, t in enumerate(things, 1)
        for p in t.parts
    ]
    counts = np.cumsum([0] + [len(t.parts) for t in things])
    groups = np.stack([counts[:-1], counts[1:]], axis=1)
    bounds = []
    for first, last in groups:
        own = [p for _, p in parts[first:last]]
        middle = np.mean([p.centre for p in own], axis=0)
        bounds.append([*middle, max(float(np.linalg.norm(p.centre - middle)) + p.reach for p in own)])
    only = [p for _, p in parts]
    seen, depth, normals, light = _cast(
        size, camera.focal, camera.turn, camera.place, groups, np.array(bounds),
        np.array([p.kind for p in only]), np.array([[*p.centre, p.reach] for p in only]),
        np.array([p.turn for p in only]), np.array([p.size for p in only]), np.array([p.colour for p in only]),
        np.array([p.material for p in only]), lights, _spots(), skies, floors, pattern,
    )  # fmt: skip
    labels = np.array([p.label for p in only] + [0, 1], np.uint8)[seen]  # -2 sky, -1 floor
    instances = np.array([i for i, _ in parts] + [0, 0], np.uint8)[seen]
    depth = np.where(seen == -2, np.inf, depth)
    lines = _visible_lines(_straight(only, camera), camera, depth) + _horizon(labels)
    return Scene(
        picture=(255 * light ** (1 / 2.2)).round().astype(np.uint8),
        captions=_captions(things, floor, sky),
        depth=depth.astype(np.float32),
        normals=normals.astype(np.float32),
        labels=labels,
        instances=instances,
        edges=_edges(seen, labels, instances, depth, normals),
        lines=np.array(lines, np.float32).reshape(-1, 4),
        keypoints=_seen_joints(things, camera, depth),
        heldout=any(key in HELDOUT for t in things for key in t.keys),
    )


def draw_scenes(size: int, seed: int, indices: Sequence[int], workers: int = 2) -> Iterator[Scene]:
    """Scenes in order, drawn by several threads (the ray caster lets go of Python's lock)."""
    with ThreadPoolExecutor(workers) as pool:
        for first in range(0, len(indices), 8 * workers):  # whoever reads slowly does not make them heap up
            yield from pool.map(lambda index: draw_scene(size, seed, index), indices[first : first + 8 * workers])


_EDITION = 1
"""Raised when what is drawn changes, so that no older drawing is read from a cache."""


def load_scenes(size: int, seed: int, count: int) -> list[Scene]:
    """Scenes 0 to ``count`` of a seed, drawn once and then kept in the cache (20 a second at 128 px)."""
    path = cache_dir() / "world" / f"scenes-{_EDITION}-{size}-{seed}-{count}.npz"
    if not path.exists():
        drawn = [vars(scene) for scene in draw_scenes(size, seed, range(count))]
        parts: dict[str, np.ndarray] = {}
        for name in ("picture", "depth", "normals", "labels", "instances", "edges"):
            parts[name] = np.stack([scene[name] for scene in drawn])
        parts["heldout"] = np.array([scene["heldout"] for scene in drawn])
        for name in ("captions", "lines", "keypoints"):  # of differing lengths: end to end, with the lengths beside
            parts[f"{name}_counts"] = np.array([len(scene[name]) for scene in drawn])
            parts[name] = np.concatenate([np.asarray(scene[name]) for scene in drawn])
        parts["normals"] = (parts["normals"] * 127).round().astype(np.int8)
        depth = parts["depth"]  # the floor right before the horizon lies farther than half precision reaches
        parts["depth"] = np.where(np.isfinite(depth), np.minimum(depth, 6e4), np.inf).astype(np.float16)

        def write(scratch: Path) -> None:
            with scratch.open("wb") as file:
                np.savez(file, allow_pickle=False, **parts)

        write_atomic(path, write)
    with np.load(path) as held:
        read = {name: held[name] for name in held.files}
    read["normals"] = read["normals"].astype(np.float32) / 127
    read["depth"] = read["depth"].astype(np.float32)
    for name in ("captions", "lines", "keypoints"):
        ends = np.cumsum(read.pop(f"{name}_counts"))[:-1]
        read[name] = np.split(read[name], ends)
    return [
        Scene(**{name: values[i] for name, values in read.items()} | {"captions": tuple(map(str, read["captions"][i]))})
        for i in range(len(read["heldout"]))
    ]
