"""Symmetric InfoNCE on a similarity matrix; pure."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def temperature(logit_scale: Tensor) -> Tensor:
    """What cosines are multiplied by: exp of the learnt logarithm, limited to 100 here, in the forward."""
    return logit_scale.clamp(max=math.log(100)).exp()


def symmetric_info_nce(similarity_NN: Tensor, logit_scale: Tensor) -> Tensor:
    """Half of the row and half of the column cross-entropy; the truth lies on the diagonal.

    Args:
        similarity_NN: cosines, rows texts, columns videos.
        logit_scale: logarithm of the temperature, shape [1] or []; see :func:`temperature`.

    Returns:
        A scalar. Other captions of the same video in the batch count as negatives, as in the paper.
    """
    logits_NN = similarity_NN * temperature(logit_scale)
    truth_N = torch.arange(len(logits_NN), device=logits_NN.device)
    return (F.cross_entropy(logits_NN, truth_N) + F.cross_entropy(logits_NN.T, truth_N)) / 2
