"""Generated street scenes in CamVid's folder layout, to try every command without the data.

    python -m datasets.synthetic --out data/synthetic
    python -m datasets.synthetic --out data/small --train 40 --val 10 --test 4 --size 240 180

A scene is a list of flat faces. A pinhole camera paints them from far to near on the image and the
mask at once, so that occlusion is the same in both. Lengths are in metres; x points to the right,
y up and z away from the camera; the ground is at y = 0.
"""

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageColor, ImageDraw, ImageOps

from datasets.classes import CAMVID
from support.command import Parser, number, run_command
from support.files import atomic_folder, make_folder

# Of each face: the class id, or None for shadows and markings, which leave the mask as it is; the
# colour; the points of its polygons, (..., corners, 3).
Faces = Iterable[tuple[int | None, str, np.ndarray]]

VOID, SKY, BUILDING, POLE, ROAD, SIDEWALK, TREE, SIGN, FENCE, CAR, PEDESTRIAN, BICYCLIST = range(12)
ROUGHNESS = np.array([3, 0, 4, 3, 4, 4, 10, 2, 4, 2, 3, 3])  # of each class, in grey levels

# Colours to choose from.
PALETTES = """
dark     #26282c
steel    #8c9294
post     #8c9294 #3c5a46
red      #f03c32
yellow   #d8b040 #8c9294
sign     #b02a2c #284a92
plate    #e4e4de
warning  #e4e4de #d8b040
line     #e4e4de #d8b040
wall     #a8705a #b8a488 #c8c0b0 #8a7c70 #946048 #c4a878 #9a9a98 #7a5a50
trim     #e4e4de #54463a #8c9294
glass    #3c4854 #26282c
paint    #26282c #e4e4de #8c9294 #96202a #24386c #46584c #5c6470 #a8926a #c4c8cc
coat     #26282c #963c6e #2a7078 #c4b08c #60428c #3a4a6c #b0442c #d8d4c8 #5a6444
jacket   #d4dc3c #f08a30 #d83c34 #3c78c8 #e4e4de
hair     #26282c #54463a #d8b040
skin     #e2b89c #ba8a6a #704c38
frame    #b02a2c #26282c
rim      #b4b4b0
pavement #a8a49c #b09c84 #a88c80
asphalt  #64666a #74726e #5a5c62
"""
COLORS = {row.split()[0]: row.split()[1:] for row in PALETTES.strip().splitlines()}
RED = "#b02a2c"
YELLOW = "#d8b040"
WHITE = "#e4e4de"
DARK = "#26282c"
GLASS = "#3c4854"
WOOD = "#54463a"
SHADOW = "#0a0c2068"
LEAVES = (  # at the bottom, in the middle and at the top of the crown
    ("#2e4424", "#46602c", "#62803c"),
    ("#3c4a28", "#5c6c34", "#849048"),
    ("#6a4a24", "#96682c", "#b88c40"),
)
FENCES = (  # panel, posts and rails
    (WOOD, SHADOW),
    ("#3c5a46", SHADOW),
    (WHITE, SHADOW),
    ("#8c929428", "#8c9294"),  # a railing: transparent, but labelled as a whole, as in CamVid
)
WEATHERS = (  # colour of the sky at the top, at the horizon, strength of the sunshine
    ("#4f86c8", "#c8dcec", 0.16),
    ("#7f9fc4", "#dfe2e2", 0.1),
    ("#9aa2ac", "#d4d6d6", 0.02),
    ("#6c76a6", "#f0c49a", 0.18),
)

# What stands in the street: the maximum number on each side, metres beyond the kerb, farthest z
# divided by nearest z; then its parts: class id, palette, and outlines around the foot as arguments
# of `rect` and `disc`. CamVid has no class for bins.
FURNITURE = """
lamp 2 0.5 3
    3 post rect -0.1 0 0.1 6, rect -0.16 0 0.16 1, rect 0 5.9 1.8 6.05
light 1 0.4 1.6
    3 steel rect -0.07 0 0.07 2.2
    7 dark rect -0.25 2 0.25 3.3
    7 red disc 0 3.05 0.15
    7 yellow disc 0 2.65 0.15, disc 0 2.25 0.15
triangle 1 0.7 2
    3 steel rect -0.07 0 0.07 2.2
    7 sign disc 0 2.4 0.6 3
    7 warning disc 0 2.4 0.34 3
sign 1 0.9 1.8
    3 steel rect -0.07 0 0.07 2.2
    7 sign disc 0 2.5 0.5
    7 plate disc 0 2.5 0.3
bin 2 1.6 2
    0 paint rect -0.35 0 0.35 1.1
    0 dark rect -0.4 1 0.4 1.15
person 2 1.1 1.6
    10 paint rect -0.15 0.9 0.03 0 -0.14, rect -0.03 0.9 0.15 0 0.14
    10 coat rect -0.23 0.75 0.23 1.5, rect -0.28 1.4 -0.2 0.8 -0.06, rect 0.2 1.4 0.28 0.8 0.06
    10 hair disc 0 1.68 0.15
    10 skin disc 0.03 1.63 0.11
person 2 1.7 1.6
    10 paint rect -0.15 0.9 0.03 0 -0.14, rect -0.03 0.9 0.15 0 0.14
    10 coat rect -0.23 0.75 0.23 1.5, rect -0.28 1.4 -0.2 0.8 -0.06, rect 0.2 1.4 0.28 0.8 0.06
    10 hair disc 0 1.68 0.15
    10 skin disc 0.03 1.63 0.11
cyclist 1 -0.8 1.6
    11 dark disc -0.55 0.36 0.36, disc 0.55 0.36 0.36
    11 rim disc -0.55 0.36 0.28, disc 0.55 0.36 0.28
    11 frame rect -0.54 0.3 -0.46 0.9 0.3, rect -0.04 0.3 0.04 0.9 0.45, rect 0.46 0.3 0.54 1.1 -0.1
    11 paint rect -0.28 0.98 -0.02 0.72 0.35, rect 0.12 0.8 0.28 0.25 -0.2
    11 jacket rect -0.35 0.92 0.05 1.5 0.33, rect 0.18 1.45 0.32 1.1 0.2
    11 jacket disc 0.27 1.7 0.15
    11 skin disc 0.32 1.61 0.11
"""
ALONG = np.pi / 2  # turns an upright outline so that it runs along the street


def rect(x0, y0, x1, y1, lean=0) -> np.ndarray:
    """(n, 4, 2) outlines of rectangles; the arguments broadcast to n elements.

    lean: shift of the edge at y1 in x, which gives a parallelogram.
    """
    corners = np.broadcast_arrays(x0, y0, x1, y0, x1 + lean, y1, x0 + lean, y1)
    return np.stack(corners, axis=-1).reshape(-1, 4, 2)


def disc(x, y, radius, corners=12) -> np.ndarray:
    """(n, corners, 2) outlines of n regular polygons, each with a corner at the top."""
    angles = np.arange(corners)[:, None] * 2 * np.pi / corners
    return np.array([x + radius * np.sin(angles), y + radius * np.cos(angles)]).T


@cache
def parse_outlines(text: str) -> np.ndarray:
    """For example "rect 0 0 1 1, rect 0 1 1 2" -> (2, 4, 2) outlines."""
    outlines = []
    for shape in text.split(", "):
        kind, *numbers = shape.split()
        make: Any = rect if kind == "rect" else disc
        outlines.append(make(*map(float, numbers)))
    return np.concatenate(outlines)


@cache
def parse_furniture() -> list[tuple[list, list]]:
    """The numbers and the parts of each thing in FURNITURE."""
    things: list[tuple[list, list]] = []
    for line in FURNITURE.strip().splitlines():
        if line.startswith(" "):
            class_id, palette, text = line.split(maxsplit=2)
            things[-1][1].append((int(class_id), palette, parse_outlines(text)))
        else:
            things.append(([float(word) for word in line.split()[1:]], []))
    return things


def pick(rng: Generator, options: Any) -> Any:
    """A random option, or a random colour of a palette."""
    if isinstance(options, str):
        options = COLORS[options]
    return options[rng.integers(len(options))]


def ground(outlines: np.ndarray) -> np.ndarray:
    """(..., 2) outlines in x and z -> (..., 3) points on the ground."""
    return np.insert(outlines, 1, 0.0, axis=-1)


def upright(outlines: np.ndarray, turn=0.0, x=0.0, z=0.0) -> np.ndarray:
    """(..., 2) outlines around a foot at (x, z) -> (..., 3) points of an upright plane.

    turn: angle in radians between the plane and one that faces the camera.
    """
    across, up = outlines.T
    return np.array([x + across * np.cos(turn), up, z + across * np.sin(turn)]).T


# Each of the following functions yields the faces of one thing in the order of painting. The thing
# stands at x = 0, z = 0 until `place` moves it. side: -1 on the left of the street, 1 on the right.


def figure(rng: Generator, side: float, parts: list) -> Faces:
    """One of the FURNITURE, turned a little, with its front to the street."""
    scale = rng.uniform(0.85, 1.1) * np.array([-side, 1])
    turn = rng.uniform(-0.7, 0.7)
    yield None, SHADOW, ground(disc(0, 0, 0.4))
    for class_id, palette, outlines in parts:
        yield class_id, pick(rng, palette), upright(scale * outlines, turn)


def tree(rng: Generator) -> Faces:
    height = rng.uniform(5, 8)
    yield TREE, WOOD, upright(rect(-0.15, 0, 0.15, 3.5))
    for color, lift in zip(pick(rng, LEAVES), (0.65, 0.7, 0.77)):
        x, y, radius = height * rng.normal((0, lift, 0.1), (0.1, 0.08, 0.02), (14, 3)).T
        yield TREE, color, upright(disc(x, y, radius, 9))


def building(rng: Generator, side: float, length: float) -> Faces:
    """The gable, then the end wall and the facade, which is ``length`` long."""
    depth = 8 * side
    top = 3 * rng.integers(2, 5) + 0.6
    half_door = pick(rng, (0.5, 1.2))
    wall = pick(rng, "wall")
    trim = pick(rng, "trim")
    paint = pick(rng, "paint")
    glass = pick(rng, "glass")
    ridge = top + pick(rng, (0.1, 2.5))
    sills = np.arange(4, top - 2, 3)
    yield BUILDING, wall, upright(np.array([(0, top), (depth, top), (depth / 2, ridge)]))
    for width, turn in ((depth, 0.0), (length, ALONG)):
        columns = round(abs(width) / 2.8)
        middles = (np.arange(columns)[:, None] + 0.5) * (width / columns)
        windows = rect(middles - 0.7, sills, middles + 0.7, sills + 1.5)
        doors = rect(middles - half_door, 0.3, middles + half_door, 2.3)
        panes = np.concatenate([windows, doors])
        frames = panes + rect(-0.1, -0.1, 0.1, 0.1)
        gutter = rect(0, top - 0.3, width, top)
        yield BUILDING, wall, upright(rect(0, 0, width, top), turn)
        yield BUILDING, trim, upright(np.concatenate([gutter, frames]), turn)
        yield BUILDING, glass, upright(panes, turn)
        yield BUILDING, paint, upright(rect(0, 2.4, width, 3), turn)


def fence(rng: Generator, length: float) -> Faces:
    panel, bars = pick(rng, FENCES)
    top = rng.uniform(1.2, 1.8)
    rails = rect(0, [0.1, top - 0.15], length, [0.2, top])
    left = np.arange(0, length, 0.3)
    posts = rect(left, 0, left + 0.08, top)
    yield FENCE, panel, upright(rect(0, 0, length, top), ALONG)
    yield FENCE, bars, upright(np.concatenate([rails, posts]), ALONG)


def car(rng: Generator, x: float, z: float, lights: str) -> Faces:
    """A car or van at (x, z): one flank, strips across it from far to near, then the near end.

    `place` would not do: slopes of 45° get their light by rounding errors, which depend on z.
    """
    side = np.sign(x)
    paint = pick(rng, "paint")
    roof = pick(rng, (1.4, 1.5, 2.2))
    profile = np.array(
        [(0, 0.3), (0, 0.9), (0.6, 1), (1, roof), (3.2, roof), (3.7, 1), (4.3, 0.9), (4.3, 0.3)]
    )
    half = np.where(profile[:, 1] > 1, 0.75, 0.9)
    left = upright(profile, ALONG, x - half, z)
    right = upright(profile, ALONG, x + half, z)
    wheels = parse_outlines("disc 0.9 0.35 0.35, disc 3.4 0.35 0.35")
    yield None, SHADOW, ground(rect(x - 1.1, z - 0.3, x + 1.1, z + 4.5))
    yield CAR, paint, left if side > 0 else right  # the flank in sight
    yield CAR, GLASS, upright(rect(1, 1.05, 3.2, roof - 0.1), ALONG, x - 0.8 * side, z)
    yield CAR, DARK, upright(wheels, ALONG, x - 0.9 * side, z)
    for i in reversed(range(7)):
        strip = np.array([left[i], right[i], right[i + 1], left[i + 1]])
        yield CAR, paint, strip
        if i in (2, 4):  # rear window and windscreen
            yield CAR, GLASS, 0.85 * strip + 0.15 * strip.mean(0)
    for color, text in (
        (DARK, "rect -0.9 0.28 0.9 0.45, rect -0.9 0 -0.7 0.3, rect 0.7 0 0.9 0.3"),
        (YELLOW, "rect -0.25 0.45 0.25 0.6"),
        (lights, "rect -0.8 0.6 -0.5 0.8, rect 0.5 0.6 0.8 0.8"),
    ):
        yield CAR, color, upright(parse_outlines(text), 0, x, z - 0.02)


def pave(rng: Generator, left: float, right: float) -> Faces:
    """Woods at the horizon, then the ground with a road from x = ``left`` to ``right``."""
    middle = (left + right) / 2
    crossing = rng.uniform(8, 60)
    shade = rng.uniform(left, right)
    pavement = pick(rng, "pavement")
    asphalt = pick(rng, "asphalt")
    edge_color = pick(rng, "line")
    shady_side = 40 * pick(rng, (-1, 1))
    woods = disc(np.arange(-150, 150, 6), 0, rng.uniform(5, 14, 50))
    joints = np.geomspace(2, 40, 40)
    dashes = np.arange(crossing % 6, 99, 6) + 1
    stripes = np.arange(left + 0.4, right - 0.6)
    edges = np.array([left + 0.4, right - 0.5])
    yield TREE, "#46602c", upright(woods, z=200)
    yield SIDEWALK, pavement, ground(rect(-400, 1, 400, 400))
    yield None, "#0a0c2020", ground(rect(-30, joints, 30, 1.005 * joints))
    yield SIDEWALK, "#ccc8c0", ground(rect(left - 0.25, 1, right + 0.25, 300))
    yield ROAD, asphalt, ground(rect(left, 1, right, 300))
    yield None, WHITE, ground(rect(middle - 0.08, dashes, middle + 0.08, dashes + 3))
    yield None, WHITE, ground(rect(stripes, crossing, stripes + 0.5, crossing + 3))
    yield None, edge_color, ground(rect(edges, 1, edges + 0.1, 200))
    yield None, SHADOW, ground(rect(shade, 1, shady_side, 200))


def place(faces: Faces, x: float, z: float) -> Faces:
    """Move the faces of a thing from x = 0, z = 0 to (x, z).

    The list draws the random numbers of the thing now, before those of the next one.
    """
    return [(class_id, color, points + (x, 0, z)) for class_id, color, points in faces]


def furnish(rng: Generator, left: float, right: float) -> Iterable[tuple[float, Faces]]:
    """Everything that stands in the street: the distance and the faces."""
    for kerb in (left, right):
        side = np.sign(kerb)
        front = kerb + side * rng.uniform(2.2, 3.2)  # of the houses
        z = 3.0
        while z < 90:
            far = z + rng.uniform(9, 17)
            if rng.random() < 0.7:
                yield far, place(building(rng, side, far - z), front, z)
            else:
                yield far, place(tree(rng), front + side * 5, far)
                yield far, place(tree(rng), front + side * 2, far)
                yield far, place(fence(rng, far - z), front, z)
            z = far
        for (most, beyond, reach), parts in parse_furniture():
            x = kerb + side * beyond
            nearest = max(6, 1.8 * abs(x))  # anything nearer is out of sight
            for z in nearest * rng.uniform(1, reach, rng.integers(most + 1)):
                yield z, place(figure(rng, side, parts), x, z)
        for z in rng.uniform(8, 40, rng.integers(4)):
            yield z, place(tree(rng), kerb + side * 0.9, z)
        # The camera drives along the nearer kerb; cars on the other side come towards it.
        lights = RED if abs(kerb) < 3.5 else WHITE
        parked = kerb - side * 1.1
        moving = kerb - side * 0.3 * (right - left)
        for x, first in ((parked, 16), (moving, 9)):
            for z in rng.uniform(first, 2 * first) + 9 * np.arange(rng.integers(4)):
                yield z, list(car(rng, x, z, lights))


def paint_sky(rng: Generator, zenith: str, horizon: str, size: tuple[int, int]) -> Image.Image:
    gradient = Image.linear_gradient("L")
    image = ImageOps.colorize(gradient, zenith, horizon, whitepoint=130).resize(size)
    clouds = Image.fromarray(rng.normal(0, 100, (10, 6)).clip(0, 180).astype(np.uint8))
    image.paste("#ebebeb", mask=clouds.resize(size))
    return image


def render(rng: Generator, faces: Faces, width: int, height: int) -> tuple[Image.Image, np.ndarray]:
    """Paint the faces, the first one first, at twice the size; halving it smooths the edges."""
    zenith, horizon, sunshine = pick(rng, WEATHERS)
    focal = 1.6 * width * rng.uniform(0.9, 1.1)
    eye = rng.uniform(1.3, 1.9)
    haze = rng.uniform(100, 300)
    center_x = width * rng.uniform(0.8, 1.2)
    center_y = height * rng.uniform(0.8, 1.0)
    sun = sunshine * pick(rng, (-1, 1))
    image = paint_sky(rng, zenith, horizon, (2 * width, 2 * height))
    mask = Image.new("L", image.size, SKY)
    image_pen = ImageDraw.Draw(image, "RGBA")
    mask_pen = ImageDraw.Draw(mask)
    haze_color = np.array(ImageColor.getrgb(horizon))
    for class_id, color, points in faces:
        x, y, z = points.T  # each (corners, ...)
        # The light depends on the axis that the face is about perpendicular to.
        normal = np.ptp(points.reshape(-1, 3), axis=0).argmin()
        light = (0.8 + sun * np.sign(x.flat[0]), 1, 0.85)[normal] * rng.uniform(0.92, 1.08)
        clear = np.exp(-z.min() / haze)
        rgba = np.array(ImageColor.getcolor(color, "RGBA"))
        rgba[:3] = np.minimum(clear * light * rgba[:3] + (1 - clear) * haze_color, 255)
        fill = tuple(rgba.tolist())
        pixels = np.array([center_x + focal * x / z, center_y + focal * (eye - y) / z]).T
        for polygon in pixels.reshape(-1, 2 * len(x)).tolist():
            image_pen.polygon(polygon, fill)
            if class_id is not None:
                mask_pen.polygon(polygon, class_id)
    ids = np.asarray(mask)[::2, ::2].copy()
    return photograph(rng, image.reduce(2), ids), ids


def photograph(rng: Generator, image: Image.Image, ids: np.ndarray) -> Image.Image:
    """Apply the texture of the surfaces, sensor noise, exposure and tint."""
    texture = rng.normal(0, ROUGHNESS[ids])[..., None]
    noise = texture + rng.normal(0, 3, (*ids.shape, 3))
    exposure = rng.uniform(0.85, 1.15)
    tint = rng.uniform(0.95, 1.05, 3)
    pixels = (np.asarray(image) + noise) * exposure * tint
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def generate_scene(
    seed: int, width: int = 480, height: int = 360
) -> tuple[Image.Image, np.ndarray]:
    """The RGB image of a scene and its mask, (H, W) uint8 ids of CAMVID.

    A seed gives the same scene in every process.
    """
    rng = np.random.default_rng(seed)
    near = rng.uniform(2, 3)  # from the camera to the kerbs
    far = rng.uniform(4.5, 6)
    kerbs = (-near, far) if rng.random() < 0.5 else (-far, near)
    faces = list(pave(rng, *kerbs))
    for _, thing in sorted(furnish(rng, *kerbs), key=lambda pair: -pair[0]):
        faces += thing
    return render(rng, faces, width, height)


def generate_dataset(
    root: Path, counts: dict[str, int], size: tuple[int, int] = (480, 360)
) -> None:
    """Write ``counts[split]`` scenes to root/split and their masks to root/split_labels.

    size: width and height in pixels.
    No two splits share a scene. Raises UserError if ``root`` is neither missing nor an empty
    folder, or if it cannot be written.
    """
    seed = 0
    with atomic_folder(root) as unfinished:
        for split, count in counts.items():
            images = make_folder(unfinished / split)
            masks = make_folder(unfinished / f"{split}_labels")
            for i in range(count):
                image, ids = generate_scene(seed, *size)
                name = f"scene_{i:04d}.png"
                image.save(images / name, compress_level=1)
                Image.fromarray(CAMVID.to_rgb(ids)).save(masks / name, compress_level=1)
                seed += 1


def get_args_parser() -> Parser:
    parser = Parser(prog="python -m datasets.synthetic", description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, help="new or empty folder for the scenes"
    )
    for split, count in (("train", 200), ("val", 40), ("test", 10)):
        parser.add_argument(
            f"--{split}", type=number(int, 1), default=count, help=f"number of scenes in {split}"
        )
    parser.add_argument(
        "--size",
        type=number(int, 1, 2**14),
        nargs=2,
        default=(480, 360),
        help="width, height, pixels",
    )
    return parser


def main(args) -> None:
    counts = {"train": args.train, "val": args.val, "test": args.test}
    generate_dataset(args.out, counts, args.size)
    print(f"{sum(counts.values())} scenes in {args.out}")


if __name__ == "__main__":
    raise SystemExit(run_command(main, get_args_parser()))
