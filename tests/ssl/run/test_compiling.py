"""What is compiled, and what happens where it cannot be."""

import copy
import subprocess
import sys

import pytest
import torch
from torch._functorch import config

from skipless.ssl.config import DataSettings, Settings
from skipless.ssl.dino import DINOLoss, cross_entropy
from skipless.ssl.run.compiling import Compiler, resolve_compile

HINDRANCES = {
    "the device is a CPU": ("cpu", {}),
    "model.attention is 'xformers'": ("cuda", {"model.attention": "xformers"}),
    "ibot.loss_weight is set": ("cuda", {"ibot.loss_weight": 1.0}),
}


@pytest.mark.parametrize("hindrance", HINDRANCES)
def test_compile_is_off_or_refused_where_something_is_in_its_way(hindrance: str) -> None:
    device, values = HINDRANCES[hindrance]
    cfg = Settings(out="", data=DataSettings(""))
    for name, value in values.items():
        *group, last = name.split(".")
        setattr(getattr(cfg, group[0]) if group else cfg, last, value)
    refused = copy.deepcopy(cfg)
    assert cfg.compile == "auto"
    resolve_compile(cfg, torch.device(device))
    assert cfg.compile is False
    refused.compile = True
    with pytest.raises(ValueError, match=f"compile is true, and {hindrance}"):
        resolve_compile(refused, torch.device(device))


def test_a_sharded_run_is_compiled_where_it_is_asked_for_alone() -> None:
    for asked, expected in (("auto", False), (True, True), (False, False)):
        cfg = Settings(out="", data=DataSettings(""), shard=True, compile=asked)  # type: ignore[arg-type]
        cfg.model.attention = "sdpa"
        resolve_compile(cfg, torch.device("cuda"))
        assert cfg.compile is expected


def test_where_the_compiler_fails_a_function_runs_as_it_was_written(capfd: pytest.CaptureFixture[str]) -> None:
    calls = []

    def square(x: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            calls.append(1)
        return x.sin().square().sum()

    torch._dynamo.reset()
    x = torch.arange(3.0, requires_grad=True)
    lazy = config.patch(force_non_lazy_backward_lowering=False)  # and as it was, afterwards
    with lazy, torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        compiler = Compiler(True)
        either = compiler(square)
        for _ in range(2):
            either(x).backward()
    torch.testing.assert_close(x.grad, 2 * torch.sin(2 * torch.arange(3.0)))
    assert calls == [1, 1]
    said = capfd.readouterr().err
    assert said.count("not compiled, as torch.compile fails here") == 1
    assert "no-such-compiler" in said
    assert not compiler.on


def test_a_compiler_can_be_made_where_torch_has_imported_none_of_its_own() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from skipless.ssl.run.compiling import Compiler; Compiler(True)"], capture_output=True
    )
    assert done.returncode == 0, done.stderr


def test_a_compiled_loss_is_the_loss() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    results = []
    for sum_and_gradient in (cross_entropy, torch.compile(cross_entropy, backend="aot_eager", dynamic=False)):
        torch.manual_seed(1)
        loss = DINOLoss(16)
        loss.cross_entropy = sum_and_gradient
        student = torch.randn(5 * 4, 16, requires_grad=True)
        value = loss(student, torch.randn(2 * 4, 16), 5, 0.04).loss
        value.backward()
        results.append((value.detach(), student.grad))
    torch.testing.assert_close(*results)
