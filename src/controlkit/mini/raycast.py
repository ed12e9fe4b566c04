"""An analytic ray caster for solids on a floor under a sky: a ray a pixel for the truth, more for colour at borders.

Plain arrays in two named tuples, compiled by numba; one for all would be copied whole at each call, and take a third
longer. Rays are (o, d); d need not have length 1. Camera rays have depth 1 along the view, so that t is depth.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from controlkit.errors import NotFound

try:
    from numba import njit
except ImportError as error:
    raise NotFound("Drawing scenes needs numba. Install it with: pip install 'controlkit[world]'") from error

BALL, BOX, CYLINDER, CONE, RING, CAPSULE = range(6)
"""Kinds of primitives; ``scenes`` explains their sizes."""

_FAR = 1e30
_NEAR = 1e-6
_LIGHT_SAMPLES = 16


def _fast(function: Callable) -> Callable:
    """The function compiled; the next process finds it compiled where numba may write, beside it or in the cache."""
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError:
        return njit(nogil=True)(function)


class Solids(NamedTuple):
    """P primitives in G groups that stand apart."""

    groups: np.ndarray  # (G, 2), the first primitive and the one after the last
    bounds: np.ndarray  # (G, 4), spheres (centre and radius) that hold each group
    kinds: np.ndarray  # (P,), BALL to CAPSULE
    centres: np.ndarray  # (P, 4), spheres that hold each primitive
    turns: np.ndarray  # (P, 3, 3), own axes to the world's
    sizes: np.ndarray  # (P, 3), by kind


class Looks(NamedTuple):
    """Surfaces, lights and surroundings; colours are linear light in [0, 1]."""

    colours: np.ndarray  # (P, 3)
    materials: np.ndarray  # (P,), 0 matt, 1 shiny, 2 metal, 3 striped
    lights: np.ndarray  # (L, 5): x, y, z, radius, strength
    spots: np.ndarray  # (S, 2), from spots_of_a_light
    skies: np.ndarray  # (2, 3), at the zenith and at the horizon
    floors: np.ndarray  # (2, 3), the colours of the pattern
    pattern: int  # 0 plain, 1 planks, 2 checkered


def spots_of_a_light() -> np.ndarray:
    """Points (16, 2) of a disc: the middle, four of the rim, and a spiral."""
    first = [(0.0, 0.0), (0.97, 0.0), (-0.97, 0.0), (0.0, 0.97), (0.0, -0.97)]
    golden = math.pi * (3 - math.sqrt(5))
    rest = [
        (math.sqrt((i + 0.5) / 11) * math.cos(i * golden), math.sqrt((i + 0.5) / 11) * math.sin(i * golden))
        for i in range(_LIGHT_SAMPLES - len(first))
    ]
    return np.array(first + rest)


@_fast
def _dot(a, b):  # type: ignore[no-untyped-def]
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


@_fast
def _in_own_axes(m, v):  # type: ignore[no-untyped-def]
    """A vector of the world in a primitive's axes, whose turn is ``m``."""
    return (
        m[0, 0] * v[0] + m[1, 0] * v[1] + m[2, 0] * v[2],
        m[0, 1] * v[0] + m[1, 1] * v[1] + m[2, 1] * v[2],
        m[0, 2] * v[0] + m[1, 2] * v[1] + m[2, 2] * v[2],
    )


@_fast
def _hit_disc(radius, height, o, d):  # type: ignore[no-untyped-def]
    """The t at which a ray meets a level disc about the y axis."""
    if abs(d[1]) > 1e-12:
        t = (height - o[1]) / d[1]
        x, z = o[0] + t * d[0], o[2] + t * d[2]
        if t > _NEAR and x * x + z * z <= radius * radius:
            return t
    return _FAR


@_fast
def _hit_box(size, o, d):  # type: ignore[no-untyped-def]
    near, far, axis, sign = -_FAR, _FAR, 0, 1.0
    for k in range(3):
        if abs(d[k]) < 1e-12:
            if abs(o[k]) > size[k]:
                return _FAR, 0.0, 0.0, 0.0
            continue
        t0, t1, s = (-size[k] - o[k]) / d[k], (size[k] - o[k]) / d[k], -1.0
        if t0 > t1:
            t0, t1, s = t1, t0, 1.0
        if t0 > near:
            near, axis, sign = t0, k, s
        far = min(far, t1)
    if near > far or near <= _NEAR:
        return _FAR, 0.0, 0.0, 0.0
    return near, sign if axis == 0 else 0.0, sign if axis == 1 else 0.0, sign if axis == 2 else 0.0


@_fast
def _hit_ring(size, o, d):  # type: ignore[no-untyped-def]
    a, b, _c = size
    ox, oy, oz = o
    dx, dy, dz = d
    # Steps as long as the distance to the ring, which never pass through it.
    length = math.sqrt(_dot(d, d))
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


@_fast
def _hit_cylinder(size, o, d, closed):  # type: ignore[no-untyped-def]
    """Of a cylinder; not ``closed``, of its side alone."""
    a, b, _c = size
    ox, oy, oz = o
    dx, dy, dz = d
    best, nx, ny, nz = _FAR, 0.0, 0.0, 0.0
    qa = dx * dx + dz * dz
    qb = ox * dx + oz * dz
    qc = ox * ox + oz * oz - a * a
    disc = qb * qb - qa * qc
    if disc > 0 and qa > 1e-14:
        t = (-qb - math.sqrt(disc)) / qa
        y = oy + t * dy
        if t > _NEAR and abs(y) <= b:
            best, nx, ny, nz = t, (ox + t * dx) / a, 0.0, (oz + t * dz) / a
    if closed:
        s = 1.0 if dy < 0 else -1.0
        t = _hit_disc(a, s * b, o, d)
        if t < best:
            best, nx, ny, nz = t, 0.0, s, 0.0
    return best, nx, ny, nz


@_fast
def _hit_cone(size, o, d):  # type: ignore[no-untyped-def]
    a, b, _c = size
    ox, oy, oz = o
    dx, dy, dz = d
    best, nx, ny, nz = _FAR, 0.0, 0.0, 0.0
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
    t = _hit_disc(a, -b, o, d)
    if t < best:
        best, nx, ny, nz = t, 0.0, -1.0, 0.0
    return best, nx, ny, nz


@_fast
def _hit_balls(size, o, d):  # type: ignore[no-untyped-def]
    """Of a ball, whose half height is 0, or of the two at the ends of a capsule."""
    a, b, _c = size
    ox, oy, oz = o
    dx, dy, dz = d
    best, nx, ny, nz = _FAR, 0.0, 0.0, 0.0
    for s in (-1.0, 1.0):
        y0 = oy - s * b
        qa = _dot(d, d)
        qb = ox * dx + y0 * dy + oz * dz
        qc = ox * ox + y0 * y0 + oz * oz - a * a
        disc = qb * qb - qa * qc
        if disc > 0:
            t = (-qb - math.sqrt(disc)) / qa
            if t > _NEAR and t < best:
                best, nx, ny, nz = t, (ox + t * dx) / a, (y0 + t * dy) / a, (oz + t * dz) / a
        if b == 0:
            break
    return best, nx, ny, nz


@_fast
def _hit(kind, size, o, d):  # type: ignore[no-untyped-def]
    """The first t > 0 at which a ray meets a primitive in its own axes, with the outward normal there (t, x, y, z)."""
    if kind == BOX:
        return _hit_box(size, o, d)
    if kind == RING:
        return _hit_ring(size, o, d)
    if kind == CYLINDER:
        return _hit_cylinder(size, o, d, True)
    if kind == CONE:
        return _hit_cone(size, o, d)
    if kind == BALL:
        return _hit_balls(size, o, d)
    side, ends = _hit_cylinder(size, o, d, False), _hit_balls(size, o, d)
    return ends if ends[0] < side[0] else side


@_fast
def _misses(centre, reach, o, d):  # type: ignore[no-untyped-def]
    """Whether a ray passes by a bounding sphere, or has it behind."""
    away = (o[0] - centre[0], o[1] - centre[1], o[2] - centre[2])
    out = _dot(away, away) - reach * reach
    if out <= 0:
        return False
    b = _dot(away, d)
    return b > 0 or b * b < out * _dot(d, d)


@_fast
def _first(o, d, limit, shadow, solids, n):  # type: ignore[no-untyped-def]
    """The nearest part before ``limit``: (index or -1, t), with its normal in ``n``; for a shadow any, without that."""
    best, found = limit, -1
    for g in range(len(solids.groups)):
        if _misses(solids.bounds[g, :3], solids.bounds[g, 3], o, d):
            continue
        for i in range(solids.groups[g, 0], solids.groups[g, 1]):
            centre, m = solids.centres[i], solids.turns[i]
            if _misses(centre, centre[3], o, d):
                continue
            own = _in_own_axes(m, (o[0] - centre[0], o[1] - centre[1], o[2] - centre[2]))
            way = _in_own_axes(m, d)
            size = (solids.sizes[i, 0], solids.sizes[i, 1], solids.sizes[i, 2])
            t, nx, ny, nz = _hit(solids.kinds[i], size, own, way)
            if t < best:
                best, found = t, i
                if shadow:
                    return found, best
                for k in range(3):
                    n[k] = m[k, 0] * nx + m[k, 1] * ny + m[k, 2] * nz
    return found, best


@_fast
def _lit(p, light, spots, solids):  # type: ignore[no-untyped-def]
    """The share of a ball-shaped light seen from ``p``: five of its points, and all where those disagree."""
    to = (light[0] - p[0], light[1] - p[1], light[2] - p[2])
    length = math.sqrt(_dot(to, to))
    # Two directions across the way to the light.
    flat = math.sqrt(to[0] ** 2 + to[2] ** 2) + 1e-12
    ax, az = to[2] / flat, -to[0] / flat
    bx, by, bz = to[1] * az / length, (to[2] * ax - to[0] * az) / length, -to[1] * ax / length
    seen = 0
    across = np.empty(3)
    for s in range(len(spots)):
        u, v = spots[s, 0] * light[3], spots[s, 1] * light[3]
        across[0], across[1], across[2] = to[0] + u * ax + v * bx, to[1] + v * by, to[2] + u * az + v * bz
        if _first(p, across, 1.0, True, solids, across)[0] < 0:
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
def _striped(part, p, solids):  # type: ignore[no-untyped-def]
    """Whether a point of a striped primitive is in a light stripe."""
    centre = solids.centres[part]
    x, y, z = _in_own_axes(solids.turns[part], (p[0] - centre[0], p[1] - centre[1], p[2] - centre[2]))
    if solids.kinds[part] == RING:  # stripes around its body
        y = 0.2 * math.atan2(z, x) * 8 / math.pi
    return math.floor(y / 0.2 + 0.5) & 1


@_fast
def _surface(part, p, solids, looks, base):  # type: ignore[no-untyped-def]
    """(gloss, mirror) of a surface at a point, each in [0, 1]; its colour goes into ``base``."""
    if part == -1:
        which = 0
        if looks.pattern == 1:  # planks
            which = math.floor(p[0] / 0.3) & 1
        elif looks.pattern == 2:
            which = (math.floor(p[0] / 0.5) + math.floor(p[2] / 0.5)) & 1
        for k in range(3):
            base[k] = looks.floors[which, k]
        return 0.0, 0.0
    material = looks.materials[part]
    for k in range(3):
        base[k] = looks.colours[part, k]
    if material == 1:
        return 0.7, 0.0
    if material == 2:
        return 1.0, 0.55
    if material == 3 and _striped(part, p, solids):
        for k in range(3):
            base[k] = 0.25 * base[k] + 0.75 * 0.85
    return 0.0, 0.0


@_fast
def _shade(o, d, solids, looks, n, rgb):  # type: ignore[no-untyped-def]
    """The part that a ray meets, or -1 for the floor, -2 for the sky, and t; its normal and light go into n and rgb."""
    part, t = _first(o, d, _FAR, False, solids, n)
    if d[1] < 0:
        ground = -o[1] / d[1]
        if ground < t:
            part, t = -1, ground
            n[0], n[1], n[2] = 0.0, 1.0, 0.0
    elif part < 0:
        part = -2
    length = math.sqrt(_dot(d, d))
    if part == -2:
        rgb[0], rgb[1], rgb[2] = _sky(d[1] / length, looks.skies)
        n[0], n[1], n[2] = 0.0, 0.0, 0.0
        return part, _FAR
    p, base = np.empty(3), np.empty(3)
    for k in range(3):
        p[k] = o[k] + t * d[k]
    gloss, mirror = _surface(part, p, solids, looks, base)
    for k in range(3):
        p[k] += 2e-4 * n[k]
    side = 0.5 + 0.5 * n[1]
    zenith = _sky(0.5, looks.skies)
    for k in range(3):  # light from the sky above and, weaker, from the floor below
        around = 0.42 * zenith[k] * side + 0.2 * looks.floors[0, k] * (1 - side)
        rgb[k] = base[k] * around
    dot = _dot(n, d) / length
    rx, ry, rz = d[0] / length - 2 * dot * n[0], d[1] / length - 2 * dot * n[1], d[2] / length - 2 * dot * n[2]
    for i in range(len(looks.lights)):
        light = looks.lights[i]
        to = (light[0] - p[0], light[1] - p[1], light[2] - p[2])
        far = math.sqrt(_dot(to, to))
        facing = _dot(n, to) / far
        if facing <= 0:
            continue
        lit = _lit(p, light, looks.spots, solids)
        if lit == 0:
            continue
        shine = max((rx * to[0] + ry * to[1] + rz * to[2]) / far, 0.0) ** 40 * gloss
        for k in range(3):
            tint = base[k] if mirror > 0 else 1.0
            rgb[k] += lit * light[4] * (facing * base[k] * (1 - 0.6 * mirror) + 0.6 * shine * tint)
    if mirror > 0:
        above = _sky(ry, looks.skies)
        for k in range(3):
            around = above[k] if ry > 0 else looks.floors[0, k] * (0.35 + 0.3 * (1 + ry))
            rgb[k] += mirror * around * base[k]
    if part == -1:  # haze, so that the floor meets the sky softly
        haze = 1.0 - math.exp(-(t * length) / 60.0)
        for k in range(3):
            rgb[k] += haze * (looks.skies[1, k] - rgb[k])
    return part, t


@_fast
def _aim(d, x, y, focal, turn):  # type: ignore[no-untyped-def]
    """The ray through a place of the picture, x and y in [0, 1], goes into ``d``."""
    u, v = (x - 0.5) / focal, (0.5 - y) / focal
    for k in range(3):
        d[k] = turn[k, 0] * u + turn[k, 1] * v - turn[k, 2]


@_fast
def cast(size, focal, turn, place, solids, looks):  # type: ignore[no-untyped-def]
    """One ray a pixel for the truth; four more for the colour where neighbours differ.

    Args:
        size: pixels of a side.
        focal: the focal length in widths of the picture.
        turn, place: (3, 3), camera space to world, and (3,) in metres.
        solids, looks: ``Solids`` and ``Looks``.

    Returns:
        The part seen, -1 for the floor, -2 for the sky, int64 (H, W); depth (H, W); normals in camera space (H, W, 3);
        linear light in [0, 1] (H, W, 3).
    """
    seen = np.empty((size, size), np.int64)
    depth = np.empty((size, size))
    normals = np.empty((size, size, 3))
    light = np.empty((size, size, 3))
    d, n, rgb = np.empty(3), np.empty(3), np.empty(3)
    for y in range(size):
        for x in range(size):
            _aim(d, (x + 0.5) / size, (y + 0.5) / size, focal, turn)
            seen[y, x], depth[y, x] = _shade(place, d, solids, looks, n, rgb)
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
                smooth[y, x] = 0.0
                for i in range(4):
                    _aim(d, (x + 0.25 + 0.5 * (i & 1)) / size, (y + 0.25 + 0.5 * (i >> 1)) / size, focal, turn)
                    _shade(place, d, solids, looks, n, rgb)
                    for k in range(3):
                        smooth[y, x, k] += min(rgb[k], 1.0) / 4
    return seen, depth, normals, smooth
