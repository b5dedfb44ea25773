"""From the paths that a user types to images, and to the names of their outputs."""

import glob
import os
from collections import Counter
from pathlib import Path

from support.command import UserError
from support.images import IMAGE_SUFFIXES

UNREADABLE = (".heic", ".heif", ".avif")
LONGEST_NAME = 220  # bytes; file systems allow 255, and the names of the outputs are longer
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm")


def find_inputs(patterns: list[str]) -> tuple[list[Path], list[Path], str]:
    """The images and the videos of folders, files and patterns, sorted, and a line on the files
    that are left out.

    A single file is an image or a video, whatever its name. Raises UserError if there are none.
    """
    if len(patterns) == 1 and Path(patterns[0]).is_file() and not is_video(Path(patterns[0])):
        return [Path(patterns[0])], [], ""
    found: set[Path] = set()
    subfolders = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            found.update(path.glob("[!.]*"))
            if any(is_image(inner) for inner in path.glob("[!.]*/[!.]*")):
                subfolders.append(f"images in subfolders of {pattern} (give '{pattern}/**')")
        elif path.exists():
            found.add(path)
        elif matches := glob.glob(pattern, recursive=True):
            found.update(map(Path, matches))
        else:
            raise UserError(f"{pattern}: no such file or folder")
    long_names = {path for path in found if len(os.fsencode(path.name)) > LONGEST_NAME}
    found -= long_names
    images = sorted(filter(is_image, found))
    videos = sorted(filter(is_video, found))
    kinds = Counter(path.suffix.lower() for path in found)
    unread = [f"{kinds[kind]} {kind} (convert to JPEG)" for kind in UNREADABLE if kinds[kind]]
    if long_names:
        unread.append(f"{len(long_names)} with a name of more than {LONGEST_NAME} bytes")
    left_out = ", ".join(unread + subfolders)
    line = f"left out: {left_out}" if left_out else ""
    if not images and not videos:
        suffixes = " ".join((*IMAGE_SUFFIXES, *VIDEO_SUFFIXES))
        raise UserError(f"{' '.join(patterns)}: no images or videos ({suffixes}) {line}")
    return images, videos, line


def is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES


def is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES


def output_names(images: list[Path]) -> list[str]:
    """The names of the outputs: the stem, or where images share it, what distinguishes them too.

    a.jpg and a.png become a_jpg and a_png; x/a.png and y/a.png become x_a_png and y_a_png.
    """
    absolute = [Path(os.path.abspath(image)) for image in images]
    root = os.path.commonpath([path.parent for path in absolute])
    stems = Counter(image.stem.casefold() for image in images)  # some file systems ignore the case
    names = []
    for path in absolute:
        name = path.stem
        if stems[name.casefold()] > 1:
            name = os.path.relpath(path, root).replace(os.sep, "_").replace(".", "_")
        names.append(name)
    return names
