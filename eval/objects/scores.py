"""Scores of the objects found in a data set: CorLoc, COCO's AP, and how far their graphs can be trusted.

`entries` are what `skipless.eval.objects.search.find_objects` returns, without unreadable images.
"""

import contextlib
import io
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from skipless.datasets.labels.boxes import BoxSet
from skipless.datasets.labels.instances import read_instances
from skipless.eval.metrics import bootstrap_interval, corloc

COMPLETE = 0.99  # share of similar pairs from which a graph counts as nearly complete


def score(
    images: BoxSet, annotations: Path | None, entries: list[dict[str, Any]], method: str, seed: int, block: int
) -> dict[str, Any]:
    """{"metric", "value", "details"} of one of the blocks; value is None where no image has a box."""
    if not any(len(boxes) for boxes in images.boxes):
        return {"metric": None, "value": None, "details": {}}
    if method == "maskcut":
        return coco_ap(images, annotations, detections(images, entries, block))
    boxes = np.array([entry["blocks"][block]["objects"][0]["box"] for entry in entries], float)
    hits = corloc(boxes, list(images.boxes))
    interval = bootstrap_interval(hits, seed)
    whole = np.array([[0, 0, entry["size"][1], entry["size"][0]] for entry in entries], float)
    return {
        "metric": "CorLoc",
        "value": float(hits.mean()),
        "details": {
            "interval_95": interval,
            "scored_images": len(hits),
            "hits": int(hits.sum()),
            "whole_image": float(corloc(whole, list(images.boxes)).mean()),
        },
    }


def detections(images: BoxSet, entries: list[dict[str, Any]], block: int) -> list[dict[str, Any]]:
    """COCO's result format, with one category, 1. Objects of earlier rounds have the higher score."""
    return [
        {
            "image_id": images.ids[entry["index"]],
            "category_id": 1,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "score": 1.0 / (1 + rank),
            "segmentation": item["rle"],
            "file_name": images.names[entry["index"]] + images.images[entry["index"]].suffix,
        }
        for entry in entries
        for rank, item in enumerate(entry["blocks"][block]["objects"])
        for x0, y0, x1, y1 in [item["box"]]
    ]


def coco_ap(images: BoxSet, annotations: Path | None, results: list[dict[str, Any]]) -> dict[str, Any]:
    """COCO's AP without classes, by pycocotools: of boxes and, with an annotation file, of masks, too. Every image of
    the set counts, those without boxes as well; what lies in a crowd is neither right nor wrong."""
    details: dict[str, Any] = {"objects": len(results)}
    kinds: list[Literal["bbox", "segm"]] = ["bbox"] if annotations is None else ["bbox", "segm"]
    with contextlib.redirect_stdout(io.StringIO()):
        if annotations is not None:
            truth = read_instances(annotations)
        else:
            truth = COCO()
            truth.dataset = _as_coco(images)
            truth.createIndex()
        for kind in kinds:
            # With a segmentation, pycocotools would take areas from it, and boxes too.
            unused = "segmentation" if kind == "bbox" else "bbox"
            given = [{key: value for key, value in r.items() if key != unused} for r in results]
            evaluation = COCOeval(truth, truth.loadRes(given), kind)
            evaluation.params.useCats = 0
            # Without categories, pycocotools still leaves out what is of none of these: our 1, where it is no id.
            evaluation.params.catIds = sorted({1, *(item["category_id"] for item in truth.dataset["annotations"])})
            evaluation.params.imgIds = list(images.ids)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            name = "box" if kind == "bbox" else "mask"
            places = {"ap": 0, "ap50": 1, "ap75": 2, "ar100": 8}
            details |= {f"{name}_{score}": float(evaluation.stats[place]) for score, place in places.items()}
    known = set(images.ids)
    if from_boxes := sum(
        a.get("mask_from_box", False) and a["image_id"] in known for a in truth.dataset["annotations"]
    ):
        details["masks_from_boxes"] = from_boxes
    main = "box" if annotations is None else "mask"
    return {"metric": f"{main} AP, class-agnostic", "value": details[f"{main}_ap"], "details": details}


def _as_coco(images: BoxSet) -> dict[str, Any]:
    annotations: list[dict[str, Any]] = []
    for image, boxes in zip(images.ids, images.boxes, strict=True):
        for x0, y0, x1, y1 in boxes.tolist():
            box = {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0)}
            annotations.append({"id": len(annotations) + 1, "image_id": image, "category_id": 1, "iscrowd": 0, **box})
    return {
        "images": [{"id": image} for image in images.ids],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "object"}],
    }


def graph_report(entries: list[dict[str, Any]], block: int) -> dict[str, Any]:
    """What to know of the graphs before trusting the figure."""
    graphs = [entry["blocks"][block] for entry in entries]
    return {
        "mean_edge_share": float(np.mean([graph["edges"] for graph in graphs])),
        "nearly_complete_graphs": sum(graph["edges"] > COMPLETE for graph in graphs),
        "degenerate_images": sum(graph["degenerate"] for graph in graphs),
        "dense_fallbacks": sum(graph["fallback"] for graph in graphs),
    }
