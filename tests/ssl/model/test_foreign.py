"""The initialization and the removal of skips on models of timm, torch and transformers: they compute what ours do.

transformers is not among our dependencies. Where it is missing, two stand-ins with the names of its parts, up to
version 4 and in version 5.23, take its place; where it is there, the real ViTModel is tested too.
"""

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.layers import GluMlp, SwiGLU
from timm.models.beit import Beit
from timm.models.vision_transformer import ResPostBlock
from timm.models.vision_transformer import VisionTransformer as TimmViT
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

from skipless.ssl.model.foreign import remove_skips_
from skipless.ssl.model.initialization import skipless_init_
from skipless.ssl.model.load import load_vit
from skipless.ssl.model.vit import VisionTransformer
from skipless.ssl.run.checkpoints import export_backbone, load_run_backbone

D, DEPTH, HEADS = 32, 3, 4


class StandInAttention(nn.Module):
    """Attention as in transformers, under the names it is given."""

    def __init__(self, names: tuple[str, ...], with_output: bool):
        super().__init__()
        self.names, self.with_output, self.num_attention_heads = names, with_output, HEADS
        for name in names:
            setattr(self, name, nn.Linear(D, D))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        linears = [getattr(self, name) for name in self.names]
        q, k, v = (linear(x).unflatten(2, (HEADS, -1)).transpose(1, 2) for linear in linears[:3])
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        return linears[3](mixed) if self.with_output else mixed


class Dense(nn.Module):
    """A layer called `dense`; with a skip where it is given one to add, as transformers' ViTOutput."""

    def __init__(self, inputs: int, outputs: int, activation: nn.Module | None = None):
        super().__init__()
        self.dense = nn.Linear(inputs, outputs)
        self.dropout = nn.Dropout(0.0)
        if activation is not None:
            self.intermediate_act_fn = activation

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        x = self.dense(x)
        if hasattr(self, "intermediate_act_fn"):
            x = self.intermediate_act_fn(x)
        return x if skip is None else x + skip


class AttentionOf4(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = StandInAttention(("query", "key", "value"), with_output=False)
        self.output = Dense(D, D)

    def forward(self, x: Tensor, head_mask: Tensor | None = None) -> tuple[Tensor, str]:
        return self.output(self.attention(x, head_mask)), "the attention map"


class LayerOf4(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = AttentionOf4()
        self.intermediate = Dense(D, 4 * D, nn.GELU())
        self.output = Dense(4 * D, D)
        self.layernorm_before = nn.LayerNorm(D, eps=1e-6)
        self.layernorm_after = nn.LayerNorm(D, eps=1e-6)

    def forward(self, x: Tensor, head_mask: Tensor | None = None) -> tuple[Tensor, str]:
        attended, map_ = self.attention(self.layernorm_before(x), head_mask)
        x = x + attended
        return self.output(self.intermediate(self.layernorm_after(x)), x), map_


class MlpOf5(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.activation_fn = nn.GELU()
        self.fc1, self.fc2 = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation_fn(self.fc1(x)))


class AttentionOf5(StandInAttention):
    def __init__(self) -> None:
        super().__init__(("q_proj", "k_proj", "v_proj", "o_proj"), with_output=True)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, str]:
        return super().forward(x, attention_mask), "the attention map"


class LayerOf5(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = AttentionOf5()
        self.layernorm_before = nn.LayerNorm(D, eps=1e-6)
        self.layernorm_after = nn.LayerNorm(D, eps=1e-6)
        self.mlp = MlpOf5()
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = x + self.dropout(self.attention(self.layernorm_before(x), attention_mask)[0])
        return x + self.dropout(self.mlp(self.layernorm_after(x)))


class StandInOf4(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(LayerOf4() for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.encoder.layer:  # type: ignore[union-attr]
            x, map_ = layer(x)
            assert map_ == "the attention map"
        return x


class StandInOf5(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LayerOf5() for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def torch_layer(**kwargs: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(
        **{"d_model": D, "nhead": HEADS, "dim_feedforward": 4 * D, "dropout": 0.0, "activation": F.gelu}
        | {"layer_norm_eps": 1e-6, "batch_first": True, "norm_first": True}
        | kwargs
    )


def torch_encoder(**kwargs: Any) -> nn.TransformerEncoder:
    return nn.TransformerEncoder(torch_layer(**kwargs), DEPTH, enable_nested_tensor=False)


def timm_vit(**kwargs: Any) -> TimmViT:
    return TimmViT(
        **{"img_size": 16, "patch_size": 4, "embed_dim": D, "depth": DEPTH, "num_heads": HEADS, "num_classes": 0}
        | kwargs
    )


def our_vit(**kwargs: Any) -> VisionTransformer:
    return VisionTransformer(D, DEPTH, HEADS, patch=4, image_size=16, attention="sdpa", **kwargs)


def perturb_(model: nn.Module) -> nn.Module:
    """So that biases, norms and every single layer matter."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Tensor]]] = {
    "timm": (timm_vit, lambda model, x: model.blocks(x)),
    "torch": (torch_encoder, lambda model, x: model(x)),
    "transformers 4": (StandInOf4, lambda model, x: model(x)),
    "transformers 5": (StandInOf5, lambda model, x: model(x)),
}


def blocks_of_ours(x: Tensor, depth: int = DEPTH, **init: Any) -> Tensor:
    """Tokens [B, N, D] through the blocks of our skipless model, freshly initialized."""
    model = skipless_init_(our_vit(residual=False), **init).double()
    groups = ((x.shape[0], x.shape[1]),)
    flat = x.flatten(0, 1)
    for block in list(model.blocks)[:depth]:  # type: ignore[arg-type]
        flat = block(flat, groups, "sdpa")
    return flat.unflatten(0, groups[0]).detach()


def tokens() -> Tensor:
    return torch.randn(2, 9, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mlp", ["suo", "mirrored"])
@pytest.mark.parametrize("kind", MODELS)
def test_initialized_and_without_skips_it_computes_what_ours_does(kind: str, mlp: str, training: bool) -> None:
    make, run = MODELS[kind]
    init: dict[str, Any] = {"alpha": 1.8, "beta": 2.0, "mlp": mlp, "seed": 7, "depth_scale": 1.5}
    model = make()
    perturb_(model)  # biases other than zero, which the initialization has to clear
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
    skipless_init_(model, **init).double().train(training)
    x = tokens()
    with torch.set_grad_enabled(training):
        with_skips = run(model, x)
        without = run(remove_skips_(model), x)
    expected = blocks_of_ours(x, **init)
    torch.testing.assert_close(without.detach(), expected, atol=1e-9, rtol=1e-9)
    assert (with_skips - expected).abs().max() > 0.1


def test_whole_timm_model_equals_ours() -> None:
    reference = perturb_(timm_vit()).double().eval()
    names = list(reference.state_dict())
    ours = our_vit(residual=False).double().eval()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    remove_skips_(reference)
    assert list(reference.state_dict()) == names
    ours.load_state_dict(reference.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(reference.forward_features(images), ours([images])[0], atol=1e-9, rtol=0)


def test_timm_refuses_weights_of_shaped_attention(tmp_path: Path) -> None:
    shaped = perturb_(our_vit(residual=True, shaped=True))
    export_backbone(tmp_path, shaped, {})
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"with_shaped_attention"'):
        timm_vit().load_state_dict(load_file(tmp_path / "backbone.safetensors"))
    images = torch.randn(2, 3, 16, 16)
    for loaded in (load_run_backbone(tmp_path)[0], load_vit(str(tmp_path / "backbone.safetensors")).model):
        torch.testing.assert_close(loaded([images])[0], shaped.eval()([images])[0])


def test_timm_refuses_skipless_weights_until_their_mark_is_taken_off(tmp_path: Path) -> None:
    """By names and shapes they fit, and timm's model would add skips that they were not trained with."""
    skipless = perturb_(our_vit(residual=False))
    export_backbone(tmp_path, skipless, {})
    weights = load_file(tmp_path / "backbone.safetensors")
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"without_skip_connections"'):
        timm_vit().load_state_dict(weights)
    del weights["without_skip_connections"]
    reference = remove_skips_(timm_vit()).eval()
    reference.load_state_dict(weights)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(reference.forward_features(images), skipless.eval()([images])[0])
        torch.testing.assert_close(load_run_backbone(tmp_path)[0]([images])[0], skipless([images])[0])
    export_backbone(tmp_path, our_vit(residual=True), {})
    timm_vit().load_state_dict(load_file(tmp_path / "backbone.safetensors"))


def test_timm_block_still_honors_an_attention_mask() -> None:
    model = remove_skips_(perturb_(timm_vit())).double().eval()
    x = tokens()
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    with torch.no_grad():
        whole = model.blocks[0](x, attn_mask=mask)  # type: ignore[operator, index]
        start = model.blocks[0](x[:, :4], attn_mask=mask[:4, :4])  # type: ignore[operator, index]
    torch.testing.assert_close(whole[:, :4], start)


def test_ours_says_so_in_its_architecture() -> None:
    residual = perturb_(our_vit(residual=True, registers=2))
    skipless = our_vit(residual=False, registers=2)
    skipless.load_state_dict(residual.state_dict())
    images = torch.randn(2, 3, 16, 16)
    assert remove_skips_(residual) is residual
    assert residual.architecture == skipless.architecture
    torch.testing.assert_close(residual([images])[0], skipless([images])[0])
    rebuilt = VisionTransformer(**residual.architecture, attention="sdpa")  # type: ignore[arg-type]
    rebuilt.load_state_dict(residual.state_dict())
    torch.testing.assert_close(rebuilt([images])[0], skipless([images])[0])


def layer_by_hand(layer: nn.TransformerEncoderLayer, x: Tensor, allowed: Tensor) -> Tensor:
    """x <- attention(norm1(x)), x <- mlp(norm2(x)); allowed: bool [B, N, N], queries by keys."""

    def norm(values: Tensor, module: nn.LayerNorm) -> Tensor:
        centered = values - values.mean(-1, keepdim=True)
        scale = (centered.square().mean(-1, keepdim=True) + module.eps).sqrt()
        return centered / scale * module.weight + module.bias

    attention = layer.self_attn
    q, k, v = (norm(x, layer.norm1) @ attention.in_proj_weight.T + attention.in_proj_bias).split(D, dim=-1)
    heads = []
    for h in range(HEADS):
        columns = slice(h * D // HEADS, (h + 1) * D // HEADS)
        logits = q[..., columns] @ k[..., columns].mT / (D / HEADS) ** 0.5
        heads.append(logits.masked_fill(~allowed, -torch.inf).softmax(-1) @ v[..., columns])
    y = torch.cat(heads, dim=-1) @ attention.out_proj.weight.T + attention.out_proj.bias
    hidden = norm(y, layer.norm2) @ layer.linear1.weight.T + layer.linear1.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    return hidden @ layer.linear2.weight.T + layer.linear2.bias


PADDING = torch.tensor([[False] * 9, [False] * 6 + [True] * 3])
CAUSAL = torch.ones(9, 9, dtype=torch.bool).triu(1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("masks", "forbidden"),
    [
        ({}, torch.zeros(2, 9, 9, dtype=torch.bool)),
        ({"src_key_padding_mask": PADDING}, PADDING[:, None].expand(2, 9, 9)),
        ({"mask": CAUSAL}, CAUSAL.expand(2, 9, 9)),
        ({"mask": CAUSAL, "is_causal": True}, CAUSAL.expand(2, 9, 9)),
        ({"mask": CAUSAL, "src_key_padding_mask": PADDING, "is_causal": True}, CAUSAL | PADDING[:, None]),
    ],
    ids=["none", "padding", "mask", "causal", "causal and padding"],
)
def test_torch_encoder_is_the_formula_with_masks(masks: dict[str, Any], forbidden: Tensor, training: bool) -> None:
    encoder = torch_encoder()
    perturb_(encoder).double().train(training)
    remove_skips_(encoder)
    x = expected = tokens()
    with torch.set_grad_enabled(training):  # eval mode without gradients: where torch would take its fused kernel
        output = encoder(x, **masks)
    for layer in encoder.layers:
        expected = layer_by_hand(layer, expected, ~forbidden)  # type: ignore[arg-type]
    torch.testing.assert_close(output, expected, atol=1e-9, rtol=0)


def test_torch_fused_kernel_would_have_added_the_skips_and_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    residual = torch_layer()
    perturb_(residual).double().eval()
    skipless = remove_skips_(copy.deepcopy(residual))
    calls = []
    fused = torch._transformer_encoder_layer_fwd

    def spy(*args: Any) -> Tensor:
        calls.append(args)
        return fused(*args)

    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", spy)
    x = tokens()
    with torch.inference_mode():
        residual(x)
        assert len(calls) == 1
        output = skipless(x)
    assert len(calls) == 1
    torch.testing.assert_close(output, layer_by_hand(residual, x, torch.ones(2, 9, 9, dtype=torch.bool)))


def test_torch_layer_on_its_own_keeps_dropout() -> None:
    layer = remove_skips_(torch_layer(dropout=0.5)).train()
    x = tokens().float()
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("kind", MODELS)
def test_copies_stand_on_their_own(kind: str, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    make, run = MODELS[kind]
    names = list(make().state_dict())
    model = remove_skips_(perturb_(make())).double().eval()
    x = tokens()
    with torch.no_grad():
        before = run(model, x)
        twin = duplicate(model)
        assert list(twin.state_dict()) == names
        assert torch.equal(run(twin, x), before)
        for parameter in twin.parameters():
            parameter.mul_(1.5)
        assert not torch.allclose(run(twin, x), before)
        assert torch.equal(run(model, x), before)
        model.load_state_dict(twin.state_dict())
        assert torch.equal(run(model, x), run(twin, x))
        assert torch.equal(run(remove_skips_(twin), x), run(twin, x))  # once more does nothing


def test_blocks_remain_instances_of_their_class() -> None:
    model = remove_skips_(timm_vit())
    assert all(isinstance(block, timm.models.vision_transformer.Block) for block in model.blocks)  # type: ignore[union-attr, arg-type]
    assert len({type(block) for block in model.blocks}) == 1  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("head", [False, True])
def test_vit_of_transformers(implementation: str, head: bool) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=D, num_hidden_layers=DEPTH, num_attention_heads=HEADS, intermediate_size=4 * D, image_size=16,
        patch_size=4, layer_norm_eps=1e-6, attn_implementation=implementation,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config) if head else transformers.ViTModel(config)
    names = list(model.state_dict())
    remove_skips_(skipless_init_(model, beta=2.0, seed=7)).double().eval()
    assert list(model.state_dict()) == names
    model = pickle.loads(pickle.dumps(model))
    vit = model.vit if head else model
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        output = vit(images, output_hidden_states=True, output_attentions=implementation == "eager")
        embedded = vit.embeddings(images)
        expected = [blocks_of_ours(embedded, depth, beta=2.0, seed=7) for depth in range(DEPTH + 1)]
        torch.testing.assert_close(output.last_hidden_state, vit.layernorm(expected[-1]), atol=1e-5, rtol=0)
        for state, tokens_after in zip(output.hidden_states[:DEPTH], expected, strict=False):
            torch.testing.assert_close(state, tokens_after, atol=1e-5, rtol=0)
    if implementation == "eager":
        assert [tuple(each.shape) for each in output.attentions] == [(2, HEADS, 17, 17)] * DEPTH


def name_of(activation: Any) -> str:
    return getattr(activation, "__name__", str(activation))


@pytest.mark.parametrize(
    "activation", [F.relu, F.gelu, F.silu, nn.ReLU(inplace=True), nn.GELU("tanh"), nn.Hardswish()], ids=name_of
)
def test_mirrored_mlp_is_orthogonal_with(activation: Any) -> None:
    layer = skipless_init_(torch_layer(activation=activation), mlp="mirrored").double()
    with torch.no_grad():
        x = tokens()
        identity = torch.eye(D, dtype=torch.float64)
        matrix = layer._ff_block(identity)  # type: ignore[operator]
        torch.testing.assert_close(matrix @ matrix.T, identity, atol=1e-5, rtol=0)
        torch.testing.assert_close(layer._ff_block(x), x @ matrix, atol=1e-5, rtol=0)  # type: ignore[operator]


@pytest.mark.parametrize("activation", [F.leaky_relu, nn.PReLU(), F.elu, F.mish, nn.Tanh()], ids=name_of)
def test_mirrored_mlp_is_refused_with(activation: Any) -> None:
    layer = torch_layer(activation=activation)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with pytest.raises(ValueError, match=r"TransformerEncoderLayer: a mirrored MLP needs an activation .*; use suo"):
        skipless_init_(layer, mlp="mirrored")
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    skipless_init_(layer, mlp="suo")


class WithGate(nn.TransformerEncoderLayer):
    """A user's own layer, whose forward must not be lost."""


def relpos_vit(**kwargs: Any) -> nn.Module:
    return VisionTransformerRelPos(
        img_size=16, patch_size=4, embed_dim=D, depth=1, num_heads=HEADS, num_classes=0, **kwargs
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: timm_vit(qk_norm=True), r"blocks\.0\.attn\.q_norm \(LayerNorm\) is no part of plain softmax"),
        (lambda: timm_vit(scale_attn_norm=True), r"blocks\.0\.attn\.norm \(LayerNorm\)"),
        (lambda: timm_vit(mlp_layer=SwiGLU), r"blocks\.0\.mlp \(SwiGLU\) has no linear layer fc1"),
        (lambda: timm_vit(mlp_layer=GluMlp), r"blocks\.0: the MLP's matrices are \[128, 32\] and \[32, 64\]; a gated"),
        (lambda: timm_vit(attn_layer="diff"), r"blocks\.0\.attn\.\w+"),
        (lambda: relpos_vit(), r"blocks\.0\.attn\.rel_pos \(RelPosMlp\) adds a relative position bias"),
        (lambda: relpos_vit(shared_rel_pos=True), r"shared_rel_pos \(RelPosMlp\) adds a relative position bias"),
        (
            lambda: Beit(img_size=16, patch_size=4, embed_dim=D, depth=1, num_heads=HEADS, use_rel_pos_bias=True),
            r"blocks\.0\.attn\.(q_bias|relative_position_bias_table) is no part",
        ),
        (lambda: nn.TransformerEncoder(torch_layer(norm_first=False), 1), r"layers\.0 is post-norm"),
        (lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(D, HEADS), 1), r"layers\.0 is a TransformerDecoder"),
        (lambda: nn.Transformer(D, HEADS, 1, 1), "Transformer has no blocks"),
        (lambda: timm.create_model("resnet10t"), "ResNet has no blocks"),
    ],
)
def test_initialization_refuses(make: Callable[[], nn.Module], message: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's advice about nested tensors
        model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        skipless_init_(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: timm_vit(drop_path_rate=0.1), r"blocks\.1\.drop_path1 \(DropPath\) acts on the branch beside a skip"),
        (lambda: timm_vit(init_values=1e-5), r"blocks\.0\.ls1 \(LayerScale\) acts on the branch beside a skip"),
        (lambda: timm_vit(block_fn=ResPostBlock), r"blocks\.0 is a ResPostBlock, and where its skip"),
        (lambda: our_vit(drop_path=0.1), r"layer_scale and drop_path act on the branch .*drop_path=0\.1"),
        (lambda: our_vit(layer_scale=1e-5), r"layer_scale and drop_path act on the branch .*layer_scale=1e-05"),
        (lambda: nn.TransformerEncoder(torch_layer(norm_first=False), 1), r"layers\.0 is post-norm"),
        (lambda: WithGate(D, HEADS, norm_first=True), "WithGate is a WithGate, and where its skip"),
        (lambda: nn.Linear(2, 2), "Linear has no blocks"),
    ],
)
def test_removal_refuses(make: Callable[[], nn.Module], message: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        remove_skips_(model)
    assert [type(module) for module in model.modules()] == kinds
    if isinstance(model, VisionTransformer):
        assert model.architecture["residual"]
        assert all(block.residual for block in model.blocks)
