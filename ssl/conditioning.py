"""What skip connections do to a network, measured on its tokens."""

import torch
from torch import Tensor


def mean_share(tokens: Tensor) -> Tensor:
    """How much of the tokens' energy is their image's mean token: 1 when all tokens of an image are the same vector.

    Args:
        tokens: [B, N, D], the patch tokens of B images.

    Returns:
        [B], in [0, 1]: N |mean|^2 / sum |token|^2.
    """
    tokens = tokens.double()
    return tokens.mean(1).square().sum(-1) / tokens.square().sum(-1).mean(1)


def effective_rank(tokens: Tensor) -> Tensor:
    """exp(entropy of the squared singular values, normalised to sum 1) of an image's centred tokens (EUSIPCO 2007).

    When the mean share is close to 1, what is left after centring is noise, and its rank is that of noise: high, and
    meaningless. Read the two together.

    Args:
        tokens: [B, N, D].

    Returns:
        [B], in [1, min(N - 1, D)].
    """
    tokens = tokens.double()
    centred = tokens - tokens.mean(1, keepdim=True)
    energy = torch.linalg.svdvals(centred).square()
    share = energy / energy.sum(-1, keepdim=True).clamp_min(1e-300)
    return torch.special.entr(share).sum(-1).exp()
