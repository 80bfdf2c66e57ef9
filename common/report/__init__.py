"""Reports: from evaluations to numbers, tables, curves and one page to show."""

from common.metric import Metric
from common.report.figures import Example, View
from common.report.summary import Entry, Table, findings, format_table, tabulate
from common.report.write import write_report

__all__ = ["Entry", "Example", "Metric", "Table", "View", "findings", "format_table", "tabulate", "write_report"]
