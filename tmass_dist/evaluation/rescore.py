"""Evaluation of what is already encoded, or already scored: no GPU, no videos, no CLIP."""

# Shapes: T texts, V videos.

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tmass_dist.cli import write_json
from tmass_dist.config import Config, load_config
from tmass_dist.data.index import Index, load_index
from tmass_dist.evaluation import ranking
from tmass_dist.evaluation.features import Features, fingerprint, load_features, read_index
from tmass_dist.evaluation.report import Report, label, labels, summary, table
from tmass_dist.evaluation.tiles import Scorer, Tiles
from tmass_dist.models.head import RetrievalHead, build_head
from tmass_dist.models.pooling import MeanPool


def _config(store: Path, index: dict[str, Any], overrides: list[str]) -> Config:
    """The store's own config with overrides; what the features were made by cannot be overridden."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "config.yaml"
        page.write_text(index["config"], encoding="utf-8")
        saved, given = load_config(str(page)), load_config(str(page), overrides)
    for field in dataclasses.fields(saved.model):
        one, other = getattr(saved.model, field.name), getattr(given.model, field.name)
        if one != other:
            raise ValueError(f"model.{field.name} is {other!r} and {store} was encoded with {one!r}; encode again")
    return given


def _head(store: Path, config: Config, width: int) -> RetrievalHead:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from tmass_dist.models.backbone import load_weights

    model = config.model
    head = build_head(
        embed_dim=width,
        num_frames=model.num_frames,
        pooling=model.pooling,
        num_heads=model.num_heads,
        dropout=model.dropout,
        radius=model.radius,
    ).eval()
    path = store / "head.safetensors"
    try:
        load_weights(head, load_file(path), str(path))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is missing or torn ({error}); encode again") from error
    return head


class Stored:
    """A feature store that is being scored: blocks on disk, shared out over any number of tasks, then one report.

    Finished blocks stay in ``out/tiles``: a share that was killed goes on, and what any task computed is not computed
    again.

    Args:
        store: its directory.
        overrides: on the store's own config.
        out: where blocks and report go; by default beside the store.

    Raises:
        ValueError: the store is missing or damaged, or an override asks for another model than encoded it.
    """

    def __init__(self, store: Path, overrides: list[str], out: Path | None = None) -> None:
        self.index = read_index(store)
        self.config = config = _config(store, self.index, overrides)
        self.features = load_features(store)
        self.scorer = Scorer(_head(store, config, self.features.text_TD.shape[1]), self.features, config)
        self.out = out or store.parent
        key = fingerprint(
            self.index["fingerprint"],
            config.seed,
            dataclasses.asdict(config.stochastic),
            config.evaluation.protocol,
            config.evaluation.precision,
            config.model.pooled_by,
        )
        self.tiles = Tiles(self.out / "tiles" / key, self.scorer, log=lambda text: print(text, file=sys.stderr))

    def report(self, bank: Path | None = None, num_candidates: int | None = None) -> dict[str, Any]:
        """Compute the blocks that are still missing, rank, write the report, print the tables.

        Args:
            bank: feature store of training queries; qbnorm needs it.
            num_candidates: also try the two-stage search with so many candidates.

        Raises:
            ValueError: what was asked for does not go together, or a share of it is missing.
        """
        evaluation, num_videos = self.config.evaluation, len(self.features.video_ids)
        if bank is None and evaluation.post_processing == "qbnorm":
            raise ValueError("qbnorm needs a bank of training queries: give --bank FEATURES")
        plain = evaluation.post_processing == "none" and evaluation.protocol == "query_conditioned"
        if num_candidates is not None and not plain:
            raise ValueError("--search has no post-processing and no published_code protocol; leave them out")
        if num_candidates is not None and not 1 <= num_candidates <= num_videos:
            raise ValueError(f"--search is {num_candidates}; the gallery has {num_videos} videos")
        found = _bank(bank, self.index, self.features, self.scorer) if bank else None
        self.tiles.compute(0, 1)
        ranks = ranking.rank(self.tiles.blocks, self.features.owner_T, num_videos, evaluation.post_processing, found)
        same_towers = self._mean_pooling()
        before = self.index.get("before_training", {})
        result = labels(self.config, self.features, self.index["checkpoint"]) | summary(ranks)
        result |= {"baselines": {**before, "mean pooling of these towers": same_towers}}
        systems = {
            direction: {name: row[direction] for name, row in result["baselines"].items()}
            for direction in ("t2v", "v2t")
        }
        caption_ids = self.features.caption_ids
        report = Report(result, ranks, self.features.captions, caption_ids, systems, self.scorer, self.shards())
        report.write(self.out)
        _show(report)
        print(f"report: {self.out / 'report.html'}")
        if num_candidates is not None:
            _compare_search(self.scorer, num_candidates, ranks, result, self.out)
        return result

    def _mean_pooling(self) -> dict[str, Any]:
        plain = dataclasses.replace(
            self.config, evaluation=dataclasses.replace(self.config.evaluation, protocol="query_conditioned")
        )
        scorer = Scorer(RetrievalHead(MeanPool(), None), self.features, plain)
        blocks = lambda: map(scorer.score, scorer.starts)  # noqa: E731
        return summary(ranking.rank(blocks, self.features.owner_T, len(self.features.video_ids), "none"))

    def shards(self) -> Index | None:
        """The split's shards, for the report's pictures, if they are still where they were."""
        try:
            return load_index(self.index["shards"], self.config.data.cache)
        except (KeyError, ValueError):
            return None


def _compare_search(scorer: Scorer, num: int, exact: ranking.Ranks, result: dict[str, Any], out: Path) -> None:
    """Print the two-stage search beside the exact one and keep its metrics.

    Raises:
        ValueError: post-processing or the published protocol, which the search does not have.
    """
    from tmass_dist.evaluation.search import search_ranks

    found = ranking.metrics(search_ranks(scorer, num))
    rows = {"exact": ranking.metrics(exact.t2v_T), f"the best {num} re-ranked": found}
    rows["lost"] = {name: rows["exact"][name] - value for name, value in found.items()}
    print(table(rows, f"\ntext to video, two stages ({label(result)})"))
    write_json(out / "search.json", {"num_candidates": num, **result, "t2v": found, "lost": rows["lost"]})


def _bank(bank: Path, index: dict[str, Any], features: Features, scorer: Scorer) -> ranking.Bank:
    """The bank's queries against this gallery.

    Raises:
        ValueError: the bank was encoded by another model.
    """
    other = read_index(bank)
    if other["checkpoint"] != index["checkpoint"]:
        raise ValueError(f"{bank} was encoded by {other['checkpoint']} and the gallery by {index['checkpoint']}")
    queries = load_features(bank)
    asked = dataclasses.replace(
        features, text_TD=queries.text_TD, caption_ids=queries.caption_ids, captions=queries.captions
    )
    of_bank = Scorer(scorer.head, asked, scorer.config)
    return ranking.Bank(lambda: map(of_bank.score, of_bank.starts), len(features.video_ids))


def rank_matrix(path: Path, truth: Path | None, post: Any, out: Path | None) -> None:
    """Rank a similarity matrix from anywhere; its protocol is whatever its maker did, and is labelled so.

    Raises:
        ValueError: no matrix of numbers, or a truth that does not fit it.
    """
    if not path.is_file():
        raise ValueError(f"no file {path}")
    if post == "qbnorm":
        raise ValueError("qbnorm needs features of training queries; a matrix of the test alone does not hold them")
    try:
        matrix = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"{path} is not a matrix of numbers (.npy): {error}") from error
    if matrix.ndim != 2 or matrix.dtype.kind != "f" or 0 in matrix.shape:
        raise ValueError(f"{path} holds {matrix.dtype} of shape {matrix.shape}; wanted: floats, texts x videos")
    num_texts, num_videos = matrix.shape
    if truth is None:
        if num_texts != num_videos:
            raise ValueError(
                f"{path} is {num_texts} x {num_videos}: the truth is on no diagonal; give --truth IDS.json"
            )
        owners = list(range(num_texts))
    else:
        try:
            owners = json.loads(truth.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"{truth} cannot be read: {error}") from error
        fits = isinstance(owners, list) and len(owners) == num_texts
        if not fits or not all(isinstance(o, int) and 0 <= o < num_videos for o in owners):
            raise ValueError(f"{truth} must be a list of {num_texts} column numbers from 0 to {num_videos - 1}")
    order = np.argsort(owners, kind="stable")
    owner_T = torch.tensor(owners)[torch.from_numpy(order)]

    def blocks() -> Any:
        for start in range(0, num_texts, 256):
            yield torch.from_numpy(np.array(matrix[order[start : start + 256]]))

    ranks = ranking.rank(blocks, owner_T, num_videos, post)
    result: dict[str, Any] = {
        "protocol": "of the given similarities",
        "num_texts": num_texts,
        "num_videos": num_videos,
        "selected_on": "unknown",
        "checkpoint": str(path),
        "post_processing": post,
        **summary(ranks),
    }
    ids = [(str(owner), int(row)) for owner, row in zip(owner_T.tolist(), order)]
    report = Report(result, ranks, [""] * num_texts, ids, {})
    if out is not None:
        report.write(out)
    _show(report)


def _show(report: Report) -> None:
    for direction, name in (("t2v", "text to video"), ("v2t", "video to text")):
        print(table(report.rows(direction), f"\n{name} ({label(report.result)})"), flush=True)
