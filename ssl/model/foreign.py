"""Transformers of several libraries: where the matrices of their blocks are, and how their skip connections come off.

    skipless      VisionTransformer
    timm          VisionTransformer
    torch         nn.TransformerEncoder, nn.TransformerEncoderLayer (norm_first=True)
    transformers  ViTModel, and models with a head around one: under the names of version 4 and those of version 5.23

Blocks are recognized by the names of their parts, so that neither timm nor transformers has to be installed.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from skipless.ssl.model.vit import VisionTransformer

KNOWN = "a ViT of skipless, timm or transformers, or a pre-norm nn.TransformerEncoder"
# The parts of a ViT layer in transformers, up to version 4 and in version 5.23.
HUGGING_FACE_LAYERS = (
    {"attention", "intermediate", "output", "layernorm_before", "layernorm_after"},
    {"attention", "mlp", "dropout", "layernorm_before", "layernorm_after"},
)


class Weights(NamedTuple):
    """A linear layer, or the rows of one. Both tensors share the model's memory: what is copied into them is set."""

    weight: Tensor  # [out, in]
    bias: Tensor | None  # [out]


@dataclass
class BlockWeights:
    """The six linear maps of a pre-norm block, whatever its library calls them."""

    name: str
    """Path of the block in its model."""
    heads: int
    query: Weights
    key: Weights
    value: Weights
    output: Weights
    """[D, D], like the three above it; heads are slices of rows of those, and of columns of this."""
    first: Weights
    """[hidden, D]"""
    second: Weights
    """[D, hidden]"""
    activation: Callable[[Tensor], Tensor]
    """Between the two layers of the MLP."""


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Path and module of every block, in order.

    Raises:
        ValueError: the model keeps no blocks where the known ones do.
    """
    model = getattr(model, "base_model", model)  # transformers' name for what a head sits on
    if isinstance(model, nn.TransformerEncoderLayer):
        return [(type(model).__name__, model)]
    for path in ("blocks", "layers", "encoder.layer"):
        try:
            blocks = model.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(blocks, nn.ModuleList | nn.Sequential) and len(blocks):
            return [(f"{path}.{number}", block) for number, block in enumerate(blocks)]
    raise ValueError(f"{type(model).__name__} has no blocks that are known here; give {KNOWN}")


def block_weights(model: nn.Module) -> list[BlockWeights]:
    """The matrices of every block, in order.

    Raises:
        ValueError: a block of an unknown kind; post-norm; or attention and MLPs that hold more than plain softmax
            attention and two linear layers do (qk_norm, relative position bias, gates, SwiGLU), naming the module.
    """
    for name, module in model.named_modules():
        if any(word in type(module).__name__ for word in ("RelPosBias", "RelPosMlp", "RelativePositionBias")):
            raise ValueError(
                f"{name} ({type(module).__name__}) adds a relative position bias to the logits, which the "
                "initialization is not derived for; build the model without it"
            )
    return [_weights(name, block) for name, block in find_blocks(model)]


def remove_skips_(model: nn.Module) -> nn.Module:
    """Take the skip connections out of a residual model, in place: x <- attention(norm1(x)), x <- mlp(norm2(x)).

    Nothing else changes: neither weights nor the names in the state dict, nor masks, dropout and what a block returns.
    Dropout, where a model has it, then acts on all there is, so 0 is advised (nn.TransformerEncoderLayer's default is
    0.1). Weights that were trained with skips are of no use without them: start from `skipless_init_`. A model whose
    skips are gone already is left as it is.

    A block of another library gets a subclass of its class, with another `forward`. So its parameters, hooks and
    `isinstance` stay, which transformers needs for `output_hidden_states`; and copies (deepcopy, pickle, DataParallel's
    replicas) call `forward` on themselves, where a function put on the instance would call the original's. torch's
    fused kernel of a whole residual layer, which runs in eval mode, is chosen in that layer's `forward` and goes too.

    Args:
        model: see the top of this file. A `VisionTransformer` of ours also says so in its `architecture`.

    Returns:
        The same model.

    Raises:
        ValueError: no such model; a subclass of a known block, whose own forward would be lost; drop path or layer
            scale, which act on a branch beside a skip. The model is unchanged then.

    Examples:
        >>> layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, norm_first=True, batch_first=True)
        >>> encoder = remove_skips_(nn.TransformerEncoder(layer, 6, enable_nested_tensor=False))
    """
    if isinstance(model, VisionTransformer):
        layer_scale, drop_path = model.architecture["layer_scale"], model.architecture["drop_path"]
        if layer_scale is not None or drop_path > 0:
            raise ValueError(
                "layer_scale and drop_path act on the branch beside a skip connection; build the model without them "
                f"(layer_scale={layer_scale}, drop_path={drop_path})"
            )
        for block in model.blocks:
            block.residual = False  # type: ignore[assignment]
        model.architecture = model.architecture | {"residual": False}
        return model
    blocks: list[tuple[Any, Any]] = [
        (block, _skipless_forward(name, block))
        for name, block in find_blocks(model)
        if not isinstance(block, _Skipless)
    ]
    for block, forward in blocks:
        block.__class__ = _skipless_class(block.__class__, forward)
    return model


# --- where the matrices are


def _weights(name: str, block: Any) -> BlockWeights:
    if isinstance(block, nn.TransformerEncoderLayer):
        weights = _torch_weights(name, block)
    elif hasattr(block, "attn") and hasattr(block, "mlp"):
        weights = _timm_weights(name, block)
    elif hasattr(block, "layernorm_before") and hasattr(block, "attention"):
        weights = _hugging_face_weights(name, block)
    else:
        raise ValueError(f"{name} is a {type(block).__name__}, whose parts are not known here; give {KNOWN}")
    d, hidden = weights.output.weight.shape[0], weights.first.weight.shape[0]
    for part in ("query", "key", "value", "output"):
        shape = tuple(getattr(weights, part).weight.shape)
        if shape != (d, d):
            raise ValueError(f"{name}: the {part} matrix is {list(shape)}; all of attention's must be [{d}, {d}]")
    if weights.first.weight.shape != (hidden, d) or weights.second.weight.shape != (d, hidden):
        shapes = f"{list(weights.first.weight.shape)} and {list(weights.second.weight.shape)}"
        raise ValueError(f"{name}: the MLP's matrices are {shapes}; a gated MLP is not supported, build it without")
    return weights


def _timm_weights(name: str, block: Any) -> BlockWeights:
    """Ours too: the names are the same."""
    attention, mlp = block.attn, block.mlp
    _check_plain(f"{name}.attn", attention, ("qkv", "proj"))
    _check_plain(f"{name}.mlp", mlp, ("fc1", "fc2"), allowed=("act",))
    query, key, value = _thirds(attention.qkv.weight, attention.qkv.bias)
    output, first, second = map(_linear, (attention.proj, mlp.fc1, mlp.fc2))
    activation = getattr(mlp, "act", F.gelu)
    return BlockWeights(name, attention.num_heads, query, key, value, output, first, second, activation)


def _torch_weights(name: str, layer: nn.TransformerEncoderLayer) -> BlockWeights:
    if not layer.norm_first:
        raise ValueError(f"{name} is post-norm; only pre-norm layers are supported: build it with norm_first=True")
    attention = layer.self_attn
    query, key, value = _thirds(attention.in_proj_weight, attention.in_proj_bias)
    output, first, second = map(_linear, (attention.out_proj, layer.linear1, layer.linear2))
    return BlockWeights(name, attention.num_heads, query, key, value, output, first, second, layer.activation)


def _hugging_face_weights(name: str, layer: Any) -> BlockWeights:
    if hasattr(layer, "mlp"):
        attention, mlp = layer.attention, layer.mlp
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        _check_plain(f"{name}.attention", attention, names)
        _check_plain(f"{name}.mlp", mlp, ("fc1", "fc2"), allowed=("activation_fn",))
        linears = [*(getattr(attention, each) for each in names), mlp.fc1, mlp.fc2]
        activation = mlp.activation_fn
    else:
        attention = layer.attention.attention
        _check_plain(f"{name}.attention.attention", attention, ("query", "key", "value"))
        for part in ("attention.output", "intermediate", "output"):
            _check_plain(f"{name}.{part}", layer.get_submodule(part), ("dense",), allowed=("intermediate_act_fn",))
        linears = [attention.query, attention.key, attention.value, layer.attention.output.dense]
        linears += [layer.intermediate.dense, layer.output.dense]
        activation = layer.intermediate.intermediate_act_fn
    query, key, value, output, first, second = map(_linear, linears)
    heads = attention.num_attention_heads
    return BlockWeights(name, heads, query, key, value, output, first, second, activation)


def _linear(layer: nn.Linear) -> Weights:
    return Weights(layer.weight.detach(), None if layer.bias is None else layer.bias.detach())


def _thirds(weight: Tensor, bias: Tensor | None) -> list[Weights]:
    """Query, key and value, in this order, of a fused layer."""
    if weight.shape[0] % 3:
        raise ValueError(f"a fused query-key-value matrix is {list(weight.shape)}; it must be [3 D, D]")
    biases = (None, None, None) if bias is None else bias.detach().chunk(3)
    return [Weights(w, b) for w, b in zip(weight.detach().chunk(3), biases, strict=True)]


def _check_plain(path: str, module: nn.Module, linears: tuple[str, ...], allowed: tuple[str, ...] = ()) -> None:
    """Refuse a module that holds anything beside its linear layers that has a part in the result."""
    for name in linears:
        if not isinstance(getattr(module, name, None), nn.Linear):
            raise ValueError(
                f"{path} ({type(module).__name__}) has no linear layer {name}; the initialization is derived for plain "
                "attention and MLPs of two layers, without a gate"
            )
    more = [
        f"{path}.{name} ({type(child).__name__})"
        for name, child in module.named_children()
        if name not in (*linears, *allowed) and not isinstance(child, nn.Identity | nn.Dropout)
    ]
    more += [f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)]
    more += [f"{path}.{name}" for name, _ in module.named_buffers(recurse=False)]
    if more:
        raise ValueError(
            f"{more[0]} is no part of plain softmax attention or of an MLP of two layers, which the initialization is "
            "derived for; build the model without it"
        )


# --- how skips come off


class _Skipless:
    """Stands before a library's class of blocks among the bases. Such classes are made on demand: see `_rebuild`."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        forward, block = type(self).__bases__
        return _rebuild, (block, forward), self.__getstate__()


class _SkiplessTimmBlock(_Skipless):
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.mlp(self.norm2(self.attn(self.norm1(x), *args, **kwargs)))  # masks are attention's


class _SkiplessTorchLayer(_Skipless):
    def forward(
        self: Any,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        x = self._sa_block(self.norm1(src), src_mask, src_key_padding_mask, is_causal=is_causal)
        return self._ff_block(self.norm2(x))


class _SkiplessHuggingFaceLayer(_Skipless):
    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        attended = self.attention(self.layernorm_before(hidden_states), *args, **kwargs)
        x = attended[0] if isinstance(attended, tuple) else attended
        if hasattr(self, "mlp"):
            x = self.dropout(x)
            return self.dropout(self.mlp(self.layernorm_after(x)))
        x = self.intermediate(self.layernorm_after(x))
        x = self.output.dropout(self.output.dense(x))  # `output` itself would add its skip
        # In 4.46 attention and layer return tuples, with the attention map where it is asked for; in 4.57 tensors.
        return (x, *attended[1:]) if isinstance(attended, tuple) else x


def _skipless_forward(name: str, block: nn.Module) -> type[_Skipless]:
    kind = type(block)
    for part, child in block.named_children():
        if any(word in type(child).__name__ for word in ("DropPath", "StochasticDepth", "LayerScale")):
            raise ValueError(
                f"{name}.{part} ({type(child).__name__}) acts on the branch beside a skip connection; build the model "
                "without drop path and layer scale"
            )
    if kind is nn.TransformerEncoderLayer:
        _torch_weights(name, block)  # type: ignore[arg-type]  # refuses post-norm
        return _SkiplessTorchLayer
    if (kind.__module__, kind.__name__) == ("timm.models.vision_transformer", "Block"):
        return _SkiplessTimmBlock
    if {part for part, _ in block.named_children()} in HUGGING_FACE_LAYERS:
        return _SkiplessHuggingFaceLayer
    raise ValueError(f"{name} is a {kind.__name__}, and where its skip connections are is not known; give {KNOWN}")


@functools.cache
def _skipless_class(block: type[nn.Module], forward: type[_Skipless]) -> type[nn.Module]:
    return type(f"Skipless{block.__name__}", (forward, block), {"__module__": __name__})


def _rebuild(block: Any, forward: Any) -> nn.Module:
    """An empty block, for pickle and deepcopy, which fill it: a class made on demand has no name to be found by."""
    kind = _skipless_class(block, forward)
    return kind.__new__(kind)
