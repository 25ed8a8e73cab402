"""The files of an evaluation: metrics.json, the ranks as CSV, a markdown table and a page."""

# Shapes: T texts, V videos.

from __future__ import annotations

import csv
import io
import json
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tmass_dist.cli import write_text
from tmass_dist.errors import UserError
from tmass_dist.evaluation.bootstrap import intervals
from tmass_dist.evaluation.examples import Scored, as_url, text_examples, video_examples
from tmass_dist.evaluation.features import selection_of
from tmass_dist.evaluation.media import make_media
from tmass_dist.evaluation.plots import histogram, recall_curve
from tmass_dist.evaluation.query_list import remove_others, write_queries
from tmass_dist.evaluation.ranking import Ranks, chance, metrics
from tmass_dist.evaluation.retrieved import Retrieved
from tmass_dist.pages import inline_script, render_page
from tmass_dist.score_labels import LABELS, label_words, scoring_labels

if TYPE_CHECKING:
    from tmass_dist.config import Config
    from tmass_dist.evaluation.features import Features
    from tmass_dist.evaluation.stored import StoredSplit

COLUMNS = ("R@1", "R@5", "R@10", "MdR", "MnR")
PAGE_COLUMNS = ("R@1", "R@5", "R@10", "R@50", "MdR", "MnR")
PAGE_FILES = "report"
"""Directory beside ``report.html``: the list of all queries, thumbnails, clips."""
THIS = "this result"


def table(rows: dict[str, dict[str, float]], title: str) -> str:
    """A plain table with a row for each system, R@K in percent."""
    width = max(len(name) for name in rows)
    lines = [title, " " * width + "".join(f"{column:>8}" for column in COLUMNS)]
    lines += [f"{name:<{width}}" + "".join(f"{row[column]:8.1f}" for column in COLUMNS) for name, row in rows.items()]
    return "\n".join(lines)


def markdown(rows: dict[str, dict[str, float]], title: str) -> str:
    """The same table in markdown."""
    lines = [f"**{title}**", "", f"| system | {' | '.join(COLUMNS)} |", f"|---|{'---:|' * len(COLUMNS)}"]
    lines += [f"| {name} | {' | '.join(f'{row[column]:.1f}' for column in COLUMNS)} |" for name, row in rows.items()]
    return "\n".join(lines) + "\n"


def labels(config: Config, features: Features, index: dict[str, Any], tau: float | None) -> dict[str, Any]:
    """What every result states: how it was scored, selection split, sizes, checkpoint.

    Args:
        config: with the scoring settings.
        features: that were scored.
        index: of their store.
        tau: of the head that scored them (``RetrievalHead.tau``).
    """
    found: dict[str, Any] = scoring_labels(config, tau) | {
        "num_texts": len(features.caption_ids),
        "num_videos": len(features.video_ids),
        "split": index.get("split", "unknown"),
        "selected_on": str(selection_of(index).get("selected_on", "unknown")),
        "checkpoint": index["checkpoint"],
        "weights_sha256": index["weights_sha256"],
    }
    if features.frames_VFD.dtype != torch.float32:
        found["feature_precision"] = str(features.frames_VFD.dtype).removeprefix("torch.")
    return found


def label(result: dict[str, Any]) -> str:
    """The labels of a result in one line, to be read with every number of it."""
    return ", ".join([*label_words(result), f"{result['num_texts']} texts x {result['num_videos']} videos"])


def summary(ranks: Ranks) -> dict[str, Any]:
    """Metrics of both directions; ``intervals_95`` where there are at least two videos."""
    found: dict[str, Any] = {"t2v": metrics(ranks.t2v_T), "v2t": metrics(ranks.v2t_V)}
    limits = intervals(ranks)
    return found | {"intervals_95": limits} if limits else found


@dataclass
class Report:
    """One evaluation, ready to be written.

    Args:
        result: content of metrics.json: the labels, both directions, intervals, and ``baselines`` by name.
        ranks: of every query.
        captions: of every text.
        caption_ids: video and slot of every text.
        stored: for the pictures of single queries; None where only similarities are known.
        scores_of: similarity ``(V,)`` of one text with every video; needed with ``stored``.
        retrieved: the best answers to every query; the CSV files then name the first one.
        facts: lines about the run, for the top of the page.
    """

    result: dict[str, Any]
    ranks: Ranks
    captions: list[str]
    caption_ids: list[tuple[str, int]]
    stored: StoredSplit | None = None
    scores_of: Callable[[int], Tensor] | None = None
    retrieved: Retrieved | None = None
    facts: dict[str, str] = field(default_factory=dict)

    def rows(self, direction: str) -> dict[str, dict[str, float]]:
        """Every row of one direction's table. Baselines that were scored otherwise than the result say so."""
        plain = self.result["protocol"] == "query_conditioned" and self.result["post_processing"] == "none"
        note = "" if plain else " [query_conditioned, no post-processing]"
        baselines = self.result.get("baselines", {})
        rows = {"chance": chance(self.result["num_videos"])}
        rows |= {f"{name}{note}": row[direction] for name, row in baselines.items()}
        return rows | {THIS: self.result[direction]}

    def write(self, directory: Path) -> None:
        """Write all files, each by rename."""
        directory.mkdir(parents=True, exist_ok=True)
        names = {"t2v": "text to video", "v2t": "video to text"}
        tables = "\n".join(
            "\n".join(
                [markdown(self.rows(direction), f"{name} ({label(self.result)})")]
                + [f"- {line}\n" for line in self.remarks(direction)]
            )
            for direction, name in names.items()
        )
        texts: list[tuple[Any, ...]] = [(*key, rank) for key, rank in zip(self.caption_ids, self.ranks.t2v_T.tolist())]
        video_ids = self.video_ids
        videos: list[tuple[Any, ...]] = list(zip(video_ids, self.ranks.v2t_V.tolist()))
        text_columns, video_columns = ["video_id", "caption_slot", "rank"], ["video_id", "rank"]
        found = self.retrieved
        if found is not None:
            text_columns += ["text", "score", "top1_video_id", "top1_score"]
            answers = zip(
                found.own_score_T.tolist(), found.video_TK[:, 0].tolist(), found.video_score_TK[:, 0].tolist()
            )
            texts = [
                (*row, text, f"{own:.6f}", video_ids[video], f"{top:.6f}")
                for row, text, (own, video, top) in zip(texts, self.captions, answers)
            ]
            video_columns += ["score", "top1_video_id", "top1_text", "top1_score"]
            answers = zip(found.own_score_V.tolist(), found.text_VK[:, 0].tolist(), found.text_score_VK[:, 0].tolist())
            videos = [
                (*row, f"{own:.6f}", self.caption_ids[text][0], self.captions[text], f"{top:.6f}")
                for row, (own, text, top) in zip(videos, answers)
            ]
        queries = self._write_queries(directory / PAGE_FILES)
        contents = {
            "metrics.json": json.dumps(self.result, indent=2) + "\n",
            "ranks.csv": self._csv(text_columns, texts),
            "video_ranks.csv": self._csv(video_columns, videos),
            "table.md": tables,
            "report.html": self.html(queries),
        }
        for name, content in contents.items():
            write_text(directory / name, content)
        if queries:
            remove_others(directory / PAGE_FILES, queries)

    @property
    def video_ids(self) -> list[str]:
        """The id of each video."""
        first_text = torch.searchsorted(self.ranks.owner_T, torch.arange(len(self.ranks.v2t_V)))
        return [self.caption_ids[text][0] for text in first_text.tolist()]

    def _write_queries(self, folder: Path) -> str | None:
        """The list of all queries with its thumbnails; returns the name of its file, None without single queries."""
        if self.stored is None or self.retrieved is None:
            return None
        evaluation = self.stored.config.evaluation
        media = make_media(
            self.stored.shards(),
            self.video_ids,
            folder,
            thumbnails=evaluation.thumbnails,
            videos=evaluation.videos,
        )
        return write_queries(self.ranks, self.captions, self.video_ids, self.retrieved, media)

    def _csv(self, columns: list[str], rows: list[tuple[Any, ...]]) -> str:
        """The ranks of one direction, with the labels in every row."""
        out = io.StringIO(newline="")
        writer = csv.writer(out)
        labels = {key: self.result[key] for key in LABELS if self.result.get(key) is not None}
        writer.writerow([*columns, *labels])
        writer.writerows([*row, *labels.values()] for row in rows)
        return out.getvalue()

    def remarks(self, direction: str) -> list[str]:
        """What this result adds to the R@1 of each baseline, and how well its signals tell which texts succeed."""
        lines = []
        for name, found in self.result.get("gain_over_baselines", {}).items():
            value, low, high = found[direction]["R@1"]
            lines.append(f"R@1 {value:+.1f} over {name}; 95 % interval {low:+.1f} to {high:+.1f}")
        for name, found in self.result.get("calibration", {}).items() if direction == "t2v" else ():
            low, high = found["interval_95"]
            interval = f"95 % interval {low:.2f} to {high:.2f}"
            lines.append(f"{name} tells success at rank 1 with AUROC {found['auroc']:.2f}; {interval}; chance is 0.50")
        return lines

    def show(self) -> None:
        """Print both tables, each with its remarks."""
        for direction, name in (("t2v", "text to video"), ("v2t", "video to text")):
            print(table(self.rows(direction), f"\n{name} ({label(self.result)})"))
            for line in self.remarks(direction):
                print(line)

    def html(self, queries: str | None = None) -> str:
        """The page; every text in it is escaped.

        Args:
            queries: name of the list of all queries in ``PAGE_FILES``; None for a page without it.
        """
        # A picture may be copied without its page, so it carries the labels too.
        words = textwrap.fill(", ".join(label_words(self.result)), 60)
        pictures = {
            "Recall": [recall_curve(self.ranks, words)],
            "Ranks of the correct answer": [
                histogram(self.ranks.t2v_T, "text to video", "texts", words),
                histogram(self.ranks.v2t_V, "video to text", "videos", words),
            ],
        }
        intervals = self.result.get("intervals_95", {})
        names = {"t2v": "Text to video", "v2t": "Video to text"}
        scored = None
        if self.stored is not None and self.retrieved is not None and self.scores_of is not None:
            scored = Scored(self.stored, self.ranks, self.retrieved, self.scores_of)
        script, script_hash = inline_script("player.js", "report.js")
        return render_page(
            "report.html",
            label=label(self.result),
            facts=self.facts,
            columns=PAGE_COLUMNS,
            tables={
                name: {
                    "rows": self.rows(direction),
                    "intervals": intervals.get(direction),
                    "remarks": self.remarks(direction),
                }
                for direction, name in names.items()
            },
            pictures=[(name, [as_url(picture, "png") for picture in drawn]) for name, drawn in pictures.items()],
            text_examples=text_examples(scored) if scored else [],
            video_examples=video_examples(scored) if scored else [],
            queries=f"{PAGE_FILES}/{queries}" if queries else None,
            script=script,
            script_hash=script_hash,
        )


def read_ranks(directory: Path) -> tuple[Ranks, list[tuple[str, int]]]:
    """The ranks that an evaluation wrote, and the video id and slot of every text.

    Raises:
        UserError: a file is missing or damaged, for example written by an older version.
    """
    path = directory / "ranks.csv"
    try:
        texts, path = _csv_rows(path), directory / "video_ranks.csv"
        videos = _csv_rows(path)
        number_of = {row["video_id"]: number for number, row in enumerate(videos)}
        ranks = Ranks(
            torch.tensor([int(row["rank"]) for row in texts]),
            torch.tensor([int(row["rank"]) for row in videos]),
            torch.tensor([number_of[row["video_id"]] for row in texts]),
        )
        return ranks, [(row["video_id"], int(row["caption_slot"])) for row in texts]
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise UserError(f"{path} is missing or damaged ({error}); evaluate again") from error


def _csv_rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, strict=True))
