"""Reports: from evaluations to numbers, tables, curves and one page to show."""

from advmed.evaluation.metric import Metric
from advmed.evaluation.subjects import Entry
from advmed.report.figures import Example, View
from advmed.report.summary import Table, findings, format_table, tabulate
from advmed.report.writer import write_report

__all__ = ["Entry", "Example", "Metric", "Table", "View", "findings", "format_table", "tabulate", "write_report"]
