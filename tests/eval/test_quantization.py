"""Simulated quantization: its arithmetic by hand, its errors against theory, and the command on a small model."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from helpers import refusal
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from skipless.eval.backbones import Backbone, load_backbone
from skipless.eval.metrics import drop_interval, miou_drop_interval, miou_interval
from skipless.eval.quantization import (
    finite,
    largest_inputs,
    layer_errors,
    linear_layers,
    main,
    quantize,
    round_to_bits,
    sqnr,
)
from skipless.ssl.model.initialization import PRESETS, skipless_init_
from skipless.ssl.model.vit import VisionTransformer
from skipless.ssl.run.checkpoints import export_backbone


@pytest.fixture
def backbone(tmp_path: Path) -> Backbone:
    torch.manual_seed(0)
    model = VisionTransformer(32, 2, 2, patch=8, residual=False, image_size=32)
    skipless_init_(model, **PRESETS["small"])
    (tmp_path / "run").mkdir()
    export_backbone(tmp_path / "run", model, {})
    return load_backbone(tmp_path / "run")


def images(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("value", "bits", "expected"),
    # The largest is 7: steps of 1 in 4 bits, 7 / 127 in 8.
    [
        (3.4, 4, 3.0),
        (-3.6, 4, -4.0),
        (9.0, 4, 7.0),
        (-9.0, 4, -7.0),
        (0.4, 4, 0.0),
        (3.4, 8, 62 * 7 / 127),
        (7, 8, 7.0),
    ],
)
def test_values_go_to_the_nearest_integer_of_their_bits(value: float, bits: int, expected: float) -> None:
    got = round_to_bits(torch.tensor([value], dtype=torch.float64), torch.tensor(7.0), bits)
    np.testing.assert_allclose(got, [expected], rtol=1e-12)


@given(bits=st.integers(2, 10), seed=st.integers(0, 99))
def test_rounding_has_few_levels_and_an_error_of_half_a_step(bits: int, seed: int) -> None:
    x = torch.randn(50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    largest = x.abs().amax()
    got = round_to_bits(x, largest, bits)
    assert len(got.unique()) <= 2**bits - 1
    assert (got - x).abs().max() <= largest / (2 ** (bits - 1) - 1) / 2 * (1 + 1e-9)
    assert torch.equal(round_to_bits(torch.zeros(3), torch.tensor(0.0), bits), torch.zeros(3))


def test_noise_of_uniform_values_is_what_theory_says() -> None:
    # The variance of values uniform in [-1, 1] is 1/3, that of the error of a step s is s^2 / 12.
    x = torch.linspace(-1, 1, 100_001, dtype=torch.float64)
    step = 1 / 127
    assert sqnr(x, round_to_bits(x, torch.tensor(1.0), 8)) == pytest.approx(10 * math.log10(4 / step**2), abs=0.1)
    assert sqnr(x, x) == math.inf


def test_a_copy_computes_in_integers_and_the_original_does_not_change(backbone: Backbone) -> None:
    x, before = images(), backbone.features(images())[0].patches
    largest = largest_inputs(backbone, x, batch_size=3)
    seen: dict[str, torch.Tensor] = {}
    quantized = quantize(backbone, 4, 3, largest)
    for name, layer in linear_layers(quantized.model).items():
        assert all(len(row.unique()) <= 15 for row in layer.weight)
        layer.register_forward_hook(lambda _, inputs, __, name=name: seen.__setitem__(name, inputs[0]))
    quantized.features(x)
    assert set(seen) == set(largest) and len(seen) == 8  # noqa: PT018
    assert all(len(value.unique()) <= 7 for value in seen.values())
    assert torch.equal(backbone.features(x)[0].patches, before)
    # Features of both must not be mistaken for each other on disk, nor those of different arithmetics.
    prints = {backbone.fingerprint(), quantized.fingerprint(), quantize(backbone, 4, 8, largest).fingerprint()}
    assert len(prints) == 3


def test_many_bits_change_nothing_and_fewer_change_more(backbone: Backbone) -> None:
    x = images()
    largest = largest_inputs(backbone, x)
    exact = backbone.features(x)[0].patches
    by_bits = [sqnr(exact, quantize(backbone, bits, bits, largest).features(x)[0].patches) for bits in (16, 8, 4)]
    assert by_bits[0] > 70
    # One bit is 6.02 dB.
    assert by_bits[0] - by_bits[1] == pytest.approx(8 * 6.02, abs=4)
    assert by_bits[1] > by_bits[2] + 10


def test_errors_and_kurtosis_of_a_layer_are_those_of_numpy_and_scipy(backbone: Backbone) -> None:
    x = images(2)
    largest = largest_inputs(backbone, x)
    errors = layer_errors(backbone, x, largest)
    block = backbone.model.blocks[0]
    tokens = backbone.model.embed(x)
    fed = block.norm1(tokens).detach().numpy()  # type: ignore[operator]
    expected = np.mean([scipy.stats.kurtosis(one, axis=None) for one in fed.astype(np.float64)])
    assert errors["layers"][0]["kurtosis attn.qkv"] == pytest.approx(expected, rel=1e-5)

    def rounded(a: np.ndarray, top: np.ndarray, bits: int) -> np.ndarray:
        step = top / (2 ** (bits - 1) - 1)
        return np.rint(a / step) * step

    weight = block.attn.qkv.weight.detach().numpy()  # type: ignore[union-attr]
    exact = fed @ weight.T
    coarse = rounded(fed, np.abs(fed).max(), 4) @ rounded(weight, np.abs(weight).max(1, keepdims=True), 4).T
    decibels = 10 * np.log10((exact**2).sum() / ((exact - coarse) ** 2).sum())
    assert errors["layers"][0]["attn.qkv"][2] == pytest.approx(decibels, abs=0.05)
    assert len(errors["layers"]) == len(errors["blocks"]) == 2


def test_layers_that_are_zero_leave_no_number_that_json_lacks(backbone: Backbone) -> None:
    torch.nn.init.zeros_(backbone.model.blocks[0].mlp.fc2.weight)  # type: ignore[union-attr]
    errors = layer_errors(backbone, images(2), largest_inputs(backbone, images(2)))
    assert errors["layers"][0]["mlp.fc2"] == [math.inf] * 3
    assert finite(errors)["layers"][0]["mlp.fc2"] == [None] * 3
    json.dumps(finite(errors), allow_nan=False)
    assert sqnr(torch.zeros(3), torch.ones(3)) == -math.inf


def test_interval_of_a_drop_is_that_of_pairs() -> None:
    # Two arithmetics that are wrong about the same images differ surely, however hard the images are.
    before = np.arange(400) % 2 == 0
    after = before.copy()
    after[:40:2] = False  # 20 of 400 are lost
    low, high = drop_interval(before, after)
    deviation = math.sqrt(0.05 * 0.95 / 400)
    assert (low, high) == pytest.approx((0.05 - 1.96 * deviation, 0.05 + 1.96 * deviation), abs=0.006)
    assert drop_interval(before, before) == (0, 0)


def test_interval_of_a_drop_in_miou() -> None:
    rng = np.random.default_rng(0)
    right = rng.integers(10, 20, (60, 1, 3))
    before = np.concatenate([right, right + 10, right + 10], axis=1)
    assert miou_drop_interval(before, before) == (0, 0)
    worse = np.concatenate([right - 8, right + 10, right + 10], axis=1)
    low, high = miou_drop_interval(before, worse)
    alone = miou_interval(before)
    assert 0.1 < low < high < 0.5
    assert high - low < 4 * (alone[1] - alone[0])


def test_command_reports_every_arithmetic(
    backbone: Backbone, tiny_voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 6)):
        for i in range(count):
            folder = tmp_path / "data" / split / ("dark" if i % 2 else "light")
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 60, (40, 44, 3), dtype=np.uint8) + np.uint8(0 if i % 2 else 190)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    command = [
        f"--ckpt={tmp_path / 'run'}", "--size=32", "--k=3", "--pool=mean", f"--data.root={tmp_path / 'data'}",
        f"--cache={tmp_path / 'cache'}", "--device=cpu",
    ]  # fmt: skip
    segmentation = ["--segmentation=voc12", f"--segmentation-root={tiny_voc}", "--quick.size=32", "--quick.epochs=2"]
    main([*command, *segmentation, f"--out={tmp_path / 'out'}"])
    result = json.loads((tmp_path / "out" / "quantization.json").read_text())
    assert result["protocol"] == "data-quantization/3-nn-mean/32px"
    assert (
        list(result["details"]["knn"]) == list(result["details"]["segmentation"]) == ["float", "w8a8", "w4a8", "w4a4"]
    )
    # Dark and light are told apart by anything, in any arithmetic.
    assert result["details"]["knn"]["w8a8"]["top1"] == 1
    assert result["details"]["segmentation"]["float"]["drop"] == 0 < result["details"]["segmentation"]["float"]["miou"]
    assert result["details"]["segmentation_images"] == [12, 4]
    assert "W4A4" in (tmp_path / "out" / "quantization.md").read_text()
    assert "segmentation-root" in refusal(main, [*command, "--segmentation=voc12"], capsys)
