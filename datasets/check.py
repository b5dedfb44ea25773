"""Check a data folder before training: names, sizes, colours, and that every file can be read.

python -m datasets.check --data_root data/CamVid
python -m datasets.check --data_root mydata --write_classes     then name the classes in it
"""

from datasets.classes import ClassSet
from datasets.layouts import find_folders, list_splits, standard_split
from datasets.spec import DataSpec, SplitReport, add_data_flags, class_line, describe_data
from support.command import Parser, UserError, run_command
from support.files import write_file


def summary(report: SplitReport, classes: ClassSet) -> str:
    """Counts, sizes, the share of each class in the pixels, and the stray pixels, as text."""
    common = report.sizes.most_common(4)
    sizes = ", ".join(f"{width}×{height} ({count})" for (height, width), count in common)
    lines = [f"{report.split}: {len(report.pairs)} pairs, {sizes}"]
    total = max(1, report.pixels.sum())
    for i, name in enumerate(classes.names):
        ignored = "  (ignored)" if i == classes.ignore_index else ""
        lines.append(f"{i:>3} {name:<20} {report.pixels[i] / total:7.2%}{ignored}")
    if report.stray:
        lines.append(report.stray_line())
    return "\n  ".join(lines)


def warn_of_split(data: DataSpec) -> None:
    """Warn of CamVid frames that are not in the literature's split."""
    paths = [path for split in ("val", "test") for path in (data.root / split).glob("*")]
    moved = sum(standard_split(path.stem) == "train" for path in paths)
    if moved:  # as most are in Kaggle's copy, which is split at random
        print(
            f"warning: the literature trains on {moved} frames that are not in train here; with "
            f"their neighbours in train, scores are too high; python -m datasets.download --from "
            f"ARCHIVE restores the standard split"
        )


def write_classes(data: DataSpec, splits: list[str]) -> None:
    """Write a class_dict.csv of the masks' colours. Raises UserError if there is one already."""
    table = data.root / "class_dict.csv"
    if table.exists():
        raise UserError(f"{table} exists already; remove it first")
    text = "\n".join(data.color_table(splits)) + "\n"
    write_file(table, lambda path: path.write_text(text))
    print(text, end="")
    print(f"wrote {table}; now name the classes in it, and call what is to be ignored Void")


def get_args_parser() -> Parser:
    parser = Parser(prog="python -m datasets.check", description=__doc__)
    add_data_flags(parser)
    write_help = "write a class_dict.csv of the masks' colours into --data_root, and check nothing"
    parser.add_flags("check", ("--write_classes", bool, False, write_help))
    return parser


def main(args) -> int:
    data = describe_data(args)
    splits = list_splits(data.root)
    if not splits:
        find_folders(data.root, "train")  # raises the error that names what is missing
    if args.write_classes:
        write_classes(data, splits)
        return 0
    reports = data.check(splits)
    print(class_line(reports[splits[0]], data.classes))
    for report in reports.values():
        print(summary(report, data.classes))
    warn_of_split(data)
    problems = data.problems(reports)
    print(f"{len(problems)} problems", *problems, sep="\n  ")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(run_command(main, get_args_parser()))
