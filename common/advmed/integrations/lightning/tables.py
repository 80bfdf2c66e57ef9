"""Tables of samples, as people and their spreadsheets write them."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path


def read_table(path: Path, needed: Iterable[str]) -> list[dict[str, str]]:
    """The rows of a CSV file, its names and values stripped; with or without the mark of UTF-8 that spreadsheets write.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is no text in UTF-8, has no rows, lacks a column, or has a row with more cells than columns.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no table {path}")
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        rows = []
        try:
            for row in reader:
                if any(cell.strip() for cell in row.pop(None, ())):
                    raise ValueError(
                        f"{path} has more cells than columns in line {reader.line_num}: write decimals with a point, "
                        f"and text that holds a comma in quotation marks"
                    )
                rows.append({name.strip(): (value or "").strip() for name, value in row.items()})
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path} is no table in UTF-8, behind line {reader.line_num}: {error}") from error
    columns = list(rows[0]) if rows else []
    lacking = [name for name in needed if name not in columns]
    if lacking:
        raise ValueError(f"{path} has no column {', '.join(lacking)}; there are {', '.join(columns) or 'no rows'}")
    return rows
