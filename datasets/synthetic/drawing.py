"""Synthetic scenes, drawn: textured objects of ten classes that hide parts of each other, on a cluttered background.

`skipless.datasets.scenes` writes them to disk, and says what tells the classes apart.
"""

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

# float32 throughout; numpy's annotations widen what mixes it with Python numbers.
Float = npt.NDArray[np.floating]

CLASSES = (
    "striped_disc", "checkered_square", "dotted_triangle", "ringed_star", "zigzag_cross", "bricked_hexagon",
    "woven_crescent", "marbled_heart", "spoked_gear", "speckled_ring",
)  # fmt: skip

MIN_SIZE = 32

# Visible share of an object's full area, image border and occluders taken together.
_MAIN_VISIBLE = 0.65
_OTHER_VISIBLE = 0.30
_DIFFICULT_VISIBLE = 0.50


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene, as far as it is visible."""

    label: int
    """Its value in the class mask, 1..10; its class is `CLASSES[label - 1]`."""
    box: tuple[int, int, int, int]
    """Half-open box (x0, y0, x1, y1) of its visible pixels."""
    truncated: bool
    """The image border or another object makes the box smaller than the whole object's."""
    difficult: bool
    """Less than half of the object is visible."""


@dataclass(frozen=True, eq=False)
class Scene:
    """A drawn scene."""

    image: npt.NDArray[np.uint8]
    """uint8 [S, S, 3], RGB."""
    class_mask: npt.NDArray[np.uint8]
    """uint8 [S, S]: 0 = background, else the object's label."""
    instance_mask: npt.NDArray[np.uint8]
    """uint8 [S, S]: 0 = background, n = `objects[n - 1]`."""
    objects: list[SceneObject]
    """The main object, whose visible area is the largest, then the others in no particular order."""


# Shapes: signed distance to the outline, negative inside, for points [h, w] in units of the object's radius.


def _box_distance(u: Float, v: Float, half_width: float, half_height: float) -> Float:
    return np.maximum(np.abs(u) - half_width, np.abs(v) - half_height)


def _star_distance(u: Float, v: Float) -> Float:
    fold = np.float32(np.pi / 5)
    radius, angle = np.hypot(u, v), np.abs(np.mod(np.arctan2(u, v), 2 * fold) - fold)
    # One edge, from the tip (angle pi/5 after folding) to the notch (angle 0), repeated ten times by the fold.
    x, y = radius * np.cos(angle), radius * np.sin(angle)
    notch = 0.52
    edge_x, edge_y = np.cos(fold) - notch, np.sin(fold)
    return (edge_y * (x - notch) - edge_x * y) / np.float32(np.hypot(edge_x, edge_y))


def _heart_distance(u: Float, v: Float) -> Float:
    # A square standing on its corner and a disc on each of its two upper sides.
    p, q = (u + v + 0.12) * np.float32(np.sqrt(0.5)), (v - u + 0.12) * np.float32(np.sqrt(0.5))
    discs = np.minimum(np.hypot(p + 0.5, q), np.hypot(p, q + 0.5)) - 0.5
    return np.minimum(_box_distance(p, q, 0.5, 0.5), discs)


def _distance(label: int, u: Float, v: Float) -> Float:
    match CLASSES[label - 1]:
        case "striped_disc":
            return np.hypot(u, v) - 0.85
        case "checkered_square":
            return _box_distance(u, v, 0.72, 0.72)
        case "dotted_triangle":
            return np.maximum(v, np.abs(u) * np.float32(np.sqrt(0.75)) - v / 2) - 0.54
        case "ringed_star":
            return _star_distance(u, v)
        case "zigzag_cross":
            return np.minimum(_box_distance(u, v, 0.95, 0.36), _box_distance(u, v, 0.36, 0.95))
        case "bricked_hexagon":
            return np.maximum(np.abs(v), np.abs(u) * np.float32(np.sqrt(0.75)) + np.abs(v) / 2) - 0.78
        case "woven_crescent":
            return np.maximum(np.hypot(u, v) - 0.98, 0.72 - np.hypot(u - 0.55, v))
        case "marbled_heart":
            return _heart_distance(u, v)
        case "spoked_gear":
            return np.hypot(u, v) - (0.82 + 0.14 * np.clip(2.5 * np.sin(8 * np.arctan2(v, u)), -1, 1))
        case _:  # speckled_ring
            return np.abs(np.hypot(u, v) - 0.64) - 0.30


# Textures: a pattern in -1..1, soft at its edges, for points [h, w] in units of the texture's period.


# Middle of each class's range of periods, in radii, in the order of CLASSES.
_PERIODS = (0.28, 0.46, 0.26, 0.36, 0.40, 0.44, 0.42, 0.38, 0.36, 0.30)


def _lattice(x: Float) -> Float:
    """Distance to the nearest whole number, 0..0.5."""
    return np.abs(x - np.rint(x))


def _texture(label: int, rng: np.random.Generator, x: Float, y: Float, period: float) -> Float:
    """Pattern of class `label`, float32 [h, w] in -1..1; x and y are centered on the object, `period` is in radii."""
    phase_x, phase_y = rng.random(2, np.float32)
    sx, sy = x + phase_x, y + phase_y
    match CLASSES[label - 1]:
        case "striped_disc":
            edge = 0.25 - _lattice(sx)
        case "checkered_square":
            return np.clip(12 * (0.25 - _lattice(sx / 2)) * 12 * (0.25 - _lattice(sy / 2)), -1, 1)
        case "dotted_triangle":
            sx = sx + 0.5 * np.mod(np.rint(sy), 2)
            edge = 0.31 - np.hypot(_lattice(sx), _lattice(sy))
        case "ringed_star":
            edge = 0.25 - _lattice(np.hypot(x, y) + phase_x)
        case "zigzag_cross":
            edge = 0.25 - _lattice(sy + 1.6 * _lattice(sx / 1.6))
        case "bricked_hexagon":
            shifted = sx / 1.8 + 0.5 * np.mod(np.floor(sy), 2)
            edge = np.minimum(1.8 * _lattice(shifted), _lattice(sy)) - 0.11
        case "woven_crescent":
            # Blocks of stripes, alternately along x and along y.
            across = np.mod(np.floor(sx / 1.5) + np.floor(sy / 1.5), 2) < 1
            edge = _lattice(np.where(across, sx, sy) * 2 / 1.5 + 0.25) - 0.25
        case "marbled_heart":
            edge = 0.25 - _lattice(0.5 * sx + 1.5 * _noise(rng, x.shape, 2 + round(2 / period)))
        case "spoked_gear":
            spokes = rng.integers(6, 10)
            edge = (0.25 - _lattice(np.arctan2(y, x) * np.float32(spokes / (2 * np.pi)) + phase_x)) * 1.5
        case _:  # speckled_ring
            return np.clip(4 * _noise(rng, x.shape, 4 + round(5 / period)), -1, 1)
    return np.clip(10 * edge, -1, 1)


def _noise(rng: np.random.Generator, shape: tuple[int, ...], cells: int) -> Float:
    """Smooth noise, float32 [h, w], about -1..1, with `cells` random values a side."""
    grid = rng.random((cells, cells), np.float32) * 2 - 1
    return np.asarray(cv2.resize(grid, (shape[1], shape[0]), interpolation=cv2.INTER_CUBIC), np.float32)


_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def _tints(rng: np.random.Generator, shape: tuple[int, ...]) -> Float:
    """Color without luma, changing smoothly from place to place: float32 [h, w, 3], to be added to a luma in 0..1."""
    grid = rng.uniform(-1, 1, (3, 3, 3)).astype(np.float32) * np.float32(rng.uniform(0.04, 0.12))
    grid -= (grid @ _LUMA)[..., None]
    return np.asarray(cv2.resize(grid, (shape[1], shape[0]), interpolation=cv2.INTER_CUBIC), np.float32)


def _class_tint(rng: np.random.Generator, label: int) -> Float:
    """Color without luma that things of a class tend to have, as in the world: float32 [3]. Neighbors overlap."""
    hue = 2 * np.pi * label / len(CLASSES) + rng.normal(0, 0.8)
    direction = np.cos(hue + np.array([0, -2, 2], np.float32) * np.pi / 3)
    tint = rng.uniform(0.06, 0.16) * direction
    return np.asarray(tint - tint @ _LUMA, np.float32)


def _background(rng: np.random.Generator, size: int) -> Float:
    """Clutter without any of the classes' textures: float32 [size, size, 3], RGB in 0..1."""
    shape = (size, size)
    luma = 0.5 + rng.uniform(0.05, 0.15) * _noise(rng, shape, int(rng.integers(2, 6)))

    # Stretched, turned noise: a weak grain that has a direction.
    stretch, angle = rng.uniform(1, 8), rng.uniform(0, np.pi)
    cell = rng.uniform(0.012, 0.05) * size
    cos, sin = np.cos(angle), np.sin(angle)
    to_grain = np.array([[cos, sin], [-sin / stretch, cos / stretch]]) / cell
    center = to_grain @ np.array([size / 2, size / 2])
    grain = cv2.warpAffine(
        rng.random((128, 128), np.float32) - 0.5,
        np.column_stack([to_grain, 64 - center]),
        shape,
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_WRAP,
    )
    luma += rng.uniform(0.03, 0.1) * np.asarray(grain, np.float32)
    canvas = luma[..., None] + _tints(rng, shape)

    picture = np.ascontiguousarray(np.clip(canvas * 255, 0, 255).astype(np.uint8))
    for _ in range(rng.integers(4, 14)):
        color = (rng.uniform(80, 176) + rng.uniform(-24, 24, 3)).tolist()
        center = rng.uniform(0, size, 2)
        kind = rng.integers(3)
        if kind == 0:
            bends = center + np.cumsum(rng.normal(0, 0.12 * size, (rng.integers(2, 6), 2)), axis=0)
            thickness = max(1, round(rng.uniform(0.006, 0.03) * size))
            cv2.polylines(picture, [bends.astype(np.int32)], False, color, thickness, cv2.LINE_AA)
        elif kind == 1:
            corners = center + rng.normal(0, rng.uniform(0.03, 0.12) * size, (rng.integers(3, 6), 2))
            cv2.fillPoly(picture, [corners.astype(np.int32)], color, cv2.LINE_AA)
        else:
            axes = np.maximum(1, rng.uniform(0.02, 0.2, 2) * size).astype(int).tolist()
            start, turn = rng.uniform(0, 360, 2)
            thickness = max(1, round(rng.uniform(0.006, 0.03) * size))
            middle = (int(center[0]), int(center[1]))
            end = start + rng.uniform(60, 300)
            cv2.ellipse(picture, middle, axes, turn, start, end, color, thickness, cv2.LINE_AA)
    return picture.astype(np.float32) / 255


@dataclass(frozen=True, eq=False)
class _Placed:
    """An object's outline on the canvas, before occlusion; arrays cover the window [y0:y1, x0:x1]."""

    label: int
    radius: float
    window: tuple[slice, slice]
    u: Float
    v: Float
    distance: Float
    inside: npt.NDArray[np.bool_]  # [size, size]
    full_area: int
    full_box: tuple[int, int, int, int]


def _bounding_box(mask: npt.NDArray[np.bool_]) -> tuple[int, int, int, int]:
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _place(rng: np.random.Generator, size: int, label: int, main: bool) -> _Placed:
    radius = size / 2 * (rng.uniform(0.6, 0.95) if main else rng.uniform(0.2, 0.42))
    margin = 0.3 if main else 0.08
    center_x, center_y = rng.uniform(margin * size, (1 - margin) * size, 2)
    angle, shear, aspect = rng.uniform(-0.3, 0.3), rng.uniform(-0.15, 0.15), np.exp(rng.uniform(-0.2, 0.2))
    cos, sin = np.cos(angle), np.sin(angle)
    to_pixels = radius * np.array([[cos, -sin], [sin, cos]]) @ np.array([[aspect, shear], [0, 1 / aspect]])
    to_object = np.linalg.inv(to_pixels).astype(np.float32)

    # The window holds the whole object, also what lies outside the image: its area and box are needed too.
    reach = int(np.ceil(1.5 * radius)) + 2
    x0, y0 = int(center_x) - reach, int(center_y) - reach
    x = np.arange(x0, x0 + 2 * reach + 1, dtype=np.float32) + np.float32(0.5 - center_x)
    y = np.arange(y0, y0 + 2 * reach + 1, dtype=np.float32)[:, None] + np.float32(0.5 - center_y)
    u, v = to_object[0, 0] * x + to_object[0, 1] * y, to_object[1, 0] * x + to_object[1, 1] * y
    distance = _distance(label, u, v)
    whole = distance <= 0
    left, top, right, bottom = _bounding_box(whole)

    seen_x, seen_y = slice(max(x0, 0), min(x0 + len(x), size)), slice(max(y0, 0), min(y0 + len(y), size))
    crop = (slice(seen_y.start - y0, seen_y.stop - y0), slice(seen_x.start - x0, seen_x.stop - x0))
    inside = np.zeros((size, size), np.bool_)
    inside[seen_y, seen_x] = whole[crop]
    return _Placed(
        label=label,
        radius=radius,
        window=(seen_y, seen_x),
        u=u[crop],
        v=v[crop],
        distance=distance[crop],
        inside=inside,
        full_area=int(whole.sum()),
        full_box=(left + x0, top + y0, right + x0, bottom + y0),
    )


def _visible_areas(back_to_front: list[_Placed]) -> list[int]:
    areas = []
    free = np.ones_like(back_to_front[0].inside)
    for placed in reversed(back_to_front):
        areas.append(int((placed.inside & free).sum()))
        free &= ~placed.inside
    return areas[::-1]


def _arrange(rng: np.random.Generator, size: int, label: int) -> tuple[list[_Placed], _Placed]:
    """Objects from back to front, and the main one: the largest visible, with no object nearly hidden."""
    main = _place(rng, size, label, main=True)
    while main.inside.sum() < 0.8 * main.full_area:
        main = _place(rng, size, label, main=True)
    arranged = [main]
    smallest = max(8, 0.006 * size**2)
    for _ in range(rng.integers(0, 4)):
        for _ in range(4):
            other = _place(rng, size, int(rng.integers(1, len(CLASSES) + 1)), main=False)
            trial = arranged.copy()
            trial.insert(int(rng.integers(0, len(arranged) + 1)), other)
            areas = dict(zip(trial, _visible_areas(trial), strict=True))
            main_area = areas.pop(main)
            if main_area >= _MAIN_VISIBLE * main.full_area and all(
                max(smallest, _OTHER_VISIBLE * placed.full_area) <= area < main_area for placed, area in areas.items()
            ):
                arranged = trial
                break
    return arranged, main


def _paint(rng: np.random.Generator, canvas: Float, placed: _Placed) -> None:
    """Draw one object, with its shadow, over `canvas` in place."""
    size = len(canvas)
    if rng.random() < 0.5:
        shift_x, shift_y = rng.uniform(-0.03, 0.03, 2) * size
        move = np.array([[1, 0, shift_x], [0, 1, shift_y]])
        shadow = cv2.warpAffine(placed.inside.astype(np.float32), move, (size, size))
        shadow = cv2.GaussianBlur(shadow, (0, 0), rng.uniform(0.01, 0.03) * size)
        canvas *= 1 - rng.uniform(0.2, 0.5) * np.asarray(shadow, np.float32)[..., None]

    period = _PERIODS[placed.label - 1] * rng.uniform(0.85, 1.15)
    pattern = _texture(placed.label, rng, placed.u / np.float32(period), placed.v / np.float32(period), period)
    # Both colors of the pattern change across the object, so that the color of one part does not tell another's.
    mix = 0.5 + 0.5 * pattern
    contrast = rng.uniform(0.45, 0.65)
    luma = rng.uniform(0.45, 0.55) - contrast / 2 + contrast * (mix if rng.random() < 0.5 else 1 - mix)
    first, second = _tints(rng, luma.shape), _tints(rng, luma.shape)
    color = luma[..., None] + first + (second - first) * mix[..., None] + _class_tint(rng, placed.label)

    lit = rng.uniform(-0.12, 0.12, 2).astype(np.float32)
    shade = 1 + lit[0] * placed.u + lit[1] * placed.v
    rim = rng.uniform(0, 0.35) * np.clip(1 + placed.distance / 0.12, 0, 1)
    color *= (shade * (1 - rim)).astype(np.float32)[..., None]

    coverage = np.clip(0.5 - placed.distance * np.float32(placed.radius), 0, 1)[..., None]
    region = canvas[placed.window]
    region += coverage * (color - region)


def render_scene(rng: np.random.Generator, size: int = 128, label: int | None = None) -> Scene:
    """Draw one scene of `size` x `size` pixels.

    Args:
        rng: Source of everything random: equal generators give equal scenes.
        size: Side in pixels, at least 32.
        label: Class of the main object, 1..10; drawn from `rng` where None.

    Raises:
        ValueError: `size` or `label` out of range.

    Examples:
        >>> scene = render_scene(np.random.default_rng(0), size=64)
        >>> scene.image.shape, CLASSES[scene.objects[0].label - 1]
    """
    if size < MIN_SIZE:
        raise ValueError(f"size is {size}: a scene needs at least {MIN_SIZE} pixels a side; choose a larger size.")
    if label is not None and not 1 <= label <= len(CLASSES):
        raise ValueError(f"label is {label}: choose one of 1..{len(CLASSES)}, the values of the class mask.")
    if label is None:
        label = int(rng.integers(1, len(CLASSES) + 1))

    back_to_front, main = _arrange(rng, size, label)
    canvas = _background(rng, size)
    for placed in back_to_front:
        _paint(rng, canvas, placed)

    light = rng.uniform(-0.12, 0.12, 2).astype(np.float32)
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    canvas *= (1 + light[0] * ramp + light[1] * ramp[:, None])[..., None]
    canvas = np.asarray(cv2.GaussianBlur(canvas, (0, 0), 0.003 * size), np.float32)
    canvas += np.float32(0.015) * rng.standard_normal(canvas.shape, np.float32)
    image = np.clip(255 * canvas + 0.5, 0, 255).astype(np.uint8)

    order = [main] + [placed for placed in back_to_front if placed is not main]
    instance_mask = np.zeros((size, size), np.uint8)
    for placed in back_to_front:
        instance_mask[placed.inside] = 1 + order.index(placed)
    class_mask = np.array([0] + [placed.label for placed in order], np.uint8)[instance_mask]

    objects = []
    for number, placed in enumerate(order, start=1):
        visible = instance_mask == number
        box = _bounding_box(visible)
        objects.append(
            SceneObject(
                label=placed.label,
                box=box,
                truncated=box != placed.full_box,
                difficult=bool(visible.sum() < _DIFFICULT_VISIBLE * placed.full_area),
            )
        )
    return Scene(image, class_mask, instance_mask, objects)
