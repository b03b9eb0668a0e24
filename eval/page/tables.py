"""The table of a report: protocols in rows, checkpoints in columns; as data, in Markdown and in LaTeX."""

import math
import re
from dataclasses import dataclass, replace
from typing import Any

from skipless.common.files import printable

ORDER = (
    "knn", "linear", "segmentation", "retrieval", "clustering", "discovery", "saliency", "correspondence", "video",
    "depth",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One figure, in percent."""

    value: float
    low: float | None = None
    high: float | None = None
    """95 % interval over images."""
    spread: float | None = None
    """Standard deviation over seeds, where the figure is their mean."""
    best: bool = False
    """Above all others of its row, with an interval that does not overlap theirs."""
    careful: str = ""
    """What to know before it is compared."""

    @property
    def interval(self) -> tuple[float, float] | None:
        """That over images, or one standard deviation to both sides; None where neither was measured."""
        if self.low is not None and self.high is not None:
            return self.low, self.high
        return None if self.spread is None else (self.value - self.spread, self.value + self.spread)

    def text(self) -> str:
        """As in 56.3 (54.1-58.4), or 20.1 ± 0.8; with a † where there is something to know."""
        mark = " †" if self.careful else ""
        if self.low is not None:
            return f"{self.value:.1f} ({self.low:.1f}–{self.high:.1f}){mark}"
        return f"{self.value:.1f}" + (f" ± {self.spread:.1f}" if self.spread is not None else "") + mark


@dataclass(frozen=True)
class Row:
    """One protocol on one data set."""

    protocol: str
    data: str
    metric: str
    cells: tuple[Cell | None, ...]


@dataclass(frozen=True)
class Table:
    """All figures of all checkpoints."""

    names: tuple[str, ...]
    """Of the checkpoints, in the columns' order."""
    rows: tuple[Row, ...]

    @property
    def notes(self) -> list[str]:
        """A sentence for each figure that has a †."""
        return [
            f"† {name}, {row.protocol}: {cell.careful}."
            for row in self.rows
            for name, cell in zip(self.names, row.cells, strict=True)
            if cell is not None and cell.careful
        ]


def table_of(results: dict[str, list[dict[str, Any]]]) -> Table:
    """Results by checkpoint, as the evaluations write them, as a table."""
    rows: dict[tuple[Any, ...], dict[str, Cell]] = {}
    for name, measured in results.items():
        for result in measured:
            if result["value"] is None:
                continue
            order = ORDER.index(result["task"]) if result["task"] in ORDER else len(ORDER)
            key = (order, result["protocol"], data_of(result), result["metric"])
            rows.setdefault(key, {})[name] = cell_of(result)
    return Table(
        tuple(results),
        tuple(
            Row(protocol, data, metric, _marked([cells.get(name) for name in results]))
            for (_, protocol, data, metric), cells in sorted(rows.items(), key=lambda item: item[0])
        ),
    )


def cell_of(result: dict[str, Any]) -> Cell:
    """The figure of a result."""
    low, high = result["details"].get("interval_95") or (None, None)
    spread = result["details"].get("std")
    low, high, spread = (None if x is None else 100 * x for x in (low, high, spread))
    return Cell(100 * result["value"], low, high, spread, careful=result.get("careful", ""))


def data_of(result: dict[str, Any]) -> str:
    """As in "voc12 val SUBSET, 180 of 1,449 images"."""
    if "data" in result["details"]:
        return str(result["details"]["data"])
    official = result.get("official_images")
    if official and official != result["images"]:
        return f"{result['dataset']} {result['split']} SUBSET, {result['images']:,} of {official:,} images"
    return f"{result['dataset']} {result['split']}, {result['images']:,} images"


def markdown_table(table: Table) -> str:
    """For README files and issues; the best of a row in bold."""
    lines = [
        "| protocol | data | metric | " + " | ".join(_plain(name) for name in table.names) + " |",
        "|---|---|---|" + "---:|" * len(table.names),
    ]
    for row in table.rows:
        cells = ["" if c is None else f"**{c.text()}**" if c.best else c.text() for c in row.cells]
        about = " | ".join(map(_plain, (row.protocol, row.data, row.metric)))
        lines.append(f"| {about} | " + " | ".join(cells) + " |")
    return "\n".join(
        [
            *lines,
            "",
            "In percent; in brackets 95 % intervals over images, after ± the standard deviation over seeds.",
            "",
            *(line for note in table.notes for line in (_plain(note), "")),
        ]
    )


def latex_table(table: Table) -> str:
    """For papers; needs the package booktabs."""

    def escaped(text: str) -> str:
        special = {"&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}"}
        special |= {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}
        special |= {"±": r"$\pm$", "–": "--", "†": r"$^\dagger$"}
        return "".join(special.get(character, character) for character in printable(text))

    lines = [
        "% \\usepackage{booktabs}",
        "\\begin{tabular}{ll" + "r" * len(table.names) + "}",
        "\\toprule",
        "Protocol & Data & " + " & ".join(escaped(name) for name in table.names) + " \\\\",
        "\\midrule",
    ]
    for row in table.rows:
        texts = ["" if c is None else escaped(c.text()) for c in row.cells]
        cells = [
            f"\\textbf{{{text}}}" if c is not None and c.best else text
            for c, text in zip(row.cells, texts, strict=True)
        ]
        lines.append(f"{escaped(row.protocol)} & {escaped(row.data)} & " + " & ".join(cells) + " \\\\")
    width = 2 + len(table.names)
    notes = [f"\\multicolumn{{{width}}}{{l}}{{\\footnotesize {escaped(note)}}} \\\\" for note in table.notes]
    return "\n".join([*lines, "\\bottomrule", *notes, "\\end{tabular}", ""])


def _marked(cells: list[Cell | None]) -> tuple[Cell | None, ...]:
    measured = [c for c in cells if c is not None]
    intervals = [c.interval for c in measured]
    known = [interval for interval in intervals if interval is not None]
    if len(measured) < 2 or len(known) < len(measured):
        return tuple(cells)
    top = max(known)
    alone = all(high < top[0] for low, high in known if (low, high) != top) and known.count(top) == 1
    return tuple(c and replace(c, best=alone and c.interval == top) for c in cells)


def _plain(text: str) -> str:
    """A name as it stands in a cell of Markdown: without a meaning of its own."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", printable(text))


def usable(result: Any) -> str:
    """What keeps a result, as read from a file, from being shown; nothing where it is as the evaluations write them."""
    try:
        details, value = result["details"], result["value"]
        intervals = [
            details.get("interval_95"),
            *(entry.get("interval_95") for entry in details.get("every_block", [])),
        ]
        numbers = [0.0 if value is None else value, result["seconds"], result["images"], details.get("std") or 0.0]
        for entry in details.get("every_block", []):
            numbers += [entry["block"], entry.get("top1", entry.get("miou", entry.get("value"))) or 0.0]
        for low, high in filter(None, intervals):
            numbers += [low, high]
        for name in ("task", "protocol", "dataset", "split"):
            if not isinstance(result[name], str):
                return f"its {name} is {result[name]!r}"
        if wrong := [
            x for x in numbers if isinstance(x, bool) or not isinstance(x, int | float) or not math.isfinite(x)
        ]:
            return f"it holds {wrong[0]!r} in the place of a number"
        for name, keys in (("settings", ()), ("versions", ()), ("checkpoint", ("path", "sha256"))):
            if not isinstance(result[name], dict) or not all(isinstance(result[name][key], str) for key in keys):
                return f"its {name} is {result[name]!r}"
        return "" if {"hardware", "seed", "commit", "metric"} <= set(result) else "it lacks what a result has"
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return f"it lacks {error}" if isinstance(error, KeyError) else str(error)
