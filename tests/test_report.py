"""The page of an evaluation: escaping, plots, example queries, the list of all queries in a real browser."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import run
from tests.stores import V, write_store
from tests.test_evaluate_run import make_run
from tmass_dist.data.index import load_index
from tmass_dist.evaluation.evaluation import evaluate_store
from tmass_dist.evaluation.examples import choose
from tmass_dist.evaluation.media import PER_SHEET, make_media
from tmass_dist.evaluation.ranking import Ranks
from tmass_dist.evaluation.report import read_ranks
from tmass_dist.evaluation.stored import StoredSplit


def list_of(directory: Path) -> dict[str, Any]:
    """The content of the list of all queries."""
    [path] = (directory / "report").glob("queries-*.js")
    match = re.fullmatch(r"showQueries\((.*)\);\n", path.read_text(), re.DOTALL)
    assert match is not None
    return json.loads(match[1])


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a store whose captions are markup, and whose shards are gone."""
    out = tmp_path_factory.mktemp("hostile")
    evaluate_store(StoredSplit(write_store(out / "features"), []), out)
    return out


@pytest.fixture(scope="module")
def demo(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run on a small generated data set, with its original files."""
    directory = make_run(data, tmp_path_factory.mktemp("made") / "run")
    test = next(override.partition("=")[2] for override in data if override.startswith("data.test="))
    videos = directory.parent / "videos"
    shutil.copytree(Path(test).parent / "v" / "videos", videos / "videos")
    done = run("-m", "tmass_dist.evaluate", "--run", str(directory), f"evaluation.videos={videos}")
    assert done.returncode == 0, done.stderr
    return directory / "evaluation"


def test_markup_in_captions_is_escaped_and_nothing_is_loaded_from_elsewhere(hostile: Path) -> None:
    page = (hostile / "report.html").read_text()
    assert page.count("<script") == page.count("</script>") == 1 and "&lt;script&gt;alert" in page
    assert "http://" not in page and "https://" not in page
    assert page.count("data:image/png") == 3 + 2 * 6  # curve, two histograms, two radius pictures a query


def test_the_list_has_every_query_with_its_rank_and_its_best_answers(hostile: Path) -> None:
    content = list_of(hostile)
    ranks, caption_ids = read_ranks(hostile)
    assert content["t2v"]["rank"] == ranks.t2v_T.tolist() and content["v2t"]["rank"] == ranks.v2t_V.tolist()
    assert content["owner"] == ranks.owner_T.tolist() and content["videos"] == [f"v{n}" for n in range(V)]
    assert len(content["texts"]) == len(caption_ids)
    for text, (rank, answers) in enumerate(zip(content["t2v"]["rank"], content["t2v"]["answers"])):
        if rank <= len(answers):
            assert answers[rank - 1] == content["owner"][text]
    for video, (rank, answers) in enumerate(zip(content["v2t"]["rank"], content["v2t"]["answers"])):
        assert (rank == 1) == (content["owner"][answers[0]] == video)
    assert content["sheets"] == [] and "not on this machine" in content["notes"][0]


def test_a_second_report_leaves_one_list_and_keeps_the_thumbnails(demo: Path, tmp_path: Path) -> None:
    shutil.copytree(demo.parent, tmp_path / "run")
    out = tmp_path / "run" / "evaluation"
    before = {path.name: path.stat().st_mtime_ns for path in (out / "report").glob("frames-*")}
    command = ("-m", "tmass_dist.evaluate", "--features", str(out / "features"))
    assert run(*command, "--post-processing", "dsl").returncode == 0
    assert {path.name: path.stat().st_mtime_ns for path in (out / "report").glob("frames-*")} == before
    name = re.search(r'data-queries="report/([^"]+)"', (out / "report.html").read_text())
    assert name is not None and [path.name for path in (out / "report").glob("queries-*")] == [name[1]]
    assert run(*command, "evaluation.thumbnails=1").returncode == 0  # other thumbnails: the old ones go
    assert list_of(out)["frames"] == 1 and not before.keys() & {path.name for path in (out / "report").iterdir()}
    assert run(*command, "evaluation.thumbnails=0").returncode == 0
    assert list_of(out)["sheets"] == [] and not list((out / "report").glob("frames-*"))


def test_the_page_names_run_code_and_recall_at_50(demo: Path) -> None:
    page = (demo / "report.html").read_text()
    assert "Evaluation of run" in page and "<th>R@50</th>" in page
    assert re.search(r"<dt>code of this evaluation</dt><dd>\d+\.\d+\.\d+", page)


def test_the_code_is_named_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from launch.submit import _copy_code
    from tmass_dist import __version__, revision

    def now() -> str:
        revision.revision.cache_clear()
        return revision.revision()

    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@example.com"]
    monkeypatch.setattr(revision, "_ROOT", tmp_path)
    assert now() == __version__
    (tmp_path / "file").write_text("1")
    for command in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    assert now() == f"{__version__}, commit {head[:12]}"
    (tmp_path / "file").write_text("2")
    changed = f"{__version__}, commit {head[:12]} with changes"
    assert now() == changed
    copy = _copy_code(tmp_path / "run")  # what a SLURM job imports has no .git
    monkeypatch.setattr(revision, "_ROOT", copy)
    assert now() == changed
    revision.revision.cache_clear()


def test_examples_are_chosen_by_rank_and_then_by_margin() -> None:
    rank_Q = torch.tensor([3, 1, 9, 1, 2, 9])
    margin_Q = torch.tensor([-0.2, 0.1, -0.5, 0.3, -0.1, -0.4])
    assert choose(rank_Q, margin_Q) == [("best", 3), ("best", 1), ("typical", 0), ("worst", 5), ("worst", 2)]


@pytest.fixture
def split(data: list[str]) -> Any:
    """The small test split."""
    return load_index(next(override.partition("=")[2] for override in data if override.startswith("data.test=")))


def test_thumbnails_are_the_frames_of_the_shards(split: Any, tmp_path: Path) -> None:
    import simplejpeg

    from tmass_dist.data.samples import read_into

    ids = split.ids[::-1]  # the report's order, not the index's
    media = make_media(split, ids, tmp_path, thumbnails=4, videos=None)
    assert len(media.sheets) == -(-len(ids) // PER_SHEET) and media.num_frames == 4 and media.missing == []
    sheet = simplejpeg.decode_jpeg((tmp_path / media.sheets[0]).read_bytes())
    frames = np.empty((4, 32, 32, 3), np.uint8)
    for video in (0, 5):
        read_into(frames, split, split.ids.index(ids[video]))
        row = sheet[video * 32 : (video + 1) * 32]
        for frame in range(4):
            difference = row[:, frame * 32 : (frame + 1) * 32].astype(float) - frames[frame]
            assert np.abs(difference).mean() < 12  # JPEG of 32 pixels
        others = np.abs(row[:, :32].astype(float) - sheet[6 * 32 : 7 * 32, :32]).mean()
        assert others > 12


def test_names_in_shards_cannot_leave_the_directory_of_videos(split: Any, tmp_path: Path, data: list[str]) -> None:
    from tmass_dist.evaluation.media import _original_files

    videos = tmp_path / "videos"
    videos.mkdir()
    (tmp_path / "secret.mp4").write_bytes(b"x")
    (videos / "a b#.mp4").write_bytes(b"x")
    (videos / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    sources = ["../secret.mp4", str(tmp_path / "secret.mp4"), "link.mp4", "a b#.mp4", "javascript:alert(1)//.mp4"]
    sources += ["a\0.mp4", "", "a b#.mp4/", "x" * 5000 + ".mp4", "secret.txt"]
    assert _original_files(videos, sources, tmp_path / "report") == {3: "../videos/a%20b%23.mp4"}


def test_a_damaged_sample_has_no_thumbnail_and_the_others_do(split: Any, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(split.directory, tmp_path / "split"))
    shard = next(copy.glob("*.tar"))
    content = bytearray(shard.read_bytes())
    sample = split.sample(2)
    content[sample.offset + 600] ^= 255
    shard.write_bytes(content)
    media = make_media(load_index(copy), split.ids, tmp_path / "report", thumbnails=2, videos=None)
    assert media.missing == [2] and len(media.sheets) == 1
    shard.unlink()
    media = make_media(split, ["another", *split.ids[1:]], tmp_path / "report", thumbnails=2, videos=None)
    assert media.sheets == [] and "other videos" in media.notes[0]


def test_clips_in_shards_are_copied_to_play_unless_they_are_large(
    demo_videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.packing import pack
    from tmass_dist.evaluation import media as module

    done = pack(demo_videos, tmp_path / "clips", "--store", "clip")
    assert done.returncode == 0, done.stderr
    index = load_index(tmp_path / "clips")
    media = make_media(index, index.ids, tmp_path / "report", thumbnails=1, videos=None)
    assert len(media.urls) == len(index) and media.notes == []
    manifest = [json.loads(line) for line in (demo_videos / "manifest.jsonl").read_text().splitlines()]
    source = {row["id"]: demo_videos / row["path"] for row in manifest}
    for video, url in media.urls.items():
        assert (tmp_path / "report" / url).read_bytes() == source[index.ids[video]].read_bytes()
    monkeypatch.setattr(module, "CLIP_BYTES", 1)
    media = make_media(index, index.ids, tmp_path / "other", thumbnails=1, videos=None)
    assert media.urls == {} and "evaluation.videos=DIR" in media.notes[0]


def _open(browser: Any, directory: Path, **options: Any) -> tuple[Any, list[str]]:
    """The page as a file, loaded, and what its console says."""
    page, said = browser.new_page(**{"viewport": {"width": 1200, "height": 800}} | options), []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto((directory / "report.html").as_uri())
    page.wait_for_function("() => document.querySelector('#count').textContent.includes(' of ')")
    return page, said


def test_markup_stays_text_in_a_browser(browser: Any, hostile: Path) -> None:
    page, said = _open(browser, hostile)
    assert page.locator("#list .query").count() == 25
    assert "<script>alert(1)</script>" in page.locator("#list h3").first.text_content()
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 20)")
    # Markup that slipped through escaping would still run nothing: the policy knows the page's own script only.
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'window.ran = 1'}))")
    assert page.evaluate("window.ran") is None and len(said) == 1 and "Content Security Policy" in said[0]
    page.close()


def test_sorting_and_filtering(browser: Any, hostile: Path) -> None:
    page, said = _open(browser, hostile)
    content, ranks = list_of(hostile), read_ranks(hostile)[0]

    def shown() -> list[int]:
        titles = page.locator("#list h3 b").all_text_contents()
        return [int(title.removeprefix("rank ")) for title in titles]

    worst = sorted(ranks.t2v_T.tolist(), reverse=True)
    assert shown() == worst[:25]
    page.click("#more")
    assert shown() == worst[:50]
    page.select_option("#order", "best")
    assert shown() == worst[::-1][:25]
    page.select_option("#order", "split")
    assert shown() == ranks.t2v_T.tolist()[:25]
    page.fill("#words", "SCRIPT 7 1")
    words = [text for text in content["texts"] if "7" in text and "1" in text]
    assert page.locator("#count").text_content().startswith(f"{len(words)} of {len(content['texts'])} queries")
    page.fill("#words", "")
    page.fill("#from", "2")
    page.fill("#to", "3")
    between = [rank for rank in ranks.t2v_T.tolist() if 2 <= rank <= 3]
    assert shown() == between[:25] and page.locator("#count").text_content().startswith(f"{len(between)} of ")
    page.fill("#words", "no such word")
    assert page.locator("#count").text_content().startswith("0 of ") and page.locator("#more").is_hidden()
    for name in ("#words", "#from", "#to"):
        page.fill(name, "")
    page.select_option("#direction", "v2t")
    assert shown() == ranks.v2t_V.tolist()[:25]
    page.select_option("#order", "worst")
    assert shown() == sorted(ranks.v2t_V.tolist(), reverse=True)[:25]
    assert said == []
    page.close()


def test_thumbnails_load_and_a_click_plays_or_shows_the_frames(browser: Any, demo: Path) -> None:
    page, said = _open(browser, demo)
    sheet = page.locator("#list .thumbnail").first.evaluate("element => getComputedStyle(element).backgroundImage")
    address = sheet.removeprefix('url("').removesuffix('")')
    width = page.evaluate(
        "url => new Promise(done => { const i = new Image(); i.onload = () => done(i.naturalWidth); i.src = url })",
        address,
    )
    assert width == 4 * 32
    media = page.locator("#list .media").first
    media.click()  # MPEG-4 part 2: this browser shows the frames instead
    page.wait_for_function("() => document.querySelector('#list .media.slides .note')")
    assert "frames, " in media.locator(".note").text_content()
    assert said == []
    page.close()


def test_a_file_that_the_browser_can_play_is_played(browser: Any, demo: Path, tmp_path: Path) -> None:
    from tests.conftest import ROOT

    shutil.copytree(demo.parents[1], tmp_path / "all")
    out = tmp_path / "all" / "run" / "evaluation"
    for file in (tmp_path / "all" / "videos" / "videos").glob("*.mp4"):
        shutil.copy(ROOT / "tests" / "clips" / "gradio_a.mp4", file)  # H.264
    page, said = _open(browser, out)
    page.locator("#list .media").first.click()
    page.wait_for_function("() => { const v = document.querySelector('video'); return v && v.readyState >= 2 }")
    assert said == []
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_scrolls_the_page_down_only(browser: Any, demo: Path, scheme: str) -> None:
    page, said = _open(browser, demo, viewport={"width": 390, "height": 800}, color_scheme=scheme)
    for direction in ("t2v", "v2t"):
        page.select_option("#direction", direction)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(250, 250, 250)") == (scheme == "light") and said == []
    page.close()


def test_a_page_without_its_directory_says_so(browser: Any, hostile: Path, tmp_path: Path) -> None:
    shutil.copy(hostile / "report.html", tmp_path / "report.html")
    page = browser.new_page()
    page.goto((tmp_path / "report.html").as_uri())
    page.wait_for_function("() => document.querySelector('#count').textContent.includes('copy the folder report/')")
    page.close()


def test_a_list_of_ten_thousand_queries_is_small(tmp_path: Path) -> None:
    from tmass_dist.evaluation.media import Media
    from tmass_dist.evaluation.query_list import write_queries
    from tmass_dist.evaluation.retrieved import Retrieved

    number, generator = 10_000, torch.Generator().manual_seed(0)
    answers = torch.randint(number, (number, 5), generator=generator)
    scores, own = torch.rand(number, 5, generator=generator), torch.rand(number, generator=generator)
    ranks = Ranks(torch.ones(number).long(), torch.ones(number).long(), torch.arange(number))
    texts = ["a person is talking about the way in which a meal is prepared"] * number
    retrieved = Retrieved(answers, scores, own, answers, scores, own)
    name = write_queries(ranks, texts, [f"video{n}" for n in range(number)], retrieved, Media(tmp_path))
    assert (tmp_path / name).stat().st_size < 3_000_000


def test_shards_behind_a_url_are_not_downloaded_for_thumbnails(split: Any, tmp_path: Path) -> None:
    from dataclasses import replace

    from tmass_dist.data.remote import cached_path

    url = "http://127.0.0.1:9/split"
    remote = replace(split, directory=url, cache=str(tmp_path / "cache"), retry_s=0)
    media = make_media(remote, split.ids, tmp_path / "report", thumbnails=2, videos=None)
    assert media.sheets == [] and "cannot be read on this machine" in media.notes[0]
    for shard in split.shards:
        copy = cached_path(f"{url}/{shard.name}", str(tmp_path / "cache"))
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(split.directory) / shard.name, copy)
    media = make_media(remote, split.ids, tmp_path / "report", thumbnails=2, videos=None)
    assert media.missing == [] and len(media.sheets) == 1
