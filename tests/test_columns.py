"""A rank's columns of the similarity matrix: sizes of tiles, and the numbers that the loss returns beside itself."""

import math

import pytest
import torch
from torch import Tensor

from tmass_dist.config import ModelConfig
from tmass_dist.models.head import build_head
from tmass_dist.training.columns import PAIR_TENSORS, OwnColumns
from tmass_dist.training.losses import column_info_nce, mean_over_ranks, similarity_metrics, temperature

# Shapes: N texts, B videos, F frames, D embedding width, S matrices.
F, D = 2, 8


def _columns(num_videos: int, num_texts: int, memory_mb: float | None, **options: int) -> OwnColumns:
    head = build_head(ModelConfig(num_frames=F, pooling="mean", radius="none"), D).double()
    query_ND, frames_BFD = torch.randn(num_texts, D).double(), torch.randn(num_videos, F, D).double()
    return OwnColumns(head, query_ND, frames_BFD, None, memory_mb, **options)


def _memory_of(num_pairs: float, copies: int = PAIR_TENSORS) -> float:
    """Budget in MB for so many pairs of float64 vectors."""
    return num_pairs * copies * D * 8 / 2**20


@pytest.mark.parametrize(
    ("num_videos", "num_texts", "num_pairs", "tile_videos", "tile_texts"),
    [
        (4, 200, 799, 4, 199),  # one pair too many for one tile
        (4, 200, 400, 4, 100),
        (4, 200, 256, 4, 64),
        (4, 200, 255, 3, 64),  # fewer texts in a tile would cost more than fewer videos
        (4, 200, 130, 2, 64),
        (4, 200, 127, 1, 64),
        (4, 200, 64, 1, 64),
        (4, 200, 63, 1, 63),
        (4, 200, 1, 1, 1),
        (4, 200, 0.5, 1, 1),  # a tile is at least one pair
        (300, 2, 50, 25, 2),
        (300, 2, 599, 299, 2),
    ],
)
def test_a_tile_has_as_many_pairs_as_the_budget_allows(
    num_videos: int, num_texts: int, num_pairs: float, tile_videos: int, tile_texts: int
) -> None:
    for copies in (PAIR_TENSORS, 3):
        columns = _columns(num_videos, num_texts, _memory_of(num_pairs, copies), copies=copies)
        assert columns.pairs is None and (columns.tile_videos, columns.tile_texts) == (tile_videos, tile_texts)
    default = _columns(num_videos, num_texts, _memory_of(num_pairs))
    assert (default.tile_videos, default.tile_texts) == (tile_videos, tile_texts)


@pytest.mark.parametrize("num_pairs", [800, 801, 10_000, None])
def test_pairs_that_fit_are_pooled_at_once(num_pairs: int | None) -> None:
    columns = _columns(4, 200, None if num_pairs is None else _memory_of(num_pairs))
    assert columns.pairs is not None and (columns.tile_videos, columns.tile_texts) == (4, 200)


def test_the_gradient_of_the_texts_is_assembled_in_one_tensor() -> None:
    columns = _columns(4, 200, _memory_of(63))
    texts_ND = torch.randn(200, D).double().requires_grad_()
    rows = columns._rows_of(texts_ND)
    assert columns._rows_of(texts_ND) is rows and columns._rows_of(texts_ND.detach()) is not rows
    parts = [rows.part(slice(start, start + 63)) for start in range(0, 200, 63)]
    assert torch.equal(torch.cat(parts), texts_ND)
    weights_N1 = torch.arange(200.0).double()[:, None]
    sum((part * weights_n1).sum() for part, weights_n1 in zip(parts, weights_N1.split(63))).backward()
    assert texts_ND.grad is not None and torch.equal(texts_ND.grad, weights_N1.expand(-1, D))
    assert rows.total_N is None


@pytest.mark.parametrize("num_pairs", [1, 7, 130, None])
def test_the_mean_over_texts_and_the_cosines_do_not_depend_on_the_tiles(num_pairs: int | None) -> None:
    torch.manual_seed(0)
    whole = _columns(3, 70, None)
    tiled = OwnColumns(whole.head, whole.query_ND, whole.frames_BFD, None, num_pairs and _memory_of(num_pairs))
    mean_BD = whole.frames_BFD.mean(dim=1) if whole.pairs is None else whole.pooled_mean()
    torch.testing.assert_close(tiled.pooled_mean(), mean_BD, rtol=1e-12, atol=1e-12)
    anchors = [torch.randn(70, D).double() for _ in range(2)]
    cosines_BAN = tiled.cosines(anchors)
    assert cosines_BAN.shape == (3, 2, 70)
    torch.testing.assert_close(cosines_BAN, whole.cosines(anchors), rtol=1e-12, atol=1e-12)


def _similarities() -> Tensor:
    """``(S, B, N)``: three matrices of cosines, all below zero."""
    generator = torch.Generator().manual_seed(0)
    return -0.95 + 0.9 * torch.rand(3, 6, 6, generator=generator, dtype=torch.float64)


def test_the_loss_of_a_pair_is_the_mean_of_its_two_cross_entropies_and_has_no_gradient() -> None:
    similarity_SBN = _similarities().requires_grad_()
    losses_S, pair_loss_SB = column_info_nce(similarity_SBN, torch.tensor([2.0], dtype=torch.float64))
    assert losses_S.requires_grad and not pair_loss_SB.requires_grad
    for similarity_BN, loss, pair_loss_B in zip(similarity_SBN.detach(), losses_S, pair_loss_SB):
        logits_BN, target_B = similarity_BN * math.exp(2), torch.arange(6)
        both = (torch.nn.functional.cross_entropy(x, target_B, reduction="none") for x in (logits_BN, logits_BN.T))
        torch.testing.assert_close(pair_loss_B, sum(both) / 2, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(loss.detach(), pair_loss_B.mean(), rtol=1e-12, atol=1e-12)


def test_the_temperature_is_limited_to_100() -> None:
    for scale, expected in ((0.0, 1.0), (4.6, math.exp(4.6)), (math.log(100), 100.0), (4.61, 100.0), (9.0, 100.0)):
        assert temperature(torch.tensor([scale], dtype=torch.float64)).item() == pytest.approx(expected, rel=1e-12)


def test_the_hardest_wrong_video_is_found_below_zero_too() -> None:
    similarity_BN = _similarities()[0]
    before = similarity_BN.clone()
    matching, hardest = similarity_metrics(similarity_BN)
    assert torch.equal(similarity_BN, before)
    wrong_NB = [[similarity_BN[j, i].item() for j in range(6) if j != i] for i in range(6)]
    assert hardest.item() == pytest.approx(sum(max(row) for row in wrong_NB) / 6, rel=1e-12)
    assert matching.item() == pytest.approx(similarity_BN.diagonal().mean().item(), rel=1e-12)
    assert mean_over_ranks(torch.tensor([1.0, 2.0, 6.0])).item() == 3.0
