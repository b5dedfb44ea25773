"""Generated street scenes in CamVid's folder layout, to try every command without the data.

    python -m datasets.synthetic --out data/synthetic
    python -m datasets.synthetic --out data/small --train 40 --val 10 --test 4 --size 240 180

Each scene is a pinhole camera in a street measured in metres: x to the right, y up, z ahead, the ground at y = 0.
Things are drawn from far to near, on the photo and the mask at once, so that both agree about what hides what.
As in CamVid's own masks, a see-through railing is labelled as a whole.
"""
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from datasets.classes import CAMVID
from datasets.street import (
    GRAIN,
    PAINTS,
    ROAD,
    SIDEWALK,
    SKY,
    VOID,
    YELLOW,
    Scene,
    building,
    car,
    clutter,
    cyclist,
    fence,
    fractal,
    ground,
    lamp,
    person,
    pick,
    sign,
    tree,
)
from runtime import OneLineParser, UserError, atomic_folder, make_folder, positive_int, run_command


def draw_sky(s: Scene) -> None:
    down = np.linspace(0, 1, 120, dtype=np.float32)[:, None, None] ** 0.8
    sky = (1 - down) * np.float32(s.zenith) + down * np.float32(s.horizon)
    clouds = 0.8 * np.clip(fractal(s.rng, 160, 120, 3, 5) * 0.5 + s.clouds - 0.4, 0, 1)[..., None]
    sky = sky + clouds * (np.float32(205 + 30 * (s.sunshine > 0.3)) - sky)
    sky = Image.fromarray(np.clip(sky, 0, 255).astype(np.uint8))
    s.photo.paste(sky.resize((s.width, round(1.1 * s.vanish[1])), Image.Resampling.BILINEAR))
    s.mask.paste(SKY, (0, 0, *s.mask.size))


def draw_ground(s: Scene) -> None:
    """Pavements, kerbs, the road with its side streets, repairs and markings, then the shadows on all of them."""
    rng, light, grey = s.rng, s.light(0, 1, 0), s.rng.uniform(70, 135)
    asphalt, kerb = pick(rng, ((grey, grey, grey + 3),), 3), pick(rng, ((170, 168, 164), (120, 120, 120)))
    paving, paint = pick(rng, ((grey * 1.5,) * 3, (168, 156, 138), (154, 124, 104))), pick(rng, ((200, 200, 194),))
    s.fill(ground(-900, 900, 0.8, 400), paving, light, SIDEWALK)
    z = np.geomspace(4, 45, 26)
    s.fill(ground(-30, 30, z, z * 1.006), paving, rng.choice((0.85, 0.95)) * light)
    for side, near in s.openings:
        s.fill(ground(s.edge(side, -0.1), s.edge(side, 60), near, near + 7), asphalt, light, ROAD)
    s.fill(ground(s.edge(-1, 0.22), s.edge(1, 0.22), 0.8, 300, 20), kerb, light, SIDEWALK)
    s.fill(ground(s.edge(-1), s.edge(1), 0.8, 300, 20), asphalt, light, ROAD)
    for x, z in rng.uniform((s.edge(-1), 4), (s.edge(1) - 2, 30), (4, 2)):
        s.fill(ground(x, x + rng.uniform(0.5, 2), z, z + rng.uniform(0.6, 6)), asphalt, rng.uniform(0.85, 1.1) * light)
    dash, period = rng.choice(((2.0, 5.0), (4.0, 6.0), (3.0, 9.0)))
    z, lines = np.arange(rng.uniform(1, period), 90, period), ((), (0.5,), (0.35, 0.6))[rng.integers(3)]
    s.fill(ground(s.centre - 0.07, s.centre + 0.07, z, z + dash), paint, light)
    for x in (s.edge(side, -inset) for side in (-1, 1) for inset in lines):
        s.fill(ground(x - 0.05, x + 0.05, 0.8, 200, 20), YELLOW if len(lines) > 1 else paint, 0.85 * light)
    if rng.random() < 0.3:
        z, x = rng.uniform(7, 20), np.arange(s.edge(-1, -0.4), s.edge(1, -0.7), 1.0)
        s.fill(ground(x, x + 0.5, z, z + 2.6), paint, light)
    shadow = Image.new("L", s.photo.size)
    for polygon in s.shadows:
        polygon[:, 2] = np.maximum(polygon[:, 2], 0.8)  # what lies behind the camera would be projected upside down
        ImageDraw.Draw(shadow).polygon(s.project(polygon).ravel().tolist(), int(min(160, 280 * s.sunshine)))
    box = (0, int(s.vanish[1]), *s.photo.size)
    s.photo.paste((18, 20, 34), box, shadow.crop(box))


def plan_side(s: Scene, side: int) -> None:
    """Line one side of the street with houses, side streets and lots behind fences, and furnish its pavement."""
    rng, z, near = s.rng, s.rng.uniform(4, 8), s.visible_from(s.edge(side, 0.6))
    reach = -9 * s.sun * (1, 0, 1) / s.sun[1]
    while z < 110:
        x, kind, length = s.edge(side, s.pavement + rng.choice((0, 0, 1.0, 2.5))), rng.random(), rng.uniform(6, 17)
        if kind < 0.12 and z > 12:
            s.openings.append((side, z))
            length = 7
        elif kind < 0.36 and z < 60:
            color = pick(rng, ((122, 92, 60), (66, 96, 72), (206, 204, 198), (88, 58, 44)))
            s.add(building, x + side * 9, z + length + 0.2, side, z)
            s.add(fence, x, z + length, length, rng.uniform(1.1, 2.0), rng.random() < 0.85, color)
            for beyond in rng.uniform(2, 6, 2):
                s.add(tree, x + side * beyond, z + length + 0.1, rng.uniform(5, 9))
        else:
            s.add(building, x, z + length, side, z)
            wall = np.array([(x, 0, z), (x, 0, z + length)])
            s.shadows.append(np.concatenate([wall, wall[::-1] + reach]))
        z += length
    for z in np.arange(near * rng.uniform(1.02, 1.4), 30, rng.uniform(10, 16)):
        s.add(lamp, s.edge(side, 0.5), z, shadow=(0.2, 6))
    for z in near * rng.uniform(1, 1.7, 2):
        s.add(sign, s.edge(side, rng.uniform(0.4, 0.9)), z, shadow=(0.3, 3))
    if rng.random() < 0.6:
        for z in np.arange(near * rng.uniform(0.9, 1.8), 50, rng.uniform(9, 18)):
            height = rng.uniform(4, 8)
            s.add(tree, s.edge(side, rng.uniform(0.7, 1.1)), z, height, shadow=(0.5 * height, height, 0.4 * height))
    if rng.random() < 0.5:
        start, color = near * rng.uniform(0.8, 1.5), pick(rng, ((84, 90, 94), (206, 208, 206), (40, 82, 60)))
        for z in np.arange(start, start + rng.uniform(6, 24), 3.0):  # short pieces, so that people stand between them
            s.add(fence, s.edge(side, 0.3), z, -3, 1.05, False, color)
    for z in near * rng.uniform(1, 3, rng.integers(0, 3)):
        s.add(clutter, s.edge(side, rng.uniform(0.8, s.pavement)), z, shadow=(0.6, 1.2))
    for z in near * rng.uniform(1, 1.4, rng.integers(2, 5)):
        s.add(person, s.edge(side, rng.uniform(0.8, s.pavement - 0.3)), z, shadow=(0.5, 1.7))
    if s.half > 3.2 and rng.random() < 0.75:
        for z in np.arange(near * rng.uniform(0.9, 2.0), 45, rng.uniform(6, 13)):
            s.add(car, s.edge(side, -1.05), z, 0.0 if side == s.traffic else np.pi)


def plan_traffic(s: Scene) -> None:
    """Moving cars, cyclists, people who cross, and houses that close the view."""
    rng = s.rng
    for x in range(-70, 70, 11):
        s.add(building, x, 160, 1, 150)
    for z in rng.uniform(9, 40, rng.integers(1, 3)):
        s.add(car, s.centre - s.traffic * 0.4 * s.half, z, np.pi)
    s.add(car, s.centre + s.traffic * 0.4 * s.half, rng.uniform(8, 30), 0.0)
    if rng.random() < 0.2:
        s.add(car, s.centre + rng.uniform(-5, 5), rng.uniform(14, 30), np.pi / 2 * rng.choice((-1, 1)))
    for _ in range(rng.choice(3, p=(0.04, 0.56, 0.4))):
        across, kerb = rng.random() < 0.5, s.edge(rng.choice((-1, 1)), -rng.uniform(0.5, 1.4))
        x = rng.uniform(s.edge(-1, -1), s.edge(1, -1)) if across else kerb
        s.add(cyclist, x, s.visible_from(x) * rng.uniform(1.1, 1.5), across, shadow=(0.4, 1.6))
    if rng.random() < 0.4:
        z = rng.uniform(7, 22)
        s.add(person, rng.uniform(-0.4, 0.4) * z, z, shadow=(0.5, 1.7))


def develop(s: Scene) -> tuple[Image.Image, np.ndarray]:
    """Halve the drawing, then add surface texture, light, lens and sensor: the photo and its (H, W) uint8 ids."""
    rng, (w, h) = s.rng, (s.width // 2, s.height // 2)
    if rng.random() < 0.25:
        s.pen.ellipse(bonnet := (-0.1 * s.width, 0.92 * s.height, 1.1 * s.width, 1.2 * s.height), pick(rng, PAINTS))
        s.label.ellipse(bonnet, VOID)
    ids, mottle = np.asarray(s.mask)[::2, ::2].copy(), fractal(rng, w, h, max(4, w // 12), 2)
    noise = rng.standard_normal((h, w + 8), np.float32)
    edges = np.zeros(ids.shape, bool)
    edges[1:, 1:] = (ids[1:, 1:] != ids[:-1, 1:]) | (ids[1:, 1:] != ids[1:, :-1])
    texture = 1 + GRAIN[ids] * (0.5 * mottle + 0.4 * noise[:, :w]) / 128
    ids[edges & (mottle > 0.5)] = VOID  # annotators leave slivers between things
    gain, bands = rng.uniform(0.9, 1.3), []
    for i, band in enumerate(s.photo.reduce(2).split()):
        pixels = texture * np.asarray(band) * np.float32(gain * s.cast[i])
        pixels += np.float32(rng.normal(0, 4)) + np.float32(rng.uniform(1, 4)) * noise[:, 3 * i:3 * i + w]
        bands.append(Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)))
    return Image.merge("RGB", bands).filter(ImageFilter.BoxBlur(rng.uniform(0.1, 0.6) * w / 480)), ids


def generate_scene(seed: int, width: int = 480, height: int = 360) -> tuple[Image.Image, np.ndarray]:
    """One scene: the RGB photo and its (H, W) uint8 ids of CAMVID; the same in every process."""
    s = Scene(seed, width, height)
    for side in (-1, 1):
        plan_side(s, side)
    plan_traffic(s)
    draw_sky(s)
    draw_ground(s)
    for _, draw, args in sorted(s.items, key=lambda item: -item[0]):
        draw(s, *args)
    return develop(s)


def generate_dataset(root: Path, counts: dict[str, int], size: tuple[int, int] = (480, 360), seed: int = 0) -> None:
    """Write ``counts[split]`` scenes of ``size`` (width, height) to root/split, their masks to root/split_labels.

    No two splits share a scene, and ``root`` appears when all are there. Raises UserError if it holds anything already,
    or ``seed`` is negative, RunError if it cannot be written.
    """
    if seed < 0:
        raise UserError(f"--seed {seed}: must be 0 or more")
    number = seed * 1_000_000
    with atomic_folder(Path(root)) as unfinished:
        for split, count in counts.items():
            folders = make_folder(unfinished / split), make_folder(unfinished / f"{split}_labels")
            for i in range(count):
                photo, ids = generate_scene(number + i, *size)
                for folder, picture in zip(folders, (photo, Image.fromarray(CAMVID.to_rgb(ids))), strict=True):
                    picture.save(folder / f"scene_{i:04d}.png", compress_level=1)
            number += count


def get_parser() -> OneLineParser:
    parser = OneLineParser(prog="python -m datasets.synthetic", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="new or empty folder for the scenes")
    for split, count in (("train", 200), ("val", 40), ("test", 10)):
        parser.add_argument(f"--{split}", type=positive_int, default=count, help=f"number of scenes in {split}")
    parser.add_argument("--size", type=positive_int, nargs=2, default=(480, 360), metavar=("W", "H"), help="pixels")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same scenes")
    return parser


def main(args) -> None:
    counts = {"train": args.train, "val": args.val, "test": args.test}
    generate_dataset(args.out, counts, tuple(args.size), args.seed)
    print(f"{sum(counts.values())} scenes in {args.out}")


if __name__ == "__main__":
    sys.exit(run_command(main, get_parser()))
