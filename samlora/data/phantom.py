"""A synthetic abdomen with known truth: eight organs at plausible HU, no two cases alike.

Everything is an implicit surface in mm (x to the right, y to the front, z to the head,
origin before the spine at the height of the kidneys) on a smoothly warped grid of half the voxel size.
Averaging the fine grid gives partial volume and the exact share of each organ in each voxel. Nothing here
comes from a patient.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter, zoom

from samlora.data.grid import Volume
from samlora.data.volume import write_volume

ORGANS = ("spleen", "right kidney", "left kidney", "gallbladder", "liver", "stomach", "aorta", "pancreas")
BTCV_IDS = (1, 2, 3, 4, 6, 7, 8, 11)  # what BTCV's own label files call classes 1..8
FINE = 2  # fine samples per voxel and axis

# Tissues of the fine grid. 1..8 are the organs' own; the others are parts of them or no organ.
SPLEEN, KIDNEY_R, KIDNEY_L, GALLBLADDER, LIVER, STOMACH, AORTA, PANCREAS = range(1, 9)
(AIR, FAT, SKIN_FAT, SKIN, MUSCLE, BONE, MARROW, CANAL, DISC, LUNG, LUNG_VESSEL, BLOOD, VEIN, BOWEL, CHYME,
 STOOL, GAS, TABLE, LIVER_VEIN, MEDULLA_R, MEDULLA_L, MEAL, STOMACH_GAS, SINUS) = (0, *range(9, 32))
_CLASS = np.zeros(32, np.uint8)
_CLASS[1:9] = range(1, 9)
_CLASS[[LIVER_VEIN, MEDULLA_R, MEDULLA_L, MEAL, STOMACH_GAS]] = LIVER, KIDNEY_R, KIDNEY_L, STOMACH, STOMACH
_ROOM = (FAT, BOWEL, CHYME, STOOL, GAS, VEIN)  # what an organ may push away

Point = tuple[float, float, float]


@dataclass
class _Canvas:
    """The fine grid: warped coordinates in mm, smooth random fields, and the tissue drawn so far."""

    axes: tuple[np.ndarray, np.ndarray, np.ndarray]  # unwarped mm along x, y, z, for bounding boxes
    x: np.ndarray
    y: np.ndarray
    z: np.ndarray
    bumps: tuple[np.ndarray, np.ndarray]  # unit variance, about 30 mm wide
    strands: tuple[np.ndarray, np.ndarray]  # unit variance, about 12 mm wide
    tissue: np.ndarray

    def slabs(self, rows: int = 8) -> Iterator["_Canvas"]:
        """Views of a few rows along x each: what fits the processor's cache is drawn five times as fast."""
        for start in range(0, len(self.tissue), rows):
            part = slice(start, start + rows)
            yield _Canvas(
                (self.axes[0][part], *self.axes[1:]), self.x[part], self.y[part], self.z[part],
                (self.bumps[0][part], self.bumps[1][part]), (self.strands[0][part], self.strands[1][part]),
                self.tissue[part])

    def box(self, low: Sequence[float], high: Sequence[float], margin: float = 16) -> tuple[slice, ...]:
        """Index ranges that hold the mm box, with room for the warp."""
        ends = [np.searchsorted(axis, (a - margin, b + margin))
                for axis, a, b in zip(self.axes, low, high, strict=True)]
        return tuple(slice(*end) for end in ends)

    def ellipsoid(
        self, centre: Point, semi: Point, turn: float = 0, lean: float = 0
    ) -> tuple[tuple[slice, ...], np.ndarray]:
        """A box of the grid and the distance in mm there (negative inside), turned in plane, leaning in z."""
        reach = max(semi[0], semi[1]) + abs(lean) * semi[2]
        box = self.box(np.subtract(centre, (reach, reach, semi[2])), np.add(centre, (reach, reach, semi[2])))
        z = self.z[box] - centre[2]
        x, y = self.x[box] - centre[0] - lean * z, self.y[box] - centre[1]
        cosine, sine = np.cos(turn), np.sin(turn)
        a, b = (cosine * x + sine * y) / semi[0], (cosine * y - sine * x) / semi[1]
        return box, (np.sqrt(a * a + b * b + (z / semi[2]) ** 2) - 1) * min(semi)

    def tube(self, path: Sequence[Point], radii: Sequence[float]) -> tuple[tuple[slice, ...], np.ndarray]:
        """A box of the grid and the distance in mm there (negative inside) from a bent tube."""
        points = np.array(path, np.float32)
        box = self.box(points.min(0) - max(radii), points.max(0) + max(radii))
        place = np.stack([self.x[box], self.y[box], self.z[box]])
        nearest = np.full(place.shape[1:], 999, np.float32)
        for start, end, r0, r1 in zip(points[:-1], points[1:], radii[:-1], radii[1:], strict=True):
            way, offset = end - start, place - start[:, None, None, None]
            share = np.clip(np.tensordot(way, offset, 1) / (way @ way), 0, 1)
            gap = [o - w * share for o, w in zip(offset, way, strict=True)]
            distance = np.sqrt(gap[0] ** 2 + gap[1] ** 2 + gap[2] ** 2) - (r0 + (r1 - r0) * share)
            np.minimum(nearest, distance, out=nearest)
        return box, nearest

    def organ(
        self, box: tuple[slice, ...], distance: np.ndarray, tissue: int, gap: float = 1.2, bumps: float = 1.5
    ) -> np.ndarray:
        """Draws an organ in a fat plane of `gap` mm where there is soft room; returns where it lies."""
        distance = distance + bumps * self.bumps[0][box]
        here = self.tissue[box]
        room = np.isin(here, _ROOM)
        here[room & (distance < gap)] = FAT
        inside = room & (distance < 0)
        here[inside] = tissue
        return inside


def _smooth(
    rng: np.random.Generator, extent: Sequence[float], shape: Sequence[int], width: float
) -> np.ndarray:
    """A smooth random field of unit variance on a grid of `shape`, with bumps about `width` mm wide."""
    cells = [max(4, round(length / width) + 3) for length in extent]
    field = rng.standard_normal(cells).astype(np.float32)
    for axis, (cell, size) in enumerate(zip(cells, shape, strict=True)):
        weights = zoom(np.eye(cell), (size / cell, 1), order=3, grid_mode=True, mode="nearest")
        field = np.moveaxis(np.tensordot(weights.astype(np.float32), field, (1, axis)), 0, axis)
    return (field - field.mean()) / field.std()


def _canvas(rng: np.random.Generator, shape: Sequence[int], spacing: Sequence[float]) -> _Canvas:
    fine = [FINE * size for size in shape]
    extent = [size * step for size, step in zip(shape, spacing, strict=True)]
    axes = tuple(((np.arange(n) + 0.5) / n - 0.5).astype(np.float32) * length
                 for n, length in zip(fine, extent, strict=True))
    size = rng.normal(1, (0.05, 0.05, 0.06))  # patients differ in width, depth and height
    warp = (4.0, 4.0, 3.0)  # mm
    x, y, z = (line / scale + by * _smooth(rng, extent, fine, 90)
               for line, scale, by in zip(np.ix_(*axes), size.astype(np.float32), warp, strict=True))
    bumps = (_smooth(rng, extent, fine, 30), _smooth(rng, extent, fine, 30))
    strands = (_smooth(rng, extent, fine, 12), _smooth(rng, extent, fine, 12))
    z += np.float32(rng.uniform(-12, 12))  # scans begin and end at other heights
    return _Canvas(axes, x, y, z, bumps, strands, np.zeros(fine, np.uint8))


def _frame(canvas: _Canvas, seed: int) -> None:
    """Skin, fat, muscle wall, ribs, spine, back muscles, lungs and heart, and the table below.

    Works point by point, so that a canvas may be drawn slab by slab with one seed.
    """
    rng = np.random.default_rng(seed)
    x, y, z, tissue = canvas.x, canvas.y, canvas.z, canvas.tissue
    half_width, half_depth = rng.uniform(148, 160), rng.uniform(98, 112)
    fat, wall = rng.uniform(8, 26), rng.uniform(9, 13)
    centre = -8.0
    a, b = x / half_width, (y - centre) / np.where(y > centre, half_depth, 1.03 * half_depth)
    a, b = a * a, b * b
    radius = np.sqrt(np.sqrt(a * a + b * b + 1.3 * a * b) + 1e-9)  # 2 a b would be an ellipse
    depth = np.hypot(x, y - centre) * (1 / radius - 1)  # mm below the skin along the ray from the centre
    back = np.clip(-(y - centre) / half_depth, 0, 1)
    fat = fat * (1 + 0.4 * back) + 2.5 * canvas.bumps[1]
    table = np.abs(y + 1.05 * half_depth + 14 - x * x / 900) < 2
    tissue[table & (np.abs(x) < 165)] = TABLE
    tissue[depth > 0] = SKIN
    tissue[depth > 2] = SKIN_FAT
    inner = depth - fat
    tissue[inner > 0] = MUSCLE
    tissue[(np.abs(inner - wall * 0.55) < 0.8) & (back < 0.75) & (z < 20)] = FAT  # between the wall's muscles
    tissue[(inner > wall) & (np.abs(x) < 140)] = FAT

    # Ribs descend from the spine to the front; each axial slice cuts several of them.
    angle = np.arctan2(np.abs(x), -(y - centre))  # 0 at the back, pi in front
    fall = z + 70 * angle - rng.uniform(-6, 6)
    height = np.round(fall / 26) * 26
    off = np.hypot((fall - height) / 1.2, inner - wall * 0.5)
    rib = (off < 4.6) & (angle > 0.35) & (angle < 1.2 + 0.006 * height) & (height > 10)
    tissue[rib] = BONE
    tissue[rib & (off < 2.6)] = MARROW

    period, shift = rng.uniform(32, 37), rng.uniform(0, 30)
    if np.abs(x).min() < 80:
        phase = np.mod(z + shift, period)
        body = np.hypot(x / 1.25, y + 48) - 18 - 1.5 * np.abs(phase / period - 0.55)
        for side in (-1, 1):  # back muscles, and the psoas that widens downwards
            tissue[np.hypot((x - side * 33) / 1.5, y + 80) < 17] = MUSCLE
            psoas = np.hypot(x - side * (36 - 0.05 * z), (y + 46) / 1.15) - np.clip(9 - 0.17 * z, 0, 24)
            tissue[(psoas < 0) & (z < 40)] = MUSCLE
        tissue[(np.hypot(np.abs(x) - 20, (y + 26) / 2) < 5.5) & (z > -10)] = MUSCLE  # the diaphragm's crura
        arch = np.abs(x) < 7 + 6 * (phase > period * 0.6)  # with the spinous process
        tissue[arch & (y > -94) & (y < -70)] = BONE
        transverse = (np.hypot((np.abs(x) - 26) / 2.3, y + 72) < 5) & (np.abs(phase / period - 0.62) < 0.18)
        tissue[transverse] = BONE
        tissue[body < 0] = BONE
        tissue[body < -2.4] = MARROW
        tissue[(body < 0) & (phase < 7)] = DISC
        tissue[np.hypot(x / 1.2, y + 75) < 8.5] = CANAL

    cavity = tissue == FAT
    top = rng.uniform(80, 92)
    dome = np.maximum(top - 50 * ((x - 66) / 75) ** 2, top - 8 - 50 * ((x + 66) / 75) ** 2)
    dome = np.maximum(dome, top - 34) - 38 * ((y - 12) / 75) ** 2 + 2 * canvas.bumps[0]
    tissue[cavity & (z > dome - 3.5)] = MUSCLE  # the diaphragm
    lung = cavity & (z > dome) & ~((np.abs(x) < 26) & (y < 25))
    tissue[lung] = LUNG
    tissue[lung & (np.hypot(*canvas.strands) < 0.28)] = LUNG_VESSEL
    along, across = 0.92 * (x + 18) - 0.39 * (y - 38), 0.92 * (y - 38) + 0.39 * (x + 18)
    heart = (along / 62) ** 2 + (across / 44) ** 2 + ((z - top - 8) / 30) ** 2
    tissue[(heart < 1) & lung] = BLOOD
    tissue[(tissue == FAT) & cavity & (np.hypot(*canvas.strands) < 0.16)] = VEIN  # of the mesentery


def _bowel(canvas: _Canvas, rng: np.random.Generator) -> None:
    """Loops of small bowel and the colon: shapes with the organs' gray values that are no organ."""

    def loop(path: Sequence[Point], radii: Sequence[float], filling: int, level: float, bumps: float) -> None:
        box, distance = canvas.tube(path, radii)
        distance += bumps * canvas.strands[0][box]
        here = canvas.tissue[box]
        room = np.isin(here, _ROOM)
        here[room & (distance < 1.0)] = FAT
        here[room & (distance < 0)] = BOWEL
        inside = room & (distance < -2.6)
        here[inside] = filling
        middle = np.mean([point[1] for point in path])
        here[inside & (canvas.y[box] > middle + level * max(radii))] = GAS  # gas rises to the front

    for _ in range(34):
        start = np.array([rng.uniform(-85, 80), rng.uniform(-12, 72), rng.uniform(-125, -22)])
        bends = np.cumsum(rng.normal(0, (20, 14, 12), (3, 3)), axis=0)
        loop([tuple(start), *(tuple(start + bend) for bend in bends)], rng.uniform(9, 14, 4), CHYME,
             rng.uniform(0.2, 1.6), 1.0)
    sag = rng.uniform(-25, 5)
    colon = {
        "ascending": [(98, -22, -120), (102, -18, -70), (96, -5, -38), (80, 40, -30)],
        "transverse": [(80, 40, -30), (40, 74, sag - 25), (-15, 78, sag - 20), (-65, 60, sag), (-95, 20, 18)],
        "descending": [(-95, 20, 18), (-106, -22, -10), (-108, -32, -60), (-104, -30, -125)],
    }
    for name, path in colon.items():
        wide = rng.uniform(11, 15) if name == "descending" else rng.uniform(16, 22)
        path = [tuple(np.array(point) + rng.normal(0, 4, 3)) for point in path]
        loop(path, [wide] * len(path), STOOL, rng.uniform(-0.3, 1.0), 2.0)
    loop([(22, 36, 8), (48, 28, 2), (50, 8, -30), (28, 0, -48), (-20, 4, -44)], [13, 13, 12, 11, 11], CHYME,
         rng.uniform(0.4, 1.5), 1.0)  # the duodenum around the pancreas' head


def _organs(canvas: _Canvas, rng: np.random.Generator) -> None:
    """The eight organs and the great vessels, each shifted and scaled a little by itself."""

    def near(*centre: float, spread: float = 4.0) -> Point:
        return tuple(np.array(centre) + rng.normal(0, spread, 3))

    def sized(*semi: float) -> Point:
        return tuple(np.array(semi) * rng.normal(1, 0.07, 3).clip(0.8, 1.25))

    def path(*points: Point, spread: float = 3.0) -> list[Point]:
        drift = rng.normal(0, spread, 3)
        return [tuple(np.array(point) + drift + rng.normal(0, spread / 2, 3)) for point in points]

    right_box, right = canvas.ellipsoid(near(80, -2, 22), sized(66, 82, 76), lean=-0.1)
    left_box, left = canvas.ellipsoid(near(8, 44, 50), sized(80, 36, 36), turn=-0.25, lean=0.2)
    for box, distance in ((left_box, left), (right_box, right)):
        x, y = canvas.x[box] + 6 * canvas.bumps[1][box], canvas.y[box] + 0.5 * canvas.z[box]
        hollow = np.hypot(np.maximum(x + 30, 0), np.maximum(y + 60, 0) * 0.9) - 72  # towards the spine
        distance = np.maximum(distance, -hollow)
        inside = canvas.organ(box, distance, LIVER, gap=0.6, bumps=2.5)
        veins = np.hypot(canvas.bumps[1][box], canvas.strands[1][box]) < 0.2
        canvas.tissue[box][inside & veins] = LIVER_VEIN

    box, distance = canvas.ellipsoid(near(-96, -34, 36), sized(30, 50, 50), turn=0.45, lean=0.1)
    canvas.organ(box, distance, SPLEEN, bumps=2.0)

    pylorus = near(18, 46, 10)
    radii = np.array([27, 34, 31, 25, 17, 13]) * rng.uniform(0.72, 1.08)
    bend = path((-58, -8, 66), (-62, 16, 44), (-55, 40, 22), (-30, 54, 4), (-4, 54, 0))
    box, distance = canvas.tube([*bend, pylorus], radii)
    inside = canvas.organ(box, distance, STOMACH, bumps=2.0)
    lumen = inside & (distance + 2.0 * canvas.bumps[0][box] < -rng.uniform(3.0, 5.0) - canvas.strands[0][box])
    canvas.tissue[box][lumen] = MEAL
    canvas.tissue[box][lumen & (canvas.y[box] > rng.uniform(28, 80))] = STOMACH_GAS

    spine_front = rng.normal(-17, 2)
    aorta = path((-6, spine_front - 8, 150), (-9, spine_front - 3, 60), (-11, spine_front, 0),
                 (-7, spine_front + 2, -82), spread=1.5)
    vessels = (
        ([(22, spine_front + 8, 150), (24, spine_front + 2, 40), (21, spine_front + 1, -30),
          (16, spine_front, -84)], [12, 12, 11, 9], VEIN),  # inferior vena cava
        ([aorta[3], (-28, -28, -130)], [6.5, 6], BLOOD),
        ([aorta[3], (22, -26, -130)], [6.5, 6], BLOOD),
        ([(16, spine_front, -84), (-14, -34, -130)], [7, 7], VEIN),
        ([(16, spine_front, -84), (34, -34, -130)], [7, 7], VEIN),
    )
    for line, widths, kind in vessels:
        canvas.organ(*canvas.tube(line, widths), kind, bumps=0.4)

    box, distance = canvas.tube(
        path((32, 14, -34), (28, 16, -16), (10, 22, -4), (-20, 16, 6), (-52, 0, 18), (-82, -14, 26)),
        np.array([11, 15, 9.5, 11, 10, 7.5]) * rng.uniform(0.85, 1.15))
    distance += 1.4 * canvas.strands[0][box]  # lobules
    canvas.organ(box, distance, PANCREAS, gap=1.5, bumps=1.0)
    portal = path((8, 6, -70), (12, 8, -10), (24, 16, 14), (46, 14, 34), spread=2)
    splenic = path((12, 8, 4), (-30, 2, 10), (-78, -22, 30), spread=2)
    mesenteric = [aorta[2], (-6, 4, -6), (-3, 10, -80)]
    for line, width, kind in ((portal, 6.5, VEIN), (splenic, 3.6, VEIN), (mesenteric, 3.4, BLOOD)):
        box, distance = canvas.tube(line, [width] * len(line))
        here = canvas.tissue[box]
        here[(distance < 0) & np.isin(here, _ROOM)] = kind

    box, distance = canvas.ellipsoid(near(46, 44, -8), sized(15, 17, 30), lean=-0.35)
    here = canvas.tissue[box]
    here[(distance < 0.8) & (here == LIVER)] = FAT  # its bed in the liver
    canvas.organ(box, distance, GALLBLADDER, gap=0.8, bumps=0.8)

    for side, tissue, medulla, height in ((1, KIDNEY_R, MEDULLA_R, -28), (-1, KIDNEY_L, MEDULLA_L, -12)):
        x, y, z = near(side * 60, -46, height)
        box, distance = canvas.ellipsoid((x, y, z), sized(27, 24, 54), turn=side * 0.5, lean=-side * 0.18)
        hilum = np.hypot(canvas.x[box] - x + side * 22, canvas.y[box] - y - 10)
        hilum = np.sqrt(hilum**2 + ((canvas.z[box] - z) * 0.55) ** 2) - 15
        here = canvas.tissue[box]
        here[(distance < rng.uniform(3, 7)) & np.isin(here, (*_ROOM, LIVER, LIVER_VEIN, SPLEEN))] = FAT
        inside = canvas.organ(box, np.maximum(distance, -hilum), tissue, gap=0, bumps=1.2)
        inner = inside & (distance < -7 - 2 * canvas.strands[0][box])
        here[inner & (canvas.strands[1][box] > -0.4)] = medulla
        here[(hilum < -3) & (distance < -3) & (here == FAT) & (canvas.strands[0][box] > 0.2)] = SINUS

    box, distance = canvas.tube(aorta, np.array([12, 11.5, 10.5, 9]) * rng.uniform(0.85, 1.15))
    canvas.tissue[box][(distance < 0) & ~np.isin(canvas.tissue[box], (BONE, MARROW, DISC))] = AORTA


def _gray_values(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Mean HU and the HU spread of the texture for every tissue, for one patient in one contrast phase."""
    phase = rng.choice(3, p=(0.15, 0.2, 0.65))  # none, arterial, portal venous
    plain, arterial, portal = range(3)
    low, high = {
        plain: ([48, 30, 38, 54, 38, 38, 40, 40], [56, 38, 46, 66, 46, 46, 48, 48]),
        arterial: ([90, 150, 85, 62, 195, 60, 80, 80], [118, 186, 110, 80, 250, 100, 100, 110]),
        portal: ([100, 150, 140, 88, 125, 115, 80, 110], [120, 188, 175, 110, 170, 160, 98, 150]),
    }[int(phase)]
    spleen, cortex, medulla, liver, aorta, vein, pancreas, liver_vein = rng.uniform(low, high)
    mean, grain = np.zeros(32), np.zeros(32)
    meal = rng.choice([rng.uniform(5, 30), rng.uniform(25, 60), rng.uniform(120, 260)], p=(0.5, 0.35, 0.15))
    values = {
        AIR: (-1000, 0), FAT: (rng.uniform(-112, -92), 9), SKIN_FAT: (rng.uniform(-115, -98), 5),
        SKIN: (10, 5), MUSCLE: (rng.uniform(45, 62), 8), BONE: (rng.uniform(420, 800), 60),
        MARROW: (rng.uniform(130, 250), 35), CANAL: (25, 6), DISC: (80, 8), TABLE: (-250, 30),
        LUNG: (-860, 25), LUNG_VESSEL: (0, 30), BLOOD: (aorta, 3), VEIN: (vein, 4),
        BOWEL: (rng.uniform(55, 100), 8), CHYME: (rng.uniform(12, 45), 10), GAS: (-940, 0),
        STOOL: (rng.uniform(-20, 60), 55), SPLEEN: (spleen, 4), KIDNEY_R: (cortex, 6), KIDNEY_L: (cortex, 6),
        MEDULLA_R: (medulla, 6), MEDULLA_L: (medulla, 6), SINUS: (rng.uniform(0, 40), 8),
        GALLBLADDER: (rng.uniform(2, 18), 2), LIVER: (liver, 5), LIVER_VEIN: (liver_vein, 3),
        STOMACH: (rng.uniform(50, 95), 8), MEAL: (meal, rng.uniform(3, 22)), STOMACH_GAS: (-940, 0),
        AORTA: (aorta, 3), PANCREAS: (pancreas, 11),
    }
    for tissue, (value, spread) in values.items():
        mean[tissue], grain[tissue] = value, spread
    return mean.astype(np.float32), grain.astype(np.float32)


def _per_voxel(fine: np.ndarray) -> np.ndarray:
    """Sums the fine samples of each voxel."""
    for axis in range(3):
        fine = np.moveaxis(fine, axis, 0)
        fine = np.moveaxis(fine[0::2] + fine[1::2], 0, axis)
    return fine


def abdomen(
    seed: int, shape: Sequence[int] = (128, 128, 40), spacing: Sequence[float] = (2.8, 2.8, 5.0)
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws one patient: HU (x, y, z) int16, labels (x, y, z) uint8, affine (4, 4) from index to RAS mm.

    shape: voxels along x (to the right), y (to the front), z (to the head). spacing: mm. Labels number ORGANS
    from 1 where an organ fills more than half of a voxel. The same seed gives the same patient.
    """
    rng = np.random.default_rng(seed)
    canvas = _canvas(rng, shape, spacing)
    frame_seed = int(rng.integers(2**32))
    for slab in canvas.slabs():
        _frame(slab, frame_seed)
    _bowel(canvas, rng)
    _organs(canvas, rng)

    mean, grain = _gray_values(rng)
    texture = 0.6 * canvas.strands[1] + 0.8 * rng.standard_normal(canvas.tissue.shape, np.float32)
    hu = _per_voxel(mean[canvas.tissue] + grain[canvas.tissue] * texture) / FINE**3
    hu = gaussian_filter(hu, (rng.uniform(0.35, 0.6), rng.uniform(0.35, 0.6), 0.3))  # the scanner's focus
    noise = gaussian_filter(rng.standard_normal(shape, np.float32), (0.8, 0.8, 0.2))
    noise -= 0.6 * gaussian_filter(noise, (2.0, 2.0, 0))  # reconstruction leaves grain, not clouds
    hu += noise * (rng.uniform(6, 14) / noise.std())

    labels = np.zeros(shape, np.uint8)
    organ = _CLASS[canvas.tissue]
    for number in range(1, len(ORGANS) + 1):
        labels[_per_voxel((organ == number).astype(np.uint8)) > FINE**3 // 2] = number
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -(np.array(shape) - 1) / 2 * spacing
    return np.clip(np.rint(hu), -1024, 3071).astype(np.int16), labels, affine


def write_cases(
    folder: str | os.PathLike, count: int, seed: int = 0,
    shape: Sequence[int] = (128, 128, 40), spacing: Sequence[float] = (2.8, 2.8, 5.0),
) -> list[Path]:
    """Writes cases 1..`count` as `img/imgNNNN.nii.gz` and `label/labelNNNN.nii.gz`, labels under BTCV's ids.

    shape and spacing (mm) as in `abdomen`; case N of one seed is the same whatever the count. Returns the
    image paths. Raises InputError where nothing can be written.
    """
    folder, ids, images = Path(folder), np.array((0, *BTCV_IDS), np.uint8), []
    for case in range(1, count + 1):
        hu, labels, affine = abdomen(seed * 10_000 + case, shape, spacing)
        for kind, array in (("img", hu), ("label", ids[labels])):
            write_volume(Volume(array, affine, 1, 1), folder / kind / f"{kind}{case:04d}.nii.gz")
        images.append(folder / "img" / f"img{case:04d}.nii.gz")
    return images
