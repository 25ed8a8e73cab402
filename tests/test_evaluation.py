"""The feature store, the blocks of scores, the streamed ranking and the report."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.conftest import ROOT, run
from tmass_dist.config import ModelConfig, load_config, to_yaml
from tmass_dist.evaluation import features as store
from tmass_dist.evaluation import ranking
from tmass_dist.models.head import build_head

V, F, D = 90, 12, 32


def _part(video_numbers: list[int]) -> store.Part:
    """Features of some videos, drawn for each by its number; one to three captions each."""
    frames, texts, caption_ids = [], [], []
    for number in video_numbers:
        generator = torch.Generator().manual_seed(number)
        frames.append(torch.randn(F, D, generator=generator))
        for slot in range(1 + number % 3):
            texts.append(frames[-1].mean(dim=0) + 0.3 * torch.randn(D, generator=generator))
            caption_ids.append((f"v{number}", slot))
    captions = [f"<script>alert(1)</script> & caption {v} {s}" for v, s in caption_ids]
    return store.Part([f"v{n}" for n in video_numbers], torch.stack(frames), caption_ids, captions, torch.stack(texts))


def _write(directory: Path, parts: list[store.Part], checkpoint: str = "best.safetensors") -> Path:
    for number, part in enumerate(parts):
        store.save_part(directory, number, part)
    save_file(build_head(ModelConfig(num_frames=F), D).state_dict(), directory / "head.safetensors")
    about = {"config": to_yaml(load_config("demo.yaml")), "split": "test", "checkpoint": checkpoint}
    store.save_index(directory, len(parts), [f"v{n}" for n in range(V)], "made-from", about)
    return directory


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write(tmp_path_factory.mktemp("features"), [_part(list(range(n, V, 2))) for n in range(2)])


@pytest.fixture(scope="module")
def whole(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of ``made``."""
    from tmass_dist.evaluation.stored import Stored

    out = tmp_path_factory.mktemp("whole")
    Stored(made, [], out).report()
    return out


def _evaluate(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run("-m", "tmass_dist.evaluate", *arguments)


def _one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    return done.stderr


def test_parts_of_any_cut_are_the_same_features(made: Path, tmp_path: Path) -> None:
    # Three parts, one video in two of them.
    other = _write(tmp_path, [_part(list(range(0, 31))), _part(list(range(30, 80))), _part(list(range(80, V)))])
    one, two = store.load_features(made), store.load_features(other)
    assert one.video_ids == two.video_ids and one.caption_ids == two.caption_ids and one.captions == two.captions
    assert torch.equal(one.text_TD, two.text_TD) and torch.equal(one.frames_VFD, two.frames_VFD)


@pytest.mark.parametrize("num_shards", [1, 2, 3, 7, 64])
def test_any_number_of_shards_gives_the_same_bits(made: Path, whole: Path, tmp_path: Path, num_shards: int) -> None:
    from tmass_dist.evaluation.stored import Stored

    out = tmp_path / "out"
    for number in range(num_shards):
        Stored(made, [], out).tiles.compute(number, num_shards)
    Stored(made, [], out).report()
    for name in ("metrics.json", "ranks.csv", "table.md"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    tiles = sorted(path.relative_to(whole) for path in whole.rglob("rows-*.safetensors"))
    assert len(tiles) == 3 and all((out / tile).read_bytes() == (whole / tile).read_bytes() for tile in tiles)


def test_finished_blocks_are_kept_and_a_torn_one_is_named_and_computed_again(made: Path, tmp_path: Path) -> None:
    first = _evaluate("--features", str(made), "--out", str(tmp_path))
    assert first.returncode == 0, first.stderr
    expected = (tmp_path / "metrics.json").read_bytes()
    kept, torn, missing = sorted(tmp_path.rglob("rows-*.safetensors"))
    whole, before = torn.read_bytes(), kept.stat().st_mtime_ns
    torn.write_bytes(whole[:100])
    missing.unlink()
    again = _evaluate("--features", str(made), "--out", str(tmp_path))
    assert again.returncode == 0 and torn.name in again.stderr
    assert kept.stat().st_mtime_ns == before and torn.read_bytes() == whole and missing.is_file()
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
    assert "precision bfloat16" in done.stdout and "precision" not in exact
    for name in ("metrics.json", "ranks.csv", "table.md", "report.html"):
        assert "bfloat16" in (tmp_path / name).read_text()
    assert len(list((tmp_path / "tiles").iterdir())) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("overrides", [[], ["evaluation.protocol=published_code"], ["stochastic.prior=normal"]])
def test_a_gpu_scores_as_the_cpu_does(made: Path, tmp_path: Path, overrides: list[str]) -> None:
    from tmass_dist.evaluation.stored import Stored

    scorer = Stored(made, overrides, tmp_path).scorer
    assert scorer.device.type == "cuda"
    found = [scorer.score(start) for start in scorer.starts]
    scorer.device, scorer._gallery = torch.device("cpu"), None
    scorer.head.cpu()
    for start, block in zip(scorer.starts, found):
        torch.testing.assert_close(block, scorer.score(start), rtol=0, atol=1e-6)


def test_report_escapes_and_stands_alone(made: Path, tmp_path: Path) -> None:
    assert _evaluate("--features", str(made), "--out", str(tmp_path)).returncode == 0
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;alert" in page
    assert "http://" not in page and "https://" not in page
    assert page.count("data:image/png") >= 2 + 2 * 5  # curve, histogram, two radius pictures a query


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("part", "part-00001.safetensors is damaged"),
        ("missing", "part-00000.safetensors is missing"),
        ("nan", "2 features are not numbers: v3, v5 caption 0"),
        ("lost", "45 videos were encoded by no rank: v1, v3"),
        ("newer", "newer version"),
        ("head", "head.safetensors is missing or torn"),
    ],
)
def test_bad_stores_are_one_line(tmp_path: Path, what: str, said: str) -> None:
    parts = [_part(list(range(n, V, 2))) for n in range(2)]
    if what == "nan":
        parts[1].frames_VFD[1, 0, 0] = torch.nan
        parts[1].text_TD[parts[1].caption_ids.index(("v5", 0))] = torch.nan
    directory = _write(tmp_path / "store", parts[:1] if what == "lost" else parts)
    if what == "part":
        (directory / "part-00001.safetensors").write_bytes(b"torn")
    elif what == "missing":
        (directory / "part-00000.safetensors").unlink()
    elif what == "head":
        (directory / "head.safetensors").write_bytes(b"torn")
    elif what == "newer":
        index = json.loads((directory / "index.json").read_text())
        (directory / "index.json").write_text(json.dumps(index | {"version": 99}))
    assert said in _one_line(_evaluate("--features", str(directory), "--out", str(tmp_path)))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["model.num_frames=8"], "model.num_frames is 8"),
        (["stochastic.num_trials=0"], "at least one sample"),
        (["evaluation.precision=bfloat16", "evaluation.protocol=published_code"], "support float32 only"),
        (["--shard", "3/3"], "--shard 3/3 is no share"),
        (["--post-processing", "qbnorm"], "give --bank"),
    ],
)
def test_bad_requests_are_one_line(made: Path, tmp_path: Path, more: list[str], said: str) -> None:
    assert said in _one_line(_evaluate("--features", str(made), "--out", str(tmp_path), *more))


def test_bank_of_another_model_is_refused_and_the_right_one_is_labelled(made: Path, tmp_path: Path) -> None:
    parts = [_part(list(range(V)))]
    bank = _write(tmp_path / "bank", parts)
    command = ["--features", str(made), "--out", str(tmp_path / "out"), "--post-processing", "qbnorm", "--bank"]
    done = _evaluate(*command, str(bank))
    assert done.returncode == 0 and "qbnorm (transductive)" in done.stdout, done.stderr
    other = _write(tmp_path / "other", parts, checkpoint="another.safetensors")
    assert "another.safetensors" in _one_line(_evaluate(*command, str(other)))


def test_two_stages_are_exact_with_every_candidate(made: Path, tmp_path: Path) -> None:
    for num, lost in ((V, 0), (3, 1)):
        done = _evaluate("--features", str(made), "--out", str(tmp_path), "--search", str(num))
        assert done.returncode == 0, done.stderr
        found = json.loads((tmp_path / "search.json").read_text())
        exact = json.loads((tmp_path / "metrics.json").read_text())["t2v"]
        assert found["lost"]["R@10"] == exact["R@10"] - found["t2v"]["R@10"]
        if not lost:
            assert found["t2v"] == exact
        else:
            assert found["t2v"]["R@10"] == found["t2v"]["R@5"] and found["lost"]["MnR"] < 0
    assert "--search is 91" in _one_line(_evaluate("--features", str(made), "--out", str(tmp_path), "--search", "91"))


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
        t2v, v2t = ranking.dsl(matrix), ranking.dsl(matrix.T).T
    elif post == "qbnorm":  # the paper's formula, with its bank as a sum
        hubs = set(bank_QV.argmax(dim=1).tolist())
        inverted = (20 * matrix).exp() / (20 * bank_QV).exp().sum(dim=0)
        t2v = torch.stack([inverted[i] if int(row.argmax()) in hubs else row for i, row in enumerate(matrix)])
    best_VV = torch.stack([v2t[owner_T == video].amax(dim=0) for video in range(12)])
    expected_t2v = [int((row >= row[owner]).sum()) for row, owner in zip(t2v, owner_T)]
    expected_v2t = [int((best_VV[:, video] >= best_VV[video, video]).sum()) for video in range(12)]
    bank = ranking.Bank(lambda: bank_QV.split(7), 12) if post == "qbnorm" else None
    found = ranking.rank(lambda: matrix.split(rows), owner_T, 12, post, bank)
    assert found.t2v_T.tolist() == expected_t2v and found.v2t_V.tolist() == expected_v2t


def test_interval_holds_the_metric_and_shrinks_with_more_queries() -> None:
    few, many = torch.arange(1, 41), torch.arange(1, 41).repeat(25)
    widths = []
    for ranks in (few, many):
        found, value = ranking.intervals(ranks)["R@10"], ranking.metrics(ranks)["R@10"]
        assert found[0] <= value <= found[1]
        widths.append(found[1] - found[0])
    assert widths[1] < widths[0] / 3


def test_a_matrix_from_anywhere_is_ranked(tmp_path: Path) -> None:
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
    assert "on no diagonal" in _one_line(_evaluate(*command))
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


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine to open the report with")
def test_report_opens_in_a_real_browser(made: Path, tmp_path: Path) -> None:
    """The browser's own document: every row is there, every picture has loaded, no script ran."""
    assert _evaluate("--features", str(made), "--out", str(tmp_path)).returncode == 0
    page = (tmp_path / "report.html").read_text()
    probe = (
        "<script>addEventListener('load', () => { document.title = 'loaded ' + [...document.images]"
        ".filter(i => i.naturalWidth > 50).length + ' of ' + document.images.length })</script>"
    )
    (tmp_path / "probed.html").write_text(page.replace("</html>", probe + "</html>"))
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=10000", "--dump-dom", (tmp_path / "probed.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    count = page.count("<img")
    assert f"<title>loaded {count} of {count}</title>" in dom
    assert "query_conditioned" in dom and dom.count("<tr>") == page.count("<tr>")
