"""The training step as a whole: compiled as one graph (without the code generator, which needs a compiler), and free of
waits for the device."""

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from skipless.ssl.config import DataSettings, Settings
from skipless.ssl.data.masks import Masks, collate_masks
from skipless.ssl.dino import DINOHead, DINOLoss, DINOModel, DINOSettings, make_teacher, update_teacher
from skipless.ssl.model.vit import VisionTransformer
from skipless.ssl.objectives.gram import GramSettings
from skipless.ssl.objectives.ibot import IBOTSettings
from skipless.ssl.objectives.objective import Objective
from skipless.ssl.optim.optimizers import OptimizerSettings, make_optimizer, set_rates


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_a_step_is_one_graph_for_the_student_and_one_for_the_teacher(residual: bool, pool: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    backbone = VisionTransformer(
        32, 2, 2, patch=8, residual=residual, image_size=32, registers=1, drop_path=0.1 * residual, attention="sdpa"
    )
    student = DINOModel(backbone, DINOHead(32, 16, hidden=24, bottleneck=8), pool)  # type: ignore[arg-type]
    teacher, objective = make_teacher(student), DINOLoss(16)
    student.train()
    counter = CompileCounter()
    fast_student, fast_teacher = (
        torch.compile(network, backend=counter, fullgraph=True, dynamic=False) for network in (student, teacher)
    )
    for step in range(3):
        crops = [torch.randn(4, 3, 32, 32), torch.randn(6, 3, 16, 16)]
        with torch.no_grad():
            targets = fast_teacher(crops[:1]).logits
        torch.manual_seed(step)
        logits = fast_student(crops).logits
        torch.manual_seed(step)
        torch.testing.assert_close(logits, student(crops).logits)
        objective(logits, targets, 5, 0.04).loss.backward()
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.data.sub_(0.1 * parameter.grad)
        student.zero_grad()
    assert counter.frame_count == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("optimizer", "masks"), [("adamw", False), ("soap", True), ("muon", False)])
def test_a_step_never_waits_for_the_device(optimizer: str, masks: bool) -> None:
    backbone = VisionTransformer(32, 2, 2, patch=8, image_size=32, residual=False)
    student = DINOModel(backbone, DINOHead(32, 16, hidden=24, bottleneck=8), masks=masks).cuda()
    ibot, device = IBOTSettings(loss_weight=float(masks)), torch.device("cuda")
    dino = DINOSettings(out_dim=16, koleo_loss_weight=0.1 * masks)
    cfg = Settings(out="", data=DataSettings(""), dino=dino, ibot=ibot, gram=GramSettings(loss_weight=2.0 * masks))
    cfg.crops.local_crops_number, cfg.precision = 3, "bf16"
    teacher, objective = make_teacher(student), Objective(cfg, backbone, 4, device)
    drawn = [ibot.draw(4, 0, np.random.default_rng(seed)) for seed in range(2)]
    on_host = collate_masks(drawn) if masks else Masks()
    on_host = Masks(*(None if t is None else t.pin_memory() for t in on_host))
    rule = make_optimizer(student, OptimizerSettings(name=optimizer))  # type: ignore[arg-type]
    crops = [torch.randn(4, 3, 32, 32).cuda(), torch.randn(6, 3, 16, 16).cuda()]
    try:
        for step in range(12):
            # What is made once, in the first step, may wait.
            torch.cuda.set_sync_debug_mode("error" if step else "default")
            set_rates(rule, 1e-3, 0.04, freeze_last_layer=step < 2)
            with torch.autocast("cuda", torch.bfloat16):
                hidden = on_host.to(device)
                with torch.no_grad():
                    targets = teacher(crops[:1], hidden.read)
                outputs = student(crops, hidden.read, hidden.patches, masks)
            objective.start_step(step, lambda: teacher.backbone)
            objective(outputs, targets, hidden, crops[0], 0.04)[0].backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            rule.step()
            rule.zero_grad(set_to_none=True)
            objective.end_step()
            update_teacher(teacher, student, 0.99)
    finally:
        torch.cuda.set_sync_debug_mode("default")
