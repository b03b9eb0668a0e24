"""benchmarks/gpu.py: what fails or hangs costs itself alone, and the same command goes on."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT, NullGPU, load

gpu = load(ROOT / "benchmarks" / "gpu.py")


def test_parts_fail_alone_and_are_the_only_ones_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    about = {"hardware": "a card", "versions": {}, "commit": "abc"}
    monkeypatch.setattr(gpu, "on_device", lambda name: None)
    monkeypatch.setattr(gpu, "provenance", lambda device: about)
    count, child = tmp_path / "count", tmp_path / "child"
    report = tmp_path / "figure.json"
    report.write_text(json.dumps({"metric": "mIoU", "value": 0.5}))
    # A process that the part has started, and that would go on without it.
    hangs = f"import subprocess; subprocess.run(['sh', '-c', 'sleep 2; touch {child}'])"
    parts = {
        "fails": gpu.Part(["-c", f"open({str(count)!r}, 'a').write('x'); print('why'); exit(3)"]),
        "hangs": gpu.Part(["-c", hangs]),
        "well": gpu.Part(["-c", f"open({str(count)!r}, 'a').write('y')"], report),
    }
    monkeypatch.setattr(gpu, "all_parts", lambda settings: parts)
    settings = gpu.Settings(out=tmp_path / "gpu", work=tmp_path / "work", minutes=0.01)
    for _ in range(2):
        gpu.measure(settings)
        done = json.loads((tmp_path / "gpu.json").read_text())["parts"]
        assert [part["exit_code"] for part in done.values()] == [3, None, 0]
        assert done["fails"]["printed"] == ["why"]
        assert done["well"]["value"] == 0.5
    assert count.read_text() == "xyx"
    time.sleep(2)
    assert not child.exists()
    about = about | {"commit": "another"}
    with pytest.raises(ValueError, match="another commit"):
        gpu.measure(settings)


def test_on_the_null_gpu(null_gpu: NullGPU, tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--trial=true", f"--out={tmp_path / 'gpu'}"]
    command += [f"--work={tmp_path / 'work'}", "--parts=[attention]"]
    done = subprocess.run(command, env=os.environ | null_gpu.environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    part = json.loads((tmp_path / "gpu.json").read_text())["parts"]["attention"]
    assert part["exit_code"] == 0, part
    assert "null" in json.loads((tmp_path / "gpu_attention.json").read_text())["hardware"]
