"""Galleries and search: a search finds what the exact evaluation of the same gallery ranks first."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.conftest import ROOT, run
from tests.moved_head import moved_head_model
from tests.ranks import on_ranks
from tmass_dist import TMass
from tmass_dist.errors import UserError
from tmass_dist.evaluation.blocks import BlockScorer
from tmass_dist.evaluation.features import Features
from tmass_dist.evaluation.search import FrameIndex, candidates
from tmass_dist.retrieval import build, compact
from tmass_dist.retrieval.gallery import VideoGallery
from tmass_dist.retrieval.searcher import Searcher, open_searcher
from tmass_dist.retrieval.text_scorer import TextScorer
from tmass_dist.retrieval.videos import Source, files_of, samples_of

QUERIES = ["a red circle moving left on a plain ground", "on a striped ground a blue ring rising", "圆 🎈 <b>"]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model") / "export"
    moved_head_model().save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def videos(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """14 generated videos, one copy below another folder, a file that is no video, and one of another length."""
    shards = next(entry.removeprefix("data.test=") for entry in data if entry.startswith("data.test="))
    out = tmp_path_factory.mktemp("videos")
    for path in (Path(shards).parent / "v" / "videos").glob("test*.mp4"):
        shutil.copy(path, out)
    (out / "more").mkdir()
    shutil.copy(ROOT / "tests" / "clips" / "opencv_tree.avi", out / "more" / "tree.avi")
    (out / "broken.mp4").write_bytes(b"no video at all")
    (out / "notes.txt").write_text("not a video")
    return out


@pytest.fixture(scope="module")
def gallery(export: Path, videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gallery") / "gallery"
    done = run("-m", "tmass_dist.index", str(export), "--videos", str(videos), "--out", str(out), "--check")
    assert done.returncode == 0, done.stderr
    assert "15 videos; 15 encoded, 0 unchanged, 0 removed, 1 left out" in done.stdout
    assert "left out: broken.mp4: " in done.stderr
    return out


def _frames(directory: Path) -> dict[str, np.ndarray]:
    gallery = VideoGallery(directory)
    return {video_id: gallery.frames([row])[0].numpy() for video_id, row in gallery.rows.items()}


def test_a_search_is_the_evaluation_of_the_same_gallery(export: Path, gallery: Path) -> None:
    opened = VideoGallery(gallery)
    model = TMass.from_pretrained(export)
    rows = list(opened.rows.values())
    text_TD = model.encode_text(QUERIES)
    owners = [(f"{number}", 0) for number in range(len(QUERIES))]
    features = Features(
        list(opened.rows), opened.frames(rows), owners, QUERIES, text_TD, torch.zeros(3, dtype=torch.int64)
    )
    exact_TV = torch.cat(list(BlockScorer(model.head, features, model.config).scores()))
    for results, row_V in zip(Searcher(model, opened).search(QUERIES, k=len(rows)), exact_TV):
        expected = sorted(zip(row_V.tolist(), features.video_ids), reverse=True)
        assert [result.id for result in results] == [video_id for _, video_id in expected]
        np.testing.assert_allclose([result.score for result in results], [score for score, _ in expected], atol=1e-6)


def test_a_moment_is_the_time_of_the_frame_with_the_largest_attention(export: Path, gallery: Path) -> None:
    searcher = open_searcher(gallery)
    for result in searcher.search(QUERIES[:1])[0]:
        assert result.frame == int(np.argmax(result.attention)) and result.time_s == pytest.approx(
            result.times_s[result.frame], abs=1e-3
        )
        assert sum(result.attention) == pytest.approx(1, abs=1e-3) and 0 <= result.time_s < result.seconds
    tree = searcher.gallery.rows["more/tree.avi"]
    assert searcher.gallery.video(tree).seconds > 2 and searcher.gallery.times(tree).max() > 2


def test_the_command_prints_lines_of_json(gallery: Path, tmp_path: Path) -> None:
    (tmp_path / "queries.txt").write_text("\n".join([QUERIES[2], "", QUERIES[0]]), encoding="utf-8")
    done = run(
        "-m", "tmass_dist.search", str(gallery), QUERIES[1], "--file", str(tmp_path / "queries.txt"), "--json", "-k3"
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["query"] for line in lines] == [QUERIES[1], QUERIES[2], QUERIES[0]]
    for line in lines:
        assert len(line["results"]) == 3 and line["absent"] == 0
        assert line["labels"]["noise"] == "seed 0, caption text and trial" and line["labels"]["num_trials"] == 20
        assert line["labels"]["feature_precision"] == "float16" and line["labels"]["post_processing"] == "none"
        assert all(set(result) == {"id", "score", "time_s", "path"} for result in line["results"])
        assert all(Path(result["path"]).is_file() for result in line["results"])
    shown = run("-m", "tmass_dist.search", str(gallery), QUERIES[0], "--name", "TREE").stdout
    assert "more/tree.avi" in shown and "test0" not in shown
    assert "noise keyed by seed 0, caption text and trial" in shown.splitlines()[-1]


def test_every_remove_on_the_command_line_counts(export: Path, gallery: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(gallery, tmp_path / "gallery")
    gone = ["test00000.mp4", "test00001.mp4", "test00002.mp4"]
    remove = ["--remove", *gone[:2], "--remove", gone[2]]
    done = run("-m", "tmass_dist.index", str(export), "--out", str(copy), *remove)
    assert done.returncode == 0 and "3 removed" in done.stdout, done.stderr
    assert set(VideoGallery(copy).rows) == set(VideoGallery(gallery).rows) - set(gone)


def test_adding_changing_and_removing_leaves_the_rest_as_it_was(export: Path, videos: Path, tmp_path: Path) -> None:
    changed, model = tmp_path / "gallery", TMass.from_pretrained(export)
    mine = shutil.copytree(videos, tmp_path / "videos")
    build.update(model, str(export), changed, files_of(mine))
    before = _frames(changed)
    shutil.copy(ROOT / "tests" / "clips" / "gradio_a.mp4", mine / "new.mp4")
    shutil.copy(ROOT / "tests" / "clips" / "pyfeat_no_face.mp4", mine / "test00001.mp4")
    changes = build.update(model, str(export), changed, files_of(mine), remove=["test00000.mp4"])
    assert (changes.added, changes.removed, changes.unchanged) == (2, 1, 14)
    assert [video_id for video_id, _ in changes.failed] == ["broken.mp4"]
    after = _frames(changed)
    assert set(after) == (set(before) | {"new.mp4"}) - {"test00000.mp4"}
    same = set(before) - {"test00000.mp4", "test00001.mp4"}
    assert all(np.array_equal(after[name], before[name]) for name in same)
    assert not np.array_equal(after["test00001.mp4"], before["test00001.mp4"])
    found = open_searcher(changed).search(QUERIES[:1], k=100)[0]
    assert sorted(result.id for result in found) == sorted(after)
    again = build.update(model, str(export), changed, files_of(mine))  # what was removed comes back: it is asked for
    assert again.added == 1 and "test00000.mp4" in _frames(changed)
    with pytest.raises(UserError, match="1 videos to remove are not in"):
        build.update(model, str(export), changed, [], remove=["never there"])


def _update(out: str, export: str, videos: str) -> None:
    build.PART = 4
    build.update(TMass.from_pretrained(export), export, Path(out), files_of(Path(videos)))


def test_two_ranks_make_the_gallery_of_one(export: Path, videos: Path, gallery: Path, tmp_path: Path) -> None:
    on_ranks(2, _update, str(tmp_path / "two"), str(export), str(videos), tmp_path=tmp_path)
    two, one = _frames(tmp_path / "two"), _frames(gallery)
    assert list(two) == list(one)
    assert all(np.allclose(two[name], one[name], atol=2e-2) for name in one)  # batches differ, and with them roundings
    assert [r.id for r in open_searcher(tmp_path / "two").search(QUERIES[:1])[0]] == [
        r.id for r in open_searcher(gallery).search(QUERIES[:1])[0]
    ]


def test_a_killed_run_resumes_with_the_parts_that_are_whole(
    export: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "PART", 4)
    model, out, encoded = TMass.from_pretrained(export), tmp_path / "gallery", []
    original = build._encode_part

    def encode(*arguments) -> None:
        encoded.append(arguments[2])
        if len(encoded) == 3:
            raise KeyboardInterrupt
        original(*arguments)

    monkeypatch.setattr(build, "_encode_part", encode)
    with pytest.raises(KeyboardInterrupt):
        build.update(model, str(export), out, files_of(videos))
    with pytest.raises(UserError, match="there is no gallery"):
        VideoGallery(out)
    (out / f"{encoded[0]}.jpegs").write_bytes(b"cut short")  # as a machine that lost power leaves it
    build.update(model, str(export), out, files_of(videos))
    assert sorted(encoded[3:]) == sorted({encoded[0], encoded[2], encoded[-1]}) and len(VideoGallery(out)) == 15


def _contents(directory: Path) -> dict[str, tuple[bytes, list[float], bytes]]:
    """Frames, times and first thumbnail of each video."""
    gallery = VideoGallery(directory)
    return {
        name: (gallery.frames([row]).numpy().tobytes(), gallery.times(row).tolist(), gallery.thumbnail(row, 0))
        for name, row in gallery.rows.items()
    }


def test_compacting_gives_back_the_space_of_removed_videos(
    export: Path, videos: Path, gallery: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "PART", 4)
    model, out = TMass.from_pretrained(export), tmp_path / "gallery"
    build.update(model, str(export), out, files_of(videos))
    kept = {*sorted(VideoGallery(out).rows)[8:], "test00001.mp4"}  # a part of its own, and the whole of another
    gone = sorted(set(VideoGallery(out).rows) - kept)
    (out / "part-0123456789abcdef.frames.npy").write_bytes(b"left by a killed process")
    build.update(model, str(export), out, [], remove=gone)
    before, contents = sum(path.stat().st_size for path in out.iterdir()), _contents(out)
    found = open_searcher(out).search(QUERIES, k=100)
    done = run("-m", "tmass_dist.index", str(export), "--out", str(out), "--compact", "--check")
    assert done.returncode == 0, done.stderr
    after = sum(path.stat().st_size for path in out.iterdir())
    assert after < 0.7 * before and f"{(before - after) / 1e6:.1f} MB given back" in done.stdout
    compacted = VideoGallery(out)
    assert not compacted.removed and len(compacted.index) == len(VideoGallery(out).index) and _contents(out) == contents
    again = open_searcher(out).search(QUERIES, k=100)
    assert [[(r.id, round(r.score, 5)) for r in line] for line in again] == [
        [(r.id, round(r.score, 5)) for r in line] for line in found
    ]
    named = {file for part in compacted.parts for file in part.files} | {compacted.about["index"]["file"]}
    assert {p.name for p in out.iterdir()} - named == {"gallery.json", ".lock"} | {
        f"{part.name}.json" for part in compacted.parts
    }
    changes = build.update(model, str(export), out, files_of(videos))  # what cannot be read is not tried again
    assert changes.added == len(gone) and [name for name, _ in changes.failed] == ["broken.mp4"]
    assert run("-m", "tmass_dist.index", str(export), "--out", str(out), "--compact").stdout.endswith(
        "0.0 MB given back\n"
    )


@pytest.mark.parametrize("stage", ["part", "index", "deletion"])
def test_a_killed_compaction_leaves_the_gallery_whole_and_resumes(
    export: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    monkeypatch.setattr(build, "PART", 4)
    out = tmp_path / "gallery"
    model = TMass.from_pretrained(export)
    build.update(model, str(export), out, files_of(videos))
    build.update(model, str(export), out, [], remove=["test00001.mp4", "test00006.mp4"])
    contents, written = _contents(out), []
    original = compact.write_part

    def write_part(*arguments) -> None:
        written.append(arguments[1])
        if stage == "part" and len(written) == 2:
            (out / f"{arguments[1]}.frames.npy").write_bytes(b"cut short")
            raise KeyboardInterrupt
        original(*arguments)

    def stop(*_) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(compact, "write_part", write_part)
        if stage == "index":
            patch.setattr(FrameIndex, "save", stop)
        if stage == "deletion":
            patch.setattr(compact, "_delete_strangers", stop)
        with pytest.raises(KeyboardInterrupt):
            compact.compact(out)
        assert _contents(out) == contents and not VideoGallery(out).damaged()
        assert len(open_searcher(out).search(QUERIES[:1], k=100)[0]) == 13
    patched = len(written)
    monkeypatch.setattr(compact, "write_part", lambda *arguments: (written.append(arguments[1]), original(*arguments)))
    compact.compact(out)
    assert len(written) - patched == (1 if stage == "part" else 0)  # the part that was whole is not written again
    assert _contents(out) == contents and not VideoGallery(out).removed and not VideoGallery(out).damaged()
    assert len(list(out.glob("part-*.json"))) == len(VideoGallery(out).parts)


def test_compacting_what_is_no_gallery_is_one_line(export: Path, tmp_path: Path) -> None:
    for option in ("--compact", "--check"):
        done = run("-m", "tmass_dist.index", str(export), "--out", str(tmp_path / "mistyped"), option)
        assert done.returncode == 2 and "there is no gallery in" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "mistyped").exists()


def test_shards_are_indexed_as_their_videos_are(export: Path, data: list[str], tmp_path: Path) -> None:
    shards = next(entry.removeprefix("data.test=") for entry in data if entry.startswith("data.test="))
    build.update(TMass.from_pretrained(export), str(export), tmp_path / "packed", samples_of(shards))
    packed = VideoGallery(tmp_path / "packed")
    assert len(packed) == 14 and packed.video(0).path == "" and packed.video(0).seconds == pytest.approx(2, abs=0.01)
    files = VideoGallery(tmp_path / "packed").times(0)
    assert files[0] == pytest.approx(0.0, abs=0.1) and files[-1] > 1.7
    assert packed.thumbnail(3, 11)[:2] == b"\xff\xd8"


def test_similar_videos_are_those_with_the_same_frames(export: Path, videos: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(videos, tmp_path / "videos")
    shutil.copy(mine / "test00003.mp4", mine / "twin.mp4")
    build.update(TMass.from_pretrained(export), str(export), tmp_path / "g", files_of(mine))
    searcher = open_searcher(tmp_path / "g")
    first, *rest = searcher.similar(searcher.gallery.rows["test00003.mp4"], k=5)
    assert first.id == "twin.mp4" and first.score == pytest.approx(1, abs=1e-3)
    assert len(rest) == 4 and all(result.score < first.score for result in rest)


def test_candidates_are_the_videos_with_the_best_frames() -> None:
    torch.manual_seed(0)
    frames_VFD, text_TD = torch.randn(300, 6, 64), torch.randn(40, 64)
    best_TV = (
        (F.normalize(text_TD, dim=-1) @ F.normalize(frames_VFD, dim=-1).flatten(0, 1).T).unflatten(1, (300, 6)).amax(2)
    )
    exact_TK = best_TV.topk(10).indices
    found_TK = candidates(text_TD, frames_VFD, 20)
    hits = [len(set(one) & set(other)) for one, other in zip(exact_TK.tolist(), found_TK.tolist())]
    assert found_TK.shape == (40, 20) and np.mean(hits) > 9.9
    assert sorted(candidates(text_TD[:1], frames_VFD, 300)[0].tolist()) == list(range(300))


def test_repeated_frames_are_indexed_once_and_removed_with_their_video(tmp_path: Path) -> None:
    torch.manual_seed(0)
    frames = torch.randn(3, 1, 32).expand(-1, 5, -1).clone()
    frames[1, 3:] = torch.randn(32)
    index = FrameIndex(5, 32)
    index.add(np.array([0, 1, 2]), frames.numpy())
    assert len(index) == 4
    index.remove([1])
    index.save(tmp_path / "x.usearch")
    again = FrameIndex(5, 32, tmp_path / "x.usearch", writable=False)
    assert sorted(again.candidates(frames[1, :1].numpy(), 3)[0].tolist()) == [0, 2]


def test_a_gallery_of_another_model_is_refused(export: Path, gallery: Path, tmp_path: Path) -> None:
    model = TMass.from_pretrained(export)
    with torch.no_grad():
        model.towers.clip.text_projection.add_(1e-3)
    model.save_pretrained(tmp_path / "other")
    done = run("-m", "tmass_dist.search", str(gallery), "x", "--model", str(tmp_path / "other"))
    assert done.returncode == 2 and "was made by another model" in done.stderr
    with pytest.raises(UserError, match="was made by another model"):
        build.update(model, "other", gallery, [])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["", "--json"], "the query is empty"),
        (["x" * 100_000], "has 100000 characters"),
        ([], "there is no query"),
        (["x", "-k", "0"], "number of results is 0"),
        (["x", "--candidates", "0"], "--candidates is 0"),
        (["x", "--model", "/nowhere/model"], "there is no model"),
    ],
)
def test_a_bad_request_is_one_line(gallery: Path, arguments: list[str], said: str) -> None:
    done = run("-m", "tmass_dist.search", str(gallery), *arguments)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_a_damaged_gallery_is_named_and_an_absent_file_is_counted(gallery: Path, tmp_path: Path) -> None:
    def broken(name: str, content: bytes) -> str:
        copy = shutil.copytree(gallery, tmp_path / str(len(list(tmp_path.iterdir()))))
        [path] = copy.glob(name)
        path.write_bytes(content)
        done = run("-m", "tmass_dist.search", str(copy), "x")
        assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
        return done.stderr

    assert "is damaged" in broken("gallery.json", b"{")
    assert "newer version" in broken("gallery.json", b'{"version": 99}')
    assert "is missing or damaged" in broken("*.frames.npy", b"short")
    assert "is missing or damaged" in broken("*.usearch", b"short")
    [index] = gallery.glob("*.usearch")
    assert "is damaged" in broken("*.usearch", bytes(index.stat().st_size))
    moved = shutil.copytree(gallery, tmp_path / "moved")
    [part] = moved.glob("part-*.json")
    part.write_text(part.read_text().replace('test00002.mp4",\n   "path": "/', 'test00002.mp4",\n   "path": "/gone/'))
    shown = run("-m", "tmass_dist.search", str(moved), "x", "-k", "100").stdout
    assert "1 of the results have no file any more" in shown and "(no file)" in shown


def test_two_videos_with_one_id_are_refused(export: Path, videos: Path, tmp_path: Path) -> None:
    twice = [Source("same", str(videos / name)) for name in ("test00000.mp4", "test00001.mp4")]
    with pytest.raises(UserError, match="two videos have the id same"):
        build.update(TMass.from_pretrained(export), str(export), tmp_path / "g", twice)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--videos", "/nowhere"], "there is no directory /nowhere"),
        (["--videos", str(ROOT / "docs")], "has no video file"),
        (["--shards", str(ROOT / "docs")], "no shards in"),
        ([], "say what to do"),
        (["--videos", str(ROOT / "tests" / "clips"), "--batch-size", "0"], "--batch-size is 0"),
    ],
)
def test_nothing_to_index_is_one_line(export: Path, tmp_path: Path, arguments: list[str], said: str) -> None:
    done = run("-m", "tmass_dist.index", str(export), "--out", str(tmp_path / "g"), *arguments)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "g").exists()


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["model.num_heads=4"],
        ["model.pooling=mean"],
        ["model.pooling=best_frame", "model.radius=none"],
        ["model.pooling=query_scored"],
        ["model.pooling=weighted_interaction", "model.radius=none"],
        ["model.pooling=xpool_best_frame", "model.num_heads=2"],
        ["model.mass_score=expected"],
        ["model.mass_score=temperature", "model.radius=exp_mean"],
        ["model.radius=none"],
        ["model.radius=exp_mean"],
        ["model.radius=variational", "stochastic.prior=uniform"],
        ["model.pooled_by=sample"],
    ],
    ids=lambda changes: ",".join(changes) or "default",
)
def test_scores_and_attention_of_one_text_are_those_of_all(changes: list[str]) -> None:
    model = moved_head_model(*changes)
    frames_VFD, text_TD = torch.randn(9, 12, model.embed_dim), model.encode_text(QUERIES)
    expected_TV, expected_VTF = model.similarity(QUERIES, frames_VFD), model.attention(text_TD, frames_VFD)
    scorer = TextScorer(model)
    for number, text in enumerate(QUERIES):
        score_V, attention_VF = scorer.score(text, text_TD[number], frames_VFD)
        torch.testing.assert_close(score_V, expected_TV[number].detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(attention_VF, expected_VTF[:, number].detach(), rtol=1e-4, atol=1e-5)
