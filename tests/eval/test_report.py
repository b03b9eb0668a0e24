"""The page that compares checkpoints: what is in it, that nothing is measured twice, how it behaves in a browser."""

import base64
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ROOT, load, refusal, tiny_vit
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from sklearn.metrics.pairwise import cosine_similarity

from skipless.common import cli
from skipless.common.precision import has_bf16
from skipless.datasets.synthetic.dataset import write_scenes
from skipless.eval import discovery
from skipless.eval.dense import report as dense_report
from skipless.eval.page.render import similarity_codes
from skipless.eval.page.tables import latex_table, markdown_table, table_of
from skipless.eval.report import Settings, main
from skipless.ssl.run.checkpoints import export_backbone


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(root, train=24, val=12, size=48, workers=1)
    return root


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two random ViTs, of three blocks and of two."""
    folder = tmp_path_factory.mktemp("ckpt")
    paths = []
    for name, depth in (("deep", 3), ("shallow <b>", 2)):
        model = tiny_vit(depth=depth, image_size=48)
        paths.append(folder / f"{name}.safetensors")
        save_file(model.state_dict(), paths[-1], {"architecture": json.dumps(model.architecture)})
    return paths


def flags(scenes: Path, cache: Path, out: Path, *ckpt: Path) -> list[str]:
    return [
        "--ckpt", *map(str, ckpt), "--out", str(out), "--cache", str(cache), "--device", "cpu", "--count", "3",
        "--segmentation.name", "scenes", "--segmentation.root", str(scenes), "--segmentation.size", "48",
        "--discovery.name", "scenes", "--discovery.root", str(scenes),
        "--classification.root", str(scenes), "--classification.size", "48", "--classification.pool", "mean",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def report(scenes: Path, checkpoints: list[Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder of a report, and its cache."""
    out, cache = tmp_path_factory.mktemp("report") / "out", tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patched:
        for module in (discovery, dense_report):  # sheets of pictures take longer than all the rest
            patched.setattr(module, "PICTURES", 2)
        main(flags(scenes, cache, out, *checkpoints))
    return out, cache


@pytest.fixture
def again(report: Any, scenes: Path, checkpoints: list[Path], tmp_path: Path) -> tuple[Path, list[str]]:
    """A copy of the report's folder, and the words that make it again."""
    out = tmp_path / "out"
    shutil.copytree(report[0], out)
    return out, flags(scenes, report[1], out, *checkpoints)


def test_command_measures_everything_and_writes_page_and_tables(report: Any) -> None:
    out, _ = report
    assert {path.name for path in out.iterdir()} == {"report.html", "report.md", "report.tex", "results"}
    for name in ("deep", "shallow <b>"):
        tasks = {path.name for path in (out / "results" / name).iterdir()}
        assert tasks == {"knn", "linear", "segmentation", "retrieval", "clustering", "lost", "tokencut"}
    table = (out / "report.md").read_text()
    for protocol in ("scenes-knn/20/mean/48px", "scenes-linear/quick", "scenes-tokencut", "scenes-lost"):
        assert protocol in table
    # The figure in the table is that of the result.
    result = json.loads((out / "results/deep/tokencut/discovery.json").read_text())
    low, high = result["details"]["interval_95"]
    assert f"{100 * result['value']:.1f} ({100 * low:.1f}–{100 * high:.1f})" in table
    page = (out / "report.html").read_text()
    assert "shallow &lt;b&gt;" in page
    by_task = re.findall(r"python (eval/\w+\.py) [^<]*--ckpt=", page)
    assert {"eval/report.py", "eval/knn.py", "eval/linear.py", "eval/discovery.py", "eval/clustering.py"} <= set(
        by_task
    )
    # A band for each of the two checkpoints on each curve, whether of images or of seeds.
    plots = [svg for svg in re.findall(r"<svg.*?</svg>", page, re.S) if "viewBox" in svg]
    assert len(plots) == 4  # k-NN, segmentation, LOST and TokenCut
    assert [svg.count("PolyCollection_") for svg in plots] == [2] * 4
    assert "shallow <b>" not in page.replace("shallow \\u003cb>", "")
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", page)


def test_saliency_correspondence_video_and_depth_are_on_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    miniatures = load(ROOT / "benchmarks/miniatures.py")
    miniatures.write_data(tmp_path)
    tasks = ("saliency", "correspondence", "video", "depth")
    words = [*miniatures.command_lines(tmp_path, tmp_path)["report"], "--tasks", *tasks]
    main(words)
    table = (tmp_path / "report/report.md").read_text()
    for protocol, metric in (
        ("saliency-tokencut", "maxF"),
        ("spair-nearest/448px", "PCK@0.1"),
        ("davis17-propagation/dino", "J&F"),
        ("rooms-depth/quick", "delta1"),
    ):
        assert re.search(rf"^\| {protocol} \| [^|]* \| {metric} \| \**\d", table, re.MULTILINE), protocol
    page = (tmp_path / "report/report.html").read_text()
    assert {f"eval/{task}.py" for task in tasks} <= set(re.findall(r"python (eval/\w+\.py) [^<]*--ckpt=", page))
    capsys.readouterr()
    main(words)
    assert "(1 of 1): " not in capsys.readouterr().out


def test_what_is_measured_is_not_measured_again(again: Any, capsys: pytest.CaptureFixture) -> None:
    out, words = again
    shutil.rmtree(out / "results" / "deep" / "lost")
    before = {path: path.stat().st_mtime_ns for path in (out / "results").rglob("*.json")}
    main(words)
    printed = capsys.readouterr().out
    assert "deep (1 of 2): lost" in printed
    assert printed.count(" of 2): ") == 1
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_other_settings_are_measured_anew_and_other_weights_refused(
    again: Any, checkpoints: list[Path], capsys: pytest.CaptureFixture
) -> None:
    out, words = again
    before = {path: path.read_bytes() for path in (out / "results").rglob("*.json")}
    main([*words, "--seed", "1", "--tasks", "knn"])
    assert "deep (1 of 2): knn, anew: with other settings" in capsys.readouterr().out
    changed = {path for path, content in before.items() if path.read_bytes() != content}
    assert {path.name for path in changed} == {"knn.json"}
    assert {json.loads(path.read_text())["seed"] for path in changed} == {1}
    swapped = [*words, "--ckpt", *map(str, checkpoints[::-1]), "--names", "deep", "shallow <b>"]
    assert "other weights" in refusal(main, swapped, capsys)


def test_earlier_results_come_back_where_new_ones_do_not_get_done(
    again: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(task: Any) -> None:
        task.result.parent.mkdir(exist_ok=True)
        (task.result.parent / "begun.jsonl").touch()
        raise FileNotFoundError(f"{task.name} is gone")

    out, words = again
    before = {path: path.read_bytes() for path in (out / "results").rglob("*") if path.is_file()}
    monkeypatch.setattr("skipless.eval.report.run_quietly", fail)
    assert refusal(main, [*words, "--seed", "1", "--tasks", "knn"], capsys) == "knn is gone"
    begun = out / "results/deep/knn/begun.jsonl"
    assert not begun.exists()
    assert {path: path.read_bytes() for path in (out / "results").rglob("*") if path.is_file()} == before
    (out / "results/deep/knn/knn.json").unlink()  # what is begun and has no result yet goes on where it was
    assert refusal(main, [*words, "--tasks", "knn"], capsys) == "knn is gone"
    assert begun.exists()


def test_results_of_another_precision_are_not_taken_for_the_same(again: Any, capsys: pytest.CaptureFixture) -> None:
    """Those from before there was a choice are of float32."""
    out, words = again
    path = out / "results/deep/knn/knn.json"
    old = json.loads(path.read_text())
    assert old["settings"].pop("precision") == "fp32"
    path.write_text(json.dumps(old))
    main([*words, "--tasks", "knn"])
    assert "(1 of 2): knn" not in capsys.readouterr().out
    if has_bf16(torch.device("cpu")):  # elsewhere bf16 is the same
        main([*words, "--tasks", "knn", "--precision", "bf16"])
        assert "deep (1 of 2): knn, anew" in capsys.readouterr().out


def test_results_made_elsewhere_are_collected_by_their_weights(
    report: Any, checkpoints: list[Path], scenes: Path, tmp_path: Path
) -> None:
    done, _ = report
    (tmp_path / "noise.json").write_text("[1, 2]")
    out = tmp_path / "out"
    images = str(scenes / "val")
    main(["--ckpt", str(checkpoints[0]), "--images", images, "--count", "2", "--out", str(out), "--collect", str(done), str(tmp_path)])  # fmt: skip  # noqa: E501
    lines = (out / "report.md").read_text().splitlines()
    measured = (done / "report.md").read_text().splitlines()
    assert [len([row for row in table if row.startswith("| scenes")]) for table in (measured, lines)] == [7, 7]


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--ckpt", "nowhere.pt"], "nowhere.pt"),
        (["--ckpt", "A", "A"], "two checkpoints are called A"),
        (["--ckpt", "A", "B", "--names", "one"], "names has 1 for 2 checkpoints"),
        (["--ckpt", "A", "--tasks", "knn", "magic"], "task 'magic' does not exist"),
        (["--ckpt", "A", "--count", "0"], "count and size must be 1 or more"),
    ],
)
def test_bad_input_is_one_sentence(
    more: list[str], named: str, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert named in refusal(main, more, capsys)
    assert list(tmp_path.iterdir()) == []


def test_lists_are_words_on_the_command_line() -> None:
    parsed = cli.parse(
        Settings, ["--ckpt", "runs/a", "runs/b", "--tasks", "knn", "--names", "a b", "c", "--count", "2"]
    )
    assert parsed.ckpt == ("runs/a", "runs/b")
    assert (parsed.tasks, parsed.names, parsed.count) == (("knn",), ("a b", "c"), 2)


def result(task: str, value: float, **more: Any) -> dict[str, Any]:
    base = {"task": task, "protocol": f"x_y-{task}", "dataset": "x_y", "split": "val", "images": 4, "metric": "m"}
    return {**base, "value": value, "details": more.pop("details", {}), **more}


def test_tables_by_hand() -> None:
    table = table_of(
        {
            "a&b": [
                result("segmentation", 0.25, details={"interval_95": [0.2, 0.3]}, official_images=9),
                result("knn", 0.5, details={"interval_95": [0.4, 0.6]}),
            ],
            "c|d": [
                result("knn", 0.75, details={"interval_95": [0.65, 0.8]}),
                result("clustering", 0.1, details={"std": 0.02}),
            ],
        }
    )
    assert markdown_table(table).splitlines()[:5] == [
        r"| protocol | data | metric | a&b | c\|d |",
        "|---|---|---|---:|---:|",
        "| x_y-knn | x_y val, 4 images | m | 50.0 (40.0–60.0) | **75.0 (65.0–80.0)** |",
        "| x_y-segmentation | x_y val SUBSET, 4 of 9 images | m | 25.0 (20.0–30.0) |  |",
        "| x_y-clustering | x_y val, 4 images | m |  | 10.0 ± 2.0 |",
    ]
    assert latex_table(table).splitlines()[3:8] == [
        r"Protocol & Data & a\&b & c|d \\",
        r"\midrule",
        r"x\_y-knn & x\_y val, 4 images & 50.0 (40.0--60.0) & \textbf{75.0 (65.0--80.0)} \\",
        r"x\_y-segmentation & x\_y val SUBSET, 4 of 9 images & 25.0 (20.0--30.0) &  \\",
        r"x\_y-clustering & x\_y val, 4 images &  & 10.0 $\pm$ 2.0 \\",
    ]


@pytest.mark.parametrize(
    ("details", "best"),
    [
        ([{"interval_95": [0.4, 0.6]}, {"interval_95": [0.61, 0.8]}], [False, True]),
        ([{"interval_95": [0.4, 0.6]}, {"interval_95": [0.59, 0.8]}], [False, False]),
        ([{"std": 0.2}, {"std": 0.01}], [False, False]),  # 30 to 70, 69 to 71
        ([{"interval_95": [0.4, 0.6]}, {}], [False, False]),
        ([{}, {}], [False, False]),
        ([{"interval_95": [0.4, 0.6]}], [False]),
    ],
)
def test_bold_is_what_lies_above_all_others_of_its_row(details: list[Any], best: list[bool]) -> None:
    values = (0.5, 0.7)[: len(details)]
    results = {
        str(value): [result("knn", value, details=detail)] for value, detail in zip(values, details, strict=True)
    }
    assert [cell is not None and cell.best for cell in table_of(results).rows[0].cells] == best


def test_a_vector_that_no_loss_has_seen_is_said_below_the_tables() -> None:
    careful = "the head read the mean of the patches in training, and pool is cls, which it did not train"
    apart = {"std": 0.1}
    first, second = (result("knn", 0.5, careful=careful, details=apart), result("knn", 0.25, careful="", details=apart))
    table = table_of({"a_b": [first], "c": [second]})
    markdown, latex = markdown_table(table), latex_table(table)
    assert "| x_y-knn | x_y val, 4 images | m | **50.0 ± 10.0 †** | 25.0 ± 10.0 |" in markdown
    assert f"† a_b, x_y-knn: {careful}." in markdown.splitlines()
    assert r"\textbf{50.0 $\pm$ 10.0 $^\dagger$} & 25.0 $\pm$ 10.0 \\" in latex
    assert rf"\multicolumn{{4}}{{l}}{{\footnotesize $^\dagger$ a\_b, x\_y-knn: {careful}.}} \\" in latex.splitlines()


def test_each_checkpoint_is_asked_for_the_vector_that_its_head_read(
    scenes: Path, checkpoints: list[Path], report: Any, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    export_backbone(run, tiny_vit(image_size=48), {"pool": "mean"})
    data = ["--classification.root", str(scenes), "--classification.size", "48"]
    words = ["--ckpt", str(run), str(checkpoints[1]), "--cache", str(report[1]), "--count=1", *data, "--tasks", "knn"]
    main([*words, "--out", str(tmp_path / "auto")])
    table = (tmp_path / "auto/report.md").read_text()
    assert [line.split(" | ")[0] for line in table.splitlines() if "knn" in line] == [
        "| scenes-knn/20/48px", "| scenes-knn/20/mean/48px"
    ]  # fmt: skip
    main([*words, "--classification.pool=cls", "--out", str(tmp_path / "cls")])
    for file in ("report.md", "report.html"):
        assert "run, scenes-knn/20/48px: the head read the mean of the patches" in (tmp_path / "cls" / file).read_text()


@settings(max_examples=20)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(3, 20), st.integers(3, 30), st.integers(0, 10**6))
def test_codes_give_cosines_and_state_their_error(h: int, w: int, dim: int, dims: int, seed: int) -> None:
    features = np.random.default_rng(seed).normal(size=(h, w, dim))
    codes, error = similarity_codes(features, dims)
    assert codes.dtype == np.int8
    assert codes.shape == (h * w, min(dims, dim))
    flat = features.reshape(-1, dim)
    difference = codes.astype(float) @ codes.T / 127**2 - cosine_similarity(flat)
    np.testing.assert_allclose(np.sqrt((difference**2).mean()), error, atol=1e-12)
    if dims >= dim:  # nothing but rounding to 8 bits is left
        assert error < 0.02


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine (Debian: apt install chromium)")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any, report: Any) -> Iterator[Any]:
    """The page, opened; in the end neither an error nor a request for anything but the page itself was seen."""
    address = (report[0] / "report.html").as_uri()
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    complaints: list[str] = []
    requests: list[str] = []
    opened.on("console", lambda message: complaints.append(message.text) if message.type != "log" else None)
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("request", lambda request: requests.append(request.url))
    opened.goto(address)
    yield opened
    assert complaints == []
    assert [url for url in requests if not url.startswith("data:")] == [address]
    opened.close()


def drawn(page: Any, selector: str) -> list[str]:
    """What every canvas shows."""
    return page.eval_on_selector_all(selector, "all => all.map(c => c.toDataURL())")


def test_slider_changes_pictures(page: Any) -> None:
    assert page.text_content("#blocks") == "deep 3 of 3, shallow <b> 2 of 2"
    sheet, viewer = drawn(page, "canvas[data-sheet]"), drawn(page, "canvas[data-pca]")
    assert len(sheet) == 6
    assert len(viewer) == 2
    page.focus("#block")
    page.keyboard.press("Home")
    assert page.text_content("#blocks") == "deep 1 of 3, shallow <b> 1 of 2"
    assert all(a != b for a, b in zip(sheet, drawn(page, "canvas[data-sheet]"), strict=True))
    assert all(a != b for a, b in zip(viewer, drawn(page, "canvas[data-pca]"), strict=True))


def test_pointing_at_a_patch_changes_similarities_and_nothing_else(page: Any) -> None:
    similar, pca = drawn(page, "canvas[data-similarity]"), drawn(page, "canvas[data-pca]")
    page.locator(".view").first.hover(position={"x": 3, "y": 3})
    moved = drawn(page, "canvas[data-similarity]")
    assert all(a != b for a, b in zip(similar, moved, strict=True))
    assert drawn(page, "canvas[data-pca]") == pca
    page.locator(".view").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert all(a != b for a, b in zip(moved, drawn(page, "canvas[data-similarity]"), strict=True))


def test_similarity_on_the_page_is_that_of_the_features(page: Any, report: Any) -> None:
    look = json.loads(re.search(r'id="look">(.*?)</script>', (report[0] / "report.html").read_text())[1])  # type: ignore[index]
    checkpoint = look["checkpoints"][0]
    h, w = checkpoint["grids"][0]
    codes = np.frombuffer(base64.b64decode(checkpoint["codes"][-1][0]), np.int8).reshape(h * w, checkpoint["dims"])
    page.locator(".view").first.hover(position={"x": 1, "y": 1})
    low = (codes.astype(float) @ codes[0] / 127**2).min()
    assert page.text_content('[data-range="0"]') == f"{low:.2f} to 1"


def test_choosing_an_image_changes_all_of_the_viewer(page: Any) -> None:
    before = drawn(page, ".viewer canvas")
    page.locator(".thumbnails button").nth(1).click()
    assert page.locator(".thumbnails button").nth(1).get_attribute("aria-pressed") == "true"
    assert all(a != b for a, b in zip(before, drawn(page, ".viewer canvas"), strict=True))


def test_page_fits_a_phone(page: Any) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    cells = page.locator(".figures td.number")
    sides = cells.evaluate_all("all => all.map(c => c.getBoundingClientRect()).map(b => [b.left, b.right])")
    assert all(0 <= left <= right <= 360 for left, right in sides)  # seen without scrolling
    assert page.locator(".sheet canvas").first.bounding_box()["width"] > 40


def test_names_have_no_meaning_of_their_own_in_tables() -> None:
    table = table_of({r"a_b\c*": [result("knn", 0.5)], "<x>\n[y](z)": [result("knn", 0.25)]})
    head = markdown_table(table).splitlines()[0]
    assert head == r"| protocol | data | metric | a_b\\c\* | \<x\>\\n\[y\](z) |"
    assert (
        r"Protocol & Data & a\_b\textbackslash{}c* & <x>\textbackslash{}n[y](z) \\" in latex_table(table).splitlines()
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"value": "high"}, "it holds 'high' in the place of a number"),
        ({"value": float("nan")}, "it holds nan in the place of a number"),
        ({"protocol": ["knn"]}, "its protocol is ['knn']"),
        ({"details": None}, "'NoneType' object has no attribute 'get'"),
        ({"details": {"interval_95": [0.1]}}, "not enough values to unpack"),
        ({"versions": "none"}, "its versions is 'none'"),
        ({"dataset": None}, "its dataset is None"),
    ],
)
def test_a_malformed_result_is_left_out_and_said(
    report: Any, checkpoints: list[Path], scenes: Path, tmp_path: Path, change: dict[str, Any], reason: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    done, _ = report
    good = json.loads((done / "results/deep/knn/knn.json").read_text())
    (tmp_path / "damaged.json").write_text(json.dumps(good | change))
    line = ["--ckpt", checkpoints[0], "--images", scenes / "val", "--count=2", "--out", tmp_path / "out"]
    main(list(map(str, [*line, "--collect", tmp_path])))
    said = capsys.readouterr().out
    assert f"damaged.json is left out, as it is a damaged result: {reason}" in said
    assert (tmp_path / "out/report.html").exists()
