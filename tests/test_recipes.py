"""Every recipe parses, says what it is for, and fits together."""

from pathlib import Path

import pytest
import torch

from skipless.common import cli
from skipless.ssl import distill, supervised
from skipless.ssl.config import Settings
from skipless.ssl.dino import build_dino
from skipless.ssl.model.build import build_backbone, initialization_of
from skipless.ssl.model.initialization import PRESETS
from skipless.ssl.optim.optimizers import make_optimizer

CONFIGS = Path(__file__).parent.parent / "configs"
SUPERVISED = sorted(path.stem for path in CONFIGS.glob("supervised_*.yaml"))
DISTILLED = sorted(path.stem for path in CONFIGS.glob("distill_*.yaml"))
OTHERS = ("one_gpu", *SUPERVISED, *DISTILLED)
RECIPES = sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem not in OTHERS)


def settings(name: str, *more: str) -> Settings:
    return cli.parse(Settings, ["--config", str(CONFIGS / f"{name}.yaml"), *more, "--data.path", "photos"])


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_parses_and_its_model_can_be_built(name: str) -> None:
    recipe = settings(name)
    with torch.device("meta"):
        if recipe.model.residual:
            backbone = build_backbone(recipe.model, recipe.crops.global_crops_size, recipe.seed)
            build_dino(backbone, recipe.dino, recipe.model.pool)
    for side in (recipe.crops.global_crops_size, recipe.crops.local_crops_size):
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
    assert recipe.crops.global_crops_scale == (0.25, 1.0)
    assert (recipe.crops.global_crops_size, recipe.crops.local_crops_size, recipe.crops.local_crops_number) == (
        224,
        96,
        8,
    )
    assert (recipe.dino.out_dim, recipe.dino.hidden_dim, recipe.dino.bottleneck_dim) == (65536, 2048, 256)
    assert (recipe.dino.teacher_temp, recipe.dino.warmup_teacher_temp_epochs) == (0.07, 30)
    assert (recipe.dino.momentum_teacher, recipe.dino.norm_last_layer) == (0.996, False)
    rates = recipe.optimizer
    assert (rates.lr, rates.min_lr, rates.warmup_epochs) == (5e-4, 1e-6, 10)
    assert (rates.weight_decay, rates.weight_decay_end, recipe.clip_grad) == (0.04, 0.4, 3.0)


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("vits16")])
def test_one_gpu_version_keeps_the_batch(name: str) -> None:
    one = settings(name, "--config", str(CONFIGS / "one_gpu.yaml"))
    assert (one.batch_size, one.accumulate) == (1024, 4)


@pytest.mark.parametrize("name", DISTILLED)
def test_distillation_recipe_parses_and_its_model_can_be_built(name: str) -> None:
    words = ["--config", str(CONFIGS / f"{name}.yaml"), "--teacher.ckpt", "teacher.pth", "--data.path", "photos"]
    recipe = cli.parse(distill.Settings, words)
    assert recipe.views.size % recipe.model.patch == 0
    recipe.model.init = "default"  # the others take minutes
    with torch.device("meta"):
        build_backbone(recipe.model, recipe.views.size, recipe.seed)
    assert f"configs/{name}.yaml" in (CONFIGS / f"{name}.yaml").read_text().split("\nout:")[0]


def supervised_settings(name: str, *more: str) -> supervised.Settings:
    return cli.parse(supervised.Settings, ["--config", str(CONFIGS / f"{name}.yaml"), *more, "--data.root", "photos"])


@pytest.mark.parametrize("name", SUPERVISED)
def test_supervised_recipe_parses_and_its_model_can_be_built(name: str) -> None:
    recipe = supervised_settings(name)
    assert recipe.augmentation.size % recipe.model.patch == 0
    recipe.model.init = "default"  # the others take minutes for ViT-B
    with torch.device("meta"):
        supervised.build_classifier(recipe, classes=10)
    head = (CONFIGS / f"{name}.yaml").read_text().split("\nout:")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert f"configs/{name}.yaml" in head


def test_supervised_paper_arms_differ_only_in_what_they_are_named_for() -> None:
    residual, skipless = (supervised_settings(f"supervised_vitb16_{arm}") for arm in ("residual", "skipless"))
    assert (residual.model.residual, residual.model.drop_path, residual.optimizer.name) == (True, 0.1, "adamw")
    assert (skipless.model.residual, skipless.model.drop_path, skipless.optimizer.name) == (False, 0.0, "soap")
    assert initialization_of(residual.model) == "default"
    assert PRESETS[initialization_of(skipless.model)] == {"alpha": 2.0, "beta": 0.6, "c": 3.0, "mlp": "suo"}
    assert residual.augmentation == skipless.augmentation == supervised.Augmentation()
    assert residual.model.pool == skipless.model.pool
    for recipe in (residual, skipless):
        assert (recipe.model.size, recipe.model.patch, recipe.epochs, recipe.batch_size) == ("base", 16, 300, 1024)
        recipe.optimizer.name, recipe.optimizer.lr = "adamw", 1.0
    assert residual.optimizer == skipless.optimizer


def test_deit_settings_are_the_published_ones() -> None:
    """Touvron et al., arXiv 2012.12877, table 9, and the arguments released with DeiT-B."""
    recipe = supervised_settings("supervised_vitb16_residual")
    images, rates = recipe.augmentation, recipe.optimizer
    assert rates.lr * recipe.batch_size / 256 == pytest.approx(5e-4 * 1024 / 512)
    assert (rates.warmup_epochs, rates.min_lr, rates.weight_decay, rates.weight_decay_end) == (5, 1e-5, 0.05, 0.05)
    assert (images.mixup, images.cutmix, images.label_smoothing, images.erasing) == (0.8, 1.0, 0.1, 0.25)
    assert (images.size, images.scale, images.randaugment) == (224, (0.08, 1.0), 9)
    one = supervised_settings("supervised_vitb16_residual", "--config", str(CONFIGS / "one_gpu.yaml"))
    assert (one.batch_size, one.accumulate) == (1024, 4)


@pytest.mark.parametrize("optimizer", ["adamw", "soap", "muon"])
@pytest.mark.parametrize(
    ("arm", "init"),
    [
        (["--model.residual", "true"], "default"),
        (["--model.init", "default"], "default"),
        (["--model.init", "paper-supervised"], "paper-supervised"),
        (["--model.init", "small"], "small"),
    ],
)
def test_every_small_arm_parses_and_can_be_built(arm: list[str], init: str, optimizer: str) -> None:
    recipe = supervised_settings("supervised_small", *arm, "--optimizer.name", optimizer, "--model.depth", "1")
    assert recipe.model.residual == (arm[0] == "--model.residual")
    assert (initialization_of(recipe.model), recipe.optimizer.name) == (init, optimizer)
    make_optimizer(supervised.build_classifier(recipe, classes=10), recipe.optimizer)
