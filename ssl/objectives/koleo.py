"""KoLeo (arXiv 1806.03198, section 4) as in DINOv2: every image of a batch is pushed away from its nearest neighbor."""

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-8


def koleo(x: Tensor) -> Tensor:
    """-mean over i of log(distance from x_i to its nearest neighbor), of vectors brought to length 1.

    It knows the vectors it is given: those of a micro-batch on a process. In a smaller one neighbors are further away.
    So the gradient depends on the number of processes and of micro-batches, though little, as in DINOv2.

    Args:
        x: [N, D] of any float dtype, N at least 2.

    Returns:
        float32 [].
    """
    x = F.normalize(x.float(), dim=-1, eps=EPS)
    with torch.no_grad():
        similarity = x @ x.T
        similarity.fill_diagonal_(-2)  # below every cosine
        nearest = similarity.argmax(1)
    return -(F.pairwise_distance(x, x.index_select(0, nearest), eps=EPS) + EPS).log().mean()
