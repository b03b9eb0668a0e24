"""One page that compares checkpoints: figures with intervals, curves over the blocks, PCA pictures, patch similarity.

    python eval/report.py --ckpt runs/residual runs/skipless --out report --images photos \\
        --segmentation.name voc12 --segmentation.root VOCdevkit --discovery.name voc07 --discovery.root VOCdevkit \\
        --classification.root imagenette

measures every checkpoint in every way that the given data allow, and writes report/report.html: one file that needs no
server and no network, to open in a browser, print or send. Beside it the table in Markdown and LaTeX (report.md,
report.tex), and under report/results/NAME/TASK what each evaluation wrote. What is measured there is not measured
again: after an interruption, or with one more checkpoint or data set, the same command does only what is missing.
Results made by the evaluations themselves are taken up with --collect FOLDER. Without data, the page has pictures only.

Tasks: knn, linear (--classification), segmentation (protocol quick), retrieval, clustering (--segmentation), lost,
tokencut (--discovery), saliency, correspondence, video, depth (each by its own data).
"""

import skipless.common.interruption  # noqa: F401

import contextlib
import io
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from skipless.common import cli, distributed
from skipless.common.files import printable, write_text
from skipless.common.settings import LATER, command_line, plain
from skipless.datasets.images import read_image
from skipless.datasets.labels.classes import LabeledData
from skipless.datasets.labels.saliency import SaliencyName
from skipless.eval import (
    clustering,
    correspondence,
    depth,
    discovery,
    knn,
    linear,
    retrieval,
    saliency,
    segmentation,
    video,
)
from skipless.eval.backbones import Backbone, Precision, load_backbone, untrained, usable_precision
from skipless.eval.classification import Pooling, untrained_vector
from skipless.eval.dense import data as dense
from skipless.eval.dense.quick import QuickSettings
from skipless.eval.evaluation import EvaluationSettings, differing_settings
from skipless.eval.figures.pictures import pick_images
from skipless.eval.objects import data as objects
from skipless.eval.objects.search import FeatureChoice, choose_features
from skipless.eval.page.render import write_page
from skipless.eval.page.tables import latex_table, markdown_table, table_of, usable

T = TypeVar("T")
COMMANDS: dict[str, Any] = {
    "knn": knn, "linear": linear, "segmentation": segmentation, "retrieval": retrieval, "clustering": clustering,
    "discovery": discovery, "saliency": saliency, "correspondence": correspondence, "video": video, "depth": depth,
}  # fmt: skip

TASKS = (
    "knn", "linear", "segmentation", "retrieval", "clustering", "lost", "tokencut", "saliency", "correspondence",
    "video", "depth",
)  # fmt: skip


@dataclass
class ClassificationData(LabeledData):
    """Data of knn and linear; see eval/knn.py."""

    root: str = ""
    """Where they lie; left out, the tasks are left out."""
    pool: Pooling = "auto"
    """The vector of an image: its CLS token, the mean of its patch tokens, or both; auto is what each checkpoint's head
    read in training, and else cls."""
    size: int = 224
    """Side in pixels of the central crops."""


@dataclass
class SegmentationData(dense.DataSettings):
    """Data of segmentation, retrieval and clustering; see eval/segmentation.py."""

    name: dense.DataName = "voc12"
    """Data set."""
    root: str = ""
    """Folder, laid out as its authors ship it; left out, the tasks are left out."""
    train_split: str | None = "train"
    """Split that heads are trained on and memories are filled from."""
    size: int = 448
    """Side in pixels of the squares that images are resized to, for all three: features are computed once."""
    max_images: int = 3000
    """segmentation: at most so many training images are used, evenly spread over the set."""


@dataclass
class DiscoveryData(objects.DataSettings):
    """Data of lost and tokencut; see eval/discovery.py."""

    name: objects.DataName = "voc07"
    """Data set."""
    root: str = ""
    """Folder, laid out as its authors ship it; left out, the tasks are left out."""
    features: FeatureChoice = "auto"
    """What patches are compared by: keys, or keys_without_bias where a trained bias makes all keys alike; auto is that
    for the families of DINOv2."""


@dataclass
class SaliencyData(saliency.DataSettings):
    """Data of saliency; see eval/saliency.py."""

    name: SaliencyName = "ecssd"
    """Data set; saliency is a folder of your own."""
    root: str = ""
    """Its folder; left out, the task is left out."""


@dataclass
class CorrespondenceData(correspondence.DataSettings):
    """Data of correspondence; see eval/correspondence.py."""

    root: str = ""
    """Folder of SPair-71k; left out, the task is left out."""


@dataclass
class VideoData(video.DataSettings):
    """Data of video; see eval/video.py."""

    root: str = ""
    """Folder of DAVIS or of your own videos; left out, the task is left out."""
    size: int = video.SIZE
    """Short side in pixels that frames are resized to."""


@dataclass
class DepthData(depth.DataSettings):
    """Data of depth; see eval/depth.py."""

    root: str = ""
    """Folder of NYUv2 or of your own images; left out, the task is left out."""


@dataclass
class Settings(EvaluationSettings):
    """One page that compares checkpoints."""

    ckpt: tuple[str, ...]  # type: ignore[assignment]
    """Backbones: folders of runs; .pt, .pth or .safetensors of ours, DINO, DINOv2 or timm; or timm:NAME."""
    names: tuple[str, ...] = ()
    """Names to show them under, as many; by default those of the files or folders."""
    images: str = ""
    """Images to look at: a folder, zip archive or image file; by default those of the first data set that is given."""
    count: int = 16
    """At most so many of them, evenly spread."""
    size: int | None = None
    """Short side in pixels at which they are looked at; by default 1.5 times the size that a backbone was trained at,
    unless that is beyond 800 patches."""
    tasks: tuple[str, ...] = TASKS
    """What to measure, as far as data are given."""
    classification: ClassificationData = field(default_factory=ClassificationData)
    """Data of knn and linear."""
    segmentation: SegmentationData = field(default_factory=SegmentationData)
    """Data of segmentation, retrieval and clustering."""
    discovery: DiscoveryData = field(default_factory=DiscoveryData)
    """Data of lost and tokencut."""
    saliency: SaliencyData = field(default_factory=SaliencyData)
    """Data of saliency."""
    correspondence: CorrespondenceData = field(default_factory=CorrespondenceData)
    """Data of correspondence."""
    video: VideoData = field(default_factory=VideoData)
    """Data of video."""
    depth: DepthData = field(default_factory=DepthData)
    """Data of depth."""
    collect: tuple[str, ...] = ()
    """Folders with results that the evaluations wrote; those of the same checkpoints join the table."""
    _: KW_ONLY
    out: str = "report"
    """Folder for report.html, report.md, report.tex and results/."""
    untrained: bool = False
    """Add the first checkpoint's architecture with random weights: the floor that figures stand on."""
    cache: str | None = None
    """Folder for features; by default ~/.cache/skipless/features. Safe to delete."""
    precision: Precision = "fp32"
    """In which the network computes features: fp32, or bf16 where the device is fast in it. bf16 saves time on a GPU;
    a model without skips feels the rounding. The figure's id then ends in /bf16."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ckpt:
            raise ValueError("give one checkpoint or more: --ckpt A B")
        if self.names and len(self.names) != len(self.ckpt):
            raise ValueError(f"names has {len(self.names)} for {len(self.ckpt)} checkpoints; give one for each")
        for task in self.tasks:
            if task not in TASKS:
                raise ValueError(f"task {task!r} does not exist; choose from {', '.join(TASKS)}")
        if self.count < 1 or (self.size is not None and self.size < 1):
            raise ValueError("count and size must be 1 or more")


@dataclass(frozen=True, eq=False)
class Candidate:
    """A checkpoint that is compared."""

    name: str
    ckpt: str
    untrained: bool
    backbone: Backbone


@dataclass(frozen=True, eq=False)
class Task:
    """An evaluation of one checkpoint."""

    name: str
    settings: Any
    evaluate: Callable[[Any], Any]
    result: Path
    """The file that it leaves."""


def make_report(settings: Settings) -> Path:
    """Measure what is missing, write the page and the tables, and return the page's path.

    Raises:
        ValueError, FileNotFoundError: a checkpoint, data or settings that cannot be used.
    """
    device = distributed.start(settings.device)
    if distributed.world_size() > 1:
        raise ValueError(
            "eval/report.py runs in one process; measure with torchrun first, and give it --collect FOLDER"
        )
    settings = replace(settings, precision=usable_precision(settings.precision, device))  # as results record it
    out = Path(settings.out).expanduser()
    candidates = load_candidates(settings, device)
    # What can be wrong is found before anything is measured, which may take hours.
    pictures = pictured(settings)
    for folder_name in settings.collect:
        if not Path(folder_name).expanduser().is_dir():
            raise FileNotFoundError(f"collect: {folder_name}: no such folder")
    for candidate in candidates:
        for task in planned(settings, candidate, out / "results" / candidate.name):
            measured(task, candidate.backbone)
    results: dict[str, list[dict[str, Any]]] = {}
    for number, candidate in enumerate(candidates, 1):
        folder = out / "results" / candidate.name
        measurements = []
        for task in planned(settings, candidate, folder):
            if measured(task, candidate.backbone) is None:
                anew = ", anew: with other settings" if task.result.exists() else ""
                print(f"{candidate.name} ({number} of {len(candidates)}): {task.name}{anew}", flush=True)
                with put_aside(task.result):
                    run_quietly(task)
            result = measured(task, candidate.backbone)
            assert result is not None
            result["pictures"] = pictures_of(task.result, result)
            measurements.append(result)
        results[candidate.name] = measurements + collected(settings, candidate, measurements)
        for result in results[candidate.name]:
            if command := COMMANDS.get(result["task"]):
                result["command"] = command_line(f"eval/{result['task']}.py", result["settings"], command.Settings)
            result["careful"] = untrained_vector(candidate.backbone.pool, result["settings"].get("pool", ""))
    table = table_of(results)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "report.md", markdown_table(table))
    write_text(out / "report.tex", latex_table(table))
    page = out / "report.html"
    backbones = {candidate.name: candidate.backbone for candidate in candidates}
    command = command_line("eval/report.py", plain(settings), Settings)
    write_page(page, table, results, backbones, pictures, settings.size, plain(settings), command)
    print("\n" + markdown_table(table) + f"\nwritten: {page}, report.md, report.tex")
    return page


@contextmanager
def put_aside(result: Path) -> Iterator[None]:
    """An earlier result's folder makes room for a new one, and comes back where that does not get done. A folder
    without a result stays: what was interrupted goes on in it."""
    folder, aside = result.parent, result.parent.with_name(f"{result.parent.name}.earlier")
    if aside.exists():  # a killed process left it
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    if result.exists():
        folder.rename(aside)
    try:
        yield
    except BaseException:
        if aside.exists():
            shutil.rmtree(folder, ignore_errors=True)
            aside.rename(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def load_candidates(settings: Settings, device: Any) -> list[Candidate]:
    """The checkpoints under names that differ, and the untrained twin of the first where it is asked for."""
    names = list(settings.names) or [short_name(ckpt) for ckpt in settings.ckpt]
    for name, ckpt in zip(names, settings.ckpt, strict=True):
        if names.count(name) > 1:
            raise ValueError(f"two checkpoints are called {name}, one of them {ckpt}; tell them apart by --names A B")
        if "/" in name or name in ("", ".", ".."):
            raise ValueError(f"names: {name!r} cannot be the name of a folder")
    candidates = [
        Candidate(name, ckpt, False, load_backbone(ckpt, settings.weights).to(device))
        for name, ckpt in zip(names, settings.ckpt, strict=True)
    ]
    if settings.untrained:
        first = candidates[0]
        twin = Candidate(f"{first.name} untrained", first.ckpt, True, untrained(first.backbone, settings.seed))
        candidates.append(twin)
    return candidates


def short_name(ckpt: str) -> str:
    """The folder of a run, the name of a file without its ending, timm's name."""
    if ckpt.startswith("timm:"):
        return ckpt.removeprefix("timm:")
    path = Path(ckpt).expanduser()
    return path.resolve().name if path.is_dir() else path.stem


def planned(settings: Settings, candidate: Candidate, folder: Path) -> list[Task]:
    """The tasks whose data are given, each of which writes into its own folder in `folder`."""
    plan: list[Task] = []
    common: dict[str, Any] = {
        "ckpt": candidate.ckpt, "weights": settings.weights, "untrained": candidate.untrained, "seed": settings.seed,
        "device": settings.device, "batch_size": settings.batch_size, "workers": settings.workers,
    }  # fmt: skip
    on_features = {**common, "cache": settings.cache, "precision": settings.precision}

    def add(name: str, command: Any, **own: Any) -> None:
        stem = "discovery" if command is discovery else name
        task_settings = command.Settings(**own, out=str(folder / name))
        plan.append(Task(name, task_settings, command.evaluate, folder / name / f"{stem}.json"))

    c, s, d = settings.classification, settings.segmentation, settings.discovery
    if c.root:
        images = part(LabeledData, c)
        pool = (candidate.backbone.pool or "cls") if c.pool == "auto" else c.pool  # as results record it
        add("knn", knn, data=images, pool=pool, size=c.size, k=(20,), every_block=True, **on_features)
        add("linear", linear, data=images, pool=pool, size=c.size, **on_features)
    if s.root:
        masks = part(dense.DataSettings, s)
        quick = QuickSettings(size=s.size, max_images=s.max_images)
        add("segmentation", segmentation, data=masks, protocol="quick", every_block=True, quick=quick, **on_features)
        add("retrieval", retrieval, data=masks, size=s.size, **on_features)
        add("clustering", clustering, data=part(dense.SplitSettings, s), size=s.size, **on_features)
    if d.root:
        boxes, features = part(objects.DataSettings, d), choose_features(d.features, candidate.backbone)
        for method in ("lost", "tokencut"):
            add(method, discovery, data=boxes, method=method, features=features, every_block=True, **common)
    if settings.saliency.root:
        features = choose_features("auto", candidate.backbone)
        add("saliency", saliency, data=part(saliency.DataSettings, settings.saliency), features=features, **common)
    if settings.correspondence.root:
        pairs = part(correspondence.DataSettings, settings.correspondence)
        add("correspondence", correspondence, data=pairs, **common)
    if settings.video.root:
        add("video", video, data=part(video.DataSettings, settings.video), size=settings.video.size, **common)
    if settings.depth.root:
        add("depth", depth, data=part(depth.DataSettings, settings.depth), **on_features)
    return [task for task in plan if task.name in settings.tasks]


def part(kind: type[T], settings: Any) -> T:
    """The fields that `settings` inherits from `kind`, as one of that kind."""
    return kind(**{field.name: getattr(settings, field.name) for field in fields(kind)})  # type: ignore[arg-type]


def run_quietly(task: Task) -> None:
    """Measure, and print nothing but warnings."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        task.evaluate(task.settings)
    for line in output.getvalue().splitlines():
        if line.lower().startswith("warning"):
            print(line, flush=True)


def measured(task: Task, backbone: Backbone) -> dict[str, Any] | None:
    """The result of a task, if it is there and of these settings.

    Raises:
        ValueError: what is there is damaged, or of other weights, and measuring would overwrite it.
    """
    if not task.result.exists():
        return None
    try:
        result: dict[str, Any] = json.loads(task.result.read_bytes())
        same = result["checkpoint"]["sha256"] == backbone.sha256
        differing = differing_settings(result["settings"], plain(task.settings))
        # What had no effect is not recorded; where the checkpoint lies does not matter.
        differing = [name for name in differing if name in LATER | result["settings"] and name != "ckpt"]
        if reason := usable(result):
            raise ValueError(reason)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{task.result} is damaged or no result: delete it, and it is measured again") from None
    if not same:
        raise ValueError(
            f"{task.result} is of other weights: give another --out or other --names, or delete its folder"
        )
    return None if differing else result


def collected(settings: Settings, candidate: Candidate, known: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results of this checkpoint in the folders to collect from, other than those that are known."""
    seen = {(result["protocol"], result["dataset"], result["split"]) for result in known}
    others: dict[tuple[str, str, str], dict[str, Any]] = {}
    for path in (path for folder in settings.collect for path in sorted(Path(folder).expanduser().rglob("*.json"))):
        try:
            result = json.loads(path.read_bytes())
            same = result["checkpoint"]["sha256"] == candidate.backbone.sha256 and result["value"] is not None
            same = same and result["settings"].get("weights", "teacher") == settings.weights
        except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
            continue  # another kind of file
        if same and (reason := usable(result)):
            print(f"warning: {printable(path)} is left out, as it is a damaged result: {reason}")
            continue
        key = (result["protocol"], result["dataset"], result["split"]) if same else ("", "", "")
        # Of several with one figure, the one that also has it block by block.
        if same and key not in seen and (key not in others or "every_block" in result["details"]):
            others[key] = {**result, "pictures": pictures_of(path, result)}
    return list(others.values())


def pictures_of(path: Path, result: dict[str, Any]) -> Path:
    """The sheet of pictures beside a result; of earlier versions, all had one name."""
    sheet = path.parent / f"{result['task']}.png"
    return sheet if sheet.exists() else path.parent / "pictures.png"


def pictured(settings: Settings) -> list[tuple[str, np.ndarray]]:
    """Names and pixels of the images to look at."""
    if settings.images:
        return pick_images(settings.images, settings.count)
    c, s, d = settings.classification, settings.segmentation, settings.discovery
    if s.root:
        files = dense.open_split(s, s.split).images
    elif d.root:
        files = objects.open_data(d)[0].images
    elif c.root and c.name == "folder":
        return pick_images(Path(c.root) / (c.split or "val"), settings.count)
    else:
        raise ValueError("give --images: a folder, zip archive or image file to look at")
    rows = np.unique(np.linspace(0, len(files) - 1, settings.count).round().astype(int))
    return [(printable(files[row].name), read_image(files[row])) for row in rows.tolist()]


main = partial(cli.run, make_report, Settings, __doc__)

if __name__ == "__main__":
    main()
