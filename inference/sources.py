"""From what a user types to the images, and to the names of their outputs."""
import glob
import os
import shlex
from collections import Counter
from pathlib import Path

from support.command import UserError
from support.images import IMAGE_SUFFIXES

UNREADABLE = (".heic", ".heif", ".avif", ".jxl", ".jp2", ".gif", ".svg", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raw")
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm")


def identity(path: Path) -> tuple[Path, str]:
    """Equal for two ways to one name in one folder; a link to a file is a name of its own."""
    return path.parent.resolve(), path.name


def find_images(patterns: list[str]) -> tuple[list[Path], str]:
    """The images of folders, files and patterns, sorted, and a line on what lies there and is left out.

    A single file is taken whatever its name. Raises UserError if there are none.
    """
    if len(patterns) == 1 and Path(patterns[0]).is_file():
        return [Path(patterns[0])], ""
    names: list[Path] = []
    deeper: dict[Path, set] = {}
    for pattern in patterns:
        path = Path(pattern)
        found = ([child for child in path.iterdir() if not child.name.startswith(".")] if path.is_dir() else
                 [path] if path.is_file() else [*map(Path, glob.glob(pattern, recursive=True))])
        if not found and not path.is_dir():
            raise UserError(f"{pattern}: no such file or folder")
        names += found
        if path.is_dir():
            deeper[path] = {identity(name) for name in path.glob("[!.]*/[!.]*")
                            if name.suffix.lower() in IMAGE_SUFFIXES}
    # A pattern with ** follows links to folders, in circles too: each file once, by its shortest way.
    names.sort(key=lambda name: -len(name.parts))
    taken = {identity(name): name for name in names}
    names, missed = [*taken.values()], {path: len(inner - taken.keys()) for path, inner in deeper.items()}
    images = sorted(name for name in names if name.suffix.lower() in IMAGE_SUFFIXES)
    kinds = Counter(name.suffix.lower() for name in names)
    known = (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES, *UNREADABLE)
    other = [name for name in patterns if Path(name).is_file() and Path(name).suffix.lower() not in known]
    left = [*(f"{kinds[kind]} {kind} (give a video by its name)" for kind in VIDEO_SUFFIXES if kinds[kind]),
            *(f"{kinds[kind]} {kind} (not read; convert to JPEG or PNG)" for kind in UNREADABLE if kinds[kind]),
            *(f"{name} (of an unknown kind; give it alone)" for name in other[:3]),
            *(f"{count} image{'s' * (count != 1)} in subfolders (give {shlex.quote(f'{glob.escape(str(path))}/**')})"
              for path, count in missed.items() if count)]
    line = f"left out: {', '.join(left)}" if left else ""
    if not images:
        raise UserError(f"{' '.join(patterns)}: no images in it ({' '.join(IMAGE_SUFFIXES)})"
                        f"{f'; {line}' if line else ''}")
    return images, line


def output_names(images: list[Path]) -> list[str]:
    """The names of the outputs: the stem, or where images share it, what tells them apart as well.

    a.jpg and a.png become a_jpg and a_png; x/a.png and y/a.png become x_a_png and y_a_png.
    """
    absolute = {image: Path(os.path.abspath(image)) for image in images}  # .. would become __
    root = os.path.commonpath([path.parent for path in absolute.values()])
    stems = Counter(image.stem.casefold() for image in images)  # some file systems ignore the case of a name
    names = [image.stem if stems[image.stem.casefold()] == 1 else
             os.path.relpath(absolute[image], root).replace(os.sep, "_").replace(".", "_") for image in images]
    name, count = Counter(map(str.casefold, names)).most_common(1)[0]
    if count > 1:
        raise UserError(f"the outputs of {count} images would be called {name}; rename one")
    return names
