"""Every recipe parses, says what it is for, and fits together."""

from pathlib import Path

import pytest
import torch

from skipless.ssl.pretrain import Settings, build_model, parse

CONFIGS = Path(__file__).parent.parent / "configs"
RECIPES = sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem != "one_gpu")


def settings(name: str, *more: str) -> Settings:
    return parse(["--config", str(CONFIGS / f"{name}.yaml"), *more, "--data.path", "photos"])


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_parses_and_its_model_can_be_built(name: str) -> None:
    recipe = settings(name)
    with torch.device("meta"):
        if recipe.model.residual:
            build_model(recipe)
    for side in (recipe.crops.global_size, recipe.crops.local_size):
        assert side % recipe.model.patch == 0
    head = (CONFIGS / f"{name}.yaml").read_text().split("\nout:")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert f"configs/{name}.yaml" in head


@pytest.mark.parametrize("arm", ["residual", "skipless"])
@pytest.mark.parametrize("optimizer", ["adamw", "soap"])
def test_paper_arms_differ_only_in_what_they_are_named_for(arm: str, optimizer: str) -> None:
    recipe = settings(f"vits16_{arm}_{optimizer}")
    assert (recipe.model.residual, recipe.optimizer.name) == (arm == "residual", optimizer)
    assert recipe.model.init == ("default" if recipe.model.residual else "paper-dino")
    assert recipe.model.drop_path == (0.1 if recipe.model.residual else 0.0)
    reference = settings("vits16_residual_adamw")
    assert recipe.crops == reference.crops
    assert recipe.dino == reference.dino
    assert (recipe.epochs, recipe.batch_size) == (300, 1024)


def test_dino_settings_are_the_official_ones() -> None:
    """Caron et al., arXiv 2104.14294, and the arguments released with its ViT-S/16."""
    recipe = settings("vits16_residual_adamw")
    assert recipe.crops.global_scale == (0.25, 1.0)
    assert (recipe.crops.global_size, recipe.crops.local_size, recipe.crops.local_count) == (224, 96, 8)
    assert (recipe.dino.prototypes, recipe.dino.hidden, recipe.dino.bottleneck) == (65536, 2048, 256)
    assert (recipe.dino.teacher_temperature, recipe.dino.warmup_teacher_temperature_epochs) == (0.07, 30)
    assert (recipe.dino.momentum, recipe.dino.norm_last_layer) == (0.996, False)
    rates = recipe.optimizer
    assert (rates.lr, rates.min_lr, rates.warmup_epochs) == (5e-4, 1e-6, 10)
    assert (rates.weight_decay, rates.weight_decay_end, recipe.clip_grad) == (0.04, 0.4, 3.0)


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("vits16")])
def test_one_gpu_version_keeps_the_batch(name: str) -> None:
    one = settings(name, "--config", str(CONFIGS / "one_gpu.yaml"))
    assert (one.batch_size, one.accumulate) == (1024, 8)
