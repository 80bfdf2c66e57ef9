"""``advmed compare``: see :mod:`advmed.report.comparison`."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``advmed compare``."""
    parser.add_argument("reports", nargs="+", type=Path, help="report.json files, or their folders")
    parser.add_argument("--metric", default=None, help="default: the first of each report")
    parser.add_argument("--attack", default=None, help="default: the first of each report")
    parser.add_argument("--baseline", default=None, help="model to compare the others with; default: the first")
    parser.add_argument("--tasks", action="store_true", help="put reports of other tasks side by side, in one figure")
    parser.add_argument(
        "--repeats",
        action="store_true",
        help="models of the same name are trainings of one, other seeds or folds, a report each: one row, the mean",
    )
    parser.add_argument(
        "--front",
        nargs="+",
        default=(),
        metavar="NAME",
        help="settings of one method in their order, names or patterns ('SAT*'): the others are compared with what "
        "these reach at the same clean value",
    )
    parser.add_argument(
        "--out", type=Path, default=None, help="write compare.md, .csv, .json and .png into this folder"
    )


def run(args: argparse.Namespace) -> int:
    """Compares the reports; returns the exit status."""
    from advmed.cli.runner import report_line
    from advmed.report.comparison import Report, compare_reports, format_sections, write_comparison

    reports = [Report.read(path) for path in args.reports]
    if len({report.path.resolve() for report in reports}) < len(reports):
        raise ValueError("a report is given twice")
    sections = compare_reports(reports, metric=args.metric, attack=args.attack, tasks=args.tasks, repeats=args.repeats)
    print(format_sections(sections, args.baseline, args.front))
    if args.out is not None:
        print(report_line(*write_comparison(args.out, sections, args.baseline, args.front)))
    return 0
