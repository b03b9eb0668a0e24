"""A Vision Transformer with a linear classifier, and how its tokens are pooled for it."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipless.ssl.model.vit import Block, VisionTransformer

Pool = Literal["cls", "gathering-cls", "mean", "attention"]


class Classifier(nn.Module):
    """A backbone and a linear layer on what `pool` makes of its tokens.

    Near-identity attention, the skipless initialization's, gives a class token nothing but itself: `cls` is then the
    same for all images. Three ways out: `mean` of the patch tokens; `gathering-cls`, see `gather_into_cls_`, a matter
    of initialization alone; `attention`, see `AttentionPool`. `cls` and `gathering-cls` are the same function.
    """

    def __init__(self, backbone: VisionTransformer, classes: int, pool: Pool):
        super().__init__()
        self.backbone, self.pool = backbone, pool
        if pool == "attention":
            self.attention_pool = AttentionPool(backbone.dim, backbone.architecture["heads"])
        self.head = nn.Linear(backbone.dim, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> logits [B, classes]."""
        (tokens,) = self.backbone([images])
        if self.pool in ("cls", "gathering-cls"):
            return self.head(tokens[:, 0])
        patches = tokens[:, 1 + self.backbone.registers :]
        return self.head(self.attention_pool(patches) if self.pool == "attention" else patches.mean(dim=1))


class AttentionPool(nn.Module):
    """One learned query attends to the tokens: multi-head attention from torch's usual initialization, at first nearly
    their mean."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.query = nn.Parameter(torch.empty(1, 1, dim))
        nn.init.trunc_normal_(self.query, std=0.02)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, D] -> [B, D]."""
        return self.attention(self.query.expand(len(tokens), -1, -1), tokens, tokens, need_weights=False)[0][:, 0]


@torch.no_grad()
def gather_into_cls_(backbone: VisionTransformer) -> VisionTransformer:
    """Let the class token start by attending to all tokens alike in the first block, and change nothing else.

    What the first block sees of the class token is one vector u, the same for all images. W_Q W_K^T near the identity
    makes it attend to itself; W_Q <- (I - u u^T / u^T u) W_Q gives it the query 0, so its attention is uniform, and
    what leaves the block is the mean of the values: the mean of the patches, mapped as every patch is. From the second
    block on it differs from image to image, and near-identity attention keeps it. Only one direction of one matrix
    changes, of which other tokens hold little.
    """
    block = backbone.blocks[0]
    assert isinstance(block, Block)
    token = block.norm1((backbone.cls_token + backbone.pos_embed[:, :1])[0, 0])
    direction = F.normalize(token, dim=0)
    queries = block.attn.qkv.weight[: backbone.dim]  # W_Q transposed
    queries -= torch.outer(queries @ direction, direction)
    return backbone
