"""The feature store, the blocks of scores, the report, and ranking by blocks."""

import csv
import itertools
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conftest import ROOT, run
from tests.oracle import dsl
from tmass_dist.config import ModelConfig, load_config, to_yaml
from tmass_dist.errors import UserError
from tmass_dist.evaluation import blocks, ranking
from tmass_dist.evaluation import features as store
from tmass_dist.evaluation.evaluation import evaluate_store
from tmass_dist.evaluation.retrieved import best_answers
from tmass_dist.evaluation.stored import StoredSplit
from tmass_dist.models.head import build_head

V, F, D = 90, 12, 32


def make_part(video_numbers: list[int]) -> store.Part:
    """Features of some videos, each drawn by its number; one to three captions per video."""
    frames, texts, caption_ids = [], [], []
    for number in video_numbers:
        generator = torch.Generator().manual_seed(number)
        frames.append(torch.randn(F, D, generator=generator))
        for slot in range(1 + number % 3):
            texts.append(frames[-1].mean(dim=0) + 0.3 * torch.randn(D, generator=generator))
            caption_ids.append((f"v{number}", slot))
    captions = [f"<script>alert(1)</script> & caption {v} {s}" for v, s in caption_ids]
    return store.Part([f"v{n}" for n in video_numbers], torch.stack(frames), caption_ids, captions, torch.stack(texts))


def write_store(
    directory: Path, *, precision: str = "float32", overrides: tuple[str, ...] = (), **about: object
) -> Path:
    """A store of all videos, written in three pieces, by an untrained head of the demo config."""
    ids = [f"v{n}" for n in range(V)]
    config = load_config("demo.yaml", list(overrides))
    writer = store.StoreWriter(directory, ids, (F, D), precision)
    for numbers in (range(31), range(31, 80), range(80, V)):
        writer.add(store.merge([make_part(list(numbers))], [ids[n] for n in numbers]))
    known: dict[str, object] = {"config": to_yaml(config), "split": "test", "checkpoint": "best.safetensors"}
    known |= {"fingerprint": "made-from", "weights_sha256": "w", "selection": {"selected_on": "val"}}
    head = build_head(ModelConfig(num_frames=F, radius=config.model.radius), D)
    writer.finish(head.state_dict(), known | about)
    return directory


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


@pytest.mark.parametrize("name", ["frames.npy", "texts.npy", "captions.jsonl", "head.safetensors"])
@pytest.mark.parametrize("damage", ["bit", "torn", "missing"])
def test_a_damaged_file_of_a_store_is_named(made: Path, tmp_path: Path, name: str, damage: str) -> None:
    directory = tmp_path / "store"
    shutil.copytree(made, directory)
    content = (directory / name).read_bytes()
    if damage == "bit":
        (directory / name).write_bytes(content[:-50] + bytes([content[-50] ^ 1]) + content[-49:])
    elif damage == "torn":
        (directory / name).write_bytes(content[: len(content) // 2])
    else:
        (directory / name).unlink()
    state = "missing" if damage == "missing" else "damaged"
    assert f"{name} is {state}" in _one_line(_evaluate("--features", str(directory), "--out", str(tmp_path)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "a newer version"),
        ({"version": 1}, "an older version"),
        ({"version": "?"}, "an older version"),
        ({"checkpoint": "other"}, "its checksum differs"),
        ({"video_ids": ["v1"]}, "its checksum differs"),
        ("[[[[", "is damaged"),
        ("[" * 100_000, "is damaged"),
        ("7", "is damaged"),
    ],
)
def test_a_damaged_index_is_one_line(made: Path, tmp_path: Path, change: dict | str, message: str) -> None:
    directory = tmp_path / "store"
    shutil.copytree(made, directory)
    index = json.loads((directory / "index.json").read_text())
    (directory / "index.json").write_text(change if isinstance(change, str) else json.dumps(index | change))
    assert message in _one_line(_evaluate("--features", str(directory), "--out", str(tmp_path)))


def test_an_index_with_a_right_checksum_and_missing_entries_is_one_line(made: Path, tmp_path: Path) -> None:
    directory = tmp_path / "store"
    shutil.copytree(made, directory)
    about = store.read_index(directory)
    for key, value in (("config", None), ("fingerprint", 3), ("video_ids", {}), ("weights_sha256", None)):
        store.write_index(directory, about | {key: value})
        assert f"{key} is missing" in _one_line(_evaluate("--features", str(directory), "--out", str(tmp_path)))
    store.write_index(directory, about | {"video_ids": about["video_ids"][1:]})
    assert "no feature store" in _one_line(_evaluate("--features", str(directory), "--out", str(tmp_path)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"selection": 7}, ""),
        ({"selection": {"selected_on": ["val"], "query_scoring_tau": "0"}}, ""),
        ({"selection": {"query_scoring_tau": 0}}, ""),
        ({"before_training": [1]}, "scores before training"),
        ({"before_training": {"row": {"t2v": {"R@1": "<b>"}}}}, "scores before training"),
        ({"shards": 7}, ""),
        ({"shards": "https://127.0.0.1:9/nowhere"}, ""),
        ({"split": "<script>"}, ""),
    ],
)
def test_facts_in_an_index_of_others_break_nothing(
    made: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    directory = tmp_path / "store"
    shutil.copytree(made, directory)
    store.write_index(directory, store.read_index(directory) | change)
    done = _evaluate("--features", str(directory), "--out", str(tmp_path / "out"))
    if message:
        assert message in _one_line(done)
        return
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out" / "report.html").read_text()
    assert "not chosen here" in done.stdout and page.count("<script") == 1


def test_features_that_are_not_finite_are_named() -> None:
    parts = [make_part(list(range(n, V, 2))) for n in range(2)]
    parts[1].frames_VFD[1, 0, 0] = torch.nan
    parts[1].text_TD[parts[1].caption_ids.index(("v5", 0))] = torch.inf
    with pytest.raises(UserError, match="2 features are not finite numbers: v3, v5 caption 0"):
        store.merge(parts, [f"v{n}" for n in range(V)])
    with pytest.raises(UserError, match="45 videos were encoded by no rank: v1, v3"):
        store.merge(parts[:1], [f"v{n}" for n in range(V)])


def test_a_store_cannot_read_the_environment(made: Path, tmp_path: Path) -> None:
    directory = tmp_path / "store"
    shutil.copytree(made, directory)
    about = store.read_index(directory)
    config = about["config"].replace("run_dir: runs/demo", "run_dir: ${oc.env:SECRET_OF_TEST}")
    assert config != about["config"]
    store.write_index(directory, about | {"config": config})
    command = ["-m", "tmass_dist.evaluate", "--features", str(directory), "--out", str(tmp_path)]
    refused = run(*command, SECRET_OF_TEST="hunter2")
    assert "--allow-env" in _one_line(refused) and "hunter2" not in refused.stderr + refused.stdout
    assert run(*command, "--allow-env", SECRET_OF_TEST="hunter2").returncode == 0


def test_the_bank_is_compared_by_its_weights_and_named_in_the_result(made: Path, tmp_path: Path) -> None:
    command = ["--features", str(made), "--out", str(tmp_path / "out"), "--post-processing", "qbnorm", "--bank"]
    bank = write_store(tmp_path / "bank", checkpoint="a/copy/of/best.safetensors")
    done = _evaluate(*command, str(bank))
    assert done.returncode == 0 and "qbnorm (transductive)" in done.stdout, done.stderr
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["bank"] == str(bank)
    other = write_store(tmp_path / "other", weights_sha256="another")  # at the same path, other weights
    assert "weights_sha256 differs" in _one_line(_evaluate(*command, str(other)))


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
