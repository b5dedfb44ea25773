"""Segment images: for each, a mask whose pixel values are the class ids, and a coloured overlay.

python predict.py --image_dir photos               a folder, files, or patterns like 'photos/**'
python predict.py --image_dir photos --checkpoint checkpoint/unet_best.pth --tta flip
python predict.py --image_dir drive.mp4 --legend   a video: an overlay that browsers play
python predict.py --demo                           the scenes that train.py --demo generated
"""

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from datasets.classes import ClassSet
from inference.checkpoints import open_predictor
from inference.predictor import Predictor, add_inference_flags
from inference.sources import VIDEO_SUFFIXES, find_images, output_names
from output.report import Report
from output.visualize import draw_legend, mask_image, overlay_image
from support.command import Parser, UserError, number, run_command
from support.files import locked, write_file
from support.images import limited_size, read_image

DEMO = """--image_dir checkpoint/demo/scenes/test --checkpoint checkpoint/demo/unet_best.pth
--save_dir checkpoint/demo/predictions"""
# Images that are read, then predicted, then written together: each step uses all cores.
CHUNK = 8


def main(args) -> int:
    if args.demo:
        args = get_args_parser().parse_args(DEMO.split() + sys.argv[1:])
        if not args.checkpoint.is_file():
            raise UserError("there is no demo model yet; run: python train.py --demo")
    images = find_inputs(args)
    predictor = open_checkpoint(args)
    with locked(args.save_dir):
        if images[0].suffix.lower() in VIDEO_SUFFIXES:
            print(f"{args.checkpoint} on {images[0]}", flush=True)
            predict_video(images[0], predictor, args)
            return 0
        return predict_folder(images, predictor, args)


def find_inputs(args) -> list[Path]:
    """The images, or one video. Prints what is left out.

    Raises UserError if there are none, or if --save_dir is their own folder.
    """
    if args.image_dir is None:
        raise UserError("--image_dir PATH is needed: a folder, files, or a pattern (or try --demo)")
    images, left_out = find_images(args.image_dir)
    if args.save_dir.resolve() in {image.parent.resolve() for image in images}:
        raise UserError(f"--save_dir {args.save_dir} is the images' own folder; name another one")
    if left_out:
        print(left_out, file=sys.stderr)
    return images


def open_checkpoint(args) -> Predictor:
    """The trained network. Raises UserError if it does not fit --model and --num_classes."""
    predictor, config = open_predictor(args)
    for flag, known in (("model", config["model"]), ("num_classes", len(config["classes"]))):
        given = getattr(args, flag)
        if given not in (None, known):
            raise UserError(f"--{flag} {given}: {args.checkpoint} has {known}; leave it out")
    return predictor


def predict_folder(images: list[Path], predictor: Predictor, args) -> int:
    """Predict images and print what was found. Returns the exit status."""
    names = dict(zip(images, output_names(images)))
    if args.skip_existing:
        names = without_existing(names, args)
    print(f"{args.checkpoint} on {len(names)} images", flush=True)
    report = Report(predictor.classes) if args.report else None
    pixels, written, shrunk = predict_images(names, predictor, report, args)
    if written:
        print_shares(pixels, predictor.classes)
    print(f"wrote the pictures of {written} images to {args.save_dir}")
    if report:
        title = f"{args.checkpoint.stem} on {args.image_dir[0]}"
        print(f"wrote {report.write(args.report, title, pixels=pixels)}")
    if shrunk:
        print(
            f"{shrunk} of them at {predictor.max_side} pixels on the longer side, enlarged "
            f"again; --max_side 0 takes images at their own size"
        )
    unreadable = len(names) - written
    if unreadable:
        print(f"predict.py: {unreadable} of {len(names)} files could not be read", file=sys.stderr)
    return 1 if unreadable else 0


def predict_images(
    names: dict[Path, str], predictor: Predictor, report: Report | None, args
) -> tuple[np.ndarray, int, int]:
    """Write the pictures of every image under its name, and add them to the report.

    Returns the (C,) pixel counts of the classes and the numbers of written and shrunk images.
    """
    pixels = np.zeros(256, np.int64)
    written = 0
    shrunk = 0
    paths = list(names)

    def write(result: tuple[str, np.ndarray, np.ndarray]) -> None:
        write_pictures(*result, predictor.classes, args)

    with ThreadPoolExecutor() as pool, tqdm(total=len(paths), unit="image", disable=None) as bar:
        for start in range(0, len(paths), CHUNK):
            chunk = paths[start : start + CHUNK]
            readings = zip(chunk, pool.map(read_or_skip, chunk))
            images = [(names[path], image) for path, image in readings if image is not None]
            results = [(name, image, predictor.predict(image)) for name, image in images]
            list(pool.map(write, results))
            for name, image, ids in results:
                pixels += Image.fromarray(ids).histogram()
                shrunk += limited_size(ids.shape, predictor.max_side) != ids.shape
                if report:
                    report.add(name, image, ids)
            written += len(results)
            bar.update(len(chunk))
    return pixels[: len(predictor.classes)], written, shrunk


def read_or_skip(path: Path) -> np.ndarray | None:
    """The pixels of an image, or None and a message if it cannot be read."""
    try:
        return read_image(path)
    except UserError as error:
        tqdm.write(f"skipped: {error}", file=sys.stderr)
        return None


def write_pictures(name: str, image: np.ndarray, ids: np.ndarray, classes: ClassSet, args) -> None:
    """Write the mask, and with --overlay the overlay, of one image."""
    write_file(args.save_dir / f"{name}_mask.png", mask_image(ids, classes).save)
    if args.overlay:
        overlay = draw_overlay(image, ids, np.unique(ids).tolist(), classes, args)
        target = args.save_dir / f"{name}_overlay.png"
        write_file(target, lambda path: overlay.save(path, compress_level=1))


def draw_overlay(
    image: np.ndarray, ids: np.ndarray, shown: Sequence[int], classes: ClassSet, args
) -> Image.Image:
    """The image under the classes' colours; with --legend, a legend of the ``shown`` class ids."""
    overlay = overlay_image(image, ids, classes, args.alpha)
    return draw_legend(overlay, classes, shown) if args.legend else overlay


def predict_video(path: Path, predictor: Predictor, args) -> None:
    """Write NAME_overlay.mp4 with a frame in memory at a time."""
    from inference.video import VideoReader, write_video  # OpenCV, which images do not need

    video = VideoReader(path)
    target = args.save_dir / f"{path.stem}_overlay.mp4"
    classes = predictor.classes
    overlays = (
        np.asarray(draw_overlay(frame, predictor.predict(frame), classes.scored, classes, args))
        for frame in video
    )
    bar = tqdm(overlays, total=video.count or None, unit="frame", disable=None)
    count = write_video(target, bar, video.size, video.rate)
    print(f"wrote {target}, {count} frames at {video.rate:.4g} a second")


def without_existing(names: dict[Path, str], args) -> dict[Path, str]:
    """The images of which a mask, or an overlay if wanted, is missing in --save_dir."""
    kinds = ("mask", "overlay") if args.overlay else ("mask",)
    left = {
        path: name
        for path, name in names.items()
        if not all((args.save_dir / f"{name}_{kind}.png").exists() for kind in kinds)
    }
    print(f"{len(names) - len(left)} of {len(names)} images have their pictures already")
    return left


def print_shares(pixels: np.ndarray, classes: ClassSet) -> None:
    """The classes' shares of the predicted pixels, largest first."""
    share = pixels / pixels.sum()
    print("pixels of each class:")
    for i in np.argsort(-share, kind="stable"):
        if i != classes.ignore_index:
            print(f"  {classes.names[i]:<20}  {share[i]:6.1%}")


def true_or_false(text: str) -> bool:
    """An argparse type: the tutorial's ``--overlay False`` means false."""
    return bool(("false", "true").index(text.lower()))


def get_args_parser() -> Parser:
    parser = Parser(prog="predict.py", description=__doc__)
    parser.add_flags(
        "files",
        ("--save_dir", Path, Path("predictions"), "folder for the pictures"),
        ("--alpha", number(float, 0, 1), 0.5, "opacity of the colours in overlays"),
        ("--report", Path, None, "folder for index.html, a page of all images"),
        ("--legend", bool, False, "draw the classes' colours and names into overlays"),
        ("--skip_existing", bool, False, "skip images whose pictures exist"),
        ("--demo", bool, False, "predict the demo's test scenes with the demo's model"),
        ("--model", str, None, "name of the network, checked against the checkpoint"),
        ("--num_classes", int, None, "number of classes, checked against the checkpoint"),
    )
    add = parser.add_argument
    overlay = {"const": True, "default": True, "type": true_or_false}
    add("--image_dir", nargs="+", help="a folder of images, files, patterns, or a video")
    add("--overlay", nargs="?", help="write NAME_overlay.png too", **overlay)  # type: ignore
    add("--no-overlay", dest="overlay", action="store_false", help="write NAME_mask.png alone")
    add_inference_flags(parser)
    return parser


if __name__ == "__main__":
    raise SystemExit(run_command(main, get_args_parser()))
