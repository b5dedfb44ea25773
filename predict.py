"""Segment images: for each, a mask whose pixel values are the class ids, and a coloured overlay.

python predict.py --image_dir photos               a folder, files, or patterns like 'photos/**'
python predict.py --image_dir photos --checkpoint checkpoint/unet_best.pth --tta flip
python predict.py --image_dir 'drives/*.mp4'       videos: overlays that browsers play
python predict.py --demo                           the scenes that train.py --demo generated
"""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from datasets.classes import ClassSet
from inference.checkpoints import open_predictor
from inference.predictor import Predictor, add_inference_flags
from inference.sources import find_inputs, output_names
from output.report import Report
from output.visualize import draw_legend, mask_image, overlay_image
from support.command import Parser, UserError, number, run_command
from support.files import every_nth, locked, make_folder, write_file
from support.images import limited_size, read_image

DEMO = """--image_dir checkpoint/demo/scenes/test --checkpoint checkpoint/demo/unet_best.pth
--save_dir checkpoint/demo/predictions --legend"""
MASK_FORMAT_HELP = """palette: values are class ids, shown in colours; ids: the same in grey, as
OpenCV needs it; color: RGB"""
CONFIDENCE_HELP = """write NAME_confidence.png too, the probability of each pixel's class as grey
values from 0 to 255, and their mean in the report"""
# Images that are read, then predicted, then written together: each step uses all cores.
CHUNK = 8


class Result(NamedTuple):
    """What was predicted for an image.

    image: (H, W, 3) uint8 RGB. ids: (H, W) uint8 class ids. confidence: (H, W) uint8
    probabilities of these classes, where 255 is 1.
    """

    name: str
    image: np.ndarray
    ids: np.ndarray
    confidence: np.ndarray


def main(args) -> int:
    if args.demo:
        args = get_args_parser().parse_args(DEMO.split() + sys.argv[1:])
        if not args.checkpoint.is_file():
            raise UserError("there is no demo model yet; run: python train.py --demo")
    images, videos = list_inputs(args)
    predictor = open_checkpoint(args)
    with locked(args.save_dir):
        status = predict_folder(images, predictor, args) if images else 0
        for path, name in zip(videos, output_names(videos) if videos else ()):
            try:
                predict_video(path, name, predictor, args)
            except UserError as error:
                print(f"skipped: {error}", file=sys.stderr)
                status = 1
        return status


def list_inputs(args) -> tuple[list[Path], list[Path]]:
    """The images and the videos. Prints what is left out.

    Raises UserError if there are none, if --save_dir is their own folder, or if nothing is asked
    for.
    """
    if args.image_dir is None:
        raise UserError("--image_dir PATH is needed: a folder, files, or a pattern (or try --demo)")
    images, videos, left_out = find_inputs(args.image_dir)
    if args.save_dir.resolve() in {path.parent.resolve() for path in images + videos}:
        raise UserError(f"--save_dir {args.save_dir} is the images' own folder; name another one")
    if videos and not args.overlay and not args.save_masks:
        raise UserError(
            f"{videos[0]}: nothing to write; add --save_masks, or leave out --no-overlay"
        )
    if videos and args.report:
        raise UserError(f"{videos[0]}: --report shows images alone; leave it out for videos")
    if left_out:
        print(left_out, file=sys.stderr)
    return images, videos


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
    if args.max_side is None:
        warn_of_large(list(names), predictor.max_side)
    report = Report(predictor.classes)
    pixels = np.zeros(256, np.int64)
    written = 0
    shrunk = 0
    for result in predict_images(names, predictor, args):
        pixels += Image.fromarray(result.ids).histogram()
        written += 1
        shrunk += limited_size(result.ids.shape, predictor.max_side) != result.ids.shape
        if args.report:
            confidence = result.confidence.mean() / 255 if args.save_confidence else None
            report.add(result.name, result.image, result.ids, confidence=confidence)
    pixels = pixels[: len(predictor.classes)]
    if written:
        print_shares(pixels, predictor.classes)
    print(f"wrote the pictures of {written} images to {args.save_dir}")
    if args.report:
        title = f"{args.checkpoint.stem} on {args.image_dir[0]}"
        print(f"wrote {report.write(args.report, title, pixels=pixels)}")
    if shrunk:
        print(
            f"{shrunk} images were predicted at {predictor.max_side} pixels on the longer side; "
            f"their masks have the full size"
        )
    unreadable = len(names) - written
    if unreadable:
        print(f"predict.py: {unreadable} of {len(names)} files could not be read", file=sys.stderr)
    return 1 if unreadable else 0


def warn_of_large(images: list[Path], max_side: int) -> None:
    """Say before the run that images are much larger than those of training. Looks at a sample."""
    for path in every_nth(images):
        with contextlib.suppress(Exception), Image.open(path) as image:  # reads the header alone
            if 0 < 2 * max_side < max(image.size):
                print(
                    f"{path}: {image.width}×{image.height} pixels are more than twice the longest "
                    f"side in training, {max_side}, to which images are shrunk; if objects are as "
                    f"large as in training, add --max_side 0",
                    flush=True,
                )
                return


def predict_images(names: dict[Path, str], predictor: Predictor, args) -> Iterator[Result]:
    """Predict every image that can be read, and write its pictures under its name."""
    paths = list(names)

    def read(path: Path) -> np.ndarray | None:
        try:
            return read_image(path, predictor.value_range)
        except UserError as error:
            tqdm.write(f"skipped: {error}", file=sys.stderr)
            return None

    def write(result: Result) -> None:
        write_mask(result, args.save_dir, predictor.classes, args)
        if args.overlay:
            write_overlay(result, args.save_dir, predictor.classes, args)

    with ThreadPoolExecutor() as pool, tqdm(total=len(paths), unit="image", disable=None) as bar:
        for start in range(0, len(paths), CHUNK):
            chunk = paths[start : start + CHUNK]
            images = zip(chunk, pool.map(read, chunk))
            results = [
                Result(names[path], image, *predictor.predict_with_confidence(image))
                for path, image in images
                if image is not None
            ]
            list(pool.map(write, results))
            yield from results
            bar.update(len(chunk))


def write_mask(result: Result, folder: Path, classes: ClassSet, args) -> None:
    """Write the mask of an image or frame, and with --save_confidence its probabilities."""
    mask = mask_image(result.ids, classes, args.mask_format)
    write_file(folder / f"{result.name}_mask.png", mask.save)
    if args.save_confidence:
        grey = Image.fromarray(result.confidence)
        write_file(folder / f"{result.name}_confidence.png", grey.save)


def write_overlay(result: Result, folder: Path, classes: ClassSet, args) -> None:
    """Write the overlay of an image."""
    shown = np.unique(result.ids).tolist()
    overlay = draw_overlay(result.image, result.ids, shown, classes, args)
    target = folder / f"{result.name}_overlay.png"
    write_file(target, lambda path: overlay.save(path, compress_level=1))


def draw_overlay(
    image: np.ndarray, ids: np.ndarray, shown: Sequence[int], classes: ClassSet, args
) -> Image.Image:
    """The image under the classes' colours; with --legend, a legend of the ``shown`` class ids."""
    overlay = overlay_image(image, ids, classes, args.alpha)
    return draw_legend(overlay, classes, shown) if args.legend else overlay


def predict_video(path: Path, name: str, predictor: Predictor, args) -> None:
    """Write NAME_overlay.mp4, and with --save_masks the masks of its frames into NAME_masks, with a
    frame in memory at a time.
    """
    from inference.video import VideoReader, write_video  # OpenCV, which images do not need

    target = args.save_dir / f"{name}_overlay.mp4"
    if args.skip_existing and target.exists():
        print(f"{target} exists already")
        return
    print(f"{args.checkpoint} on {path}", flush=True)
    video = VideoReader(path)
    classes = predictor.classes
    masks = args.save_dir / f"{name}_masks"
    if args.save_masks:
        make_folder(masks)

    def predict_frames() -> Iterator[np.ndarray]:
        for i, frame in enumerate(video):
            result = Result(f"{i:06}", frame, *predictor.predict_with_confidence(frame))
            if args.save_masks:
                write_mask(result, masks, classes, args)
            yield np.asarray(draw_overlay(frame, result.ids, classes.scored, classes, args))

    frames = iter(tqdm(predict_frames(), total=video.count or None, unit="frame", disable=None))
    if args.overlay:
        count = write_video(target, frames, video.rate)
        print(f"wrote {target}, {count} frames at {video.rate:.4g} a second")
    else:
        print(f"wrote the masks of {sum(1 for _ in frames)} frames to {masks}")


def without_existing(names: dict[Path, str], args) -> dict[Path, str]:
    """The images of which a picture that is asked for is missing in --save_dir."""
    kinds = ["mask"] + ["overlay"] * args.overlay + ["confidence"] * args.save_confidence
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
        ("--mask_format", ("palette", "ids", "color"), "palette", MASK_FORMAT_HELP),
        ("--save_confidence", bool, False, CONFIDENCE_HELP),
        ("--save_masks", bool, False, "of a video, write the masks of its frames too"),
        ("--alpha", number(float, 0, 1), 0.5, "opacity of the colours in overlays"),
        ("--report", Path, None, "folder for index.html, a page of all images"),
        (
            "--legend",
            bool,
            False,
            "draw the colours and names of the classes into overlays, or beside small ones",
        ),
        ("--skip_existing", bool, False, "skip images whose pictures exist"),
        ("--demo", bool, False, "predict the demo's test scenes with the demo's model"),
        ("--model", str.lower, None, "name of the network, checked against the checkpoint"),
        ("--num_classes", int, None, "number of classes, checked against the checkpoint"),
    )
    add = parser.add_argument
    overlay = {"const": True, "default": True, "type": true_or_false}
    add("--image_dir", nargs="+", help="folders, files, or patterns of images and videos")
    add("--overlay", nargs="?", help="write NAME_overlay.png too", **overlay)  # type: ignore
    add("--no-overlay", dest="overlay", action="store_false", help="write NAME_mask.png alone")
    add_inference_flags(parser)
    return parser


if __name__ == "__main__":
    raise SystemExit(run_command(main, get_args_parser()))
