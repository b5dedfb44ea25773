"""Segment photographs: for each, a mask whose pixel values are the class ids, and an overlay of the class colours.

    python predict.py --image_dir photos                        a folder, a file or a quoted pattern: 'photos/*.jpg'
    python predict.py --image_dir photos --checkpoint checkpoint/unet_best.pth --tta flip --no-overlay
    python predict.py --image_dir drive.mp4 --legend            a video: an overlay of the same size and rate
    python predict.py --demo                                    on the scenes that train.py --demo made
"""
import argparse
import glob
import os
import sys
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from checkpoints import default_checkpoint, load_model
from datasets.camvid import PHOTO_SUFFIXES, read_photo, resize_photo
from datasets.classes import ClassSet
from inference import TILE, Predictor, add_inference_flags, predictor_from_flags
from report import Report
from runtime import (
    OneLineParser,
    UserError,
    atomic_path,
    keep_freed_memory,
    make_folder,
    number_in,
    run_command,
    select_device,
)
from visualize import draw_legend, mask_image, overlay_image

DEMO = {"image_dir": "checkpoint/demo/scenes/test", "checkpoint": Path("checkpoint/demo/unet_best.pth"),
        "save_dir": Path("checkpoint/demo/predictions")}
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm")
# Photographs read ahead, and pictures waiting to be written: enough to keep the cores busy, flat in memory.
IN_FLIGHT = min(8, max(4, os.cpu_count() or 1))


def yes_or_no(text: str) -> bool:
    """An argparse type: the tutorial's ``--overlay False`` means false."""
    values = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return values[text.lower()]


def get_args_parser() -> OneLineParser:
    parser = OneLineParser(prog="predict.py", description=__doc__.splitlines()[0])
    group = parser.add_argument_group("files")
    group.add_argument("--image_dir", metavar="PATH",
                       help="a folder of photographs, one file, a video, or a quoted pattern")
    group.add_argument("--save_dir", type=Path, default=Path("predictions"), metavar="DIR",
                       help="folder for NAME_mask.png and NAME_overlay.png")
    group.add_argument("--overlay", type=yes_or_no, nargs="?", const=True, default=True, metavar="BOOL",
                       help="write overlays")
    group.add_argument("--no-overlay", dest="overlay", action="store_false", default=argparse.SUPPRESS,
                       help="write masks alone")
    group.add_argument("--alpha", type=number_in(0, 1), default=0.5, help="opacity of the colours in overlays")
    group.add_argument("--report", type=Path, metavar="DIR", help="folder for index.html, a page of all pictures")
    group.add_argument("--legend", action="store_true", help="draw the classes' names and colours into overlays")
    group.add_argument("--skip_existing", action="store_true", help="leave out photographs whose pictures are there")
    group.add_argument("--demo", action="store_true", help="predict the demo's test scenes with the demo's model")
    add_inference_flags(parser)
    return parser


def find_photos(pattern: str) -> list[Path]:
    """The photographs of a folder, file or pattern, sorted. Raises UserError if there are none."""
    path = Path(pattern)
    if path.is_file():
        return [path]
    if path.is_dir():
        names = path.iterdir()
    else:  # a pattern with ** follows links to folders, in circles too: each file once, by its shortest way
        found = sorted(map(Path, glob.glob(pattern, recursive=True)), key=lambda name: -len(name.parts))
        names = {(os.path.realpath(name.parent), name.name): name for name in found}.values()
    photos = sorted(name for name in names if name.suffix.lower() in PHOTO_SUFFIXES and not name.name.startswith("."))
    if not photos:
        what = "no photographs in it" if path.is_dir() else "no such file or folder"
        raise UserError(f"--image_dir {pattern}: {what} ({' '.join(PHOTO_SUFFIXES)})")
    return photos


def output_names(photos: list[Path]) -> list[str]:
    """The names of the outputs: the stem, or where photographs share it, what tells them apart as well.

    a.jpg and a.png become a_jpg and a_png; x/a.png and y/a.png become x_a_png and y_a_png.
    """
    def shared(names: list[str]) -> set[str]:
        # Some file systems ignore the case of a name.
        counts = Counter(name.casefold() for name in names)
        return {name for name in names if counts[name.casefold()] > 1}
    names = [photo.stem for photo in photos]
    root = os.path.commonpath([photo.absolute().parent for photo in photos])
    for fuller in (lambda photo: photo.name, lambda photo: os.path.relpath(photo.absolute(), root)):
        clashes = shared(names)
        names = [fuller(photo).replace(os.sep, "_").replace(".", "_") if name in clashes else name
                 for photo, name in zip(photos, names)]
    if shared(names):
        raise UserError(f"the outputs of several photographs would be called {shared(names).pop()}; rename one")
    return names


def read_ahead(pool: ThreadPoolExecutor, photos: list[Path]) -> Iterator[tuple[Path, np.ndarray | UserError]]:
    """(path, (H, W, 3) uint8 photograph or its error) in order, decoded in the background."""
    def read(path: Path) -> np.ndarray | UserError:
        try:
            return read_photo(path)
        except UserError as error:
            return error
    waiting: deque[tuple[Path, Future]] = deque()
    for path in photos:
        waiting.append((path, pool.submit(read, path)))
        if len(waiting) > IN_FLIGHT:
            first, future = waiting.popleft()
            yield first, future.result()
    for path, future in waiting:
        yield path, future.result()


def batches(items: Iterator, batch_size: int, max_pixels: int) -> Iterator[list]:
    """Lists of (name, photograph) of one size, at most ``batch_size`` and, but for a single one, ``max_pixels``."""
    batch: list = []
    for item in items:
        height, width = item[1].shape[:2]
        if batch and (batch[0][1].shape != item[1].shape or len(batch) == batch_size
                      or (len(batch) + 1) * height * width > max_pixels):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def draw_overlay(photo: np.ndarray, ids: np.ndarray, classes: ClassSet, args) -> Image.Image:
    overlay = overlay_image(photo, ids, classes, args.alpha)
    return draw_legend(overlay, classes) if args.legend else overlay


def write(name: str, photo: np.ndarray, ids: np.ndarray, classes: ClassSet, args) -> None:
    """Write NAME_mask.png and NAME_overlay.png."""
    with atomic_path(args.save_dir / f"{name}_mask.png") as temporary:
        mask_image(ids, classes).save(temporary)
    if args.overlay:
        with atomic_path(args.save_dir / f"{name}_overlay.png") as temporary:
            draw_overlay(photo, ids, classes, args).save(temporary, compress_level=1)


def predict_all(names: dict[Path, str], predictor: Predictor, classes: ClassSet, image_size: tuple[int, int] | None,
                args: argparse.Namespace, report: Report) -> tuple[np.ndarray, int, int]:
    """Write the pictures of every photograph under its name; gather them in ``report`` where --report asks for it.

    Returns the (C,) pixel counts and the numbers of broken and of shrunk files.
    """
    pixels, broken, shrunk = np.zeros(len(classes), np.int64), 0, 0
    max_pixels = (args.tile or TILE) ** 2

    def readable(pool: ThreadPoolExecutor, bar: tqdm) -> Iterator[tuple[str, np.ndarray]]:
        nonlocal broken
        for path, photo in read_ahead(pool, list(names)):
            if isinstance(photo, UserError):
                broken += 1
                bar.update()
                tqdm.write(f"skipped: {photo}", file=sys.stderr)
            else:
                yield names[path], photo

    writing: deque[Future] = deque()
    with ThreadPoolExecutor() as pool, tqdm(total=len(names), unit="image", disable=None) as bar:
        for batch in batches(readable(pool, bar), args.batch_size, max_pixels):
            size = batch[0][1].shape[:2]
            shrunk += len(batch) * predictor.shrinks(image_size or size)
            images = predictor.prepare([resize_photo(photo, image_size) for _, photo in batch])
            for (name, photo), ids in zip(batch, predictor(images, size).to(torch.uint8).cpu().numpy()):
                pixels += np.bincount(ids.ravel(), minlength=len(classes))
                writing.append(pool.submit(write, name, photo, ids, classes, args))
                if args.report:
                    report.add(name, photo, ids)
            while len(writing) > IN_FLIGHT:
                writing.popleft().result()
            bar.update(len(batch))
        for future in writing:
            future.result()
    return pixels, broken, shrunk


def predict_video(path: Path, predictor: Predictor, classes: ClassSet, image_size: tuple[int, int] | None,
                  args: argparse.Namespace) -> int:
    """Write NAME_overlay.mp4, streaming: a few frames are in memory. Returns the exit status."""
    from video import VideoReader, write_video  # OpenCV, which photographs do without

    video = VideoReader(path)

    def overlays(pool: ThreadPoolExecutor) -> Iterator[np.ndarray]:
        frames = batches((("", frame) for frame in video), args.batch_size, (args.tile or TILE) ** 2)
        following = pool.submit(next, frames, None)  # decoded while the network runs
        while batch := following.result():
            following = pool.submit(next, frames, None)
            images = predictor.prepare([resize_photo(frame, image_size) for _, frame in batch])
            for (_, frame), ids in zip(batch, predictor(images, video.size).to(torch.uint8).cpu().numpy()):
                yield np.asarray(draw_overlay(frame, ids, classes, args))

    target = args.save_dir / f"{path.stem}_overlay.mp4"
    with ThreadPoolExecutor(1) as pool:
        bar = tqdm(overlays(pool), total=video.count or None, unit="frame", disable=None)
        count = write_video(target, bar, video.size, video.rate)
    print(f"wrote {target}, {count} frames at {video.rate:.4g} a second")
    if count < video.count:
        print(f"predict.py: {path} announces {video.count} frames; it may be cut short", file=sys.stderr)
    return 1 if count < video.count else 0


def print_shares(pixels: np.ndarray, classes: ClassSet) -> None:
    """The pixel share of each class, largest first, with a warning where one class is nearly everything."""
    share = pixels / max(1, pixels.sum())
    print("pixels of each class: " + ", ".join(f"{classes.names[i]} {share[i]:.1%}" for i in np.argsort(-share)
                                               if i != classes.ignore_index))
    if share.max() > 0.99:
        print(f"warning: {classes.names[share.argmax()]} holds {share.max():.1%} of all pixels: the model may be "
              f"barely trained, or these photographs unlike its training data", file=sys.stderr)


def main(args) -> int:
    if args.image_dir is None:
        raise UserError("--image_dir PATH is needed: a folder of photographs, one file, or a pattern (or try --demo)")
    if args.demo and not args.checkpoint.is_file():
        raise UserError(f"{args.checkpoint}: there is no demo model yet; run: python train.py --demo")
    photos = find_photos(args.image_dir)
    device = select_device(args.device)
    if device.type == "cpu":
        keep_freed_memory()
    checkpoint = args.checkpoint or default_checkpoint()
    model, classes, config = load_model(checkpoint)
    if args.save_dir.resolve() in {folder.resolve() for folder in {photo.parent for photo in photos}}:
        raise UserError(f"--save_dir {args.save_dir}: is the photographs' own folder; give another one")
    make_folder(args.save_dir)
    if args.report:
        make_folder(args.report)
    names = dict(zip(photos, output_names(photos)))
    if args.skip_existing:
        kinds = ("mask", "overlay") if args.overlay else ("mask",)
        names = {photo: name for photo, name in names.items()
                 if not all((args.save_dir / f"{name}_{kind}.png").exists() for kind in kinds)}
        print(f"{len(photos) - len(names)} of {len(photos)} photographs have their pictures already")
        if not names:
            return 0
    predictor = predictor_from_flags(args, model, classes.ignore_index, config, device)
    if photos[0].suffix.lower() in VIDEO_SUFFIXES:
        if not args.overlay:
            raise UserError(f"{photos[0]}: of a video there is an overlay alone; leave --no-overlay out")
        print(f"{checkpoint} on {photos[0]}", flush=True)
        return predict_video(photos[0], predictor, classes, config["train"].get("image_size"), args)
    print(f"{checkpoint} on {len(names)} photograph{'s' * (len(names) > 1)}", flush=True)
    report = Report(classes)
    pixels, broken, shrunk = predict_all(names, predictor, classes, config["train"].get("image_size"), args,
                                         report)
    done = len(names) - broken
    if done:
        print_shares(pixels, classes)
    print(f"wrote {done} mask{'s' * (done != 1)}{' and as many overlays' * args.overlay} to {args.save_dir}")
    if args.report:
        print(f"wrote {report.write(args.report, f'{checkpoint.stem} on {args.image_dir}', pixels=pixels)}")
    if shrunk:
        print(f"{shrunk} of them at {predictor.max_side} pixels on the longer side, enlarged again; --max_side 0 takes "
              f"photographs at their own size")
    if broken:
        print(f"predict.py: {broken} of {len(names)} files could not be read", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    parser = get_args_parser()
    if "--demo" in sys.argv:
        parser.set_defaults(**DEMO)
    raise SystemExit(run_command(main, parser))
