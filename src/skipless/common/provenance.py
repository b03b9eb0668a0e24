"""Where a number comes from: hardware, versions and commit."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch


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
    root = Path(__file__).resolve().parents[3]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", root, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != root:
            return None
        return git("rev-parse", "HEAD") + (
            "+changes" if git("status", "--porcelain", "--", "ssl", "eval", "datasets", "src") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None
