"""What pages are made of: their templates, curves as SVG, pictures as data URLs."""

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import jinja2
import matplotlib
import numpy as np

from skipless.common.files import printable

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

FOLDER = jinja2.FileSystemLoader(Path(__file__).resolve().parent)
TEMPLATES = jinja2.Environment(loader=FOLDER, autoescape=True, trim_blocks=True, lstrip_blocks=True)
# Tol's bright scheme: told apart by the color-blind, on white and on black.
COLORS = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377")
MARKERS = "os^Dv"
INK = "#010203"  # stands for the page's text color in plots


def rendered(template: str, **content: Any) -> str:
    """A page from a template in this folder."""
    return TEMPLATES.get_template(template).render(**content)


def colors_of(names: Iterable[str]) -> dict[str, str]:
    """A color for each name."""
    return {name: COLORS[number % len(COLORS)] for number, name in enumerate(names)}


@dataclass
class Line:
    """A line of a plot."""

    x: Sequence[float]
    y: Sequence[float]
    band: Sequence[tuple[float, float]] | None = None
    """From where to where it may be uncertain, at each x."""


def draw_lines(lines: dict[str, Line], xlabel: str, ylabel: str, colors: dict[str, str], markers: str = "") -> str:
    """An SVG of lines by name, in the page's text color and font.

    Args:
        colors: of all names of the page; markers: on the points, a kind for each name; none where empty.
    """
    style: Any = {
        "svg.fonttype": "none", "svg.hashsalt": "skipless", "font.family": "sans-serif", "font.size": 9,
        "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
        "axes.spines.top": False, "axes.spines.right": False, "figure.facecolor": "none", "axes.facecolor": "none",
        "text.parse_math": False,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        names = list(colors)
        figure, axis = plt.subplots(figsize=(4.6, 3.0), layout="constrained")
        for name, line in lines.items():
            marker = markers[names.index(name) % len(markers)] if markers else None
            axis.plot(
                line.x, line.y, color=colors[name], marker=marker, markersize=4, linewidth=1.5, label=printable(name)
            )
            if line.band:
                low, high = zip(*line.band, strict=True)
                axis.fill_between(line.x, low, high, color=colors[name], alpha=0.15, linewidth=0)
        axis.set(xlabel=xlabel, ylabel=ylabel)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.25, linewidth=0.5)
        axis.legend(frameon=False, fontsize=8)
        written = io.StringIO()
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    svg = written.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor")


def picture_url(picture: np.ndarray, width: int, quality: int) -> str:
    """A data URL of a picture as JPEG, at most `width` pixels wide."""
    if picture.shape[1] > width:
        size = (width, max(1, round(picture.shape[0] * width / picture.shape[1])))
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    written, data = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert written
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()
