"""Generated street scenes in CamVid's folder layout, to try every command without the data.

    python -m datasets.synthetic --out data/synthetic
    python -m datasets.synthetic --out data/small --train 40 --val 10 --test 4 --size 240 180

A scene is a list of flat faces: (class id, color, (..., corners, 3) points). A pinhole camera paints them from far to
near, on the image and the mask at once, so that both agree about what hides what. Lengths are metres: x to the right,
y up, z ahead of the camera, and the ground is at y = 0.
"""
from support.command import Parser, number, run_command  # isort: split

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageOps

from datasets.classes import CAMVID
from support.files import atomic_folder, make_folder

VOID, SKY, BUILDING, POLE, ROAD, SIDEWALK, TREE, SIGN, FENCE, CAR, PEDESTRIAN, BICYCLIST = range(len(CAMVID))
GRAIN = np.array([3, 0, 4, 3, 4, 4, 10, 2, 4, 2, 3, 3])  # how rough the surface of each class looks, in grey levels
RED, BLUE, YELLOW, WHITE, STEEL, DARK = "#b02a2c", "#284a92", "#d8b040", "#e4e4de", "#8c9294", "#26282c"
GLASS, WOOD, GREEN, SHADOW = "#3c4854", "#54463a", "#3c5a46", "#0a0c2068"
WEATHERS = (((79, 134, 200), (200, 220, 236), 0.16), ((127, 159, 196), (223, 226, 226), 0.1),  # sky at the top and at
            ((154, 162, 172), (212, 214, 214), 0.02), ((108, 118, 166), (240, 196, 154), 0.18))  # the horizon, sunshine
WALLS = ("#a8705a", "#b8a488", "#c8c0b0", "#8a7c70", "#946048", "#c4a878", "#9a9a98", "#7a5a50")
PAINTS = (DARK, WHITE, STEEL, "#96202a", "#24386c", "#46584c", "#5c6470", "#a8926a", "#c4c8cc")
COATS = (DARK, "#963c6e", "#2a7078", "#c4b08c", "#60428c", "#3a4a6c", "#b0442c", "#d8d4c8", "#5a6444")
JACKETS, SKINS = ("#d4dc3c", "#f08a30", "#d83c34", "#3c78c8", WHITE), ("#e2b89c", "#ba8a6a", "#704c38")
LEAVES = (("#2e4424", "#46602c", "#62803c"), ("#3c4a28", "#5c6c34", "#849048"), ("#6a4a24", "#96682c", "#b88c40"))
ALONG = np.pi / 2  # turns an upright outline so that it runs along the street


def rect(x0: float, y0: float, x1: float, y1: float) -> list:
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def bar(x0: float, y0: float, x1: float, y1: float, width: float = 0.08) -> list:
    """Outline of something straight that leans; the width is measured across."""
    return [(x0 - width / 2, y0), (x0 + width / 2, y0), (x1 + width / 2, y1), (x1 - width / 2, y1)]


def disc(x: float, y: float, radius: float, corners: int = 12) -> list:
    """Outline with a corner at the top, so that 3 corners make a triangle."""
    angles = np.arange(corners) * 2 * np.pi / corners
    return [(x + radius * np.sin(a), y + radius * np.cos(a)) for a in angles]


# What stands in the street: (class id, colors to choose from, outlines around its foot). CamVid has no class for bins.
LAMP = [(POLE, (STEEL, GREEN), [rect(-0.1, 0, 0.1, 6), rect(-0.16, 0, 0.16, 1), rect(0, 5.9, 1.8, 6.05)])]
POST = (POLE, (STEEL,), [rect(-0.07, 0, 0.07, 2.2)])
TRAFFIC_LIGHT = [POST, (SIGN, (DARK,), [rect(-0.25, 2, 0.25, 3.3)]), (SIGN, ("#f03c32",), [disc(0, 3.05, 0.15)]),
                 (SIGN, (YELLOW, STEEL), [disc(0, 2.65, 0.15), disc(0, 2.25, 0.15)])]
TRIANGLE = [POST, (SIGN, (RED, BLUE), [disc(0, 2.4, 0.6, 3)]), (SIGN, (WHITE, YELLOW), [disc(0, 2.4, 0.34, 3)])]
ROUND = [POST, (SIGN, (RED, BLUE), [disc(0, 2.5, 0.5)]), (SIGN, (WHITE,), [disc(0, 2.5, 0.3)])]
BIN = [(VOID, PAINTS, [rect(-0.35, 0, 0.35, 1.1)]), (VOID, (DARK,), [rect(-0.4, 1, 0.4, 1.15)])]
PERSON = [(PEDESTRIAN, PAINTS, [bar(-0.06, 0.9, -0.2, 0, 0.18), bar(0.06, 0.9, 0.2, 0, 0.18)]),
          (PEDESTRIAN, COATS, [rect(-0.23, 0.75, 0.23, 1.5), bar(-0.24, 1.4, -0.3, 0.8), bar(0.24, 1.4, 0.3, 0.8)]),
          (PEDESTRIAN, (DARK, WOOD, YELLOW), [disc(0, 1.68, 0.15)]), (PEDESTRIAN, SKINS, [disc(0.03, 1.63, 0.11)])]
CYCLIST = [(BICYCLIST, (DARK,), [disc(-0.55, 0.36, 0.36), disc(0.55, 0.36, 0.36)]),
           (BICYCLIST, ("#b4b4b0",), [disc(-0.55, 0.36, 0.28), disc(0.55, 0.36, 0.28)]),
           (BICYCLIST, (RED, DARK), [bar(-0.5, 0.3, -0.2, 0.9), bar(0, 0.3, 0.45, 0.9), bar(0.5, 0.3, 0.4, 1.1)]),
           (BICYCLIST, PAINTS, [bar(-0.15, 0.98, 0.2, 0.72, 0.26), bar(0.2, 0.8, 0, 0.25, 0.16)]),
           (BICYCLIST, JACKETS, [bar(-0.15, 0.92, 0.18, 1.5, 0.4), bar(0.25, 1.45, 0.45, 1.1, 0.14)]),
           (BICYCLIST, JACKETS, [disc(0.27, 1.7, 0.15)]), (BICYCLIST, SKINS, [disc(0.32, 1.61, 0.11)])]
FURNITURE = (  # what, at most how many on each side, metres beyond the kerb, times the least distance it is seen from
    (LAMP, 2, 0.5, 3), (TRAFFIC_LIGHT, 1, 0.4, 1.6), (TRIANGLE, 1, 0.7, 2), (ROUND, 1, 0.9, 1.8), (BIN, 2, 1.6, 2),
    (PERSON, 2, 1.1, 1.6), (PERSON, 2, 1.7, 1.6), (CYCLIST, 1, -0.8, 1.6))


def pick(rng: np.random.Generator, options: Sequence) -> Any:
    """What ``rng.choice`` gives, faster; and that one can lose a Ctrl-C, by an except of all exceptions."""
    return options[int(rng.integers(len(options)))]


def ground(outlines) -> np.ndarray:
    """(..., 2) outlines in x and z -> (..., 3) points."""
    return np.insert(outlines, 1, 0.0, axis=-1)


def upright(outlines, x, z: float, turn: float = 0.0) -> np.ndarray:
    """(..., 2) outlines around a foot at (x, z) -> (..., 3) points of a plane that faces the camera, or is turned."""
    across, up = np.asarray(outlines).T
    return np.array([x + across * np.cos(turn), up, z + across * np.sin(turn)]).T


def figure(rng: np.random.Generator, parts: list[tuple], x: float, z: float) -> list[tuple]:
    """One of the things above, a little turned, with its front to the street."""
    scale, turn = rng.uniform(0.85, 1.1) * np.array([-np.sign(x), 1]), rng.uniform(-0.7, 0.7)
    faces = [(class_id, pick(rng, colors), upright(scale * outlines, x, z, turn))
             for class_id, colors, outlines in parts]
    return [(None, SHADOW, ground(disc(x, z, 0.4))), *faces]


def tree(rng: np.random.Generator, x: float, z: float) -> list[tuple]:
    height, parts = rng.uniform(5, 8), [(WOOD, bar(0, 0, 0, 3.5, 0.3))]
    for color, lift in zip(LEAVES[rng.integers(3)], (0.65, 0.7, 0.77)):  # light falls on the crown from above
        leaves = rng.normal((0, lift, 0.1), (0.1, 0.08, 0.02), (14, 3)) * height
        parts.append((color, [disc(u, v, radius, 9) for u, v, radius in leaves]))
    return [(TREE, color, upright(outlines, x, z)) for color, outlines in parts]


def building(rng: np.random.Generator, x: float, z: float, length: float) -> list[tuple]:
    """A house along the street from z on: gable, end wall and facade, each wall with windows over doors or shops."""
    depth, top, wide = 8 * np.sign(x), 3 * rng.integers(2, 5) + 0.6, pick(rng, (0.5, 1.2))
    wall, trim, paint, glass = (pick(rng, colors) for colors in (WALLS, (WHITE, WOOD, STEEL), PAINTS, (GLASS, DARK)))
    faces = [(BUILDING, wall, upright([(0, top), (depth, top), (depth / 2, top + pick(rng, (0.1, 2.5)))], x, z))]
    for width, turn in ((depth, 0.0), (length, ALONG)):
        middles = np.linspace(0, width, 2 * round(abs(width) / 2.8) + 1)[1::2]
        openings = [(u, v, v + 1.5, 0.7) for u in middles for v in np.arange(4, top - 2, 3)]
        openings += [(u, 0.3, 2.3, wide) for u in middles]
        frames = [rect(u - w - 0.1, v0 - 0.1, u + w + 0.1, v1 + 0.1) for u, v0, v1, w in openings]
        parts = ((wall, [rect(0, 0, width, top)]), (trim, [rect(0, top - 0.3, width, top), *frames]),
                 (glass, [rect(u - w, v0, u + w, v1) for u, v0, v1, w in openings]), (paint, [rect(0, 2.4, width, 3)]))
        faces += [(BUILDING, color, upright(outlines, x, z, turn)) for color, outlines in parts]
    return faces


def fence(rng: np.random.Generator, x: float, z: float, length: float) -> list[tuple]:
    """Boards, or a railing that one sees through and that is labelled as a whole, as in CamVid."""
    panel, rail = ((WOOD, SHADOW), (GREEN, SHADOW), (WHITE, SHADOW), ("#8c929428", STEEL))[rng.integers(4)]
    top, posts = rng.uniform(1.2, 1.8), np.arange(0, length, 0.3)
    rails = [rect(0, 0.1, length, 0.2), rect(0, top - 0.15, length, top), *(rect(u, 0, u + 0.08, top) for u in posts)]
    parts = (panel, [rect(0, 0, length, top)]), (rail, rails)
    return [(FENCE, color, upright(outlines, x, z, ALONG)) for color, outlines in parts]


def car(rng: np.random.Generator, x: float, z: float, lights: str) -> list[tuple]:
    """A car or van along the street: the profile of its side, spread in between, then what is fixed to the near end."""
    paint, roof, side = pick(rng, PAINTS), pick(rng, (1.4, 1.5, 2.2)), -np.sign(x)  # side: the one that is seen
    profile = np.array([(0, 0.3), (0, 0.9), (0.6, 1), (1, roof), (3.2, roof), (3.7, 1), (4.3, 0.9), (4.3, 0.3)])
    half = np.where(profile[:, 1] > 1, 0.75, 0.9)
    left, right = upright(profile, x - half, z, ALONG), upright(profile, x + half, z, ALONG)
    faces = [(None, SHADOW, ground(rect(x - 1.1, z - 0.3, x + 1.1, z + 4.5))),
             (CAR, paint, upright(profile, x + side * half, z, ALONG)),
             (CAR, GLASS, upright(rect(1, 1.05, 3.2, roof - 0.1), x + 0.8 * side, z, ALONG)),
             (CAR, DARK, upright([disc(0.9, 0.35, 0.35), disc(3.4, 0.35, 0.35)], x + 0.9 * side, z, ALONG))]
    for i in (6, 5, 4, 3, 2, 1, 0):  # from far to near
        quad = np.array([left[i], right[i], right[i + 1], left[i + 1]])
        faces.append((CAR, paint, quad))
        if i in (2, 4):  # rear window and windscreen
            faces.append((CAR, GLASS, 0.85 * quad + 0.15 * quad.mean(0)))
    parts = ((DARK, [rect(-0.9, 0.28, 0.9, 0.45), rect(-0.9, 0, -0.7, 0.3), rect(0.7, 0, 0.9, 0.3)]),
             (YELLOW, [rect(-0.25, 0.45, 0.25, 0.6)]), (lights, [rect(-0.8, 0.6, -0.5, 0.8), rect(0.5, 0.6, 0.8, 0.8)]))
    return faces + [(CAR, color, upright(outlines, x, z - 0.02)) for color, outlines in parts]


def pave(rng: np.random.Generator, left: float, right: float) -> list[tuple]:
    """A wood at the horizon, then the ground: pavements, a road from x = ``left`` to ``right``, markings, a shadow."""
    middle, crossing, shade = (left + right) / 2, rng.uniform(8, 60), rng.uniform(left, right)
    parts = [(SIDEWALK, pick(rng, ("#a8a49c", "#b09c84", "#a88c80")), [rect(-400, 1, 400, 400)]),
             (None, "#0a0c2020", [rect(-30, z, 30, 1.005 * z) for z in np.geomspace(2, 40, 40)]),
             (SIDEWALK, "#ccc8c0", [rect(left - 0.25, 1, right + 0.25, 300)]),
             (ROAD, pick(rng, ("#64666a", "#74726e", "#5a5c62")), [rect(left, 1, right, 300)]),
             (None, WHITE, [rect(middle - 0.08, z, middle + 0.08, z + 3) for z in np.arange(crossing % 6, 99, 6) + 1]),
             (None, WHITE, [rect(x, crossing, x + 0.5, crossing + 3) for x in np.arange(left + 0.4, right - 0.6)]),
             (None, pick(rng, (WHITE, YELLOW)), [rect(x, 1, x + 0.1, 200) for x in (left + 0.4, right - 0.5)]),
             (None, SHADOW, [rect(shade, 1, 40 * pick(rng, (-1, 1)), 200)])]
    wood = (TREE, LEAVES[0][1], upright([disc(x, 0, rng.uniform(5, 14)) for x in range(-150, 150, 6)], 0, 200))
    return [wood, *((class_id, color, ground(outlines)) for class_id, color, outlines in parts)]


def furnish(rng: np.random.Generator, left: float, right: float) -> list[tuple]:
    """The faces of everything that stands in the street, the farthest thing first."""
    things = []  # pairs of a distance and the faces there
    for kerb in (left, right):
        side, line, z = np.sign(kerb), kerb + np.sign(kerb) * rng.uniform(2.2, 3.2), 3.0  # line: where houses begin
        while z < 90:
            far = z + rng.uniform(9, 17)
            if rng.random() < 0.7:
                things.append((far, building(rng, line, z, far - z)))
            else:
                things += [(far, tree(rng, line + side * beyond, far)) for beyond in (5, 2)]
                things.append((far, fence(rng, line, z, far - z)))
            z = far
        for parts, most, beyond, reach in FURNITURE:
            x = kerb + side * beyond
            for z in max(6, 1.8 * abs(x)) * rng.uniform(1, reach, rng.integers(most + 1)):  # nearer is out of sight
                things.append((z, figure(rng, parts, x, z)))
        for z in rng.uniform(8, 40, rng.integers(4)):
            things.append((z, tree(rng, kerb + side * 0.9, z)))
        lights = RED if abs(kerb) < 3.5 else WHITE  # the camera drives next to the nearer kerb
        for x, first in ((kerb - side * 1.1, 16), (kerb - side * 0.3 * (right - left), 9)):
            for z in rng.uniform(first, 2 * first) + 9 * np.arange(rng.integers(4)):
                things.append((z, car(rng, x, z, lights)))
    return [face for _, faces in sorted(things, key=lambda thing: -thing[0]) for face in faces]


def render(rng: np.random.Generator, faces: list[tuple], width: int, height: int) -> tuple[Image.Image, np.ndarray]:
    """Paint the faces at twice the size, for smooth edges; then halve and add texture, exposure, tint and noise."""
    size, (zenith, horizon, sun) = (2 * width, 2 * height), WEATHERS[rng.integers(len(WEATHERS))]
    focal, eye, haze = 1.6 * width * rng.uniform(0.9, 1.1), rng.uniform(1.3, 1.9), rng.uniform(100, 300)
    center_x, center_y, sunny_side = width * rng.uniform(0.8, 1.2), height * rng.uniform(0.8, 1.0), pick(rng, (-1, 1))
    image = ImageOps.colorize(Image.linear_gradient("L"), zenith, horizon, whitepoint=130).resize(size)
    clouds = Image.fromarray(rng.normal(0, 100, (10, 6)).clip(0, 180).astype(np.uint8))
    image.paste((235, 235, 235), mask=clouds.resize(size, Image.Resampling.BICUBIC))
    mask = Image.new("L", size, SKY)
    image_pen, mask_pen = ImageDraw.Draw(image, "RGBA"), ImageDraw.Draw(mask)
    for class_id, color, points in faces:
        x, y, z = points.reshape(-1, 3).T
        normal = np.argmin(np.ptp(points.reshape(-1, 3), axis=0))  # the axis that the face is at a right angle to
        light = (0.8 + sun * sunny_side * np.sign(x[0]), 1, 0.85)[normal] * rng.uniform(0.92, 1.08)
        clear, (*rgb, alpha) = np.exp(-z.min() / haze), np.array(ImageColor.getcolor(color, "RGBA"))
        rgb = (clear * light * np.array(rgb) + (1 - clear) * np.array(horizon)).clip(0, 255).astype(int)
        pixels = np.stack([center_x + focal * x / z, center_y + focal * (eye - y) / z], -1)
        for polygon in pixels.reshape(-1, 2 * points.shape[-2]).tolist():
            image_pen.polygon(polygon, (*rgb.tolist(), int(alpha)))
            if class_id is not None:  # a shadow or a marking has none
                mask_pen.polygon(polygon, class_id)
    ids = np.asarray(mask)[::2, ::2].copy()
    noise = (GRAIN[ids] * rng.standard_normal(ids.shape))[..., None] + rng.normal(0, 3, (*ids.shape, 3))
    pixels = (np.asarray(image.reduce(2)) + noise) * rng.uniform(0.85, 1.15) * rng.uniform(0.95, 1.05, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), ids


def generate_scene(seed: int, width: int = 480, height: int = 360) -> tuple[Image.Image, np.ndarray]:
    """One scene: the RGB image and its (H, W) uint8 ids of CAMVID; the same in every process."""
    rng = np.random.default_rng(seed)
    near, far = rng.uniform(2, 3), rng.uniform(4.5, 6)  # from the camera to the kerbs
    kerbs = (-near, far) if rng.random() < 0.5 else (-far, near)
    return render(rng, pave(rng, *kerbs) + furnish(rng, *kerbs), width, height)


def generate_dataset(root: Path, counts: dict[str, int], size: tuple[int, int] = (480, 360)) -> None:
    """Write ``counts[split]`` scenes of ``size`` (width, height) to root/split, their masks to root/split_labels.

    No two splits share a scene. Raises UserError if ``root`` holds anything already, RunError if it cannot be written.
    """
    seed = 0
    with atomic_folder(root) as unfinished:
        for split, count in counts.items():
            images, masks = make_folder(unfinished / split), make_folder(unfinished / f"{split}_labels")
            for i in range(count):
                image, ids = generate_scene(seed, *size)
                image.save(images / f"scene_{i:04d}.png", compress_level=1)
                Image.fromarray(CAMVID.to_rgb(ids)).save(masks / f"scene_{i:04d}.png", compress_level=1)
                seed += 1


def get_args_parser() -> Parser:
    parser = Parser(prog="python -m datasets.synthetic", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="new or empty folder for the scenes")
    for split, count in (("train", 200), ("val", 40), ("test", 10)):
        parser.add_argument(f"--{split}", type=number(int, 1), default=count, help=f"number of scenes in {split}")
    parser.add_argument("--size", type=number(int, 1, 2**14), nargs=2, default=(480, 360), help="width, height, pixels")
    return parser


def main(args) -> None:
    generate_dataset(args.out, {"train": args.train, "val": args.val, "test": args.test}, args.size)
    print(f"{args.train + args.val + args.test} scenes in {args.out}")


if __name__ == "__main__":
    raise SystemExit(run_command(main, get_args_parser()))
