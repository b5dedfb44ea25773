"""A camera in a street and the things that stand there; datasets.synthetic lays the scenes out."""
import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from datasets.classes import CAMVID, Color

VOID, SKY, BUILDING, POLE, ROAD, SIDEWALK, TREE, SIGN, FENCE, CAR, PEDESTRIAN, BICYCLIST = range(len(CAMVID))
GRAIN = np.array([6, 0, 9, 5, 8, 9, 22, 4, 9, 3, 7, 7], np.float32)  # how mottled each class's surface is
RED, BLUE, GREEN, WHITE, YELLOW = (176, 34, 38), (40, 74, 146), (28, 104, 70), (226, 226, 220), (206, 170, 50)
DARK, STEEL, GLASS = (34, 36, 40), (124, 126, 126), (52, 60, 70)
WALLS = ((150, 92, 72), (176, 160, 138), (196, 190, 180), (128, 120, 112), (120, 78, 62), (190, 172, 130))
PAINTS = (DARK, WHITE, (200, 202, 205), STEEL, (150, 30, 32), (34, 52, 106), (62, 84, 72), (88, 92, 98), (150, 130, 96))
COATS = ((150, 60, 110), (40, 110, 120), (196, 176, 140), (96, 66, 140), (34, 36, 40))
JACKETS = ((206, 214, 70), (232, 128, 50), (176, 34, 38), (40, 74, 146), (34, 36, 40))
LEAVES = ((62, 86, 40), (48, 74, 44), (88, 100, 46), (116, 96, 48), (70, 92, 62), (120, 76, 46))
SKINS = ((226, 184, 156), (186, 138, 106), (112, 76, 56))
WEATHERS = (  # sky at the top and the horizon, clouds 0-1, light of the sun and of the sky, colour cast
    ((70, 122, 196), (190, 212, 232), 0.35, 0.5, 0.7, (1.03, 1.0, 0.95)),
    ((104, 142, 190), (206, 214, 222), 0.9, 0.4, 0.7, (1.0, 1.0, 1.0)),
    ((176, 180, 186), (216, 216, 214), 0.6, 0.06, 0.92, (0.97, 1.0, 1.03)),
    ((138, 144, 154), (190, 192, 194), 1.0, 0.03, 0.84, (0.96, 0.99, 1.04)),
    ((92, 96, 142), (228, 176, 132), 0.5, 0.45, 0.6, (1.1, 0.98, 0.86)),
)
BUMPER, LAMPS = ((0, 0, 1, 0.22), (44, 46, 48)), ((0.03, 0.5, 0.2, 0.85), (0.8, 0.5, 0.97, 0.85))
REAR = (BUMPER, ((0.36, 0.3, 0.64, 0.48), YELLOW), *((lamp, RED) for lamp in LAMPS))
FRONT = (BUMPER, ((0.36, 0.25, 0.64, 0.4), WHITE), ((0.22, 0.5, 0.78, 0.8), DARK), *((lamp, WHITE) for lamp in LAMPS))
WINDOW = ((0.06, 0.1, 0.94, 0.88), GLASS)
SIDE_WINDOWS = (((0.08, 0.1, 0.48, 0.85), GLASS), ((0.53, 0.1, 0.92, 0.85), GLASS))


def pick(rng: np.random.Generator, colors: tuple[Color, ...], spread: float = 6) -> Color:
    """One of the colours, a little off in brightness and hue."""
    which, gain, *shifts = rng.random(5).tolist()
    color = zip(colors[int(which * len(colors))], shifts, strict=True)
    return tuple(min(245, max(8, int(c * (0.75 + 0.4 * gain) + 4 * spread * (shift - 0.5)))) for c, shift in color)


def fractal(rng: np.random.Generator, width: int, height: int, cells: int, octaves: int) -> np.ndarray:
    """(height, width) float32 smooth noise of zero mean: each octave has twice the cells and 0.6 of the strength."""
    total = np.zeros((height, width), np.float32)
    for octave in range(octaves):
        count = cells << octave
        coarse = Image.fromarray(rng.standard_normal((max(2, count * height // width), count), np.float32))
        total += 0.6 ** octave * np.asarray(coarse.resize((width, height), Image.Resampling.BILINEAR))
    return total


def grid(columns: int, rows: int, u0: float, v0: float, u1: float, v1: float) -> np.ndarray:
    """(columns * rows, 4): the same rectangle in every cell of a grid on a face, the lowest row first."""
    v, u = np.divmod(np.arange(columns * rows), columns)
    return np.stack([(u + u0) / columns, (v + v0) / rows, (u + u1) / columns, (v + v1) / rows], 1)


def ground(x0, x1, z0, z1, corners: int = 2) -> np.ndarray:
    """Numbers or (n,) arrays -> (n, 2 * corners, 3) rectangles on the ground; ``corners`` along z let them bend."""
    x0, x1, z0, z1 = np.broadcast_arrays(*(np.atleast_1d(np.asarray(v, float)) for v in (x0, x1, z0, z1)))
    z = np.geomspace(z0, z1, corners, axis=1)
    left, right = (np.stack([np.broadcast_to(x[:, None], z.shape), 0 * z, z], -1) for x in (x0, x1))
    return np.concatenate([left, right[:, ::-1]], 1)


class Scene:
    """The camera, the light, the street's measures, and the photo and mask, drawn at twice their final size."""

    def __init__(self, seed: int, width: int, height: int):
        rng = self.rng = np.random.default_rng(seed)
        self.width, self.height = 2 * width, 2 * height
        self.photo, self.mask = (Image.new(mode, (self.width, self.height)) for mode in ("RGB", "L"))
        self.pen, self.label = ImageDraw.Draw(self.photo), ImageDraw.Draw(self.mask)
        self.focal, self.eye = self.width * rng.uniform(0.72, 0.95), rng.uniform(1.25, 1.8)
        self.vanish = self.width * rng.uniform(0.36, 0.64), self.height * rng.uniform(0.38, 0.52)
        self.curve, self.roll = rng.uniform(-1, 1) ** 3 * 0.0016, rng.normal(0, 0.008)
        weather = WEATHERS[rng.choice(len(WEATHERS), p=(0.3, 0.2, 0.2, 0.15, 0.15))]
        self.zenith, self.horizon, self.clouds, self.sunshine, self.skylight, self.cast = weather
        sun = np.array([rng.uniform(-1, 1), rng.uniform(0.35, 1.0), rng.uniform(-1, 0.6)])
        self.sun, self.haze = sun / np.linalg.norm(sun), rng.uniform(130, 420)
        self.traffic = rng.choice((-1, 1))  # the side on which this street drives: left or right
        self.half, self.pavement = rng.uniform(2.7, 4.0), rng.uniform(1.9, 3.3)
        self.centre = -self.traffic * rng.uniform(0.4, 1.2)
        self.crowns = [crown(rng, self.light(0, 0.5, -0.6)) for _ in range(2)]
        self.items: list[tuple[float, Callable, tuple]] = []  # distance, what draws it, its arguments
        self.shadows: list[np.ndarray] = []  # (corners, 3) polygons on the ground
        self.openings: list[tuple[int, float]] = []  # side and z of side streets

    def edge(self, side: int, beyond: float = 0.0) -> float:
        """x of the kerb on that side (-1 left, 1 right), or of a line ``beyond`` metres outside it."""
        return self.centre + side * (self.half + beyond)

    def visible_from(self, x: float) -> float:
        """The z from which on something at x stands inside the frame."""
        return max(4.5, 1.08 * abs(x) * self.focal / (self.vanish[0] if x < 0 else self.width - self.vanish[0]))

    def add(self, draw: Callable, x: float, z: float, *args, shadow: tuple[float, ...] = ()) -> None:
        """Draw something later, at its distance; ``shadow`` is its width, height and, if aloft, lower end."""
        self.items.append((z, draw, (x, z, *args)))
        if shadow:
            away = -self.sun[[0, 2]] / self.sun[1]
            across = away[::-1] * (0.5, -0.5) / np.hypot(*away) * shadow[0]
            low, high = np.array([x, z]) + away * sum(shadow[2:]), np.array([x, z]) + away * shadow[1]
            self.shadows.append(np.insert([low - across, low + across, high + across, high - across], 1, 0, 1))

    def project(self, points: np.ndarray) -> np.ndarray:
        """(..., 3) metres -> (..., 2) pixels of the drawing."""
        z = np.maximum(points[..., 2], 0.5)
        pixels = np.empty((*z.shape, 2))
        pixels[..., 0] = x = self.vanish[0] + self.focal * (points[..., 0] / z + self.curve * z)
        y = self.vanish[1] + self.focal * (self.eye - points[..., 1]) / z
        pixels[..., 1] = y + self.roll * (x - self.width / 2)
        return pixels

    def shade(self, color: Color, z: float, light: float) -> Color:
        """The colour under that light, as it arrives through z metres of haze."""
        clear = math.exp(-z / self.haze)
        both = zip(color, self.horizon, strict=True)
        return tuple(min(255, int(c * light * clear + h * (1 - clear))) for c, h in both)

    def light(self, x: float, y: float, z: float) -> float:
        """How bright a surface with that unit normal is."""
        return self.skylight + self.sunshine * max(0.0, float(self.sun @ (x, y, z)))

    def fill(self, polygons: np.ndarray, color: Color, light: float, class_id: int | None = None) -> None:
        """Fill (n, corners, 3) polygons; without a class only the photo changes."""
        if len(polygons):
            fill = self.shade(color, polygons[0, 0, 2], light)
            for polygon in self.project(polygons).reshape(len(polygons), -1).tolist():
                self.pen.polygon(polygon, fill)
                if class_id is not None:
                    self.label.polygon(polygon, class_id)

    def trim(self, face: np.ndarray, rects, color: Color, light: float) -> None:
        """Fill (n, 4) rectangles u0, v0, u1, v1 of a (4, 3) face, whose corners go round from the lower left."""
        rects = np.asarray(rects, float)
        u, v = rects[:, [0, 2, 2, 0], None], rects[:, [1, 1, 3, 3], None]
        bottom, top = face[0] + u * (face[1] - face[0]), face[3] + u * (face[2] - face[3])
        self.fill(bottom + v * (top - bottom), color, light)


class Figure:
    """A plane facing the camera at (x, z), drawn in metres to the right of and above its foot on the ground."""

    def __init__(self, scene: Scene, x: float, z: float, class_id: int, scale: float = 1.0, flip: int = 1):
        self.scene, self.z, self.class_id, self.flip = scene, z, class_id, flip
        self.x, self.y = scene.project(np.array([x, 0.0, z])).tolist()
        self.unit, self.light = scale * scene.focal / z, scene.light(0, 0, -1)  # unit: pixels per metre

    def _draw(self, shape: str, points, color: Color, *options) -> None:
        pixels = [(self.x + self.flip * self.unit * x, self.y - self.unit * y) for x, y in points]
        getattr(self.scene.pen, shape)(pixels, self.scene.shade(color, self.z, self.light), *options)
        getattr(self.scene.label, shape)(pixels, self.class_id, *options)

    def cover(self, points) -> None:
        """Label a see-through area and leave the photo alone."""
        self.scene.label.polygon([(self.x + self.flip * self.unit * x, self.y - self.unit * y) for x, y in points],
                                 self.class_id)

    def polygon(self, color: Color, *points) -> None:
        self._draw("polygon", points, color)

    def box(self, color: Color, x0: float, y0: float, x1: float, y1: float) -> None:
        self.polygon(color, (x0, y0), (x1, y0), (x1, y1), (x0, y1))

    def line(self, color: Color, width: float, *points) -> None:
        self._draw("line", points, color, max(2, round(width * self.unit)), "curve")

    def disc(self, color: Color, x: float, y: float, rx: float, ry: float) -> None:
        self.polygon(color, *((x + rx * np.cos(a), y + ry * np.sin(a)) for a in np.linspace(0, 6, 16)))


def crown(rng: np.random.Generator, light: float) -> tuple[Image.Image, Image.Image]:
    """A leafy crown: its lit colours (RGB) and its outline (L), 96 pixels square."""
    y, x = np.mgrid[-1:1:96j, -1:1:96j].astype(np.float32)
    lumps, leaves = fractal(rng, 96, 96, 5, 4), fractal(rng, 96, 96, 16, 2)
    tone = light * (0.95 - 0.28 * y + 0.16 * leaves + 0.12 * lumps)
    pixels = np.clip(tone[..., None] * np.array(pick(rng, LEAVES, 9), np.float32), 0, 255).astype(np.uint8)
    inside = np.hypot(x, y * rng.uniform(0.95, 1.15)) < 0.78 + 0.17 * lumps
    return Image.fromarray(pixels), Image.fromarray(inside.astype(np.uint8) * 255)


def foliage(s: Scene, x: float, z: float, y: float, width: float, height: float) -> None:
    colors, outline = s.crowns[s.rng.integers(len(s.crowns))]
    (px, py), (w, h) = s.project(np.array([x, y, z])), np.array([width, height]) * s.focal / z + 2
    box = round(px - w / 2), round(py - h / 2), round(px + w / 2), round(py + h / 2)
    if box[2] < 0 or box[0] > s.width or box[3] < 0:
        return
    outline = outline.resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.NEAREST)
    colors = Image.blend(colors, Image.new("RGB", colors.size, s.horizon), 1 - math.exp(-z / s.haze))
    s.photo.paste(colors.resize(outline.size, Image.Resampling.BILINEAR), box, outline)
    s.mask.paste(TREE, box, outline)


def tree(s: Scene, x: float, z: float, height: float) -> None:
    rng, trunk, bark = s.rng, Figure(s, x, z, TREE, height), pick(s.rng, ((84, 70, 58), (110, 100, 90), (60, 52, 46)))
    lean = rng.normal(0, 0.04)
    trunk.polygon(bark, (-0.03, 0), (0.03, 0), (lean + 0.02, 0.45), (lean - 0.02, 0.45))
    for reach in (-0.2, 0.18):
        trunk.line(bark, 0.015, (lean, 0.4), (lean + reach, 0.75))
    for _ in range(2 if z < 40 else 1):
        width = height * rng.uniform(0.55, 0.8)
        foliage(s, x + height * rng.normal(lean, 0.1), z, height * rng.uniform(0.64, 0.78), width, 0.85 * width)


def building(s: Scene, x: float, z: float, side: int, near: float) -> None:
    """A house along the street from ``near`` to z: end wall, roof, facade with windows, doors or shops."""
    rng, floors, storey = s.rng, int(s.rng.integers(2, 6)), s.rng.uniform(2.8, 3.6)
    top, wall, far, lit = floors * storey, pick(rng, WALLS), x + side * rng.uniform(7, 12), s.light(-side, 0, 0)
    face = np.array([(x, 0, near), (x, 0, z), (x, top, z), (x, top, near)])
    if not 0 < s.project(face[1])[0] < s.width and near < 90:
        return  # beside the camera
    end = np.array([(x, 0, near), (far, 0, near), (far, top, near), (x, top, near)])
    ridge = np.array([((x + far) / 2, top + rng.choice((0.1, 2.8)), depth) for depth in (near, z)])
    tiles = pick(rng, ((92, 64, 56), (84, 86, 92)))
    s.fill(np.array([[face[3], face[2], ridge[1], ridge[0]]]), tiles, s.light(-side * 0.6, 0.8, 0), BUILDING)
    s.fill(np.array([[*end, ridge[0]]])[:, [0, 1, 2, 4, 3]], wall, s.light(0, 0, -1), BUILDING)
    s.fill(face[None], wall, lit, BUILDING)
    if near > 90:
        return
    if rng.random() < 0.5 and near < 30:
        s.trim(face, grid(1, int(top / 0.3), 0, 0, 1, 0.15), tuple(int(0.87 * c) for c in wall), lit)
    columns, wide = max(2, round((z - near) / rng.uniform(2.4, 3.6))), rng.uniform(0.2, 0.34)
    tall = rng.uniform(0.6, 0.82)
    frame, glass = pick(rng, (WHITE, (90, 80, 70), wall)), pick(rng, (GLASS, (84, 98, 112), DARK))
    for surface, count, light in ((face, columns, lit), (end, 3, s.light(0, 0, -1)))[:1 if near > 50 else 2]:
        if near < 35:
            s.trim(surface, grid(count, floors, 0.44 - wide, 0.17, 0.56 + wide, tall + 0.04)[count:], frame, light)
        s.trim(surface, grid(count, floors, 0.5 - wide, 0.2, 0.5 + wide, tall)[count:], glass, light)
    if rng.random() < 0.5:  # shops: wide glass under a board with lettering
        s.trim(face, grid(columns, floors, 0.06, 0.12, 0.92, 0.72)[:columns], pick(rng, (GLASS, (120, 116, 100))), lit)
        s.trim(face, [(0, 0.76 / floors, 1, 0.98 / floors)], pick(rng, (*PAINTS, RED, BLUE, GREEN, YELLOW)), lit)
        s.trim(face, grid(4 * columns, floors, 0.2, 0.83, 0.6, 0.92)[rng.integers(0, 4 * columns, 7)], WHITE, lit)
    else:
        is_door = rng.random(columns) < 0.4
        door = pick(rng, (*PAINTS, (96, 60, 40)))
        s.trim(face, grid(columns, floors, 0.25, 0, 0.7, 0.75)[:columns][is_door], door, lit)
        s.trim(face, grid(columns, floors, 0.2, 0.3, 0.8, 0.75)[:columns][~is_door], glass, lit)


def fence(s: Scene, x: float, z: float, length: float, height: float, planks: bool, color: Color) -> None:
    """A fence along the street, ``length`` metres towards (or, if negative, away from) the camera."""
    light, step = s.light(-np.sign(x), 0, 0), 0.25 if planks else 0.14
    face = np.array([(x, 0, z), (x, 0, z - length), (x, height, z - length), (x, height, z)])
    if planks:
        s.fill(face[None], color, light)
    s.label.polygon(s.project(face).ravel().tolist(), FENCE)
    bars = grid(round(abs(length) / step), 1, 0, 0, 0.16 if planks else 0.65, 1)
    s.trim(face, bars, color, light * (0.7 if planks else 1))
    s.trim(face, [(0, 0.88, 1, 1), (0, 0.06, 1, 0.14)], color, light)


def tube(post: Figure, color: Color, radius: float, height: float) -> None:
    """A round post: one flank in the light, the other in its own shadow."""
    for brightness, x0, x1 in ((1.0, -1, 1), (1.3, -0.6, -0.1), (0.5, 0.4, 1)):
        post.box(tuple(min(245, int(brightness * c)) for c in color), radius * x0, 0, radius * x1, height)


def lamp(s: Scene, x: float, z: float) -> None:
    post, steel = Figure(s, x, z, POLE), pick(s.rng, ((176, 180, 180), (38, 66, 56), (196, 190, 170)))
    height, arm = s.rng.uniform(4.5, 8), -np.sign(x) * s.rng.uniform(0, 1.6)
    tube(post, steel, 0.12, height)
    tube(post, steel, 0.18, 1.1)
    post.line(steel, 0.12, (0, height), (arm, height + 0.3))
    post.box((190, 190, 180), arm - 0.3, height + 0.2, arm + 0.3, height + 0.42)


def sign(s: Scene, x: float, z: float) -> None:
    """A traffic light, or a plate on a post: round, a triangle, or a board with lines of text."""
    rng, kind, y = s.rng, s.rng.integers(5), s.rng.uniform(2.3, 3.0)
    tube(Figure(s, x, z, POLE), STEEL if kind else DARK, 0.08, y + 0.3)
    plate = Figure(s, x, z, SIGN)
    if kind == 0:
        plate.box(DARK, -0.22, y, 0.22, y + 1.05)
        for i, lit in enumerate(((60, 230, 120), (250, 180, 40), (240, 50, 40))):
            plate.disc(lit if rng.random() < 0.5 else STEEL, 0, y + 0.2 + 0.32 * i, 0.13, 0.13)
    elif kind == 1:
        plate.polygon(RED, (-0.5, y - 0.3), (0.5, y - 0.3), (0, y + 0.55))
        plate.polygon(WHITE, (-0.3, y - 0.18), (0.3, y - 0.18), (0, y + 0.32))
    elif kind < 4:
        plate.disc((RED, BLUE)[kind - 2], 0, y, 0.42, 0.42)
        plate.disc(WHITE, 0, y, 0.29, (0.29, 0.1)[kind - 2])
    else:
        plate.box(pick(rng, (BLUE, GREEN, WHITE, YELLOW, STEEL)), -0.8, y, 0.8, y + 1.0)
        for row in (0.2, 0.45, 0.7):
            plate.box(WHITE, -0.65, y + row, rng.uniform(0, 0.6), y + row + 0.1)


def clutter(s: Scene, x: float, z: float) -> None:
    """A bin or cabinet, which CamVid leaves unlabelled."""
    thing, tall, wide = Figure(s, x, z, VOID), s.rng.uniform(0.8, 1.5), s.rng.uniform(0.25, 0.45)
    thing.box(pick(s.rng, (*PAINTS, GREEN)), -wide, 0, wide, tall)
    thing.box(DARK, -wide, tall - 0.15, wide, tall)


def person(s: Scene, x: float, z: float) -> None:
    rng, p = s.rng, Figure(s, x, z, PEDESTRIAN, s.rng.uniform(0.75, 1.12), s.rng.choice((-1, 1)))
    coat, trousers = pick(rng, COATS, 22), pick(rng, PAINTS, 16)
    step, hem = rng.uniform(0, 0.34), rng.uniform(0.5, 0.9)
    for foot in (-step - 0.06, step + 0.06):
        p.line(trousers, 0.16, (foot * 0.3, 0.9), (foot * 0.75, 0.45), (foot, 0.04))
        p.disc(DARK, foot + 0.04, 0.05, 0.13, 0.06)
    p.polygon(coat, (-0.2, hem), (0.2, hem), (0.25, 1.42), (0.1, 1.52), (-0.1, 1.52), (-0.25, 1.42))
    for arm in (-0.25, 0.25):
        p.line(coat, 0.1, (arm, 1.4), (1.3 * arm, 1.1), (arm + 0.4 * step, 0.85))
    p.disc(pick(rng, (DARK, (92, 64, 40), (150, 120, 70))), 0, 1.66, 0.11, 0.14)
    p.disc(pick(rng, SKINS), 0.03, 1.63, 0.08, 0.11)
    if rng.random() < 0.4:
        p.box(pick(rng, PAINTS, 22), 0.2, 0.6, 0.42, 0.95)


def cyclist(s: Scene, x: float, z: float, across: bool) -> None:
    rng, b = s.rng, Figure(s, x, z, BICYCLIST, s.rng.uniform(0.9, 1.08), s.rng.choice((-1, 1)))
    coat, trousers, frame = pick(rng, JACKETS, 16), pick(rng, PAINTS, 16), pick(rng, (RED, BLUE, DARK, WHITE))
    if across:
        for hub in (-0.52, 0.52):
            angles = np.linspace(0, 2 * np.pi, 17)
            b.cover((hub + 0.34 * np.cos(a), 0.34 + 0.34 * np.sin(a)) for a in angles)
            b.line(DARK, 0.07, *((hub + 0.31 * np.cos(a), 0.34 + 0.31 * np.sin(a)) for a in angles))
        b.line(frame, 0.06, (-0.52, 0.34), (-0.2, 0.8), (0.4, 0.8), (0, 0.32), (-0.52, 0.34))
        b.line(frame, 0.06, (0.52, 0.34), (0.38, 1.0), (0.5, 1.05))
        b.line(trousers, 0.16, (-0.2, 0.95), (0.22, 0.72), (0.05, 0.25))
        b.polygon(coat, (-0.3, 0.9), (-0.02, 0.88), (0.28, 1.42), (0.1, 1.55))
        b.line(coat, 0.1, (0.2, 1.4), (0.3, 1.15), (0.48, 1.05))
    else:
        b.box(DARK, -0.05, 0, 0.05, 0.68)
        b.line(frame, 0.05, (-0.3, 1.0), (0.3, 1.0))
        for leg, foot in ((-0.13, 0.15), (0.13, 0.32)):
            b.line(trousers, 0.16, (leg, 0.9), (1.5 * leg, 0.62), (leg, foot))
            b.line(coat, 0.1, (1.7 * leg, 1.38), (2.7 * leg, 1.15), (2.2 * leg, 1.0))
        b.polygon(coat, (-0.2, 0.85), (0.2, 0.85), (0.25, 1.42), (-0.25, 1.42))
    b.disc(pick(rng, (DARK, WHITE, RED, (92, 64, 40))), 0.3 * across, 1.64, 0.12, 0.15)
    b.disc(pick(rng, SKINS), 0.3 * across + 0.03, 1.59, 0.08, 0.08)


def car(s: Scene, x: float, z: float, yaw: float) -> None:
    """A car, van or lorry: a body and a cabin, of which the faces turned to the camera are drawn."""
    rng, kind = s.rng, s.rng.choice(3, p=(0.8, 0.14, 0.06))
    half, wide, belt, top = ((2.1, 0.86, 0.88, 1.45), (2.5, 0.95, 1.2, 2.3), (4.0, 1.2, 1.5, 3.4))[kind]
    back, front = (-0.97 * half, (0.4, 0.75, 0.8)[kind] * half)
    turn = np.array([[np.cos(yaw), 0, -np.sin(yaw)], [0, 1, 0], [np.sin(yaw), 0, np.cos(yaw)]])
    paint, position = pick(rng, PAINTS, 10), np.array([x, 0, z + half - 2.1])  # long ones do not come nearer

    def ring(y: float, w: float, a: float, b: float) -> np.ndarray:
        """A level rectangle across ±w, from a to b along the car -> (4, 3) in the world."""
        return np.array([(-w, y, a), (w, y, a), (w, y, b), (-w, y, b)]) @ turn + position

    s.fill(ring(0, wide, -half, half)[None], (24, 24, 28), 1)
    body = ring(0.24, wide, -half, half), ring(belt, 0.97 * wide, -half, half), (REAR, (), FRONT, ())
    roof = ring(top, 0.75 * wide, back + 0.4, front - 0.7)
    cabin = ring(belt, 0.9 * wide, back, front), roof, 2 * ((WINDOW,), SIDE_WINDOWS)
    for low, high, trims in (body, cabin):
        s.fill(high[None], paint, s.light(0, 1, 0), CAR)
        for i in (2, 1, 3, 0):
            face = np.array([low[i], low[i - 3], high[i - 3], high[i]])
            normal = np.array(((0, 0, -1), (1, 0, 0), (0, 0, 1), (-1, 0, 0))[i]) @ turn
            if normal @ (face.mean(0) - (0, s.eye, 0)) < 0:
                s.fill(face[None], paint, s.light(*normal), CAR)
                for rect, color in trims[i]:
                    s.trim(face, [rect], color, s.light(*normal))
                if low is body[0] and i % 2:
                    for radius, color in ((0.36, DARK), (0.2, STEEL)):
                        angle = np.linspace(0, 6, 12)[None] + np.zeros((2, 1))
                        along = radius * np.sin(angle) + half * np.array([[-0.6], [0.6]])
                        wheels = np.stack([0 * angle + (2 - i) * wide, 0.36 + radius * np.cos(angle), along], -1)
                        s.fill(wheels @ turn + position, color, s.light(*normal), CAR)
