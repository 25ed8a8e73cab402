"""The feature store, the blocks of scores, the report, and ranking by blocks."""

import csv
import itertools
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conftest import ROOT, run
from tests.oracle import dsl
from tests.stores import D, F, V, make_part, write_store
from tmass_dist.errors import UserError
from tmass_dist.evaluation import blocks, ranking
from tmass_dist.evaluation import features as store
from tmass_dist.evaluation.evaluation import evaluate_store
from tmass_dist.evaluation.retrieved import best_answers
from tmass_dist.evaluation.stored import StoredSplit


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="module")
def whole(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of one process for ``made``."""
    out = tmp_path_factory.mktemp("whole")
    evaluate_store(StoredSplit(made, []), out)
    return out


def _evaluate(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run("-m", "tmass_dist.evaluate", *arguments)


def _one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    return done.stderr


def test_parts_of_any_cut_are_the_same_features(made: Path) -> None:
    # Three parts, one video in two of them.
    ids = [f"v{n}" for n in range(V)]
    parts = [make_part(list(range(31))), make_part(list(range(30, 80))), make_part(list(range(80, V)))]
    one, two = store.load_features(made), store.merge(parts, ids)
    assert one.video_ids == two.video_ids and one.caption_ids == two.caption_ids and one.captions == two.captions
    assert torch.equal(one.text_TD, two.text_TD) and torch.equal(one.frames_VFD, two.frames_VFD)
    assert torch.equal(one.owner_T, two.owner_T)


def test_blocks_hold_whole_videos_and_cover_all_texts() -> None:
    owner_T = torch.arange(40).repeat_interleave(
        torch.randint(1, 90, (40,), generator=torch.Generator().manual_seed(0))
    )
    cut = blocks.split_into_blocks(owner_T, 64)
    assert [text for block in cut for text in range(block.start, block.stop)] == list(range(len(owner_T)))
    for one, other in itertools.pairwise(cut):
        assert owner_T[one.stop - 1] != owner_T[other.start]
    for block in cut:
        assert block.stop - block.start <= 64 or len(owner_T[block].unique()) == 1


@pytest.mark.parametrize("num_shards", [1, 2, 3, 7, 64])
def test_any_number_of_shards_gives_the_same_bits(made: Path, whole: Path, tmp_path: Path, num_shards: int) -> None:
    out = tmp_path / "out"
    for number in range(num_shards):
        StoredSplit(made, []).block_files(out).compute(number, num_shards)
    evaluate_store(StoredSplit(made, []), out)
    for name in ("metrics.json", "ranks.csv", "video_ranks.csv", "table.md"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    files = sorted(path.relative_to(whole) for path in whole.rglob("rows-*.safetensors"))
    assert len(files) == 3 and all((out / name).read_bytes() == (whole / name).read_bytes() for name in files)


@pytest.mark.parametrize("group_bytes", [1, 2**17, 2**29])
def test_a_gallery_prepared_a_tile_at_a_time_gives_the_same_bits(
    made: Path, monkeypatch: pytest.MonkeyPatch, group_bytes: int
) -> None:
    scorer = StoredSplit(made, []).scorer
    scorer.tile_videos = 16
    kept = list(scorer.scores())
    monkeypatch.setattr(blocks, "GALLERY_BYTES", 0)
    monkeypatch.setattr(blocks, "GROUP_BYTES", group_bytes)
    for one, other in zip(kept, scorer.scores(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(scorer.scores_of(100), torch.cat(kept)[100])


def test_float16_features_are_labelled_and_close(made: Path, whole: Path, tmp_path: Path) -> None:
    half = write_store(tmp_path / "half", precision="float16")
    assert (half / "frames.npy").stat().st_size < 0.51 * (made / "frames.npy").stat().st_size
    done = _evaluate("--features", str(half), "--out", str(tmp_path / "out"))
    assert done.returncode == 0 and "feature precision float16" in done.stdout, done.stderr
    result = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert result["feature_precision"] == "float16"
    exact = json.loads((whole / "metrics.json").read_text())
    assert abs(result["t2v"]["R@10"] - exact["t2v"]["R@10"]) < 3
    one, other = (next(StoredSplit(directory, []).scorer.scores()) for directory in (made, half))
    torch.testing.assert_close(one, other, rtol=0, atol=2e-3)


def test_features_that_float16_cannot_hold_are_named(tmp_path: Path) -> None:
    part = make_part([0, 1])
    part.frames_VFD[1, 2, 3] = 1e6
    writer = store.StoreWriter(tmp_path, ["v0", "v1"], (F, D), "float16")
    with pytest.raises(UserError, match="1 features are not finite numbers: v1"):
        writer.add(store.merge([part], ["v0", "v1"]))


@pytest.mark.parametrize("damage", ["torn", "bit", "shape"])
def test_finished_blocks_are_kept_and_a_damaged_one_is_named_and_computed_again(
    made: Path, tmp_path: Path, damage: str
) -> None:
    from safetensors.torch import load_file, save_file

    first = _evaluate("--features", str(made), "--out", str(tmp_path))
    assert first.returncode == 0, first.stderr
    expected = (tmp_path / "metrics.json").read_bytes()
    kept, damaged, missing = sorted(tmp_path.rglob("rows-*.safetensors"))
    content, before = damaged.read_bytes(), kept.stat().st_mtime_ns
    if damage == "torn":
        damaged.write_bytes(content[:100])
    elif damage == "bit":
        damaged.write_bytes(content[:-100] + bytes([content[-100] ^ 64]) + content[-99:])
    else:
        save_file({"similarity": load_file(damaged)["similarity"][:, 1:].contiguous()}, damaged)
    missing.unlink()
    again = _evaluate("--features", str(made), "--out", str(tmp_path))
    assert again.returncode == 0 and damaged.name in again.stderr and kept.name not in again.stderr
    assert kept.stat().st_mtime_ns == before and damaged.read_bytes() == content and missing.is_file()
    assert (tmp_path / "metrics.json").read_bytes() == expected


def test_every_result_names_its_protocol(made: Path, tmp_path: Path) -> None:
    done = _evaluate("--features", str(made), "--out", str(tmp_path), "evaluation.protocol=published_code")
    assert done.returncode == 0, done.stderr
    assert "published_code" in done.stdout
    for name in ("metrics.json", "ranks.csv", "table.md", "report.html"):
        assert "published_code" in (tmp_path / name).read_text()


def test_bfloat16_names_itself_in_every_result_and_shares_no_block(made: Path, tmp_path: Path) -> None:
    assert _evaluate("--features", str(made), "--out", str(tmp_path)).returncode == 0
    exact = json.loads((tmp_path / "metrics.json").read_text())
    done = _evaluate("--features", str(made), "--out", str(tmp_path), "evaluation.precision=bfloat16")
    assert done.returncode == 0, done.stderr
    assert ", precision bfloat16" in done.stdout and exact["precision"] == "float32"
    for name in ("metrics.json", "ranks.csv", "table.md", "report.html"):
        assert "bfloat16" in (tmp_path / name).read_text()
    assert len(list((tmp_path / "scores").iterdir())) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("overrides", [[], ["evaluation.protocol=published_code"], ["stochastic.prior=normal"]])
def test_a_gpu_scores_as_the_cpu_does(made: Path, tmp_path: Path, overrides: list[str]) -> None:
    scorer = StoredSplit(made, overrides).scorer
    assert scorer.device.type == "cuda"
    on_gpu = list(scorer.scores())
    scorer.device, scorer._whole_gallery = torch.device("cpu"), None
    scorer.head.cpu()
    for one, other in zip(on_gpu, scorer.scores()):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_two_stages_are_exact_with_every_candidate(made: Path, tmp_path: Path) -> None:
    search = ["--features", str(made), "--out", str(tmp_path), "--search"]
    for num, is_exact in ((V, True), (3, False)):
        done = _evaluate(*search, str(num), "--compare-exact")
        assert done.returncode == 0, done.stderr
        found = json.loads((tmp_path / "search.json").read_text())
        exact = json.loads((tmp_path / "metrics.json").read_text())["t2v"]
        assert found["lost"]["R@10"] == exact["R@10"] - found["t2v"]["R@10"]
        if is_exact:
            assert found["t2v"] == exact
        else:
            assert found["t2v"]["R@10"] == found["t2v"]["R@5"] and found["lost"]["MnR"] < 0
    assert "--search is 91" in _one_line(_evaluate(*search, "91"))


def test_a_search_computes_no_exact_scores_unless_asked_to_compare(made: Path, tmp_path: Path) -> None:
    done = _evaluate("--features", str(made), "--out", str(tmp_path), "--search", "5")
    assert done.returncode == 0 and "search with 5 candidates" in done.stdout, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["search.json"]
    found = json.loads((tmp_path / "search.json").read_text())
    assert "lost" not in found and found["protocol"] == "query_conditioned"


def _matrix() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    owner_T = torch.arange(12).repeat_interleave(torch.randint(1, 4, (12,), generator=generator))
    return torch.rand(len(owner_T), 12, generator=generator) * 2 - 1, owner_T


@pytest.mark.parametrize("post", ["none", "dsl", "qbnorm"])
@pytest.mark.parametrize("rows", [1, 2, 5, 100])
def test_streamed_ranking_is_that_of_the_whole_matrix(post: str, rows: int) -> None:
    matrix, owner_T = _matrix()
    bank_QV = torch.rand(30, 12, generator=torch.Generator().manual_seed(1))
    t2v = v2t = matrix
    if post == "dsl":
        t2v, v2t = dsl(matrix), dsl(matrix.T).T
    elif post == "qbnorm":  # the paper's formula, with its bank as a sum
        hubs = set(bank_QV.argmax(dim=1).tolist())
        inverted = (20 * matrix).exp() / (20 * bank_QV).exp().sum(dim=0)
        t2v = torch.stack([inverted[i] if int(row.argmax()) in hubs else row for i, row in enumerate(matrix)])
    best_VV = torch.stack([v2t[owner_T == video].amax(dim=0) for video in range(12)])
    expected_t2v = [int((row >= row[owner]).sum()) for row, owner in zip(t2v, owner_T)]
    expected_v2t = [int((best_VV[:, video] >= best_VV[video, video]).sum()) for video in range(12)]
    bank = ranking.Bank(lambda: bank_QV.split(7), 12) if post == "qbnorm" else None
    ranks = ranking.rank(lambda: matrix.split(rows), owner_T, 12, post, bank)  # type: ignore[arg-type]
    assert ranks.t2v_T.tolist() == expected_t2v and ranks.v2t_V.tolist() == expected_v2t


def test_the_matrix_of_another_program_is_ranked(tmp_path: Path) -> None:
    matrix, owner_T = _matrix()
    shuffled = torch.randperm(len(owner_T), generator=torch.Generator().manual_seed(2))
    np.save(tmp_path / "s.npy", matrix[shuffled].numpy())
    (tmp_path / "truth.json").write_text(json.dumps(owner_T[shuffled].tolist()))
    command = ["--similarities", str(tmp_path / "s.npy"), "--out", str(tmp_path / "out")]
    done = _evaluate(*command, "--truth", str(tmp_path / "truth.json"), "--post-processing", "dsl")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    expected = ranking.rank(lambda: [matrix], owner_T, 12, "dsl")
    assert found["t2v"] == ranking.metrics(expected.t2v_T) and found["v2t"] == ranking.metrics(expected.v2t_V)
    assert found["post_processing"] == "dsl" and "transductive" in done.stdout
    assert "have no diagonal" in _one_line(_evaluate(*command))
    (tmp_path / "truth.json").write_text("[99]")
    assert "column numbers" in _one_line(_evaluate(*command, "--truth", str(tmp_path / "truth.json")))
    (tmp_path / "s.npy").write_bytes(b"no matrix")
    assert "not a matrix" in _one_line(_evaluate(*command))


REAL = ROOT.parent / "shared" / "metrics" / "msrvtt_1kA_titles_matrix.npy"


@pytest.mark.skipif(not REAL.is_file(), reason="the real MSR-VTT matrix lies only in ../shared/metrics")
def test_a_real_matrix_gives_its_published_metrics() -> None:
    matrix = torch.from_numpy(np.load(REAL, allow_pickle=False))
    found = ranking.metrics(ranking.rank(lambda: matrix.split(100), torch.arange(1000), 1000).t2v_T)
    assert [round(found[name], 2) for name in ("R@1", "R@5", "R@10", "MdR", "MnR")] == [29.7, 55.8, 66.6, 4.0, 26.74]


@pytest.mark.parametrize("post", ["none", "dsl"])
def test_the_best_answers_agree_with_the_ranks(post: ranking.PostProcessing) -> None:
    similarity_TV = torch.randn(60, 20, generator=torch.Generator().manual_seed(0))
    owner_T = torch.arange(20).repeat_interleave(3)
    ranks = ranking.rank(lambda: similarity_TV.split(7), owner_T, 20, post)
    found = best_answers(lambda: similarity_TV.split(7), owner_T, 20, post)
    assert torch.equal(ranks.t2v_T == 1, found.video_TK[:, 0] == owner_T)
    assert torch.equal(ranks.t2v_T == 1, found.margins(owner_T)[0] > 0)
    assert torch.equal(ranks.v2t_V == 1, found.margins(owner_T)[1] > 0)
    assert torch.equal(ranks.v2t_V == 1, owner_T[found.text_VK[:, 0]] == torch.arange(20))
    if post == "none":
        assert torch.equal(found.text_VK[:, 0], similarity_TV.argmax(dim=0))


def test_the_csv_files_name_the_first_answer(made: Path, tmp_path: Path) -> None:
    assert _evaluate("--features", str(made), "--out", str(tmp_path)).returncode == 0
    for name in ("ranks.csv", "video_ranks.csv"):
        with (tmp_path / name).open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert rows and all(float(row["top1_score"]) >= float(row["score"]) for row in rows)
        assert all(row["video_id"] == row["top1_video_id"] for row in rows if row["rank"] == "1")
