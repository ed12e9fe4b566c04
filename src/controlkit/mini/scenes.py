"""Scenes with their full truth: solids and jointed figures on a floor, drawn by an analytic ray caster.

``draw_scene(size, seed, index)`` gives a picture, captions in several wordings, and the truth of every pixel: depth,
normals, classes, things, edges, straight lines, body joints. A scene depends on its seed and index alone, whatever the
size; its truth is the same on every machine, its colours within 1/255 (powers may differ in their last bit).

World: x right, y up, z towards the viewer, metres, the floor at y = 0. Camera space: the same axes, turned with the
camera, which looks along -z.
"""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from controlkit.files import write_atomic
from controlkit.hub import cache_dir
from controlkit.mini import raycast
from controlkit.seeds import numpy_rng

CLASSES = (
    "sky", "floor", "ball", "box", "cylinder", "cone", "ring", "skin", "hair", "shirt", "trousers", "shoes"
)  # fmt: skip
"""The classes of pixels; ``Scene.labels`` are indices into this."""
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
"""Materials of solids, in the words of captions; the first is plain and matt."""
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

# --- the parts of a scene -----------------------------------------------------------------------------------------


Colour = tuple[float, float, float]


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
    colour: Colour  # linear
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
    """A solid or a figure, its feet at the origin: primitives, joints, and its name in captions."""

    name: str
    keys: tuple[str, ...]  # names that ``HELDOUT`` may list
    parts: list[_Part]
    joints: np.ndarray | None = None  # (18, 3)
    at: tuple[float, float] = (0.0, 0.0)  # x, z on the floor
    radius: float = field(init=False)
    height: float = field(init=False)

    def __post_init__(self) -> None:
        ends = [(np.hypot(p.centre[0], p.centre[2]), p) for p in self.parts]
        self.radius = max(d + p.reach for d, p in ends)
        self.height = max(p.centre[1] + p.reach for p in self.parts)


def _linear(colour: Sequence[float]) -> Colour:
    """sRGB 0-255 as light (by a plain power of 2.2)."""
    r, g, b = (min(max(c, 0.0), 255.0) / 255.0 for c in colour)
    return r**2.2, g**2.2, b**2.2


def _jittered(rng: np.random.Generator, colour: Sequence[int], by: float = 12.0) -> Colour:
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
    shade, middle = _jittered(rng, COLOURS[colour]), np.array([0.0, height, 0.0])
    part = _Part(kind, middle, turn, size, shade, material, CLASSES.index(name))
    words = " ".join(filter(None, (MATERIALS[material], colour, name)))
    return _Thing(words, (f"{colour} {name}",), [part])


def _limb(a: np.ndarray, b: np.ndarray, radius: float, colour: Colour, name: str) -> _Part:
    half = float(np.linalg.norm(b - a)) / 2
    return _Part(raycast.CAPSULE, (a + b) / 2, _along(b - a), (radius, half, 0.0), colour, 0, CLASSES.index(name))


def _ball(centre: np.ndarray, radius: float, colour: Colour, name: str) -> _Part:
    return _Part(raycast.BALL, centre, np.eye(3), (radius, 0.0, 0.0), colour, 0, CLASSES.index(name))


def _head(joints: np.ndarray, at: np.ndarray, skin: Colour, hair: Colour) -> Iterator[_Part]:
    """The parts of a head whose middle is ``at``; the places of nose, eyes and ears go into ``joints``."""
    yield _ball(at, 0.115, skin, "skin")
    yield _ball(at + np.array([0, 0.025, -0.03]), 0.118, hair, "hair")
    yield _ball(at + np.array([0, -0.01, 0.115]), 0.022, skin, "skin")
    joints[0] = at + np.array([0, -0.01, 0.125])
    for sign, eye, ear in ((-1, 14, 16), (1, 15, 17)):
        joints[eye] = at + np.array([0.042 * sign, 0.025, 0.1])
        joints[ear] = at + np.array([0.112 * sign, 0.0, 0.01])
        yield _ball(joints[eye], 0.02, _linear((30, 25, 25)), "skin")


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
    parts = [_limb(0.02 * spine, neck - 0.12 * spine, 0.14, above, "shirt")]
    parts += [_limb(neck - 0.05 * spine, neck + 0.1 * spine, 0.05, skin, "skin"), *_head(joints, head, skin, hair)]
    for side, sign, s, e, w, h, k, a in (("right", -1, 2, 3, 4, 8, 9, 10), ("left", 1, 5, 6, 7, 11, 12, 13)):
        joints[s] = neck + np.array([0.185 * sign, -0.03, 0])
        joints[e] = joints[s] + 0.28 * direction(side, "arm")
        joints[w] = joints[e] + 0.25 * direction(side, "forearm")
        joints[h] = np.array([0.095 * sign, -0.02, 0])
        joints[k] = joints[h] + 0.43 * direction(side, "thigh")
        joints[a] = joints[k] + 0.42 * direction(side, "shin")
        heel, toe = joints[a] + np.array([0, -0.035, -0.02]), joints[a] + np.array([0.02 * sign, -0.05, 0.13])
        parts += [
            _limb(joints[s], joints[e], 0.062, above, "shirt"),
            _limb(joints[e], joints[w], 0.05, skin if bare else above, "skin" if bare else "shirt"),
            _ball(joints[w] + 0.05 * (joints[w] - joints[e]) / 0.25, 0.055, skin, "skin"),
            _limb(joints[h], joints[k], 0.085, below, "trousers"),
            _limb(joints[k], joints[a], 0.065, below, "trousers"),
            _limb(heel, toe, 0.05, shoes, "shoes"),
        ]
    parts.append(_limb(joints[2], joints[5], 0.075, above, "shirt"))
    parts.append(_limb(joints[8], joints[11], 0.105, below, "trousers"))
    # Feet on the floor, turned about: mostly towards the viewer, one in six away.
    low = min(float(p.centre[1] - abs(p.turn[1, 1]) * p.size[1] - p.size[0]) for p in parts)
    up = -low + (0.12 if pose_name == "jumping" else 0.0)
    spin = _yaw(rng.normal(0, 0.5) + (math.pi if rng.random() < 1 / 6 else 0.0))
    lifted = [replace(p, centre=spin @ (p.centre + (0, up, 0)), turn=spin @ p.turn) for p in parts]
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
    reach = 0.35
    for i, thing in enumerate(things):
        while True:
            thing.at = x, z = rng.uniform(-1, 1) * reach, rng.uniform(-1, 0.6) * reach
            if all(math.hypot(x - o.at[0], z - o.at[1]) > 0.85 * (thing.radius + o.radius) for o in things[:i]):
                break
            reach *= 1.05
    height, pitch, focal = rng.uniform(0.9, 1.9), 0.2, rng.uniform(1.1, 1.5)
    margin = rng.uniform(0.05, 0.14)
    distance = 2.0
    corners = np.array(
        [(t.at[0] + sx * 0.8 * t.radius, y, t.at[1]) for t in things for sx in (-1, 1) for y in (0.0, t.height)]
    )
    while True:
        for _ in range(3):  # turn to the middle of the things
            seen = _Camera(height, distance, pitch, focal).project(corners, 1)
            pitch += math.atan(((seen[:, 1].min() + seen[:, 1].max()) / 2 - 0.5) / focal)
        pitch = min(max(pitch, -0.1), 0.5)
        camera = _Camera(height, distance, pitch, focal)
        seen = camera.project(corners, 1)
        fits = seen[:, :2].min() > margin and seen[:, :2].max() < 1 - margin and seen[:, 2].min() > 0.5
        if fits or distance > 12:
            return things, camera
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
        if part.kind == raycast.BOX:
            corners = [np.array((x, y, z)) for x in (-a, a) for y in (-b, b) for z in (-c, c)]
            own = [(p, q) for i, p in enumerate(corners) for q in corners[i + 1 :] if (p != q).sum() == 1]
        elif part.kind in (raycast.CYLINDER, raycast.CONE):
            # Planes through the eye that touch the solid: they meet its circle where lines from a point touch that, the
            # eye's own place for a cylinder, for a cone where the line from its apex through the eye meets the base.
            away = math.hypot(eye[0], eye[2])
            towards = math.atan2(eye[2], eye[0])
            if part.kind == raycast.CONE:
                below = b - eye[1]
                towards += math.pi if below < 0 else 0.0
                away *= 2 * b / max(abs(below), 1e-6)
            if away > a:
                spread = math.acos(a / away)
                for t in (towards - spread, towards + spread):
                    x, z = a * math.cos(t), a * math.sin(t)
                    top = (0.0, b, 0.0) if part.kind == raycast.CONE else (x, b, z)
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
        for first, last in _runs(seen):
            start, end = points[first], points[last - 1]
            if last - first >= 4 and np.hypot(*(end - start)[:2]) >= size / 20:
                found.append([*start[:2], *end[:2]])
    return found


def _runs(there: np.ndarray) -> Iterator[tuple[int, int]]:
    """The runs of True in a row of them, bool (N,): the first of each, and the one after its last."""
    ends = np.flatnonzero(np.diff(np.concatenate([[0], there.astype(int), [0]])))
    yield from zip(ends[::2], ends[1::2], strict=True)


def _horizon(labels: np.ndarray) -> list[list[float]]:
    """The runs of columns in which sky stands right above floor, as one segment each."""
    meet = (labels[:-1] == 0) & (labels[1:] == 1)
    found = []
    for y in np.flatnonzero(meet.any(1)):
        for first, last in _runs(meet[y]):
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
    key = (5 * math.sin(angle), rng.uniform(4, 6), 5 * math.cos(angle), rng.uniform(0.25, 0.6), 0.62)
    fill = (-4 * math.sin(angle), rng.uniform(2.5, 4.5), 4, rng.uniform(0.4, 0.8), 0.24)
    lights = np.array([key, fill])
    skies = np.array([_jittered(rng, colour, 8) for colour in SKIES[sky]])
    floors = np.array([_jittered(rng, colour, 8) for colour in FLOORS[floor]])
    pattern = {"wooden": 1, "checkered": 2}.get(floor, 0)
    if not pattern:
        floors[1] = floors[0]

    parts = [replace(p, centre=p.centre + (t.at[0], 0.0, t.at[1])) for t in things for p in t.parts]
    counts = np.cumsum([0] + [len(t.parts) for t in things])
    groups = np.stack([counts[:-1], counts[1:]], axis=1)
    bounds = []
    for first, last in groups:
        own = parts[first:last]
        middle = np.mean([p.centre for p in own], axis=0)
        bounds.append([*middle, max(float(np.linalg.norm(p.centre - middle)) + p.reach for p in own)])
    spheres = [[*p.centre, p.reach] for p in parts]
    facts = [(p.kind, p.turn, p.size, p.colour, p.material) for p in parts]
    kinds, turns, sizes, colours, materials = (np.array(column) for column in zip(*facts, strict=True))
    solids = raycast.Solids(groups, np.array(bounds), kinds, np.array(spheres), turns, sizes)
    looks = raycast.Looks(colours, materials, lights, raycast.spots_of_a_light(), skies, floors, pattern)
    seen, depth, normals, light = raycast.cast(size, camera.focal, camera.turn, camera.place, solids, looks)
    labels = np.array([p.label for p in parts] + [0, 1], np.uint8)[seen]  # -2 sky, -1 floor
    owners = [i for i, t in enumerate(things, 1) for _ in t.parts]
    instances = np.array(owners + [0, 0], np.uint8)[seen]
    depth = np.where(seen == -2, np.inf, depth)
    lines = _visible_lines(_straight(parts, camera), camera, depth) + _horizon(labels)
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


def draw_scenes(size: int, seed: int, indices: Sequence[int]) -> Iterator[Scene]:
    """Scenes in order, drawn by two threads (the ray caster lets go of Python's lock)."""
    with ThreadPoolExecutor(2) as pool:
        for first in range(0, len(indices), 16):  # a slow reader does not make them heap up
            yield from pool.map(lambda index: draw_scene(size, seed, index), indices[first : first + 16])


_EDITION = 1
"""Raised when the drawing changes, so that no older drawing is read from a cache."""


def load_scenes(size: int, seed: int, count: int) -> list[Scene]:
    """Scenes 0 to ``count`` - 1 of a seed, drawn once and then read from the cache (20 a second at 128 px)."""
    path = cache_dir() / "world" / f"scenes-{_EDITION}-{size}-{seed}-{count}.npz"
    if not path.exists():
        drawn = [vars(scene) for scene in draw_scenes(size, seed, range(count))]
        whole = ("picture", "depth", "normals", "labels", "instances", "edges", "heldout")
        parts = {name: np.stack([scene[name] for scene in drawn]) for name in whole}
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
