"""Where a number comes from: hardware, versions and commit."""

import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from skipless.ssl.checkpoints import write_text


def provenance(device: torch.device | str) -> dict[str, Any]:
    """What a result file says about the machine and the code that produced it.

    Returns:
        {"hardware": the GPU's name or the CPU's with its cores, "versions": of Python and the packages that matter,
        "commit": of the source tree, with "+changes" where it has uncommitted ones; None outside of a git checkout}.
    """
    packages = (
        "torch", "torchvision", "numpy", "scikit-learn", "opencv-python-headless", "faiss-cpu", "faiss-gpu",
    )  # fmt: skip
    versions = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"hardware": _hardware(torch.device(device)), "versions": versions, "commit": _commit()}


def write_result(out: Path, result: Any, text: str) -> None:
    """Write a result for machines, `out`.json, and for people, `out`.md."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(Path(f"{out}.json"), json.dumps(result, indent=1) + "\n")
    write_text(Path(f"{out}.md"), text)


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = f"{models[0] if models else name}, {len(models) or '?'} cores"
    return name


def _commit() -> str | None:
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", root, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != root:
            return None
        return git("rev-parse", "HEAD") + (
            "+changes" if git("status", "--porcelain", "--", "ssl", "eval", "datasets") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None
