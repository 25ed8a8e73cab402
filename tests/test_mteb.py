"""A model in mteb's retrieval tasks has the ranks of our own evaluation. The task is of the form of mteb's own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.moved_head import moved_head_model
from tmass_dist.errors import UserError
from tmass_dist.evaluation.ranking import metrics, rank
from tmass_dist.retrieval.mteb import MtebModel

mteb = pytest.importorskip("mteb", reason="the benchmark mteb needs pip install -e '.[mteb]'")
datasets = pytest.importorskip("datasets")

from mteb.abstasks.retrieval import AbsTaskRetrieval  # noqa: E402
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData  # noqa: E402
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> MtebModel:
    """Exported and loaded again."""
    out = tmp_path_factory.mktemp("model") / "export"
    moved_head_model(result={"selected_on": "val"}).save_pretrained(out)
    return MtebModel.from_pretrained(out)


@pytest.fixture(scope="module")
def rows(demo_videos: Path) -> list[dict[str, Any]]:
    """Videos with their captions."""
    rows = [json.loads(line) for line in (demo_videos / "manifest.jsonl").read_text().splitlines()]
    return [row | {"path": str(demo_videos / row["path"])} for row in rows]


def task_of(rows: list[dict[str, Any]], category: str, *, as_bytes: bool = False) -> AbsTaskRetrieval:
    """A task with these videos as files or as bytes, in the form in which mteb's own tasks hold theirs."""
    videos = [{"path": None, "bytes": Path(row["path"]).read_bytes()} if as_bytes else row["path"] for row in rows]
    by_kind = {
        "v": datasets.Dataset.from_dict({"id": [row["id"] for row in rows], "video": videos}).cast_column(
            "video", datasets.Video()
        ),
        "t": datasets.Dataset.from_dict(
            {
                "id": [f"{row['id']}#{n}" for row in rows for n in range(len(row["captions"]))],
                "text": [caption for row in rows for caption in row["captions"]],
            }
        ),
    }
    captions_of = {row["id"]: [f"{row['id']}#{n}" for n in range(len(row["captions"]))] for row in rows}
    relevant = {video: dict.fromkeys(captions, 1) for video, captions in captions_of.items()}
    if category[0] == "t":
        relevant = {caption: {video: 1} for video, captions in captions_of.items() for caption in captions}

    class GeneratedVideos(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="GeneratedVideos",
            description="Generated videos of moving shapes.",
            dataset={"path": "none/none", "revision": "1"},
            type="Any2AnyRetrieval",
            category=category,  # pyright: ignore[reportArgumentType]
            modalities=["text", "video"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="recall_at_1",
        )

        def load_data(self, *_: Any, **__: Any) -> None:
            if not self.data_loaded:
                split = RetrievalSplitData(
                    queries=by_kind[category[0]],
                    corpus=by_kind[category[-1]],
                    relevant_docs=relevant,
                    top_ranked=None,
                )
                self.dataset, self.data_loaded = {"default": {"test": split}}, True

    return GeneratedVideos()


def results_of(model: MtebModel, task: AbsTaskRetrieval) -> dict[str, float]:
    """What mteb says."""
    found = mteb.evaluate(model, [task], cache=None, co2_tracker=False, show_progress_bar=False)  # pyright: ignore
    return found.task_results[0].scores["test"][0]


def test_mteb_finds_the_ranks_of_our_own_evaluation(model: MtebModel, rows: list[dict[str, Any]]) -> None:
    captions = [caption for row in rows for caption in row["captions"]]
    owner_T = torch.tensor([number for number, row in enumerate(rows) for _ in row["captions"]])
    frames_VFD = model.model.encode_videos([row["path"] for row in rows])
    score_TV = model.model.similarity(captions, frames_VFD)
    ranks = rank(lambda: [score_TV], owner_T, len(rows))
    t2v, v2t = metrics(ranks.t2v_T), metrics(ranks.v2t_V)
    assert 100 / len(rows) < t2v["R@1"] < 100 and 100 / len(rows) < v2t["R@1"] < 100  # neither chance nor perfect

    found = results_of(model, task_of(rows, "t2v"))
    for depth in (1, 5, 10):
        assert found[f"recall_at_{depth}"] == pytest.approx(t2v[f"R@{depth}"] / 100, abs=1e-4)
    # Videos as bytes, as in the files of the Hub. mteb ranks a video's best caption among all captions, and we among
    # the best captions of all videos: the same for the first place.
    found = results_of(model, task_of(rows, "v2t", as_bytes=True))
    assert found["hit_rate_at_1"] == pytest.approx(v2t["R@1"] / 100, abs=1e-4)
    own_TV = owner_T[:, None] == torch.arange(len(rows))
    best_V = score_TV.masked_fill(~own_TV, -torch.inf).amax(0)
    among_captions = metrics((score_TV >= best_V).sum(0))
    for depth in (5, 10):
        assert found[f"hit_rate_at_{depth}"] == pytest.approx(among_captions[f"R@{depth}"] / 100, abs=1e-4)


def test_the_results_state_the_labels_of_our_scores(model: MtebModel) -> None:
    meta = model.mteb_model_meta
    assert meta.name == "tmass-dist/export" and meta.revision == model.model.fingerprint()
    assert dict(meta.experiment_kwargs or {}) == model.model.labels()
    assert model.model.labels()["protocol"] == "query_conditioned" and model.model.labels()["num_trials"] == 20


def test_only_ranked_documents_and_the_best_of_them_are_returned(model: MtebModel, rows: list[dict[str, Any]]) -> None:
    task = task_of(rows, "t2v")
    task.load_data()
    split = task.dataset["default"]["test"]
    model.index(split["corpus"], task_metadata=task.metadata)
    few = split["queries"].select([0])
    [every] = model.search(few, top_k=len(rows)).values()
    assert set(every) == {row["id"] for row in rows}
    some = sorted(every)[:3]
    [found] = model.search(few, top_k=2, top_ranked={few["id"][0]: some}).values()
    assert found == {name: every[name] for name in sorted(some, key=lambda name: -every[name])[:2]}


def test_tasks_with_sound_and_damaged_videos_are_one_line(
    model: MtebModel, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    task = task_of(rows[:2], "t2v")
    task.metadata = task.metadata.model_copy(update={"category": "t2va"})
    with pytest.raises(UserError, match="GeneratedVideos is of category t2va; this model has t2v and v2t"):
        results_of(model, task)
    (tmp_path / "broken.mp4").write_bytes(b"no video at all")
    broken = task_of([rows[0], rows[1] | {"path": str(tmp_path / "broken.mp4")}], "t2v")
    with pytest.raises(UserError, match=f"{rows[1]['id']} cannot be decoded"):
        results_of(model, broken)
