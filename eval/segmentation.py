"""Linear segmentation: how well one linear layer tells the class of every patch from frozen features.

In minutes on a CPU, for comparing checkpoints:

    python eval/segmentation.py --protocol quick --ckpt runs/photos --data.name voc12 --data.root VOCdevkit --out voc

By default on the data that datasets/prepare.py has put into data/, or else on synthetic scenes:

    python eval/segmentation.py --ckpt runs/photos

As published, on a GPU (or on several: torchrun --nproc-per-node 8 eval/segmentation.py ...):

    python eval/segmentation.py --ckpt dinov2_vits14_pretrain.pth --data.name voc12 --data.root VOCdevkit --out voc

mIoU after every block of the network:

    python eval/segmentation.py --protocol quick --every-block --ckpt runs/photos --data.name scenes --data.root scenes

Protocols differ by several points on the same weights, so the figure's id names its own: voc12-linear/mmseg (DINOv2's),
voc12-linear/dinov3, voc12-linear/neco (Leopart, NeCo, Franca), voc12-linear/quick. Their settings are the recipes in
configs/segmentation/; a figure made with other settings says "(changed)". An interrupted run is continued by the same
command.
"""

import skipless.common.interruption  # noqa: F401

from dataclasses import KW_ONLY, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from skipless.common import cli
from skipless.common.settings import flat, plain
from skipless.eval import defaults
from skipless.eval.dense.data import DataSettings, described, open_split
from skipless.eval.dense.outcome import figures
from skipless.eval.dense.quick import QuickSettings, quick
from skipless.eval.dense.report import choose_shown, finish_segmentation, protocol_id
from skipless.eval.dense.training import TrainingSettings, train_and_evaluate
from skipless.eval.evaluation import FeatureSettings, SheetSettings, announce, prepare

Protocol = Literal["auto", "mmseg", "dinov3", "neco", "quick"]

PLACES = {
    "VOCdevkit/VOC2012/SegmentationClass": ("voc12", "VOCdevkit"),
    "coco/stuffthingmaps": ("coco-stuff-27", "coco"),
    "ADEChallengeData2016": ("ade20k", "ADEChallengeData2016"),
}
ON_CPU = "protocol quick, as by default on a CPU: mmseg, DINOv2's, would take days here (--protocol mmseg)"
ON_CPU_PUBLISHED = "a head on augmented images takes long on a CPU; --protocol quick takes minutes"
RECIPES = Path(__file__).resolve().parent.parent / "configs" / "segmentation"


@dataclass
class Settings(SheetSettings, FeatureSettings):
    """Linear segmentation."""

    data: DataSettings
    protocol: Protocol = "auto"
    """Which recipe of configs/segmentation/ to follow. Figures of different protocols are not comparable. auto is mmseg
    on a GPU, and quick on a CPU, where the others take days."""
    quick: QuickSettings = field(default_factory=QuickSettings)
    """Settings of the protocol quick, of its recipe."""
    training: TrainingSettings = field(default_factory=TrainingSettings)
    """Settings of the other protocols. The defaults shown here are those of mmseg; another recipe brings its own."""
    _: KW_ONLY
    out: str | None = None
    """Folder for segmentation.json, segmentation.md and segmentation.png (and, except for quick, head.pt); by default
    nothing is written."""
    cache: str | None = None
    """quick: folder for features; by default ~/.cache/skipless/features. Safe to delete."""
    batch_size: int = 16
    """Images (windows, for mmseg and dinov3) in one forward pass of the backbone: of quick, and of the evaluation by
    the other protocols. Changes speed and memory alone."""


def evaluate(settings: Settings) -> dict[str, Any]:
    """Measure linear segmentation as `settings` say, write what `settings.out` asks for, and return the result.

    Raises:
        ValueError, FileNotFoundError: a checkpoint, data or settings that cannot be used.
    """
    settings = replace(settings, protocol=chosen_protocol(settings))
    context = prepare(settings, "segmentation")
    del context.recorded["training" if settings.protocol == "quick" else "quick"]  # which had no effect
    train = open_split(settings.data, settings.data.train_split or default_train_split(settings))
    val = open_split(settings.data, settings.data.split)
    changed = changed_settings(settings)
    protocol = protocol_id(context, f"{val.name}-linear/{settings.protocol}", bool(changed))
    lines = [described(train), described(val)]
    if train.split == val.split:
        lines.append(f"warning: heads are trained on {train.split}, and measured on the same images")
    if context.device.type == "cpu":
        lines.append(ON_CPU if settings.protocol == "quick" else ON_CPU_PUBLISHED)
    announce(context, protocol, *lines)

    shown = choose_shown(val)
    if settings.protocol == "quick":
        outcome = quick(context, train, val, settings.quick, settings.seed, shown)
    else:
        outcome = train_and_evaluate(context, train, val, settings.training, settings.seed, shown)
    miou, details = figures(context, outcome, val.classes)
    details["changed_settings"] = changed
    how = f"trained on {details['train_images']:,} images"
    if "held_out_images" in details:
        how += f" ({details['held_out_images']:,} more chose the learning rate)"
    return finish_segmentation(context, protocol, val, miou, details, outcome.predictions, how)


def changed_settings(settings: Settings) -> dict[str, list[Any]]:
    """Settings of the protocol that differ from its recipe: {name: [recipe's, used]}.

    Raises:
        ValueError: a changed setting of a part that the protocol does not use.
    """
    words = [f"--protocol={settings.protocol}", "--ckpt=x", "--data.name=scenes", "--data.root=x"]
    published = flat(plain(cli.parse(Settings, words, recipe=recipe)))
    changed = {
        name: [published[name], value]
        for name, value in flat(plain(settings)).items()
        if name.startswith(("quick.", "training.")) and published[name] != value
    }
    effective = "quick." if settings.protocol == "quick" else "training."
    for name in changed:
        if not name.startswith(effective):
            raise ValueError(f"{name} has no effect on the protocol {settings.protocol}; leave it out")
    default = default_train_split(settings)
    if settings.data.train_split not in (None, default):
        changed["data.train_split"] = [default, settings.data.train_split]
    return changed


def default_train_split(settings: Settings) -> str:
    """Leopart's data set, which NeCo follows, is VOC's trainaug."""
    return "trainaug" if (settings.protocol, settings.data.name) == ("neco", "voc12") else "train"


def chosen_protocol(settings: Settings) -> Protocol:
    """The protocol that is followed: what auto means on the device."""
    if settings.protocol != "auto":
        return settings.protocol
    on_cpu = settings.device == "cpu" or (settings.device == "auto" and not torch.cuda.is_available())
    return "quick" if on_cpu else "mmseg"


def recipe(settings: Settings) -> Path:
    """The file of settings of a protocol."""
    return RECIPES / f"{chosen_protocol(settings)}.yaml"


def fill(missing: list[str], words: list[str]) -> list[str]:
    """What is segmented, and which checkpoint, where that is not told; scenes, which are small, by quick in minutes."""
    told = any(word.startswith(("--protocol", "--config", "--quick", "--training")) for word in words)
    on_scenes = [] if told else ["--quick.size=224", "--quick.max_images=500"]
    if on_scenes and torch.cuda.is_available():  # where auto is another one
        on_scenes.append("--protocol=quick")
    return defaults.fill("segmentation", PLACES, "voc12", on_scenes, missing, words)


main = partial(cli.run, evaluate, Settings, __doc__, recipe=recipe, fill=fill)

if __name__ == "__main__":
    main()
