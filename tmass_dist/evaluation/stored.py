"""Evaluation of what is already encoded, or already scored: no GPU, no videos, no CLIP."""

# Shapes: T texts, V videos.

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from tmass_dist.cli import write_json
from tmass_dist.config import Config, load_config
from tmass_dist.data.index import Index, load_index
from tmass_dist.errors import UserError
from tmass_dist.evaluation import ranking
from tmass_dist.evaluation.blocks import Scorer, Tiles
from tmass_dist.evaluation.features import Features, fingerprint, load_features, read_index
from tmass_dist.evaluation.report import Report, label, labels, summary, table
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
            raise UserError(f"model.{field.name} is {other!r} and {store} was encoded with {one!r}; encode again")
    return given


def _head(store: Path, config: Config, width: int) -> RetrievalHead:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from tmass_dist.models.backbone import load_weights

    head = build_head(config.model, width).eval()
    path = store / "head.safetensors"
    try:
        load_weights(head, load_file(path), str(path))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is missing or torn ({error}); encode again") from error
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
        UserError: the store is missing or damaged, or an override asks for another model than encoded it.
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
            UserError: what was asked for does not go together, or a share of it is missing.
        """
        evaluation, num_videos = self.config.evaluation, len(self.features.video_ids)
        if bank is None and evaluation.post_processing == "qbnorm":
            raise UserError("qbnorm needs a bank of training queries: give --bank FEATURES")
        plain = evaluation.post_processing == "none" and evaluation.protocol == "query_conditioned"
        if num_candidates is not None and not plain:
            raise UserError("--search has no post-processing and no published_code protocol; leave them out")
        if num_candidates is not None and not 1 <= num_candidates <= num_videos:
            raise UserError(f"--search is {num_candidates}; the gallery has {num_videos} videos")
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
        report.show()
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
            return load_index(self.index["shards"], self.config.data.cache, self.config.data.retry_s)
        except (KeyError, ValueError):
            return None


def _compare_search(scorer: Scorer, num: int, exact: ranking.Ranks, result: dict[str, Any], out: Path) -> None:
    """Print the two-stage search beside the exact one and keep its metrics.

    Raises:
        UserError: post-processing or the published protocol, which the search does not have.
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
        UserError: the bank was encoded by another model.
    """
    other = read_index(bank)
    if other["checkpoint"] != index["checkpoint"]:
        raise UserError(f"{bank} was encoded by {other['checkpoint']} and the gallery by {index['checkpoint']}")
    queries = load_features(bank)
    asked = dataclasses.replace(
        features, text_TD=queries.text_TD, caption_ids=queries.caption_ids, captions=queries.captions
    )
    of_bank = Scorer(scorer.head, asked, scorer.config)
    return ranking.Bank(lambda: map(of_bank.score, of_bank.starts), len(features.video_ids))
