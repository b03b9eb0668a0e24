"""The table and the curves of an experiment, made from its result file (what `run.py` writes as EXPERIMENT.json)."""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

matplotlib.rcParams["svg.hashsalt"] = "skipless"

Row = dict[str, Any]

CONDITIONING: dict[str, tuple[str, Callable[[list[float]], float]]] = {
    "worst condition of W_V W_O": ("value_output_condition", max),
    "attention on the diagonal, mean of blocks": ("diagonal_share", statistics.mean),
    "largest kurtosis": ("kurtosis", max),
    "last block's mean share": ("mean_share", lambda blocks: blocks[-1]),
    "last block's effective rank": ("effective_rank", lambda blocks: blocks[-1]),
}


def best(value: Any) -> float:
    """A number, or the largest of a list of them."""
    return max(value) if isinstance(value, list) else float(value)


def learning_rates(settings: dict[str, Any], arm: str) -> list[float]:
    """The learning rates of an arm."""
    rates = settings["learning_rates"]
    return rates[arm] if isinstance(rates, dict) else rates


def chosen_rows(result: dict[str, Any], arm: str) -> list[Row]:
    """Runs of an arm that ended well, with the learning rate that was best with the first seed."""
    ended = [r for r in result["runs"] if r["arm"] == arm and r["value"] is not None and r["status"].startswith("done")]
    first = [r for r in ended if r["seed"] == result["seeds"][0]]
    if not first:
        return []
    lr = max(first, key=lambda r: r["value"])["lr"]
    return [r for r in ended if r["lr"] == lr]


def table(result: dict[str, Any]) -> str:
    """Markdown: the arms at their best learning rate, then every run."""
    metric = result["metric"]
    lines = [
        f"**{result['protocol']}**: {metric} at the end, of the best block where there are several, in",
        "percent; mean and standard deviation over seeds, at the learning rate that was best with the first one.",
        "",
        "| arm | learning rate | of | seeds | best block | last block | its effective rank | its mean share |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for arm in result["settings"]["arms"]:
        chosen = chosen_rows(result, arm)
        tried = ", ".join(f"{lr:g}" for lr in learning_rates(result["settings"], arm))
        if not chosen:
            lines.append(f"| {arm} | | {tried} | 0 | | | | |")
            continue
        values = [r["last"][metric] for r in chosen]
        last_block = [100 * (value[-1] if isinstance(value, list) else value) for value in values]
        ranks = [r["last"]["monitor/effective_rank"][-1] for r in chosen if "monitor/effective_rank" in r["last"]]
        shares = [r["last"]["monitor/mean_share"][-1] for r in chosen if "monitor/mean_share" in r["last"]]
        lines.append(
            f"| {arm} | {chosen[0]['lr']:g} | {tried} | {len(chosen)} | {spread([100 * r['value'] for r in chosen])} | "
            f"{spread(last_block)} | {spread(ranks)} | {spread(shares, 2)} |"
        )
    lines += conditioning(result)
    lines += ["", "| run | learning rate | seed | value | status |", "|---|---:|---:|---:|---|"]
    for r in result["runs"]:
        value = "" if r["value"] is None else f"{100 * r['value']:.1f}"
        lines.append(f"| {r['arm']} | {r['lr']:g} | {r['seed']} | {value} | {r['status']} |")
    return "\n".join(lines) + "\n"


def conditioning(result: dict[str, Any]) -> list[str]:
    """Lines of a table of conditioning at the start and at the end, where runs logged it (--monitor.conditioning)."""
    lines = []
    for arm in result["settings"]["arms"]:
        chosen = [
            r
            for r in chosen_rows(result, arm)
            if all("monitor/conditioning/kurtosis" in r[when] for when in ("start", "last"))
        ]
        if not chosen:
            continue
        cells = []
        for measure, over_blocks in CONDITIONING.values():
            ends = [
                statistics.mean(over_blocks(r[when][f"monitor/conditioning/{measure}"]) for r in chosen)
                for when in ("start", "last")
            ]
            cells.append(" -> ".join(f"{value:.3g}" for value in ends))
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    if not lines:
        return []
    return ["", f"| arm, start -> end | {' | '.join(CONDITIONING)} |", "|---|" + "---:|" * len(CONDITIONING), *lines]


def spread(values: list[float], digits: int = 1) -> str:
    """Mean ± standard deviation (of a sample), as far as there are values."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def draw(result: dict[str, Any], path: Path) -> None:
    """Curves of the metric over the epochs, each arm at its best learning rate: seeds thin, their mean thick. From the
    eleventh arm on colors come again, dashed."""
    figure, axis = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for number, arm in enumerate(result["settings"]["arms"]):
        color = plt.get_cmap("tab10")(number % 10)
        chosen = chosen_rows(result, arm)
        for r in chosen:
            axis.plot([p["epoch"] for p in r["curve"]], [100 * p["value"] for p in r["curve"]], color=color, lw=0.6)
        shortest = min((len(r["curve"]) for r in chosen), default=0)
        if shortest:
            x = [p["epoch"] for p in chosen[0]["curve"][:shortest]]
            y = [100 * statistics.mean(r["curve"][i]["value"] for r in chosen) for i in range(shortest)]
            style = "-" if number < 10 else "--"
            axis.plot(x, y, color=color, ls=style, lw=2, label=f"{arm} ({len(chosen)})")
    axis.set(xlabel="epoch", ylabel=f"{result['metric']}, best block, %")
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
