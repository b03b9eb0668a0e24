"""A model card: what a model is, how to load it, how it was trained, what it reaches."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from skipless.common.files import printable
from skipless.common.progress import duration
from skipless.common.settings import flat
from skipless.ssl.formats.layouts import Written
from skipless.ssl.model.load import Loaded, shipped_file

# Where a run was, and how it was watched, is no property of the model.
PRIVATE = ("out", "device", "resume", "wandb", "log_to", "keep", "log_every", "save_every_epochs", "data.workers")
PAPER = "[Cutting the Skip: Training Residual-Free Transformers](https://arxiv.org/abs/2510.00345)"

OTHERS_DIFFER = (
    "Do not load the weights into another library's ViT: names and shapes fit, but it {does}, and its features are "
    "others."
)
ONE_SIZE = (
    "At {side} x {side} pixels features are those of the run; at other sizes they differ a little, for this library "
    "interpolates positions in its own way. `skipless export --size` makes them for another size."
)


def model_card(loaded: Loaded, name: str, written: Written, license: str, results: Sequence[Path]) -> str:
    """The card in Markdown, with a head of YAML as Hugging Face reads it.

    Args:
        name: title; written: what was exported.
        license: of the weights, by Hugging Face's identifier.
        results: files that evaluations wrote (.json), or folders of them; those of other weights are left out.

    Raises:
        ValueError: a file of `results` is no result; OSError: it is not there.
    """
    architecture = loaded.model.architecture
    kind = "with skip connections" if architecture["residual"] else f"without skip connections ({PAPER})"
    does = [] if architecture["residual"] else ["adds skip connections"]
    does += ["has no shaped attention"] if architecture.get("shaped") else []
    parts = [
        head(license, written.library),
        f"# {name}",
        f"A Vision Transformer {kind}: {architecture['depth']} blocks, {architecture['dim']} wide, "
        f"{architecture['heads']} heads, patches of {architecture['patch']} pixels, {architecture['registers']} "
        f"registers, {sum(p.numel() for p in loaded.model.parameters()) / 1e6:.1f} M parameters; trained at "
        f"{architecture['image_size']} pixels.",
        f"## Load\n\n```python\n{written.load.replace('FOLDER', name)}\n```",
        *([OTHERS_DIFFER.format(does=" and ".join(does))] if does else []),
        *([] if written.any_size else [ONE_SIZE.format(side=architecture["image_size"])]),
        f"`images` are RGB in [0, 1], less the mean {list(loaded.mean)}, divided by {list(loaded.std)}."
        + (" For a vector of an image take the mean of the patches, as in training." if loaded.pool == "mean" else ""),
    ]
    about = run_facts(loaded.path)
    figures = [*run_figures(about), *(row for path in results for row in result_rows(path, loaded.sha256))]
    table = "\n".join(["| what | on | value |", "|---|---|---:|", *(f"| {' | '.join(row)} |" for row in figures)])
    parts.append("## Figures\n\n" + (table if figures else "None were measured, or none were given to this card."))
    parts.append("## Training\n\n" + training(about, loaded))
    said = "not stated: ask whoever trained these weights" if license == "unknown" else license
    parts.append(f"## License\n\n{said}.")
    return "\n\n".join(parts) + "\n"


def head(license: str, library: str) -> str:
    """What Hugging Face's site reads of a card."""
    fields = {
        "license": license,
        "library_name": library,
        "pipeline_tag": "image-feature-extraction",
        "tags": ["vision-transformer", "skipless"],
    }
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---"


def run_facts(ckpt: str) -> dict[str, Any]:
    """What a run left beside its weights: a .json of their name, and the last value of each metric as `metrics`."""
    path = shipped_file(ckpt) if ckpt.startswith("skipless:") else Path(ckpt).expanduser()
    file = path / "backbone.json" if path.is_dir() else path.with_suffix(".json")
    folder = file.parent
    try:
        about = json.loads(file.read_bytes())
        if not isinstance(about, dict):
            return {}
        metrics: dict[str, Any] = {}
        if (folder / "metrics.jsonl").exists():
            for line in (folder / "metrics.jsonl").read_text().splitlines():
                metrics |= json.loads(line)
    except (OSError, ValueError):
        return {}
    return {**about, "metrics": metrics}


def run_figures(about: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What a run measured by itself: rows of (what, on, value)."""
    rows = []
    knn = about.get("metrics", {}).get("monitor/knn")
    if knn:
        rows.append(("k-NN accuracy in training, last block", "its own images by folder", f"{100 * knn[-1]:.1f} %"))
    if validation := about.get("validation"):
        on = f"{validation['dataset']}, {validation['split']}, {validation['images']:,} images"
        rows.append(("top-1 accuracy", on, f"{100 * validation['top1']:.1f} %"))
    return rows


def result_rows(path: Path, sha256: str) -> list[tuple[str, str, str]]:
    """The figures of some weights in result files."""
    rows = []
    for file in sorted(path.rglob("*.json")) if path.is_dir() else [path]:
        try:
            result = json.loads(file.read_bytes())
            if result["checkpoint"]["sha256"] == sha256 and result["value"] is not None:
                on = f"{result['dataset']}, {result['split']}, {result['images']:,} images"
                rows.append((f"{result['metric']} ({result['protocol']})", on, f"{100 * result['value']:.1f} %"))
        except (ValueError, KeyError, TypeError):
            if not path.is_dir():
                raise ValueError(f"{file} is no result of an evaluation: leave it out of --results") from None
    return rows


def training(about: dict[str, Any], loaded: Loaded) -> str:
    """The settings of the run, the machine and the code."""
    settings = {name: value for name, value in flat(about.get("settings") or {}).items() if name not in PRIVATE}
    if not settings:
        return f"Read from `{Path(loaded.path).name}` ({loaded.family}); what it was trained on is not recorded there."
    data = settings.get("data.path", settings.get("data.root"))
    seconds, versions = about.get("seconds"), about.get("versions", {})
    lines = [
        f"On `{printable(Path(str(data)).name)}`, {settings.get('epochs')} epochs of batches of "
        f"{settings.get('batch_size')}, on {about.get('hardware', 'a machine that is not recorded')}"
        + (f", in {duration(seconds)}" if seconds else "")
        + f"; commit {about.get('commit') or 'not recorded'}, torch {versions.get('torch', 'not recorded')}.",
        "All settings:",
        f"```yaml\n{yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)}```",
    ]
    return "\n\n".join(lines)
