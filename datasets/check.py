"""Check a data folder before training: names, sizes, colours, and that every file can be read.

python -m datasets.check --data_root data/CamVid
python -m datasets.check --data_root mydata --write_classes     then name the classes in it
"""

from datasets.classes import ClassSet
from datasets.flags import add_data_flags, class_line, describe_data, warn_of_split
from datasets.layouts import all_pairs, find_splits
from datasets.masks import class_table, survey_masks
from datasets.spec import SplitReport
from support.command import Parser, UserError, run_command
from support.files import write_file


def summary(report: SplitReport, classes: ClassSet) -> str:
    """Counts, sizes, the share of each class in the pixels, and what is odd, as text."""
    common = report.sizes.most_common(4)
    sizes = ", ".join(f"{width}×{height} ({count})" for (height, width), count in common)
    lines = [f"{report.split}: {len(report.pairs)} pairs, {sizes}"]
    total = max(1, report.pixels.sum())
    for i, name in enumerate(classes.names):
        ignored = "  (ignored)" if i == classes.ignore_index else ""
        lines.append(f"{i:>3} {name:<20} {report.pixels[i] / total:7.2%}{ignored}")
    return "\n  ".join([*lines, *report.lines()])


def write_classes(args) -> None:
    """Write a table of the masks' colours or ids. Raises UserError if there is one already."""
    if args.data_root is None:
        raise UserError("--data_root DIR is needed, the folder of the data")
    table = args.classes or args.data_root / "class_dict.csv"
    if table.exists():
        raise UserError(f"{table} exists already; remove it first")
    splits = find_splits(args.data_root)[1]
    survey = survey_masks(pair.mask for pair in all_pairs(splits))
    text = "\n".join(class_table(args.data_root, survey)) + "\n"
    write_file(table, lambda path: path.write_text(text, encoding="utf-8"))
    print(text, end="")
    print(f"wrote {table}; now name the classes in it, and name ignored classes Void")


def get_args_parser() -> Parser:
    parser = Parser(prog="python -m datasets.check", description=__doc__)
    add_data_flags(parser)
    write_help = "write a class_dict.csv of the masks into --data_root (or --classes), and no more"
    parser.add_flags("check", ("--write_classes", bool, False, write_help))
    parser.set_defaults(max_side=0)
    return parser


def main(args) -> int:
    if args.write_classes:
        write_classes(args)
        return 0
    data = describe_data(args)
    labelled = [name for name, split in data.splits.items() if split.pairs or name != "test"]
    reports = data.check(labelled)
    first = next(iter(reports.values()))
    if first.sizes:
        print(class_line(data, first))
    for report in reports.values():
        if report.sizes:
            print(summary(report, data.classes))
    if "test" in data.splits and "test" not in labelled:
        print(f"test: left out, as its {len(data.splits['test'].unlabelled)} images have no masks")
    warn_of_split(data.splits)
    problems = data.problems(reports)
    print(f"{len(problems)} problems", *problems, sep="\n  ")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(run_command(main, get_args_parser()))
