"""Blocks of scores and ranking, in one process and against plain references."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.stores import D, F, V, write_store
from tmass_dist.config import Config, load_config
from tmass_dist.errors import UserError
from tmass_dist.evaluation import blocks, ranking
from tmass_dist.evaluation.blocks import BlockFiles, BlockScorer, caption_noise, split_into_blocks
from tmass_dist.evaluation.scoring import score
from tmass_dist.evaluation.stored import StoredSplit
from tmass_dist.noise import keyed_noise, text_key

# Shapes: T texts, V videos, M trials, D embedding width.


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("blocks"))


def _scorer(stored: Path, *overrides: str) -> BlockScorer:
    return StoredSplit(stored, list(overrides)).scorer


@pytest.mark.parametrize("limit", [1, 3, 5, 64])
@pytest.mark.parametrize("counts", [[], [1], [2, 2, 1], [7, 1, 1], [1, 1, 7, 3, 2], [3] * 9])
def test_blocks_are_the_longest_runs_of_whole_videos(counts: list[int], limit: int) -> None:
    owner_T = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts, dtype=torch.int64))
    expected: list[list[int]] = []
    row = 0
    for count in counts:
        rows = list(range(row, row + count))
        if expected and len(expected[-1]) + count <= limit:
            expected[-1] += rows
        else:
            expected.append(rows)
        row += count
    assert [list(range(b.start, b.stop)) for b in split_into_blocks(owner_T, limit)] == expected
    assert split_into_blocks(owner_T) == split_into_blocks(owner_T, 64)


@pytest.mark.parametrize("prior", ["uniform", "normal"])
def test_the_noise_of_a_caption_depends_on_its_text_and_the_seed_alone(prior: str) -> None:
    config = load_config("demo.yaml", ["seed=7", f"stochastic.prior={prior}", "stochastic.prior_std=0.5"])
    cpu, captions = torch.device("cpu"), ["a dog", "ein Hund", "a dog"]
    noise_TMD = caption_noise(captions, config, 6, cpu)
    assert noise_TMD.shape == (3, config.stochastic.num_trials, 6) and torch.equal(noise_TMD[0], noise_TMD[2])
    assert torch.equal(caption_noise(captions[1:2], config, 6, cpu), noise_TMD[1:2])
    keys = torch.tensor([text_key("evaluation", caption) for caption in captions])
    for num_trials in (3, 1):
        expected = keyed_noise(keys, num_trials * 6, seed=7, prior=prior, std=0.5).view(3, num_trials, 6)
        assert torch.equal(caption_noise(captions, config, 6, cpu, num_trials), expected)


def _plain(scorer: BlockScorer, config: Config) -> Tensor:
    """Similarity ``(T, V)`` of all texts at once."""
    features = scorer.features
    noise_TMD = caption_noise(features.captions, config, features.text_TD.shape[1], torch.device("cpu"))
    return score(
        scorer.head,
        features.text_TD.float(),
        features.frames_VFD.float(),
        noise_TMD if scorer.head.mass is not None else None,
        protocol=config.evaluation.protocol,
        caption_owner_T=features.owner_T,
        tile_texts=1000,
        tile_videos=1000,
    )


@pytest.mark.parametrize("overrides", [[], ["evaluation.protocol=published_code"], ["model.pooled_by=sample"]])
def test_scores_of_blocks_are_those_of_all_texts_at_once(stored: Path, overrides: list[str]) -> None:
    scorer = _scorer(stored, *overrides)
    texts = len(scorer.features.owner_T)
    published = "evaluation.protocol=published_code" in overrides
    assert (len(scorer.blocks) == 1) == published and scorer.blocks[-1].stop == texts
    assert (scorer.tile_texts, scorer.tile_videos) == blocks.TILE_SIZES["cpu"]
    whole_TV = torch.cat(list(scorer.scores()))
    if "model.pooled_by=sample" not in overrides:
        expected_TV = _plain(scorer, scorer.config)
        assert torch.isnan(expected_TV).any() == published
        torch.testing.assert_close(whole_TV, expected_TV.nan_to_num(blocks.LOWEST), rtol=0, atol=2e-6)
    for text in (0, 1, scorer.blocks[0].stop - 1, texts - 1):
        assert torch.equal(scorer.scores_of(text), whole_TV[text])
    if not published:
        last = scorer.blocks[-1]
        assert torch.equal(next(scorer.scores([last])), whole_TV[last])
        some = torch.tensor([3, 0, 11])
        gallery = scorer.gallery(scorer.features.frames_VFD[some])
        torch.testing.assert_close(scorer.score(last, gallery), whole_TV[last][:, some], rtol=0, atol=2e-6)


@pytest.mark.parametrize("pooling", ["xpool", "best_frame", "mean"])
def test_the_memory_of_a_prepared_gallery_is_known(stored: Path, pooling: str) -> None:
    scorer = _scorer(stored)
    if pooling != "xpool":
        from tmass_dist.models.head import build_head

        model = load_config("demo.yaml", [f"model.pooling={pooling}", "model.radius=none"]).model
        scorer.head = build_head(model, D)
    heads = getattr(scorer.head.pooling, "num_heads", 0)
    own = {"xpool": (heads + 1) * F + 2, "best_frame": F, "mean": 1}[pooling]  # keys and basis of the pooling
    assert scorer._gallery_bytes() == 4 * V * D * (F + F + own)


@pytest.mark.parametrize("limit", [0, 2**40])
def test_a_gallery_is_kept_if_it_is_small_enough(stored: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(blocks, "GALLERY_BYTES", limit)
    scorer = _scorer(stored)
    scorer.tile_videos = 16
    whole_TV = torch.cat(list(scorer.scores()))
    assert (scorer._whole_gallery is not None) == (limit > 0)
    torch.testing.assert_close(whole_TV, _plain(scorer, scorer.config), rtol=0, atol=2e-6)
    published = _scorer(stored, "evaluation.protocol=published_code")
    next(iter(published.scores()))
    assert published._whole_gallery is not None


def test_groups_hold_as_many_blocks_as_the_memory_allows(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = _scorer(stored)
    texts = [block.stop - block.start for block in scorer.blocks]
    per_text = 4 * (V + scorer.config.stochastic.num_trials * D)
    for group_bytes, expected in (
        (0, [[0], [1], [2]]),
        ((texts[0] + texts[1]) * per_text, [[0, 1], [2]]),
        ((texts[0] + texts[1]) * per_text - 1, [[0], [1, 2]]),
        (sum(texts) * per_text, [[0, 1, 2]]),
    ):
        monkeypatch.setattr(blocks, "GROUP_BYTES", group_bytes)
        groups = list(scorer._groups(scorer.blocks))
        assert groups == [[scorer.blocks[k] for k in group] for group in expected], group_bytes
    assert list(scorer._groups([])) == []


def test_tasks_share_the_blocks_and_a_damaged_one_is_named_and_computed_again(stored: Path, tmp_path: Path) -> None:
    scorer, said = _scorer(stored), []
    files = BlockFiles(tmp_path / "deep" / "scores", scorer, log=said.append)
    files.compute(1, 2)
    assert [path.name for path in files.directory.iterdir()] == [f"rows-{scorer.blocks[1].start:09d}.safetensors"]
    files.compute(0, 2)
    names = [f"rows-{block.start:09d}.safetensors" for block in scorer.blocks]
    assert sorted(path.name for path in files.directory.iterdir()) == names
    whole_TV = torch.cat(list(scorer.scores()))
    assert torch.equal(torch.cat(list(files.blocks())), whole_TV) and said == []
    for text in (0, scorer.blocks[1].start, len(whole_TV) - 1):
        assert torch.equal(files.scores_of(text), whole_TV[text])
    # A file that is whole is read, not computed: 0.5 is not the score.
    marked, checksum = torch.full_like(next(files.blocks()), 0.5), blocks._sha256
    save_file({"similarity": marked}, files.directory / names[0], metadata={"sha256": checksum(marked)})
    assert torch.equal(next(files.blocks()), marked) and torch.equal(files.scores_of(1), marked[1])
    for damage, message in (
        ({"similarity": marked}, "its checksum differs"),
        ({"similarity": marked[:, 1:].contiguous()}, "its shape is"),
        ({"similarity": marked[1:].contiguous()}, "its shape is"),
        ({"other": marked}, "similarity"),
    ):
        save_file(
            damage,
            files.directory / names[0],
            metadata={"sha256": checksum(next(iter(damage.values())) + ("checksum" in message))},
        )
        assert torch.equal(next(files.blocks()), whole_TV[scorer.blocks[0]])
        assert torch.equal(files.scores_of(1), whole_TV[1])
        assert len(said) == 2 and all(f"{names[0]} is damaged" in line and message in line for line in said)
        said.clear()
    save_file({"similarity": marked}, files.directory / names[0])  # without a checksum
    files.compute(0, 1)
    assert len(said) == 1 and torch.equal(load_file(files.directory / names[0])["similarity"], whole_TV[: len(marked)])


def test_metrics_of_ranks_are_the_textbook_ones() -> None:
    ranks = torch.tensor([1, 1, 2, 5, 6, 10, 11, 50, 51, 200])
    expected = {"R@1": 20.0, "R@5": 40.0, "R@10": 60.0, "R@50": 80.0, "R@100": 90.0, "MdR": 8.0, "MnR": 33.7}
    assert ranking.metrics(ranks) == pytest.approx(expected, rel=1e-12)
    assert ranking.chance(40) == {"R@1": 2.5, "R@5": 12.5, "R@10": 25.0, "R@50": 100.0, "R@100": 100.0} | {
        "MdR": 20.5,
        "MnR": 20.5,
    }


def test_rows_that_cannot_be_ranked_are_named() -> None:
    matrix_TV, owner_T = torch.rand(4, 3), torch.tensor([0, 0, 1, 2])

    def refused(owner_T: Tensor, matrix_TV: Tensor = matrix_TV, **options: object) -> str:
        with pytest.raises(UserError) as error:
            ranking.rank(lambda: matrix_TV.split(2), owner_T, matrix_TV.shape[1], **options)  # type: ignore[arg-type]
        return str(error.value)

    assert "in the order of their videos" in refused(torch.tensor([0, 1, 0, 2]))
    seven = refused(torch.tensor([7, 7]), torch.rand(2, 8))
    assert seven == "7 videos have no caption: [0, 1, 2, 3, 4]"
    assert "2 videos have no caption: [1, 3]" in refused(torch.tensor([0, 0, 2, 2]), torch.rand(4, 4))
    assert "give --bank FEATURES" in refused(owner_T, post="qbnorm")
    assert "there are 4 rows of similarities and 5 texts" in refused(torch.tensor([0, 0, 1, 2, 2]))
    bad_TV = matrix_TV.clone()
    bad_TV[[1, 3], [0, 2]] = torch.nan
    assert "2 texts have a similarity that is not a number; the first rows are [1, 3]" in _all_rows(bad_TV, owner_T)
    assert "1 texts have a similarity that is not a number; the first rows are [3]" in refused(
        owner_T, torch.cat([matrix_TV[:2], bad_TV[2:]])
    )


def _all_rows(matrix_TV: Tensor, owner_T: Tensor) -> str:
    with pytest.raises(UserError) as error:
        ranking.rank(lambda: [matrix_TV], owner_T, matrix_TV.shape[1])
    return str(error.value)


def test_features_that_are_not_numbers_are_named_and_counted(stored: Path) -> None:
    scorer = _scorer(stored)
    text_TD = torch.full((7, D), torch.nan)
    with pytest.raises(
        UserError, match=r"^7 texts have features that are not numbers; the first are \[0, 1, 2, 3, 4\]$"
    ):
        score(scorer.head, text_TD, scorer.features.frames_VFD[:3].float())


@pytest.mark.parametrize("post", ["none", "dsl"])
def test_ranks_of_two_halves_combine_to_those_of_the_whole(post: str) -> None:
    """``combine`` as all-reduce, simulated: each half runs until it needs the other half's numbers."""
    generator = torch.Generator().manual_seed(0)
    owner_T = torch.arange(6).repeat_interleave(torch.tensor([2, 1, 3, 1, 2, 2]))
    matrix_TV = torch.rand(len(owner_T), 6, generator=generator) * 2 - 1
    expected = ranking.rank(lambda: matrix_TV.split(3), owner_T, 6, post)  # type: ignore[arg-type]
    halves = [(matrix_TV[:6], owner_T[:6]), (matrix_TV[6:], owner_T[6:])]
    known: list[list[Tensor]] = [[], []]

    def run(number: int) -> ranking.Ranks | None:
        position = iter(range(10))

        def combine(value: Tensor, how: str) -> Tensor:
            at = next(position)
            if len(known[number]) == at:
                known[number].append(value.clone())
            if len(known[1 - number]) <= at:
                raise LookupError
            both = torch.stack([known[number][at], known[1 - number][at]])
            return {"amax": both.amax, "sum": both.sum, "logsumexp": both.logsumexp}[how](0)

        matrix, owner = halves[number]
        try:
            return ranking.rank(lambda: matrix.split(2), owner, 6, post, combine=combine)  # type: ignore[arg-type]
        except LookupError:
            return None

    found: list[ranking.Ranks | None] = [None, None]
    for _ in range(6):
        found = [run(0), run(1)]
    assert all(ranks is not None for ranks in found)
    assert torch.cat([ranks.t2v_T for ranks in found if ranks]).tolist() == expected.t2v_T.tolist()
    assert all(ranks.v2t_V.tolist() == expected.v2t_V.tolist() for ranks in found if ranks)


def test_a_bank_normalises_the_rows_whose_nearest_video_is_a_hub() -> None:
    bank_QV = torch.tensor([[0.9, 0.1, 0.2], [0.8, 0.3, 0.1]])
    bank = ranking.Bank(lambda: [bank_QV[:1], bank_QV[1:]], 3)
    assert bank.is_hub_V.tolist() == [True, False, False] and bank.beta == 20.0
    rows_TV = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.5]])
    found_TV = bank.normalised(rows_TV)
    sums = [sum(math.exp(20 * row[video]) for row in bank_QV.tolist()) for video in range(3)]
    first = [math.exp(20 * value) / total for value, total in zip(rows_TV[0].tolist(), sums)]
    assert found_TV[0].tolist() == pytest.approx(first, rel=1e-4) and found_TV[1].tolist() == rows_TV[1].tolist()
