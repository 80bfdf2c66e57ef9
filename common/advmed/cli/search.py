"""``advmed search``: the choice of delta, or of any other setting, by AUC_robust on validation data."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from advmed.cli import runner
from advmed.cli.runner import report_line
from advmed.documentation import page
from advmed.search.command import Interrupted, Stop
from advmed.search.loop import Search, claim_folder
from advmed.search.plan import Plan, Setting, fill, name_of, read_plan
from advmed.search.table import Table
from advmed.search.trials import (
    Trials,
    distributions_of,
    open_study,
    optuna_package,
    rounded,
    sampler_of,
    storage_errors,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``advmed search``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter  # another would break the path
    parser.epilog = f"search.md, of the documentation: {page('search.md')}\n{runner.DEBUG}"
    parser.add_argument("study", type=Path, metavar="STUDY.yaml", help="the study file; search.md says what it holds")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run nothing")
    parser.add_argument("--table", action="store_true", help="print the table of what has ended, and run nothing")
    parser.add_argument("--retry-failed", action="store_true", help="take trials that failed up again")
    parser.add_argument("--stop-on-failure", action="store_true", help="stop at the first trial that fails")


def run(args: argparse.Namespace) -> int:
    """Runs ``advmed search``.

    Returns:
        The exit status: 0, 1 if a trial failed, 130 if the user stopped the search.

    Raises:
        OSError, ValueError, RuntimeError, ImportError: one clear message for what is wrong.
    """
    plan = read_plan(args.study)
    if args.dry_run:
        return _dry_run(plan)
    optuna_package()
    if not args.table:
        claim_folder(plan)
    study = open_study(plan, create=not args.table)
    with storage_errors(plan):
        return _show(plan, study) if args.table else _search(plan, study, args)


def _show(plan: Plan, study: Any) -> int:
    print(Table.of(plan, list(Trials(plan, study).by_setting().values())).text())
    return 0


def _search(plan: Plan, study: Any, args: argparse.Namespace) -> int:
    stop = Stop()
    try:
        with stop.listening():
            Search(plan, study, stop).run(args.retry_failed, args.stop_on_failure)
    except Interrupted:
        print(f"Stopped. Call advmed search {args.study} again to go on where it stopped.", file=sys.stderr)
        return 130
    table = Table.of(plan, list(Trials(plan, study).by_setting().values()))
    written = table.write()
    print(f"\n{table.text()}\n\n{report_line(*written)}" + _failures(table))
    return 1 if any(trial.state == "FAILED" for trial in table.trials) else 0


def _failures(table: Table) -> str:
    """What failed and why, each in a line."""
    failed = [trial for trial in table.trials if trial.state == "FAILED"]
    if not failed:
        return ""
    lines = [f"  {t.name}: {str(t.attributes.get('error', '')).splitlines()[0].removesuffix(':')}" for t in failed]
    return "\nFailed (again with --retry-failed):\n" + "\n".join(lines)


def _dry_run(plan: Plan) -> int:
    """Prints the commands of every point of a grid, or of a setting that tpe could begin with."""
    settings: list[Setting] = plan.grid() if plan.sampler == "grid" else []
    if plan.sampler == "tpe":
        optuna = optuna_package()
        study = optuna.create_study(sampler=sampler_of(plan, 0, optuna))
        asked = study.ask(distributions_of(plan, optuna)).params
        settings = [rounded(plan, asked)]
        print(f"# {plan.trials} trials; the first:")
    for setting in settings:
        known = plan.placeholders(setting)
        known["checkpoint"] = fill(plan.checkpoint, known) if plan.checkpoint else ""
        print(f"# {name_of(setting)}")
        for name, text in plan.files.items():
            print(f"# {known['folder']}/{name}:")
            print("".join(f"#   {line}\n" for line in fill(text, known).splitlines()), end="")
        variables = [f"{name}={fill(text, known)}" for name, text in plan.environment.items()]
        for words in (plan.train, plan.evaluate):
            print(shlex.join([*variables, *(fill(word, known) for word in words)]))
    return 0
