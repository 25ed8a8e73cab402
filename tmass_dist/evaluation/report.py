"""What an evaluation leaves behind: metrics.json, ranks.csv, a markdown table and one self-contained page."""

# Shapes: T texts, V videos, F frames, D embedding width.

from __future__ import annotations

import base64
import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tmass_dist.evaluation import radii
from tmass_dist.evaluation.ranking import Ranks, chance, intervals, metrics
from tmass_dist.pages import render_page
from tmass_dist.pictures import figure, png

if TYPE_CHECKING:
    from tmass_dist.config import Config
    from tmass_dist.data.index import Index
    from tmass_dist.evaluation.blocks import Scorer
    from tmass_dist.evaluation.features import Features

COLUMNS = ("R@1", "R@5", "R@10", "MdR", "MnR")
THIS = "this result"


def table(rows: dict[str, dict[str, float]], title: str) -> str:
    """A plain table: one row a system, R@K in percent."""
    width = max(len(name) for name in rows)
    lines = [title, " " * width + "".join(f"{column:>8}" for column in COLUMNS)]
    lines += [f"{name:<{width}}" + "".join(f"{row[column]:8.1f}" for column in COLUMNS) for name, row in rows.items()]
    return "\n".join(lines)


def markdown(rows: dict[str, dict[str, float]], title: str) -> str:
    """The same for a document."""
    lines = [f"**{title}**", "", f"| system | {' | '.join(COLUMNS)} |", f"|---|{'---:|' * len(COLUMNS)}"]
    lines += [f"| {name} | {' | '.join(f'{row[column]:.1f}' for column in COLUMNS)} |" for name, row in rows.items()]
    return "\n".join(lines) + "\n"


def label(result: dict[str, Any]) -> str:
    """What every number is to be read with."""
    transductive = " (transductive)" if result["post_processing"] != "none" else ""
    return (
        f"protocol {result['protocol']}, checkpoint selected on {result['selected_on']}, "
        f"post-processing {result['post_processing']}{transductive}, {_precision(result)}"
        f"{result['num_texts']} texts x {result['num_videos']} videos"
    )


def labels(config: Config, features: Features, checkpoint: str) -> dict[str, Any]:
    """What every result says of itself."""
    found = {
        "protocol": config.evaluation.protocol,
        "num_texts": len(features.caption_ids),
        "num_videos": len(features.video_ids),
        "num_trials": config.stochastic.num_trials if config.model.radius != "none" else None,
        "selected_on": config.evaluation.selected_on,
        "checkpoint": checkpoint,
        "post_processing": config.evaluation.post_processing,
    }
    precision = config.evaluation.precision
    return found if precision == "float32" else found | {"precision": precision}


def _precision(result: dict[str, Any]) -> str:
    """A word for labels, where the scores are not exact."""
    return f"precision {result['precision']}, " if "precision" in result else ""


def summary(ranks: Ranks) -> dict[str, Any]:
    """Metrics of both directions with their bootstrap 95 % intervals."""
    found: dict[str, Any] = {"t2v": metrics(ranks.t2v_T), "v2t": metrics(ranks.v2t_V)}
    return found | {"intervals_95": {"t2v": intervals(ranks.t2v_T), "v2t": intervals(ranks.v2t_V)}}


@dataclass
class Report:
    """One evaluation, ready to be written.

    Args:
        result: what metrics.json holds.
        ranks: of every query.
        captions: of every text.
        caption_ids: video and slot of every text.
        systems: further rows of the tables, by direction.
        scorer: for the queries' pictures; None where only similarities are known.
        index: shards of the split, for the videos' frames.
    """

    result: dict[str, Any]
    ranks: Ranks
    captions: list[str]
    caption_ids: list[tuple[str, int]]
    systems: dict[str, dict[str, dict[str, float]]]
    scorer: Scorer | None = None
    index: Index | None = None

    def rows(self, direction: str) -> dict[str, dict[str, float]]:
        """Every row of one direction's table."""
        chances = {"chance": chance(self.result["num_videos"])}
        return chances | self.systems.get(direction, {}) | {THIS: self.result[direction]}

    def write(self, directory: Path) -> None:
        """Write all four files, each aside and renamed."""
        directory.mkdir(parents=True, exist_ok=True)
        out = io.StringIO(newline="")
        writer = csv.writer(out)
        labels = {k: self.result[k] for k in ("protocol", "post_processing", "precision") if k in self.result}
        writer.writerow(["video_id", "caption_slot", "rank", *labels])
        for (video_id, slot), rank in zip(self.caption_ids, self.ranks.t2v_T.tolist()):
            writer.writerow([video_id, slot, rank, *labels.values()])
        names = {"t2v": "text to video", "v2t": "video to text"}
        tables = "\n".join(markdown(self.rows(d), f"{name} ({label(self.result)})") for d, name in names.items())
        contents = {
            "metrics.json": json.dumps(self.result, indent=2) + "\n",
            "ranks.csv": out.getvalue(),
            "table.md": tables,
            "report.html": self.html(),
        }
        for name, content in contents.items():
            aside = directory / f"{name}.tmp"
            aside.write_text(content, encoding="utf-8")
            aside.replace(directory / name)

    def show(self) -> None:
        """Print both tables."""
        for direction, name in (("t2v", "text to video"), ("v2t", "video to text")):
            print(table(self.rows(direction), f"\n{name} ({label(self.result)})"), flush=True)

    def html(self) -> str:
        """The page; every text in it is escaped."""
        # A picture travels without its page: it carries the label too.
        said = f"{self.result['protocol']}, {_precision(self.result)}post-processing {self.result['post_processing']}"
        pictures = [
            ("Recall", _recall_curve(self.ranks, said)),
            ("Ranks of the right video", _histogram(self.ranks, said)),
        ]
        intervals = self.result["intervals_95"]
        return render_page(
            "report.html",
            label=label(self.result),
            columns=COLUMNS,
            tables={
                name: {"rows": self.rows(direction), "intervals": intervals[direction]}
                for direction, name in (("t2v", "Text to video"), ("v2t", "Video to text"))
            },
            pictures=[(name, _as_url(png, "png")) for name, png in pictures],
            queries=self._queries() if self.scorer is not None else [],
        )

    def _queries(self) -> list[dict[str, Any]]:
        """Best, typical and worst queries, chosen by rank, with what they retrieved and their radii."""
        assert self.scorer is not None
        order = torch.argsort(self.ranks.t2v_T, stable=True).tolist()
        middle = len(order) // 2
        chosen = [("best", i) for i in order[:2]] + [("typical", i) for i in order[middle : middle + 2]]
        chosen += [("worst", i) for i in order[-2:]]
        found = []
        for kind, number in dict((i, (k, i)) for k, i in chosen).values():
            block = self.scorer.block
            row_V = self.scorer.score(number // block * block)[number % block]
            truth = int(self.scorer.features.owner_T[number])
            top = row_V.argsort(descending=True)[:3].tolist()
            found.append(
                {
                    "kind": kind,
                    "caption": self.captions[number],
                    "rank": int(self.ranks.t2v_T[number]),
                    "videos": [self._video(truth, row_V, "right"), *(self._video(v, row_V, "retrieved") for v in top)],
                    "pictures": [_as_url(png, "png") for png in self._radii(number, truth)],
                }
            )
        return found

    def _video(self, number: int, row_V: Tensor, role: str) -> dict[str, Any]:
        assert self.scorer is not None
        video_id = self.scorer.features.video_ids[number]
        frames = []
        if self.index is not None:
            import numpy as np
            import simplejpeg

            from tmass_dist.data.samples import read_into

            side = self.index.image_size
            frames_FHWC = np.empty((min(4, self.index.num_frames or 4), side, side, 3), np.uint8)
            read_into(frames_FHWC, self.index, self.index.ids.index(video_id))
            frames = [_as_url(simplejpeg.encode_jpeg(frame, quality=85), "jpeg") for frame in frames_FHWC]
        return {"id": video_id, "score": float(row_V[number]), "role": role, "frames": frames}

    def _radii(self, number: int, truth: int) -> list[bytes]:
        """The supplementary's pictures: the radius vector of the pair beside five others; |R|_1 with every video."""
        assert self.scorer is not None
        if self.scorer.head.mass is None:
            return []
        radius_VD = radii.radii_of(self.scorer.head.mass, self.scorer.features, number)
        others = [v for v in range(len(radius_VD)) if v != truth][:5]
        title = "this text with every video; the right one in red"
        return [radii.vectors(radius_VD, truth, others), radii.norms(radius_VD.abs().sum(dim=1), truth, title)]


def _as_url(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _recall_curve(ranks: Ranks, title: str) -> bytes:
    drawn, (axes,) = figure()
    for name, values in (("text to video", ranks.t2v_T), ("video to text", ranks.v2t_V)):
        ordered = values.sort().values
        axes.plot(ordered.numpy(), torch.arange(1, len(ordered) + 1).numpy() / len(ordered) * 100, label=name)
    axes.set(xscale="log", xlabel="K", ylabel="R@K, percent", ylim=(0, 102), title=title)
    axes.legend()
    return png(drawn)


def _histogram(ranks: Ranks, title: str) -> bytes:
    drawn, (axes,) = figure()
    top = max(int(ranks.t2v_T.max()), 2)
    edges = torch.logspace(0, torch.log10(torch.tensor(float(top + 1))).item(), 25).numpy()
    axes.hist(ranks.t2v_T.numpy(), bins=edges)
    axes.set(xscale="log", xlabel="rank (text to video)", ylabel="texts", title=title)
    return png(drawn)
