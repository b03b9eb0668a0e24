"""The conditioning of models, block by block, as a table and as a figure."""

import itertools
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D

from skipless.eval.figures.pictures import save_figure
from skipless.eval.spectra import TOLERANCE

# Title and axis of every measure, in the order of the table and of the figure's panels.
MEASURES: dict[str, tuple[str, str]] = {
    "attention_condition": ("attention Jacobian: condition number", "log"),
    "attention_small_share": ("attention Jacobian: part below 1 % of the largest", "linear"),
    "attention_smallest": ("attention Jacobian: smallest singular value", "log"),
    "attention_largest": ("attention Jacobian: largest singular value", "log"),
    "mlp_condition": ("MLP Jacobian: condition number", "log"),
    "mlp_small_share": ("MLP Jacobian: part below 1 % of the largest", "linear"),
    "mlp_smallest": ("MLP Jacobian: smallest singular value", "log"),
    "mlp_largest": ("MLP Jacobian: largest singular value", "log"),
    "value_output_condition": ("W_V W_O: condition number", "log"),
    "value_output_smallest": ("W_V W_O: smallest singular value", "log"),
    "value_output_largest": ("W_V W_O: largest singular value", "log"),
    "attention_entropy": ("entropy of attention / ln N", "linear"),
    "diagonal_share": ("attention on the diagonal", "linear"),
    "diagonal_gap": ("logits: diagonal - mean of others", "linear"),
    "diagonal_margin": ("logits: diagonal - largest other", "linear"),
    "kurtosis": ("excess kurtosis of tokens", "asinh"),
    "mean_share": ("mean share of patch tokens", "linear"),
    "effective_rank": ("effective rank of patch tokens", "linear"),
    "parameter_gradient": ("gradient norm, block's parameters", "log"),
    "token_gradient": ("gradient norm, block's input tokens", "log"),
}

LEGEND = "What is measured, and how: docs/conditioning.md."
BOUNDS = (
    "K is the Jacobian of a block's attention or MLP with respect to its normalized input. ≥ and ≤ stand before what "
    "is no more than a bound: two bounds do not tell which is worse."
)

# Okabe and Ito's palette, told apart by color-blind readers as well; markers tell the lines apart in gray.
COLORS = ("#000000", "#D55E00", "#0072B2", "#E69F00", "#CC79A7", "#009E73", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

Statistics = dict[str, list[float]]


def table(statistics: dict[str, Statistics]) -> str:
    """Markdown: for each measure a line for each model and a column for every second block and the first.

    Lines of K + I, a residual block's Jacobian with its skip, stand below those of K. A bound is written as one.
    """
    depth = max(len(values["mean_share"]) for values in statistics.values())
    blocks = sorted({0, *range(1, depth, 2), depth - 1})
    lines = []
    for measure, (title, _) in MEASURES.items():
        rows = [
            (name + suffix, values, key)
            for key, suffix in ((measure, ""), (_with_skip(measure), ": with its skip (K + I)"))
            for name, values in statistics.items()
            if key in values
        ]
        if not rows:
            continue
        lines += [f"### {title[0].upper()}{title[1:]}", ""]
        lines.append("| model | " + " | ".join(f"block {b + 1}" for b in blocks) + " |")
        lines.append("|---|" + "---|" * len(blocks))
        for label, values, key in rows:
            cells = [_cell(values, key, b) if b < len(values[key]) else "" for b in blocks]
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _with_skip(measure: str) -> str:
    """The key of the same measure of K + I."""
    branch, _, rest = measure.partition("_")
    return f"{branch}_skip_{rest}"


def _is_bound(values: Statistics, key: str, block: int) -> bool:
    stem, _, end = key.rpartition("_")
    errors = values.get(f"{stem}_smallest_error")
    return end in ("smallest", "condition") and errors is not None and errors[block] > TOLERANCE


def _cell(values: Statistics, key: str, block: int) -> str:
    sign = "" if not _is_bound(values, key, block) else "≥ " if key.endswith("condition") else "≤ "
    return f"{sign}{values[key][block]:.3g}"


def draw_conditioning(statistics: dict[str, Statistics], title: str, out: Path) -> None:
    """Write a figure with a panel for each measure and a line for each model over depth.

    Dotted lines are K + I; hollow markers, which no line joins, are bounds.
    """
    panels = [measure for measure in MEASURES if any(measure in values for values in statistics.values())]
    rows, depth = -(-len(panels) // 4), max(len(values["mean_share"]) for values in statistics.values())
    looks = dict(zip(statistics, zip(itertools.cycle(COLORS), itertools.cycle(MARKERS)), strict=False))
    with plt.rc_context({"font.size": 7, "axes.titlesize": 7, "lines.linewidth": 1.1, "lines.markersize": 3.5}):
        figure, grid = plt.subplots(rows, 4, figsize=(10, 2.0 * rows + 1.1), layout="constrained", squeeze=False)
        for measure, axes in zip(panels, grid.flat, strict=False):
            for name, (color, marker) in looks.items():
                _draw_lines(axes, statistics[name], measure, color, marker)
            axes.set_title(MEASURES[measure][0])
            axes.set_yscale(MEASURES[measure][1])
            axes.grid(alpha=0.3, linewidth=0.4)
            axes.set_xticks(range(1, 1 + depth, 2))
        for axes in list(grid.flat)[len(panels) :]:
            axes.axis("off")
        for axes in grid[-1]:
            axes.set_xlabel("block")
        handles = [Line2D([], [], color=color, marker=marker, label=name) for name, (color, marker) in looks.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
        jacobians = "attention_condition" in panels
        note = "\ndotted: with the skip, K + I; hollow: no more than a bound" if jacobians else ""
        figure.suptitle(title + note, fontsize=8)
        save_figure(figure, out)


def _draw_lines(axes: plt.Axes, values: Statistics, measure: str, color: str, marker: str) -> None:
    for key, style in ((measure, "-"), (_with_skip(measure), ":")):
        if key not in values:
            continue
        blocks, heights = np.arange(len(values[key])), np.array(values[key])
        bound = np.array([_is_bound(values, key, int(block)) for block in blocks])
        axes.plot(blocks + 1, np.where(bound, np.nan, heights), style, color=color)
        for chosen, face in ((~bound, color), (bound, "white")):
            axes.scatter(
                blocks[chosen] + 1, heights[chosen],
                s=11, marker=marker, linewidths=0.7, zorder=3, facecolors=face, edgecolors=color,
            )  # fmt: skip
