"""The console command: `skipless NAME ...` runs one of the commands below.

    skipless                    # which commands there are
    skipless knn --help
    skipless pretrain --config configs/demo.yaml --data.path FOLDER --out runs/mine

`python -m skipless` is the same. Torch is imported only by the command that was asked for.
"""

import skipless.common.interruption  # noqa: F401

import difflib
import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import version

from skipless.common import cli

COMMANDS = {
    "recipe": ("ssl.recipe", "Write a recipe for your images, your machine and your time."),
    "pretrain": ("ssl.pretrain", "Pretrain a backbone with DINO, without labels."),
    "supervised": ("ssl.supervised", "Train a classifier on labeled images."),
    "distill": ("ssl.distill", "Distill a trained backbone into a smaller one."),
    "export": ("ssl.export", "Export a backbone for others, with a model card."),
    "report": ("eval.report", "Measure several backbones and write one page about them."),
    "segmentation": ("eval.segmentation", "Linear segmentation of frozen features, mIoU."),
    "discovery": ("eval.discovery", "Find objects without labels: LOST, TokenCut, MaskCut."),
    "saliency": ("eval.saliency", "Unsupervised saliency: maxF, IoU and accuracy of cut-out objects."),
    "correspondence": ("eval.correspondence", "Points found again on another object of its kind, PCK."),
    "video": ("eval.video", "Objects followed through videos from their first frame, J&F."),
    "depth": ("eval.depth", "Depth by a linear head on frozen features: delta1, AbsRel, RMSE."),
    "retrieval": ("eval.retrieval", "Segmentation by the nearest patches of a memory, mIoU."),
    "clustering": ("eval.clustering", "Segmentation by k-means, without labels, mIoU."),
    "knn": ("eval.knn", "k-NN classification of frozen features."),
    "linear": ("eval.linear", "Linear classification of frozen features."),
    "quantization": ("eval.quantization", "What 8 and 4 bits cost a backbone."),
    "conditioning": ("eval.conditioning", "Condition numbers, ranks and Jacobians of every block."),
    "embed": ("eval.embed", "Vectors of a folder of images, in one file."),
    "pca": ("eval.pca", "Pictures of patch features in three colors."),
    "attention-maps": ("eval.attention_maps", "Pictures of where each head looks."),
    "similarity": ("eval.similarity", "Pictures of the patches that resemble a chosen one."),
    "match": ("eval.match", "Picture of what belongs together in two images."),
    "crop-sheet": ("eval.crop_sheet", "A sheet of the crops that pretraining sees."),
    "watch": ("eval.watch", "A page that shows how training goes, renewed while it does."),
    "summarize": ("eval.summarize", "One table of what pretraining runs measured."),
    "cache": ("eval.cache", "List or delete the features that evaluations keep."),
    "prepare": ("datasets.prepare", "Download and unpack the data sets of the evaluations."),
    "shard": ("datasets.shard", "Pack a folder of images into tar files."),
    "scenes": ("datasets.scenes", "Write synthetic scenes with exact masks, boxes and classes."),
}


def table() -> str:
    """What `skipless --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {sentence}" for name, (_, sentence) in COMMANDS.items()]
    usage = "usage: skipless COMMAND ... | --version"
    return "\n".join([usage, "", *lines, "", "skipless COMMAND --help tells more."])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the first word names, with the words after it."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("--help", "-h"):
        cli.guard(lambda: print(table()))
        return
    if name == "--version":
        cli.guard(lambda: print(f"skipless {version('skipless')}"))
        return
    name = name.replace("_", "-")
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, 1, 0.5)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        print(f"error: there is no command {name}: {hint}skipless --help lists them", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"skipless {name}", *rest]
    importlib.import_module(f"skipless.{COMMANDS[name][0]}").main()


if __name__ == "__main__":
    main()
