"""One page of what was reproduced: a row for each row of the paper, published and measured side by side."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.experiments import PARTS, SYSTEMS
from launch.measure import COLUMNS, is_finished, measure, numbers, spread

if TYPE_CHECKING:
    from launch.reproduce import Layout

PUBLISHED = "published (published code, see protocol)"
TITLES = {
    "msrvtt": "MSR-VTT 1k-A",
    "lsmdc": "LSMDC",
    "didemo": "DiDeMo",
    "vatex": "VATEX",
    "charades": "Charades",
    "demo": "embedded benchmark",
}


@dataclass
class Section:
    """A table, its pictures, and how to read them."""

    title: str
    note: str
    columns: list[str]
    rows: list[list[str]]
    pictures: list[tuple[str, bytes]] = field(default_factory=list)


class _Writer:
    def __init__(self, layout: Layout, absent: str | None) -> None:
        import yaml

        self.layout, self.absent = layout, absent
        path = Path(__file__).with_name("published.yaml")
        self.published: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))

    def _finished(self, system: str) -> list[Path]:
        return [run for run in self.layout.runs(system) if is_finished(run)]

    def _measured(self, label: str, system: str, **options: Any) -> list[list[str]]:
        """Both protocols of one system here."""
        if self.absent is not None:
            return [[label, f"no data: {self.absent}", *[""] * len(COLUMNS)]]
        runs = self._finished(system)
        if not runs:
            return [[label, f"not trained yet: {self.layout.runs(system)[0]}", *[""] * len(COLUMNS)]]
        where = TITLES[self.layout.data]
        return [
            [label, f"measured on {where}, {protocol}, {len(runs)} seeds", *numbers(runs, protocol=protocol, **options)]
            for protocol in ("published_code", "query_conditioned")
        ]

    def _line(self, label: str, values: list[float]) -> list[str]:
        return [label, PUBLISHED, *(f"{value:.1f}" for value in values)]

    def _of_data_sets(
        self, table: dict[str, Any], title: str, note: str, variants: dict[str, dict[str, Any]]
    ) -> Section:
        rows = []
        for data, published in table.items():
            for key, values in published.items():
                label = f"{TITLES[data]}, {key}" if key != "none" else TITLES[data]
                rows.append(self._line(label, values))
                if data == self.layout.data:
                    rows += self._measured(label, "tmass", **variants[key])
                else:
                    rows.append([label, f"not measured here: --data {data}", *[""] * len(COLUMNS)])
        if self.layout.data == "demo":
            for key, options in variants.items():
                label = f"{TITLES['demo']}, {key}" if key != "none" else TITLES["demo"]
                rows += self._measured(label, "tmass", **options)
        return Section(title, note, ["row", "source", *COLUMNS], rows)

    def table_1(self) -> Section:
        note = (
            "Text to video with ViT-B/32 (the embedded benchmark: its own towers), without and with DSL, which sees "
            "all queries (transductive)."
        )
        variants = {"none": {"post": "none"}, "dsl": {"post": "dsl"}}
        return self._of_data_sets(self.published["table_1"], "Table 1", note, variants)

    def table_2(self) -> Section:
        rows = []
        for data, published in self.published["table_2"].items():
            for post, values in published.items():
                label = TITLES[data] + (", dsl" if post == "dsl" else "")
                rows.append(self._line(label, values))
        own = "the embedded benchmark has one size of towers" if self.layout.data == "demo" else "add it by --submit"
        rows.append(["", f"not measured: {own}: model.architecture=ViT-B-16-quickgelu", *[""] * len(COLUMNS)])
        return Section("Table 2", "Text to video with ViT-B/16.", ["row", "source", *COLUMNS], rows)

    def table_3(self) -> Section:
        rows = []
        for name, values in self.published["table_3"].items():
            system, _, trials = name.rpartition("-") if name.startswith("sampled-only") else (name, "", "20")
            label = SYSTEMS[system].title + (f", M = {trials}" if system != "xpool" else "")
            rows += [self._line(label, values), *self._measured(label, system, trials=int(trials))]
        note = "Sampling with the unlearnable radius, with and without L_s. Published: MSR-VTT 1k-A."
        return Section("Table 3", note, ["row", "source", *COLUMNS], rows)

    def table_4(self) -> Section:
        variants = {"t2v": {"direction": "t2v"}, "v2t": {"direction": "v2t"}}
        return self._of_data_sets(self.published["table_4"], "Table 4", "Text to video and video to text.", variants)

    def table_5(self) -> Section:
        rows = []
        for data, published in self.published["table_5"].items():
            rows += [self._line(f"{TITLES[data]}, batch {batch}", values) for batch, values in published.items()]
        for system in PARTS["table 5"]:
            if SYSTEMS[system].batch_size <= self.layout.size.largest_batch:
                rows += self._measured(f"{TITLES[self.layout.data]}, batch {SYSTEMS[system].batch_size}", system)
        note = "Larger global batches; measured with as many pairs seen, so larger batches take fewer steps."
        return Section("Table 5", note, ["row", "source", *COLUMNS], rows)

    def figure_1(self) -> Section:
        from launch.figures import training_curves

        runs = self._finished("tmass"), self._finished("kl")
        pictures = [("Figure 1", training_curves(*runs))] if all(runs) else []
        rows = self._measured("T-MASS", "tmass") + self._measured(SYSTEMS["kl"].title, "kl")
        rows.append(["KL, MSR-VTT", PUBLISHED, f"below {self.published['figure_1']['kl_below']:.0f}", "", "", "", ""])
        note = "R@1 on the validation split and the KL term during training, weight 1, prior N(0, I)."
        return Section("Figure 1", note, ["row", "source", *COLUMNS], rows, pictures)

    def _radii(self) -> Any:
        from launch.figures import Radii

        runs = self._finished("tmass")
        return Radii(runs[0]) if runs else None

    def figure_2(self) -> Section:
        radii = self._radii()
        pictures = []
        if radii is not None:
            kind, text = radii.chosen()[0]
            pictures.append((f"“{radii.features.captions[text]}” ({kind})", radii.vectors(text)))
        note = (
            "Radius of the right pair in red, of the five next best videos in blue; the first query of Figures 3 to 10."
        )
        return Section("Figure 2", note, [], [], pictures)

    def figure_3(self) -> Section:
        radii = self._radii()
        pictures, rows = [], []
        if radii is not None:
            pictures = [(f"“{radii.features.captions[t]}” ({kind})", radii.dynamics(t)) for kind, t in radii.chosen()]
            share = float((radii.place_T == 1).float().mean()) * 100
            half = float((radii.place_T <= radii.norm_TV.shape[1] / 2).float().mean()) * 100
            rows = [
                ["the right video has the smallest |R|_1", f"{share:.1f} %"],
                ["it is in the smaller half", f"{half:.1f} %"],
            ]
        note = (
            "|R|_1 of a query with every video. By rule: seven queries evenly spaced among those found at rank 1, then "
            "the failing one whose right video has the largest place in |R|_1. The paper says the right video has the "
            "smallest; the table counts it over all queries (seed 0)."
        )
        return Section("Figures 3 to 10", note, ["of all queries", "share"] if rows else [], rows, pictures)

    def section_2(self) -> Section:
        from launch.figures import scores_against_trials

        runs, points, rows = self._finished("tmass"), [], []
        for trials in (1, 5, 10, 20, 40) if runs else ():
            found = [measure(run, trials=trials) for run in runs]
            r1, seconds = spread([f["t2v"]["R@1"] for f in found]), spread([f["seconds"] for f in found])
            points.append((trials, r1, seconds))
            rows.append([f"pooling by t, M = {trials}", "query_conditioned", r1, seconds])
        by_sample = self._finished("by-sample")
        if by_sample:
            found = [measure(run) for run in by_sample]
            one = spread([f["t2v"]["R@1"] for f in found]), spread([f["seconds"] for f in found])
            rows.append(["pooling by t_s, M = 20", "query_conditioned", *one])
        pictures = [("Cost and R@1 against M", scores_against_trials(points))] if points else []
        note = "What a query costs against the number of samples M, and pooling by the sample in place of the text."
        return Section("Section 2", note, ["row", "protocol", "R@1", "seconds of scoring"], rows, pictures)

    def section_3(self) -> Section:
        rows = []
        for when, published in self.published["section_3"].items():
            rows.append([when, PUBLISHED, f"{published['tokens_m']:.2f} M", f"+{published['gain']:.1f}"])
        for when, suffix in (("before", ""), ("after", "-captions")):
            pairs = [
                (measure(one)["t2v"]["R@1"], measure(other)["t2v"]["R@1"])
                for one, other in zip(self.layout.runs(f"xpool{suffix}"), self.layout.runs(f"tmass{suffix}"))
                if is_finished(one) and is_finished(other)
            ]
            if pairs:
                tokens = _caption_tokens(self.layout.runs(f"tmass{suffix}")[0])
                gain = spread([tmass - xpool for xpool, tmass in pairs])
                where = f"measured on {TITLES[self.layout.data]}, query_conditioned, {len(pairs)} seeds"
                rows.append([when, where, f"{tokens / 1e6:.3f} M", gain])
            else:
                rows.append([when, self.absent or "not trained yet", "", ""])
        note = (
            "What T-MASS gains over X-Pool in R@1 before and after a captioner's captions were added to the "
            "training ones; tokens of all training captions. On the embedded benchmark the captioner is its generator."
        )
        return Section("Section 3", note, ["captions", "source", "caption tokens", "R@1 gain over X-Pool"], rows)

    def gain(self) -> Section:
        rows = []
        base = {run.name: run for run in self._finished("xpool")}
        for system in PARTS["gain"]:
            runs = self._finished(system)
            if not runs:
                rows.append([SYSTEMS[system].title, *["-"] * 6])
                continue
            honest = [measure(run)["t2v"] for run in runs]
            leaky = [measure(run, protocol="published_code")["t2v"]["R@1"] for run in runs]
            pairs = [m["R@1"] - measure(base[r.name])["t2v"]["R@1"] for r, m in zip(runs, honest) if r.name in base]
            rows.append(
                [
                    SYSTEMS[system].title,
                    *(spread([metrics[name] for metrics in honest]) for name in ("R@1", "R@5", "R@10", "MnR")),
                    spread(pairs) if pairs and system != "xpool" else "-",
                    spread([leak - metrics["R@1"] for leak, metrics in zip(leaky, honest)]),
                ]
            )
        note = (
            "Text to video, query_conditioned, M = 20. The gain is taken seed by seed (the same towers, order and "
            "data). The leak is what published_code adds to R@1 for the same weights."
        )
        columns = ["system", "R@1", "R@5", "R@10", "MnR", "R@1 gain over X-Pool", "the leak in R@1"]
        return Section("Is the gain real?", note, columns, rows)


def _caption_tokens(run: Path) -> int:
    """Tokens of all training captions, start and end included."""
    from tmass_dist.config import load_config
    from tmass_dist.data.index import read_sample
    from tmass_dist.models.backbone import build_tokenizer
    from tmass_dist.train import load_splits

    config = load_config(str(run / "config.yaml"))
    training, _ = load_splits(config)
    tokenize = build_tokenizer(config.model.architecture)
    texts = [text for number in range(len(training)) for text in read_sample(training, number)[0]["captions"]]
    return sum(int(tokenize([text]).shape[1]) for text in texts)


def write_page(layout: Layout, parts: list[str], absent: str | None) -> Path:
    """``index.html``, self-contained, and ``index.md`` with its pictures beside it; returns the first."""
    writer = _Writer(layout, absent)
    makers: dict[str, Callable[[], Section]] = {part: getattr(writer, part.replace(" ", "_")) for part in parts}
    sections = [make() for make in makers.values()]
    where = f"{TITLES[layout.data]}, {layout.seeds} seeds (of towers where it has its own, and of training)"
    head = (
        f"{where}. Mean ± standard deviation over seeds, R@K in percent. Checkpoints are chosen on the validation "
        "split; the published ones were chosen on the test set by code whose evaluation shows each video its answer "
        "(docs/protocol.md)."
    )
    html = layout.base / "index.html"
    pictures = layout.base / "pictures"
    pictures.mkdir(exist_ok=True)
    lines = ["# What was reproduced", "", head]
    for section in sections:
        lines += ["", f"## {section.title}", "", section.note]
        if section.columns:
            lines += ["", f"| {' | '.join(section.columns)} |", f"|{'---|' * len(section.columns)}"]
            lines += [f"| {' | '.join(cell.replace('|', '¦') for cell in row)} |" for row in section.rows]
        for number, (caption, png) in enumerate(section.pictures):
            name = f"{section.title.lower().replace(' ', '-').replace('?', '')}-{number}.png"
            (pictures / name).write_bytes(png)
            lines += ["", f"![{caption}](pictures/{name})", "", f"*{caption}*"]
    contents = {html: _html(head, sections), html.with_suffix(".md"): "\n".join(lines) + "\n"}
    for path, content in contents.items():
        aside = path.with_name(path.name + ".tmp")
        aside.write_text(content, encoding="utf-8")
        aside.replace(path)
    return html


def _html(head: str, sections: list[Section]) -> str:
    from jinja2 import Environment

    shown = [
        (section, [(caption, base64.b64encode(png).decode()) for caption, png in section.pictures])
        for section in sections
    ]
    return Environment(autoescape=True).from_string(_PAGE).render(head=head, sections=shown)


_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>tmass-dist: what was reproduced</title>
<style>
body{font:15px/1.45 system-ui,sans-serif;max-width:1100px;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:.5rem 0 1.5rem}
td,th{padding:.2rem .7rem;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child,td:nth-child(2).word,th.word{text-align:left}
tr.published td{color:#777}.label{background:#f3f3e7;padding:.5rem .8rem;border-radius:4px}
figure{margin:.5rem 0}img{max-width:100%}figcaption{color:#555}
</style>
<h1>What was reproduced</h1><p class="label">{{ head }}</p>
{% for section, pictures in sections %}<h2>{{ section.title }}</h2><p>{{ section.note }}</p>
{% if section.columns %}<table><tr>
{% for c in section.columns %}<th{% if c in ("source", "protocol") %} class="word"{% endif %}>
{{ c }}</th>{% endfor %}</tr>
{% for row in section.rows %}<tr{% if row[1].startswith("published (") %} class="published"{% endif %}>
{% for cell in row %}<td
{% if section.columns[loop.index0] in ("source", "protocol") %} class="word"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>{% endif %}
{% for caption, png in pictures %}<figure><img alt="{{ caption }}" src="data:image/png;base64,{{ png }}">
<figcaption>{{ caption }}</figcaption></figure>{% endfor %}{% endfor %}</html>
"""
