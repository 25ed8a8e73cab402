"""Evaluation of what is already encoded, or already scored: no GPU, no videos, no CLIP."""

# Shapes: T texts, V videos.

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tmass_dist.config import Config, load_config
from tmass_dist.engine.checkpoint import write_json
from tmass_dist.evaluation import ranking
from tmass_dist.evaluation.features import Features, fingerprint, load_features, read_index
from tmass_dist.evaluation.report import Report, label, labels, summary, table
from tmass_dist.evaluation.tiles import Scorer, Tiles
from tmass_dist.models.head import RetrievalHead, build_head


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


def _share(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not int(found[1]) < int(found[2]):
        raise ValueError(f"--shard {text} is no share; write I/N with I from 0 to N - 1, as 3/8")
    return int(found[1]), int(found[2])


def rescore(
    store: Path,
    overrides: list[str],
    out: Path | None,
    shard: str | None,
    bank: Path | None,
    num_candidates: int | None = None,
) -> None:
    """Score a feature store, or one share of it, and report.

    Finished blocks of scores stay in ``OUT/tiles``: a share that was killed goes on, and what any task computed is
    not computed again. Without ``--shard`` whatever is missing is computed, ranked and reported.
    """
    share = _share(shard)
    index = read_index(store)
    config = _config(store, index, overrides)
    if bank is None and config.evaluation.post_processing == "qbnorm":
        raise ValueError("qbnorm needs a bank of training queries: give --bank FEATURES")
    plain = config.evaluation.post_processing == "none" and config.evaluation.protocol == "query_conditioned"
    if num_candidates is not None and not plain:
        raise ValueError("--search has no post-processing and no published_code protocol; leave them out")
    features = load_features(store)
    if num_candidates is not None and not 1 <= num_candidates <= len(features.video_ids):
        raise ValueError(f"--search is {num_candidates}; the gallery has {len(features.video_ids)} videos")
    head = _head(store, config, features.text_TD.shape[1])
    out = out or store.parent
    scorer = Scorer(head, features, config)
    key = fingerprint(
        index["fingerprint"],
        config.seed,
        dataclasses.asdict(config.stochastic),
        config.evaluation.protocol,
        config.model.pooled_by,
    )
    tiles = Tiles(out / "tiles" / key, scorer, log=lambda text: print(text, file=sys.stderr))
    tiles.compute(*(share or (0, 1)))
    if share is not None:
        print(f"share {shard} is done: {out / 'tiles' / key}")
        return
    found = None
    if bank is not None:
        found = _bank(bank, index, features, scorer)

    post, num_videos = config.evaluation.post_processing, len(features.video_ids)
    ranks = ranking.rank(tiles.blocks, features.owner_T, num_videos, post, found)
    result = labels(config, features, index["checkpoint"]) | summary(ranks)
    Report(result, ranks, features.captions, features.caption_ids, {}, scorer).write(out)
    _show(result)
    print(f"report: {out / 'report.html'}")
    if num_candidates is not None:
        _compare_search(scorer, num_candidates, ranks, result, out)


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
    if out is not None:
        ids = [(str(owner), int(row)) for owner, row in zip(owner_T.tolist(), order)]
        Report(result, ranks, [""] * num_texts, ids, {}).write(out)
    _show(result)


def _show(result: dict[str, Any]) -> None:
    for direction, name in (("t2v", "text to video"), ("v2t", "video to text")):
        rows = {"chance": ranking.chance(result["num_videos"]), "this result": result[direction]}
        print(table(rows, f"\n{name} ({label(result)})"), flush=True)
