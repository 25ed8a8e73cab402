"""The shortlist of a search: its approximate score, what it keeps, and that search and evaluation use the same."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.moved_head import moved_head_model
from tmass_dist import TMass
from tmass_dist.errors import UserError
from tmass_dist.evaluation import search, shortlist
from tmass_dist.evaluation.blocks import BlockScorer
from tmass_dist.evaluation.features import Features
from tmass_dist.evaluation.shortlist import Shortlist
from tmass_dist.evaluation.two_stage import num_exact, search_ranks
from tmass_dist.models.pooling import XPool
from tmass_dist.retrieval import build
from tmass_dist.retrieval.gallery import VideoGallery
from tmass_dist.retrieval.searcher import Searcher

NUM_VIDEOS, NUM_TEXTS, FRAMES = 600, 12, 12


def _features(width: int) -> tuple[Tensor, Tensor]:
    """Frames ``(V, F, D)`` and texts ``(T, D)`` in clusters, with a decaying spectrum; half precision, as a gallery."""
    generator = torch.Generator().manual_seed(1)
    spectrum = torch.arange(1, width + 1) ** -0.5
    centres = torch.randn(60, width, generator=generator)
    scenes = centres[torch.randint(60, (NUM_VIDEOS, 3), generator=generator)]
    scenes = scenes + 0.7 * torch.randn(NUM_VIDEOS, 3, width, generator=generator)
    frames = scenes.repeat_interleave(FRAMES // 3, dim=1) + 0.1 * torch.randn(
        NUM_VIDEOS, FRAMES, width, generator=generator
    )
    texts = scenes[:NUM_TEXTS, 1] + 0.4 * torch.randn(NUM_TEXTS, width, generator=generator)
    return (frames * spectrum).half().float(), texts * spectrum


@pytest.mark.parametrize("num_heads", [1, 4])
def test_the_approximate_score_is_the_dot_product_without_the_deviations(num_heads: int) -> None:
    model = moved_head_model(f"model.num_heads={num_heads}")
    frames_VFD, text_TD = _features(model.embed_dim)
    pool = model.head.pooling
    assert isinstance(pool, XPool)

    def centred(vectors: Tensor) -> Tensor:
        return vectors - vectors.mean(dim=-1, keepdim=True)

    with torch.no_grad():
        normed_VFD = pool.norm_in(frames_VFD)
        weights_VHFT = pool.attention(pool.queries(text_TD), pool.keys(normed_VFD))
        found = Shortlist(model.head)
        for number, text_D in enumerate(text_TD):
            summed_VHD = torch.einsum("vhf,vfd->vhd", weights_VHFT[..., number], normed_VFD)
            value_HED = pool.value.weight.unflatten(0, (num_heads, -1))
            values_VHE = torch.einsum("hed,vhd->vhe", value_HED, summed_VHD)
            attended_VD = pool.out(values_VHE.flatten(1) + pool.value.bias)
            attended_VD = centred(attended_VD) * pool.norm_attended.weight
            dot_V = centred(attended_VD + F.linear(attended_VD, pool.linear.weight)) * pool.norm_out.weight @ text_D
            expected_V = dot_V / summed_VHD.flatten(1).norm(dim=1)
            scores_V = found.scores(text_D, frames_VFD.half().split(128))
            torch.testing.assert_close(scores_V, expected_V, rtol=1e-4, atol=1e-5 * float(text_D.norm()))


def test_the_shortlist_keeps_what_the_exact_score_puts_first() -> None:
    model = moved_head_model()
    frames_VFD, text_TD = _features(model.embed_dim)
    exact_TV = model.similarity([f"text {n}" for n in range(NUM_TEXTS)], frames_VFD, text_TD=text_TD)
    by_mean_frame_TV = F.normalize(text_TD, dim=-1) @ F.normalize(frames_VFD.mean(1), dim=-1).T
    kept = {"shortlist": 0.0, "mean frame": 0.0}
    for text_D, exact_V, other_V in zip(text_TD, exact_TV, by_mean_frame_TV):
        best = exact_V.topk(10).indices
        scores_V = Shortlist(model.head).scores(text_D, [frames_VFD])
        for name, values in (("shortlist", scores_V), ("mean frame", other_V)):
            kept[name] += float(torch.isin(best, values.topk(NUM_VIDEOS // 10).indices).float().mean()) / NUM_TEXTS
    assert kept["shortlist"] > 0.98 and kept["mean frame"] < 0.95


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> tuple[TMass, Path]:
    """A gallery of generated frames in several parts."""
    model, out = moved_head_model(), tmp_path_factory.mktemp("gallery")
    frames_VFD, _ = _features(model.embed_dim)
    _write(model, out, frames_VFD)
    return model, out


def _write(model: TMass, out: Path, frames_VFD: Tensor) -> None:
    names = []
    for start in range(0, NUM_VIDEOS, 250):
        some = frames_VFD[start : start + 250].half().numpy()
        videos = [{"id": f"v{start + n}", "path": "", "seconds": 12.0, "state": []} for n in range(len(some))]
        times = np.tile(np.arange(FRAMES, dtype=np.float32), (len(some), 1))
        names.append(f"part-{start}")
        build.write_part(out, names[-1], videos, [], some, times, [b"jpeg"] * (len(some) * FRAMES))
    build.commit(out, None, names, set(), model.fingerprint(), "this test", (FRAMES, model.embed_dim))


def test_frames_are_read_from_the_files_as_they_are_mapped(gallery: tuple[TMass, Path]) -> None:
    opened = VideoGallery(gallery[1])
    rows = [599, 0, 1, 249, 250, 499, 500, 3, 3]
    whole = np.concatenate([part.frames for part in opened.parts])
    assert np.array_equal(opened.half_frames(rows).numpy(), whole[rows])
    assert opened.half_frames([]).shape == (0, FRAMES, gallery[0].embed_dim)


@pytest.mark.parametrize(
    ("candidates", "size", "said"),
    [
        (600, 50, "exact scores of all videos"),
        (120, 50, "exact scores of the best 50 of 120 candidates"),
        (40, 50, "exact scores of 40 candidates"),
    ],
)
def test_a_search_and_an_evaluation_score_the_same_videos(
    gallery: tuple[TMass, Path], monkeypatch: pytest.MonkeyPatch, candidates: int, size: int, said: str
) -> None:
    monkeypatch.setattr(shortlist, "SHORTLIST", size)
    monkeypatch.setattr(shortlist, "PER_RESULT", 5)
    model, opened = moved_head_model(), VideoGallery(gallery[1])
    _, text_TD = _features(model.embed_dim)
    texts = [f"text {n}" for n in range(NUM_TEXTS)]
    frames_VFD = opened.frames(list(range(NUM_VIDEOS)))
    owners = [(f"v{number}", 0) for number in range(NUM_TEXTS)]
    features = Features(list(opened.rows), frames_VFD, owners, texts, text_TD, torch.arange(NUM_TEXTS))
    scorer = BlockScorer(model.head, features, model.config)
    ranks_T = search_ranks(scorer, candidates)
    searcher = Searcher(model, opened, candidates)
    assert searcher.labels()["search"] == said
    assert num_exact(scorer, candidates) == (min(size, candidates) if candidates < NUM_VIDEOS else NUM_VIDEOS)
    exact_TV = model.similarity(texts, frames_VFD, text_TD=text_TD)
    for number, results in enumerate(searcher.search_encoded(texts, text_TD, k=10)):
        found = [result.row for result in results]
        assert ranks_T[number] == found.index(number) + 1 if number in found else ranks_T[number] > 10
        if candidates == NUM_VIDEOS:
            assert found == exact_TV[number].topk(10).indices.tolist()
        scores = [result.score for result in results]
        torch.testing.assert_close(torch.tensor(scores), exact_TV[number, found], rtol=0, atol=1e-5)


def test_more_results_have_a_longer_shortlist_and_some_heads_have_none(
    gallery: tuple[TMass, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shortlist, "SHORTLIST", 20)
    monkeypatch.setattr(shortlist, "PER_RESULT", 20)
    searcher = Searcher(moved_head_model(), VideoGallery(gallery[1]), 300)
    [rows] = searcher.candidates(_features(searcher.model.embed_dim)[1][:1], 300)
    text_D = _features(searcher.model.embed_dim)[1][0]
    sizes = [shortlist.shortlist_size(k) for k in (1, 5, 200)]
    assert [len(searcher.best("text 0", text_D, rows, 300, size)) for size in sizes] == [20, 100, 300]
    for overrides in (["model.pooling=query_scored"], ["model.pooling=xpool_best_frame"], ["model.pooled_by=sample"]):
        other = moved_head_model(*overrides)
        assert not Shortlist.applies(other.head, other.config.model.pooled_by)


def test_a_large_gallery_may_give_fewer_candidates_and_says_so(
    gallery: tuple[TMass, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "EXHAUSTIVE", 0)
    monkeypatch.setattr(search, "FRAMES_PER_CANDIDATE", 1)
    model, opened = moved_head_model(), VideoGallery(gallery[1])
    searcher, text_D = Searcher(model, opened, 200), opened.frames([7])[0, 0]
    [few] = opened.index.candidates(text_D[None].numpy(), 200, fewest=1)
    [all_of_them] = opened.index.candidates(text_D[None].numpy(), 200)
    assert len(few) < 200 == len(all_of_them)
    assert few.tolist() == all_of_them[: len(few)].tolist()
    [more] = opened.index.candidates(text_D[None].numpy(), 200, fewest=len(few) + 1)
    assert len(more) > len(few)
    assert searcher.labels()["search"] == "exact scores of at most 200 candidates"
    monkeypatch.setattr(shortlist, "SHORTLIST", 50)
    monkeypatch.setattr(shortlist, "PER_RESULT", 5)
    assert searcher.labels()["search"] == "exact scores of the best 50 of at most 200 candidates"
    assert "at most" not in searcher.labels(name="v1")["search"]  # a part of the gallery is compared frame by frame
    assert len(searcher.search_encoded(["text"], text_D[None], k=10)[0]) == 10


@pytest.mark.parametrize("kind", ["frames.npy", "jpegs"])
def test_a_gallery_that_changed_while_it_was_open_is_one_line(gallery: tuple[TMass, Path], kind: str) -> None:
    opened = VideoGallery(gallery[1])
    path = gallery[1] / f"part-500.{kind}"
    path.rename(path.with_suffix(".away"))
    try:
        with pytest.raises(UserError, match=r"cannot be read.*Open it again"):
            opened.half_frames([550]) if kind == "frames.npy" else opened.thumbnail(550, 0)
    finally:
        path.with_suffix(".away").rename(path)


@pytest.mark.parametrize(
    "overrides", [[], ["model.pooled_by=sample"], ["model.pooling=late_interaction", "model.radius=none"]]
)
def test_a_video_whose_frames_are_not_numbers_is_named(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shortlist, "SHORTLIST", 50)
    monkeypatch.setattr(shortlist, "PER_RESULT", 5)
    model = moved_head_model(*overrides)
    frames_VFD, _ = _features(model.embed_dim)
    frames_VFD[8] = frames_VFD[7]
    _write(model, tmp_path, frames_VFD)
    path = tmp_path / "part-0.frames.npy"
    stored_VFD = np.load(path)
    stored_VFD[7, 3, 5] = np.nan  # after it was indexed, as on a disk that fails
    np.save(path, stored_VFD)
    searcher = Searcher(model, VideoGallery(tmp_path))
    text_TD = model.encode_text(["a text"]).clone()
    text_TD[0, : model.embed_dim] = frames_VFD[7, 0]
    for among in (200, NUM_VIDEOS):
        with pytest.raises(UserError, match=r"the score of 'v7' is not a number; .* --check"):
            searcher.search_encoded(["a text"], text_TD, candidates=among)
    for row in (7, 8):
        with pytest.raises(UserError, match=r"the score of 'v7' is not a number; .* --check"):
            searcher.similar(row)
