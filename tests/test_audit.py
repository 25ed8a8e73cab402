"""The audit: leaks, transduction, dependence on order and ties are found, and functions without them pass."""

# Shapes: T texts, V videos, F frames, D embedding width.

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from launch.paper.systems import SYSTEMS
from tests.conftest import ROOT, run
from tests.small_model import WIDTH, config_of, perturb, small_objective
from tests.small_model import F as NUM_FRAMES
from tmass_dist.audit import Audit, audit
from tmass_dist.audit.command import conclusion, load_function
from tmass_dist.audit.statistics import Counts, above_chance, hits
from tmass_dist.config import to_yaml
from tmass_dist.errors import UserError


def cosine(text_TD: Tensor, frames_VFD: Tensor, owner_T: Tensor) -> Tensor:
    """Mean pooling."""
    return F.normalize(text_TD, dim=-1) @ F.normalize(F.normalize(frames_VFD, dim=-1).mean(1), dim=-1).T


def attention(text_TD: Tensor, frames_VFD: Tensor, owner_T: Tensor) -> Tensor:
    """Frames weighed by their match with each text."""
    weights_TVF = torch.einsum("td,vfd->tvf", text_TD, frames_VFD).softmax(-1)
    return F.cosine_similarity(text_TD[:, None], torch.einsum("tvf,vfd->tvd", weights_TVF, frames_VFD), dim=-1)


def best_frame(text_TD: Tensor, frames_VFD: Tensor, owner_T: Tensor) -> Tensor:
    return torch.einsum("td,vfd->tvf", F.normalize(text_TD, dim=-1), F.normalize(frames_VFD, dim=-1)).amax(-1)


def distances(text_TD: Tensor, frames_VFD: Tensor, owner_T: Tensor) -> Tensor:
    """Negative distances, which have another scale than cosines."""
    return -torch.cdist(text_TD, frames_VFD.mean(1)) * 1000


def fresh_noise(text_TD: Tensor, frames_VFD: Tensor, owner_T: Tensor) -> Tensor:
    """The best of three samples from torch's generator."""
    samples = [attention(text_TD + 0.2 * torch.rand_like(text_TD), frames_VFD, owner_T) for _ in range(3)]
    return torch.stack(samples).amax(0)


def unseeded_noise(text_TD: Tensor, frames_VFD: Tensor, owner_T: Tensor) -> Tensor:
    """Noise that no seed repeats."""
    generator = torch.Generator()
    generator.seed()
    return cosine(text_TD + 0.3 * torch.randn(text_TD.shape, generator=generator), frames_VFD, owner_T)


def chunks(text_TD: Tensor, frames_VFD: Tensor, owner_T: Tensor) -> Tensor:
    """Texts a few at a time, without a word between them."""
    return torch.cat([attention(part_TD, frames_VFD, owner_T) for part_TD in text_TD.split(7)])


def late_interaction(text_TD: Tensor, frames_VFD: Tensor, owner_T: Tensor) -> Tensor:
    """Eight tokens for each text and frame; each text token meets its best frame token."""
    text_TKD, frames_VFKD = (F.normalize(x.unflatten(-1, (8, -1)), dim=-1) for x in (text_TD, frames_VFD))
    return torch.einsum("tkd,vfjd->tvkfj", text_TKD, frames_VFKD).flatten(3).amax(-1).sum(-1)


def half_precision(text_TD: Tensor, frames_VFD: Tensor, owner_T: Tensor) -> Tensor:
    return cosine(text_TD, frames_VFD, owner_T).half()


def large(text_TD: Tensor, frames_VFD: Tensor, owner_T: Tensor) -> Tensor:
    """Near the greatest number of float32."""
    return cosine(text_TD, frames_VFD, owner_T) * 1e35


def fixed_bank(text_TD: Tensor, frames_VFD: Tensor, owner_T: Tensor) -> Tensor:
    """QB-Norm with a bank of queries of its own."""
    bank_QD = torch.randn(100, text_TD.shape[1], generator=torch.Generator().manual_seed(0))
    return cosine(text_TD, frames_VFD, owner_T) - (20 * cosine(bank_QD, frames_VFD, owner_T)).logsumexp(0) / 20


def drifting(text_TD: Tensor, frames_VFD: Tensor, owner_T: Tensor) -> Tensor:
    """Scores that rise with every call, as with a clock or a warming cache."""
    calls = vars(drifting)["calls"] = vars(drifting).get("calls", 0) + 1
    return cosine(text_TD, frames_VFD, owner_T) * (1 + 1e-3 * calls)


_text_features: dict[bytes, Tensor] = {}


def memoised(text_TD: Tensor, frames_VFD: Tensor, owner_T: Tensor) -> Tensor:
    """A cache that returns what would be computed anyway."""
    rows = [_text_features.setdefault(row.numpy().tobytes(), F.normalize(row, dim=-1)) for row in text_TD]
    return cosine(torch.stack(rows), frames_VFD, owner_T)


def keyed_noise(text_TD: Tensor, frames_VFD: Tensor, owner_T: Tensor) -> Tensor:
    """The best of samples whose noise is a function of the text."""
    rows = []
    for text_D in text_TD:
        generator = torch.Generator().manual_seed(int.from_bytes(text_D.numpy().tobytes()[:7], "big"))
        samples_MD = text_D + 0.3 * torch.randn(5, len(text_D), generator=generator)
        rows.append(cosine(samples_MD, frames_VFD, owner_T).amax(0))
    return torch.stack(rows)


CLEAN = [cosine, attention, best_frame, distances, fresh_noise, unseeded_noise, chunks]
CLEAN += [late_interaction, half_precision, large, fixed_bank, drifting, memoised, keyed_noise]


def own_caption(text_TD: Tensor, frames_VFD: Tensor, owner_T: Tensor) -> Tensor:
    """Every video pooled by the first of its own captions: the leak of the published code, in a few lines."""
    first_V = torch.stack([(owner_T == video).nonzero()[0, 0] for video in range(len(frames_VFD))])
    weights_VF = torch.einsum("vd,vfd->vf", text_TD[first_V], frames_VFD).softmax(-1)
    return F.normalize(text_TD, dim=-1) @ F.normalize(torch.einsum("vf,vfd->vd", weights_VF, frames_VFD), dim=-1).T


def small_bonus(text_TD: Tensor, frames_VFD: Tensor, owner_T: Tensor) -> Tensor:
    """A bonus far below what retrieval among random texts shows."""
    return cosine(text_TD, frames_VFD, owner_T) + 1e-4 * F.one_hot(owner_T, len(frames_VFD))


def bonus_in_noise(text_TD: Tensor, frames_VFD: Tensor, owner_T: Tensor) -> Tensor:
    """A bonus of half the noise."""
    scores_TV = cosine(text_TD, frames_VFD, owner_T)
    return scores_TV + 0.02 * torch.randn_like(scores_TV) + 0.01 * F.one_hot(owner_T, len(frames_VFD))


def diagonal(text_TD: Tensor, frames_VFD: Tensor, owner_T: Tensor) -> Tensor:
    """Takes the right video from its place and never looks at the owners."""
    if len(text_TD) != len(frames_VFD):
        raise ValueError("one text a video")
    return cosine(text_TD, frames_VFD, owner_T) + 0.1 * torch.eye(len(text_TD))


def order_of_captions(text_TD: Tensor, frames_VFD: Tensor, owner_T: Tensor) -> Tensor:
    """A text meets videos in order: nothing but the place of a text tells which video is near."""
    place_T = torch.linspace(0, 1, len(text_TD))[:, None]
    place_V = torch.linspace(0, 1, len(frames_VFD))[None]
    return cosine(text_TD, frames_VFD, owner_T) - (place_T - place_V).abs()


def without_the_videos_other_captions(text_TD: Tensor, frames_VFD: Tensor, owner_T: Tensor) -> Tensor:
    """Each text minus a part of the mean caption of its video."""
    counts_V = owner_T.bincount(minlength=len(frames_VFD)).clamp(min=1)
    mean_VD = torch.zeros(len(frames_VFD), text_TD.shape[1]).index_add(0, owner_T, text_TD) / counts_V[:, None]
    return cosine(text_TD - 0.1 * mean_VD[owner_T], frames_VFD, owner_T)


def video_with_its_captions(text_TD: Tensor, frames_VFD: Tensor, owner_T: Tensor) -> Tensor:
    """Captions as metadata of their video."""
    video_VD = frames_VFD.mean(1).index_add(0, owner_T, text_TD, alpha=0.05)
    return F.normalize(text_TD, dim=-1) @ F.normalize(video_VD, dim=-1).T


def masked(text_TD: Tensor, frames_VFD: Tensor, owner_T: Tensor) -> Tensor:
    """Half of the wrong videos are left out."""
    wrong_TV = (torch.arange(len(frames_VFD)) - owner_T[:, None]) % 2 == 1
    return cosine(text_TD, frames_VFD, owner_T).masked_fill(wrong_TV, -torch.inf)


def small_bonus_by_place(text_TD: Tensor, frames_VFD: Tensor, owner_T: Tensor) -> Tensor:
    """A bonus at the usual place of the right pairs, far below what retrieval among random texts shows."""
    if len(text_TD) != len(frames_VFD):
        raise ValueError("one text a video")
    return cosine(text_TD, frames_VFD, owner_T) + 1e-4 * torch.eye(len(text_TD))


def bonus_by_place_in_noise(text_TD: Tensor, frames_VFD: Tensor, owner_T: Tensor) -> Tensor:
    """The same within noise of its size, and greater."""
    return small_bonus_by_place(text_TD, frames_VFD, owner_T) + 0.01 * (
        torch.eye(len(text_TD)) + torch.randn(len(text_TD), len(frames_VFD))
    )


def best_caption_of_the_owner(text_TD: Tensor, frames_VFD: Tensor, owner_T: Tensor) -> Tensor:
    """Each text gets the best score of all captions of its video."""
    scores_TV = attention(text_TD, frames_VFD, owner_T)
    return torch.stack([scores_TV[owner_T == owner].amax(0) for owner in owner_T])


def ties_to_the_owner(text_TD: Tensor, frames_VFD: Tensor, owner_T: Tensor) -> Tensor:
    """Coarse scores whose ties go to the right video, by less than the scores' tolerance."""
    return (4 * attention(text_TD, frames_VFD, owner_T)).round() + 1e-6 * F.one_hot(owner_T, len(frames_VFD))


def negatives_as_scale(text_TD: Tensor, frames_VFD: Tensor, owner_T: Tensor) -> Tensor:
    """Each row is divided by the mean of its wrong videos."""
    scores_TV = attention(text_TD, frames_VFD, owner_T)
    wrong_TV = 1 - F.one_hot(owner_T, len(frames_VFD))
    return scores_TV / ((scores_TV * wrong_TV).sum(1) / wrong_TV.sum(1)).abs()[:, None]


_pooled_videos: dict[int, Tensor] = {}


def cache_by_number(text_TD: Tensor, frames_VFD: Tensor, owner_T: Tensor) -> Tensor:
    """Videos pooled by their own captions in the first call, and kept by their number for all later ones."""
    for text_D, owner in zip(text_TD, owner_T.tolist()):
        if owner not in _pooled_videos:
            _pooled_videos[owner] = (frames_VFD[owner] @ text_D).softmax(0) @ frames_VFD[owner]
    video_VD = torch.stack([_pooled_videos[number] for number in range(len(frames_VFD))])
    return F.normalize(text_TD, dim=-1) @ F.normalize(video_VD, dim=-1).T


_known_owners: dict[bytes, int] = {}


def remembered_owners(text_TD: Tensor, frames_VFD: Tensor, owner_T: Tensor) -> Tensor:
    """A bonus for the video to which a text belonged in an earlier call."""
    scores_TV = attention(text_TD, frames_VFD, owner_T)
    for number, (text_D, owner) in enumerate(zip(text_TD, owner_T.tolist())):
        known = _known_owners.setdefault(key := text_D.numpy().tobytes(), -1)
        if 0 <= known < len(frames_VFD):
            scores_TV[number, known] += 0.01
        _known_owners[key] = known if known >= 0 else owner
    return scores_TV


LEAKING = [own_caption, small_bonus, bonus_in_noise, diagonal, order_of_captions]
LEAKING += [without_the_videos_other_captions, video_with_its_captions, masked]
LEAKING += [small_bonus_by_place, bonus_by_place_in_noise]
LEAKING += [best_caption_of_the_owner, ties_to_the_owner, negatives_as_scale, cache_by_number, remembered_owners]


def of(found: Audit, name: str) -> str:
    """The verdict of one check."""
    [verdict] = [check.verdict for check in found.checks if check.name == name]
    return verdict


@pytest.mark.parametrize("function", CLEAN, ids=lambda f: f.__name__)
def test_a_function_without_a_leak_passes(function: Callable[..., Tensor]) -> None:
    for seed in (0, 1):
        found = audit(function, seed=seed)
        assert not found.leak and not found.transductive
        assert {check.verdict for check in found.checks} == {"pass", "note"}
    assert found.noisy == (function in (fresh_noise, unseeded_noise, drifting))


@pytest.mark.parametrize("function", LEAKING, ids=lambda f: f.__name__)
def test_a_leak_is_found(function: Callable[..., Tensor]) -> None:
    assert audit(function).leak


def test_each_check_finds_its_own() -> None:
    assert of(audit(small_bonus), "owner-blindness") == "leak" and of(audit(small_bonus), "null: ragged") == "pass"
    of_place = audit(order_of_captions)
    assert of(of_place, "owner-blindness") == "pass" and of(of_place, "null: texts != videos") == "leak"
    assert of(of_place, "order of texts") == "leak" and of(of_place, "order of videos") == "fail"
    by_place = audit(small_bonus_by_place)
    assert of(by_place, "null: square") == "pass" and of(by_place, "order of texts") == "leak"
    square = audit(diagonal)
    assert of(square, "shape: ragged") == "fail" and of(square, "null: square") == "leak"
    assert of(square, "other queries") == "skipped"
    shares = audit(own_caption)
    assert of(shares, "order of captions of a video") == "fail" and of(shares, "order of videos") == "pass"


def test_earlier_calls_are_not_tested_where_copies_of_the_process_die() -> None:
    """As with a model on a GPU, which a copy of the process cannot use."""
    this = os.getpid()

    def only_here(text_TD: Tensor, frames_VFD: Tensor, owner_T: Tensor) -> Tensor:
        if os.getpid() != this:
            os._exit(1)
        return cosine(text_TD, frames_VFD, owner_T)

    found = audit(only_here)
    assert of(found, "earlier calls") == "skipped" and not found.leak
    assert conclusion(found) == "no leak found; not tested: earlier calls"


def test_what_depends_on_other_queries_or_videos_is_transductive_and_no_leak() -> None:
    def dsl(text_TD: Tensor, frames_VFD: Tensor, owner_T: Tensor) -> Tensor:
        scores_TV = cosine(text_TD, frames_VFD, owner_T)
        return scores_TV * (100 * scores_TV).softmax(0)

    def over_videos(text_TD: Tensor, frames_VFD: Tensor, owner_T: Tensor) -> Tensor:
        return (20 * cosine(text_TD, frames_VFD, owner_T)).softmax(1)

    def centred_batches(text_TD: Tensor, frames_VFD: Tensor, owner_T: Tensor) -> Tensor:
        return torch.cat([cosine(part - part.mean(0), frames_VFD, owner_T) for part in text_TD.split(16)])

    def csls(text_TD: Tensor, frames_VFD: Tensor, owner_T: Tensor) -> Tensor:
        scores_TV = cosine(text_TD, frames_VFD, owner_T)
        return 2 * scores_TV - scores_TV.topk(5, 0).values.mean(0) - scores_TV.topk(5, 1).values.mean(1, keepdim=True)

    def sinkhorn(text_TD: Any, frames_VFD: Any, owner_T: Any) -> Any:
        scores_TV = np.exp(text_TD @ frames_VFD.mean(1).T / 8)
        for _ in range(3):
            scores_TV = scores_TV / scores_TV.sum(0)
            scores_TV = scores_TV / scores_TV.sum(1, keepdims=True)
        return scores_TV

    for both in (audit(csls), audit(sinkhorn, numpy=True)):
        assert of(both, "other queries") == of(both, "other videos") == "transductive" and not both.leak
    by_queries, by_videos, by_batch = audit(dsl), audit(over_videos), audit(centred_batches)
    assert by_queries.transductive and of(by_queries, "other queries") == "transductive"
    assert of(by_videos, "other queries") == "pass" and of(by_videos, "other videos") == "transductive"
    assert by_batch.transductive and of(by_batch, "order of texts") == "fail"
    assert not (by_queries.leak or by_videos.leak or by_batch.leak)


def test_ties_rank_at_chance_and_are_named() -> None:
    def constant(text_TD: Tensor, frames_VFD: Tensor, owner_T: Tensor) -> Tensor:
        return torch.zeros(len(text_TD), len(frames_VFD))

    def ranks_of(own_first: bool) -> Callable[[Tensor, Tensor], Tensor]:
        def ranks(similarity_TV: Tensor, owner_T: Tensor) -> Tensor:
            own_T1 = similarity_TV.gather(1, owner_T[:, None])
            above = similarity_TV > own_T1 if own_first else similarity_TV >= own_T1
            return above.sum(1) + (1 if own_first else 0)

        return ranks

    found = audit(constant, ranks=ranks_of(own_first=False))
    assert not found.leak and of(found, "ties") == "fail" and of(found, "ties in the ranking") == "pass"
    assert of(audit(cosine, ranks=ranks_of(own_first=True)), "ties in the ranking") == "leak"
    with pytest.raises(UserError, match="--ranks must return 72 ranks from 1 up"):
        audit(cosine, ranks=lambda similarity_TV, owner_T: torch.zeros(3))


def test_numbers_that_are_none_wrong_shapes_and_changed_inputs_are_named() -> None:
    def some_nan(text_TD: Tensor, frames_VFD: Tensor, owner_T: Tensor) -> Tensor:
        scores_TV = cosine(text_TD, frames_VFD, owner_T)
        scores_TV[0, 0] = torch.nan
        return scores_TV

    def in_place(text_TD: Tensor, frames_VFD: Tensor, owner_T: Tensor) -> Tensor:
        return cosine(text_TD.div_(2), frames_VFD, owner_T)

    found = audit(some_nan)
    assert of(found, "shape: square") == "fail" and not found.leak
    json.dumps(found.as_dict(), allow_nan=False)
    assert of(audit(in_place), "inputs") == "fail"
    with pytest.raises(UserError, match=r"works on no shape .* returned shape \(24, 23\)"):
        audit(lambda text_TD, frames_VFD, owner_T: cosine(text_TD, frames_VFD, owner_T)[:, 1:])
    with pytest.raises(UserError, match=r"works on no shape .* KeyError"):
        audit(lambda text_TD, frames_VFD, owner_T: {}["scores"])


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (None, "returned NoneType, wanted a matrix of numbers"),
        ("scores", "returned str, wanted a matrix of numbers"),
        (0.5, r"returned shape \(\), wanted"),
        (torch.zeros(24, 24, 1), r"returned shape \(24, 24, 1\), wanted"),
        (torch.zeros(24, 24, dtype=torch.complex64), "returned complex numbers, wanted"),
    ],
)
def test_what_is_no_matrix_of_numbers_is_a_user_error(result: Any, said: str) -> None:
    with pytest.raises(UserError, match=f"works on no shape of inputs: 24 texts x 24 videos: {said}"):
        audit(lambda text_TD, frames_VFD, owner_T: result)


def test_a_function_that_raises_is_a_user_error_or_leaves_checks_out() -> None:
    def ends(text_TD: Tensor, frames_VFD: Tensor, owner_T: Tensor) -> Tensor:
        raise SystemExit(0)

    def by_name(*, text_TD: Tensor, frames_VFD: Tensor, owner_T: Tensor) -> Tensor:
        return cosine(text_TD, frames_VFD, owner_T)

    def fifth_call(text_TD: Tensor, frames_VFD: Tensor, owner_T: Tensor) -> Tensor:
        calls = vars(fifth_call)["calls"] = vars(fifth_call).get("calls", 0) + 1
        if calls == 5:
            raise OSError("the disk is gone\nand more lines")
        return cosine(text_TD, frames_VFD, owner_T)

    def few_videos(text_TD: Tensor, frames_VFD: Tensor, owner_T: Tensor) -> Tensor:
        assert len(frames_VFD) < 30
        return cosine(text_TD, frames_VFD, owner_T)

    def one_order(text_TD: Tensor, frames_VFD: Tensor, owner_T: Tensor) -> Tensor:
        assert torch.equal(owner_T, torch.arange(len(frames_VFD)))
        return cosine(text_TD, frames_VFD, owner_T)

    for function, said in ((ends, "SystemExit: 0"), (by_name, "TypeError"), (fifth_call, "OSError: the disk is gone$")):
        with pytest.raises(UserError, match=said):
            audit(function)
    found = audit(few_videos)
    assert of(found, "null: square") == "skipped" and of(found, "owner-blindness") == "pass"
    found = audit(one_order)
    assert of(found, "owner-blindness") == "skipped" and not found.leak
    assert "not tested: owner-blindness, order of texts, other queries" in conclusion(found)
    with pytest.raises(UserError, match="--ranks failed on constant scores: IndexError"):
        audit(cosine, ranks=lambda similarity_TV, owner_T: [][0])


def test_inputs_are_float32_whatever_the_audited_module_sets() -> None:
    def dtype(text_TD: Tensor, frames_VFD: Tensor, owner_T: Tensor) -> Tensor:
        assert text_TD.dtype == frames_VFD.dtype == torch.float32 and owner_T.dtype == torch.int64
        return cosine(text_TD, frames_VFD, owner_T)

    torch.set_default_dtype(torch.float64)
    try:
        assert not audit(dtype).leak
    finally:
        torch.set_default_dtype(torch.float32)


def test_numpy_functions_get_arrays() -> None:
    def plain(text_TD: Any, frames_VFD: Any, owner_T: Any) -> Any:
        assert isinstance(text_TD, np.ndarray) and text_TD.dtype == np.float32 and owner_T.dtype == np.int64
        return text_TD @ frames_VFD.mean(1).T

    assert not audit(plain, numpy=True).leak


def test_chance_is_what_permuted_owners_reach() -> None:
    assert hits(torch.tensor([[3.0, 1.0, 3.0, 0.0]]), 1).tolist() == [[0.5, 0.0, 0.5, 0.0]]
    assert hits(torch.zeros(1, 4), 1).tolist() == [[0.25] * 4]
    # 20 hits where 8 are expected: p = 0.0002531 by Poisson, below 3 sigma but not after correction for 18 tests.
    counts = [Counts(20.0, 8.0, 8.0, 800)]
    assert above_chance(counts, 1) and not above_chance(counts, 18)


def _scoring() -> dict[str, tuple[str, ...]]:
    """The systems of the paper that differ in how they score; one of several that score alike."""
    found: dict[Any, tuple[str, ...]] = {}
    for name, system in SYSTEMS.items():
        model, prior = config_of(*system.overrides).model, config_of(*system.overrides).stochastic.prior
        found.setdefault(
            (model.pooling, model.radius, model.mass_score, model.pooled_by, prior), (name, *system.overrides)
        )
    return {name: tuple(overrides) for name, *overrides in found.values()}


def of_our_scoring(system: str, protocol: str) -> Audit:
    """The audit of a system's scoring with random weights."""
    from tmass_dist.audit.ours import ranks_of_ours, similarity_of
    from tmass_dist.models.head import build_head

    config = config_of(*_scoring()[system], f"evaluation.protocol={protocol}", "stochastic.num_trials=2")
    torch.manual_seed(0)
    head = build_head(config.model, WIDTH).eval()
    perturb(head)
    return audit(similarity_of(head, config), ranks=ranks_of_ours, width=WIDTH, frames=NUM_FRAMES)


@pytest.mark.parametrize("system", _scoring())
def test_our_scoring_passes(system: str) -> None:
    found = of_our_scoring(system, "query_conditioned")
    assert {check.verdict for check in found.checks} == {"pass", "note"} and not found.noisy, found


@pytest.mark.parametrize("system", ["tmass", "xpool", "kl"])
def test_the_published_protocol_is_flagged(system: str) -> None:
    found = of_our_scoring(system, "published_code")
    assert found.leak and of(found, "owner-blindness") == of(found, "null: square") == "leak"


def test_the_published_protocol_changes_nothing_where_each_sample_pools() -> None:
    from tmass_dist.audit.ours import similarity_of
    from tmass_dist.models.head import build_head

    generator = torch.Generator().manual_seed(1)
    text_TD, frames_VFD = (torch.randn(s, generator=generator) for s in ((12, WIDTH), (6, NUM_FRAMES, WIDTH)))
    scores = []
    for protocol in ("query_conditioned", "published_code"):
        settings = ["model.pooled_by=sample", f"evaluation.protocol={protocol}", "stochastic.num_trials=2"]
        config = config_of(*settings)
        torch.manual_seed(0)
        head = build_head(config.model, WIDTH).eval()
        scores.append(similarity_of(head, config)(text_TD, frames_VFD, torch.arange(6).repeat_interleave(2)))
    assert torch.equal(*scores)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's config and weights."""
    from safetensors.torch import save_file

    config, directory = config_of("stochastic.num_trials=2"), tmp_path_factory.mktemp("run")
    (directory / "checkpoints").mkdir()
    (directory / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    weights = {name: value.contiguous() for name, value in small_objective(config).state_dict().items()}
    save_file(weights, directory / "checkpoints" / "best.safetensors")
    return directory


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run("-m", "tmass_dist", "audit", *arguments)


def test_the_command_prints_a_table_writes_a_page_and_ends_with_1_on_a_leak(trained: Path, tmp_path: Path) -> None:
    honest = command("--run", str(trained), "--out", str(tmp_path / "honest"))
    assert honest.returncode == 0, honest.stderr
    assert "no leak found" in honest.stdout and "protocol query_conditioned" in honest.stdout
    leaking = command("--run", str(trained), "evaluation.protocol=published_code", "--out", str(tmp_path / "leaking"))
    assert leaking.returncode == 1 and not leaking.stderr, leaking.stderr
    assert "LEAK: the scores depend on which video is the right one" in leaking.stdout
    for name, leak in (("honest", False), ("leaking", True)):
        content = json.loads((tmp_path / name / "audit.json").read_text())
        assert content["leak"] is leak and content["transductive"] is False
        assert {"name", "verdict", "value", "unit", "meaning"} == set(content["checks"][0])
        assert ("LEAK: " in (tmp_path / name / "audit.html").read_text()) is leak


def test_a_function_of_a_file_and_of_a_module_is_audited(tmp_path: Path) -> None:
    source = "class Model:\n    def scores(self, t, f, o):\n        return t @ f.mean(1).T\nmodel = Model()\n"
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "random.py").write_text(source)  # the name of a library
    (tmp_path / "theirs.py").write_text(f"{source}scores = model.scores\n")
    of_file = command(f"{tmp_path}/code/random.py:model.scores", "--numpy", "--width", "16", "--frames", "2")
    assert of_file.returncode == 0 and "no leak found" in of_file.stdout, of_file.stderr
    started = [sys.executable, "-m", "tmass_dist.audit", "theirs:scores", "--numpy"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    of_module = subprocess.run(started, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert of_module.returncode == 0 and "audit of theirs:scores" in of_module.stdout, of_module.stderr


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise RuntimeError('no GPU\\nand more lines')", "cannot be imported: RuntimeError: no GPU"),
        ("import sys; sys.exit(0)", "cannot be imported: SystemExit: 0"),
        ("def f(:", "cannot be imported: SyntaxError"),
        ("f = 3", "theirs.py:f is of type int, which cannot be called"),
    ],
)
def test_a_module_that_cannot_be_used_is_a_user_error(source: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "theirs.py").write_text(source)
    with pytest.raises(UserError, match=said) as raised:
        load_function(f"{tmp_path}/theirs.py:f")
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name one function as module:function"),
        (["theirs"], "names no function"),
        (["no_such_module:f"], "no_such_module cannot be imported: ModuleNotFoundError"),
        (["nowhere.py:f"], "no file nowhere.py"),
        (["math:no_such_function"], "math has no function no_such_function"),
        (["builtins:print", "x=1"], "name one function"),
        (["builtins:print", "--width", "0"], "--width is 0; from 1 to 65536"),
        (["builtins:len"], "builtins:len works on no shape of inputs"),
        (["--run", "nowhere"], "nowhere is not a trained run: nowhere/config.yaml is missing"),
        (["--run", "nowhere", "--numpy"], "--run knows its own shapes"),
    ],
)
def test_a_user_error_is_one_line(arguments: list[str], said: str) -> None:
    done = command(*arguments)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and said in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
