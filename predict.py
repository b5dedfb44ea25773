"""Segment images: for each, a mask whose pixel values are the class ids, and an overlay of the classes' colours.

    python predict.py --image_dir photos                        a folder, files, or patterns such as 'photos/**/*.jpg'
    python predict.py --image_dir photos --checkpoint checkpoint/unet_best.pth --tta flip --no-overlay
    python predict.py --image_dir drive.mp4 --legend            a video: an overlay that browsers play
    python predict.py --demo                                    on the scenes that train.py --demo made
"""
from support.command import Parser, UserError, number, run_command  # isort: split

import argparse
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from datasets.classes import ClassSet
from inference.predictor import Predictor, add_inference_flags, predict_stream
from inference.sources import VIDEO_SUFFIXES, find_images, output_names
from output.report import Report
from output.visualize import draw_legend, mask_image, overlay_image
from support.device import select_amp_dtype, select_device
from support.files import locked, make_folder, write_file
from support.images import limited_size, read_image
from training.checkpoints import default_checkpoint, load_predictor

DEMO = {"image_dir": ["checkpoint/demo/scenes/test"], "checkpoint": Path("checkpoint/demo/unet_best.pth"),
        "save_dir": Path("checkpoint/demo/predictions")}
# Images read ahead, and pictures waiting to be written: enough to keep the cores busy, flat in memory.
IN_FLIGHT = min(8, max(4, os.cpu_count() or 1))


def yes_or_no(text: str) -> bool:
    """An argparse type: the tutorial's ``--overlay False`` means false."""
    values = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return values[text.lower()]


def get_args_parser() -> Parser:
    parser = Parser(prog="predict.py", description=__doc__)
    add = parser.add_argument_group("files").add_argument
    add("--image_dir", nargs="+", metavar="PATH", help="a folder of images, files, patterns, or a video")
    add("--save_dir", type=Path, default=Path("predictions"), metavar="DIR", help="for NAME_mask.png, NAME_overlay.png")
    add("--overlay", type=yes_or_no, nargs="?", const=True, default=True, metavar="BOOL", help="write overlays")
    add("--no-overlay", dest="overlay", action="store_false", default=argparse.SUPPRESS, help="write masks alone")
    add("--alpha", type=number(float, 0, 1), default=0.5, help="opacity of the colours in overlays")
    add("--report", type=Path, metavar="DIR", help="folder for index.html, a page of all images")
    add("--legend", action="store_true", help="draw the classes' colours and names into overlays, "
        "names in Latin, Greek or Cyrillic letters")
    add("--skip_existing", action="store_true", help="leave out images whose pictures are there")
    add("--demo", action="store_true", help="predict the demo's test scenes with the demo's model")
    add_inference_flags(parser)
    add = parser.add_argument_group("checked against the checkpoint, which knows them").add_argument
    add("--model", metavar="NAME", help="network")
    add("--num_classes", type=int, metavar="N", help="number of classes, the ignored one included")
    return parser


def in_background(pool: ThreadPoolExecutor, function: Callable, items: Iterable) -> Iterator[tuple[Any, Future]]:
    """Each item with its ``function(item)``, in their order; the pool computes IN_FLIGHT of them ahead."""
    waiting: deque[tuple[Any, Future]] = deque()
    for item in items:
        waiting.append((item, pool.submit(function, item)))
        if len(waiting) > IN_FLIGHT:
            yield waiting.popleft()
    yield from waiting


def draw_overlay(image: np.ndarray, ids: np.ndarray, shown: Sequence[int], classes: ClassSet, args) -> Image.Image:
    """The image under the classes' colours, with --alpha, and with --legend a legend of the ``shown`` class ids."""
    overlay = overlay_image(image, ids, classes, args.alpha)
    return draw_legend(overlay, classes, shown) if args.legend else overlay


def predict_images(names: dict[Path, str], predictor: Predictor, classes: ClassSet, report: Report,
                   args) -> tuple[np.ndarray, int, int]:
    """Write the pictures of every image under its name, and add them to the report if --report asks for it.

    Returns the (C,) pixel counts and the numbers of broken and of shrunk images.
    """
    pixels, broken, shrunk = np.zeros(len(classes), np.int64), 0, 0

    def readable() -> Iterator[tuple[str, np.ndarray]]:
        nonlocal broken
        for path, reading in in_background(pool, read_image, names):
            try:
                image = reading.result()
            except UserError as error:
                broken += 1
                bar.update()
                tqdm.write(f"skipped: {error}", file=sys.stderr)
            else:
                yield names[path], image

    def write(item: tuple[str, np.ndarray, np.ndarray]) -> None:
        name, image, ids = item
        write_file(args.save_dir / f"{name}_mask.png", mask_image(ids, classes).save)
        if args.overlay:
            overlay = draw_overlay(image, ids, np.unique(ids).tolist(), classes, args)
            write_file(args.save_dir / f"{name}_overlay.png", lambda path: overlay.save(path, compress_level=1))

    with ThreadPoolExecutor() as pool, tqdm(total=len(names), unit="image", disable=None) as bar:
        predictions = predict_stream(predictor, readable(), args.batch_size)
        for (name, image, ids), writing in in_background(pool, write, predictions):
            writing.result()
            for row in ids:  # at once it would take eight bytes a pixel
                pixels += np.bincount(row, minlength=len(classes))
            shrunk += limited_size(ids.shape, predictor.max_side) != ids.shape
            if args.report:
                report.add(name, image, ids)
            bar.update()
    return pixels, broken, shrunk


def predict_video(path: Path, predictor: Predictor, classes: ClassSet, args) -> int:
    """Write NAME_overlay.mp4 with a few frames in memory at a time. Returns the exit status."""
    from inference.video import VideoReader, write_video  # OpenCV, which images do without

    video, target = VideoReader(path), args.save_dir / f"{path.stem}_overlay.mp4"
    frames = predict_stream(predictor, (("", frame) for frame in video), args.batch_size)
    overlays = (np.asarray(draw_overlay(frame, ids, classes.scored, classes, args)) for _, frame, ids in frames)
    bar = tqdm(overlays, total=video.count or None, unit="frame", disable=None)
    count = write_video(target, bar, video.size, video.rate)
    print(f"wrote {target}, {count} frames at {video.rate:.4g} a second")
    cut_short = video.count - count > video.rate  # a second: some files announce as many as their sound is long
    if cut_short:
        print(f"predict.py: {path} announces {video.count} frames; it may be cut short", file=sys.stderr)
    return int(cut_short)


def print_shares(pixels: np.ndarray, classes: ClassSet) -> None:
    """A table of the classes' pixel shares, largest first, with a warning where one class is nearly everything."""
    share, wide = pixels / max(1, pixels.sum()), max(map(len, classes.names))
    print("pixels of each class:")
    for i in np.argsort(-share, kind="stable"):
        if i != classes.ignore_index:
            print(f"  {classes.names[i]:<{wide}}  {share[i]:6.1%}")
    if share.max() > 0.99:
        print(f"warning: {classes.names[share.argmax()]} holds {share.max():.1%} of all pixels: the model may be "
              f"barely trained, or these images unlike its training data", file=sys.stderr)


def without_existing(names: dict[Path, str], args) -> dict[Path, str]:
    """The images of which a mask, or an overlay that is asked for, is missing in --save_dir."""
    kinds = ("mask", "overlay") if args.overlay else ("mask",)
    left = {path: name for path, name in names.items()
            if not all((args.save_dir / f"{name}_{kind}.png").exists() for kind in kinds)}
    print(f"{len(names) - len(left)} of {len(names)} images have their pictures already")
    return left


def open_checkpoint(path: Path, args) -> tuple[Predictor, ClassSet]:
    """The network and its classes. Raises UserError if they are not those of --model and --num_classes."""
    device = select_device(args.device)
    predictor, classes, config = load_predictor(path, args.max_side, device=device, tile=args.tile, tta=args.tta,
                                                amp_dtype=select_amp_dtype(args.amp, device))
    for flag, known in (("model", config["model"]["name"]), ("num_classes", len(classes))):
        if getattr(args, flag) not in (None, known):
            raise UserError(f"--{flag} {getattr(args, flag)}: {path} has {known}; leave it out")
    return predictor, classes


def main(args) -> int:
    if args.image_dir is None:
        raise UserError("--image_dir PATH is needed: a folder of images, one file, or a pattern (or try --demo)")
    if args.demo and not args.checkpoint.is_file():
        raise UserError(f"{args.checkpoint}: there is no demo model yet; run: python train.py --demo")
    if args.report and args.skip_existing:
        raise UserError("--report shows all images, --skip_existing predicts some; give one of them")
    images, left_out = find_images(args.image_dir)
    video = images[0] if images[0].suffix.lower() in VIDEO_SUFFIXES else None
    if video and (args.report or args.skip_existing or not args.overlay):
        raise UserError(f"{video}: of a video there is an overlay alone; leave out --report, --skip_existing and "
                        f"--no-overlay")
    if args.save_dir.resolve() in {folder.resolve() for folder in {image.parent for image in images}}:
        raise UserError(f"--save_dir {args.save_dir}: is the images' own folder; give another one")
    names = dict(zip(images, output_names(images)))
    args.checkpoint = args.checkpoint or default_checkpoint()
    predictor, classes = open_checkpoint(args.checkpoint, args)
    with locked(args.save_dir):
        if left_out:
            print(left_out, file=sys.stderr)
        if video:
            print(f"{args.checkpoint} on {video}", flush=True)
            return predict_video(video, predictor, classes, args)
        return run(names, predictor, classes, args)


def run(names: dict[Path, str], predictor: Predictor, classes: ClassSet, args) -> int:
    """Predict the images, under these names, and say what was found. Returns the exit status."""
    if args.report:
        make_folder(args.report)
    names = without_existing(names, args) if args.skip_existing else names
    print(f"{args.checkpoint} on {len(names)} image{'s' * (len(names) != 1)}", flush=True)
    report = Report(classes)
    pixels, broken, shrunk = predict_images(names, predictor, classes, report, args)
    done = len(names) - broken
    if done:
        print_shares(pixels, classes)
    print(f"wrote {done} mask{'s' * (done != 1)}{f' and {done} overlay' + 's' * (done != 1) if args.overlay else ''} "
          f"to {args.save_dir}")
    if args.report:
        title = f"{args.checkpoint.stem} on {args.image_dir[0]}{' …' * (len(args.image_dir) > 1)}"
        print(f"wrote {report.write(args.report, title, pixels=pixels)}")
    if shrunk:
        print(f"{shrunk} of them at {predictor.max_side} pixels on the longer side, enlarged again; --max_side 0 takes "
              f"images at their own size")
    if broken:
        print(f"predict.py: {broken} of {len(names)} files could not be read", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    parser = get_args_parser()
    if "--demo" in sys.argv:
        parser.set_defaults(**DEMO)
    raise SystemExit(run_command(main, parser))
