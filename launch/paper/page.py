"""One page of what was reproduced: a row for each row of the paper, published and measured side by side."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.paper.measure import gain_of, is_finished, measure, numbers, spread
from launch.paper.systems import PARTS, SYSTEMS
from tmass_dist.evaluation.report import COLUMNS

if TYPE_CHECKING:
    from launch.paper.layout import Layout

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

    def _measured(self, label: str, system: str, data: str | None = None, **options: Any) -> list[list[str]]:
        """Both protocols of one system, here or on another data set that was reproduced beside this one."""
        data = data or self.layout.data
        runs = [run for run in self.layout.of(data).runs(system) if is_finished(run)]
        if runs:
            return [
                [label, f"{TITLES[data]}, {protocol}, {_seeds(runs)}", *numbers(runs, protocol=protocol, **options)]
                for protocol in ("published_code", "query_conditioned")
            ]
        why = f"not measured here: --data {data}"
        if data == self.layout.data:
            why = f"no data: {self.absent}" if self.absent else f"not trained yet: {self.layout.runs(system)[0]}"
        return [[label, why, *[""] * len(COLUMNS)]]

    def _line(self, label: str, values: list[float]) -> list[str]:
        return [label, PUBLISHED, *(f"{value:.1f}" for value in values)]

    def _of_data_sets(
        self, number: int, note: str, variants: dict[str, dict[str, Any]], system: str = "tmass"
    ) -> Section:
        """A table of the paper with a row for each data set and variant; the embedded benchmark's rows come last."""
        rows = []
        for data, published in self.published[f"table_{number}"].items():
            for key, values in published.items():
                label = f"{TITLES[data]}, {key}" if key != "none" else TITLES[data]
                rows += [self._line(label, values), *self._measured(label, system, data, **variants[key])]
        if self.layout.data == "demo" and system == "tmass":
            for key, options in variants.items():
                label = f"{TITLES['demo']}, {key}" if key != "none" else TITLES["demo"]
                rows += self._measured(label, system, **options)
        return Section(f"Table {number}", note, ["row", "source", *COLUMNS], rows)

    def table_1(self) -> Section:
        note = (
            "Text to video with ViT-B/32 (the embedded benchmark: its own towers), without and with DSL, which sees "
            "all queries (transductive)."
        )
        return self._of_data_sets(1, note, {"none": {"post": "none"}, "dsl": {"post": "dsl"}})

    def table_2(self) -> Section:
        note = "Text to video with ViT-B/16; the embedded benchmark has one size of towers, which Table 1 shows."
        return self._of_data_sets(2, note, {"none": {"post": "none"}, "dsl": {"post": "dsl"}}, "tmass-b16")

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
        return self._of_data_sets(4, "Text to video and video to text.", variants)

    def table_5(self) -> Section:
        rows = []
        for data, published in self.published["table_5"].items():
            for batch, values in published.items():
                label = f"{TITLES[data]}, batch {batch}"
                rows.append(self._line(label, values))
                if data != self.layout.data:
                    rows += self._measured(label, "tmass" if batch == 32 else f"batch-{batch}", data)
        where = TITLES[self.layout.data]
        for system in PARTS["table 5"]:
            one = SYSTEMS[system]
            if one.batch_size <= self.layout.size.largest_batch:
                more = ", as many steps" if one.as_many_steps else ""
                rows += self._measured(f"{where}, batch {one.batch_size}{more}", system)
        note = (
            "Larger global batches at the same learning rates. Measured with as many pairs seen, as an epoch sees, so "
            "that a larger batch takes fewer steps; once also with as many steps as batch 32."
        )
        return Section("Table 5", note, ["row", "source", *COLUMNS], rows)

    def figure_1(self) -> Section:
        from launch.paper.figures import training_curves

        runs = self._finished("tmass"), self._finished("kl")
        pictures = [("Figure 1", training_curves(*runs))] if all(runs) else []
        rows = self._measured("T-MASS", "tmass") + self._measured(SYSTEMS["kl"].title, "kl")
        rows.append(["KL, MSR-VTT", PUBLISHED, f"below {self.published['figure_1']['kl_below']:.0f}", "", "", "", ""])
        note = "R@1 on the validation split and the KL term during training, weight 1, prior N(0, I)."
        return Section("Figure 1", note, ["row", "source", *COLUMNS], rows, pictures)

    @cached_property
    def _radii(self) -> Any:
        """Of T-MASS's first seed; Figure 2 and Figures 3 to 10 share them."""
        from launch.paper.figures import Radii

        runs = self._finished("tmass")
        return Radii(runs[0]) if runs else None

    def figure_2(self) -> Section:
        radii = self._radii
        pictures = []
        if radii is not None:
            kind, text = radii.chosen()[0]
            pictures.append((f"“{radii.features.captions[text]}” ({kind})", radii.vectors(text)))
        note = (
            "Radius of the right pair in red, of the five next best videos in blue; the first query of Figures 3 to 10."
        )
        return Section("Figure 2", note, [], [], pictures)

    def figure_3(self) -> Section:
        radii = self._radii
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
        from launch.paper.figures import scores_against_trials

        runs, points, rows = self._finished("tmass"), [], []
        for trials in (0, 1, 5, 10, 20, 40) if runs else ():
            found = [measure(run, trials=trials) for run in runs]
            r1 = [f["t2v"]["R@1"] for f in found]
            seconds = min(f["seconds"] for f in found)
            points.append((trials, r1, seconds))
            name = f"pooling by t, M = {trials}" if trials else "pooling by t, the text itself (M = 0)"
            rows.append([name, "query_conditioned", spread(r1), f"{seconds:.2f}"])
        by_sample = self._finished("by-sample")
        if by_sample:
            found = [measure(run) for run in by_sample]
            seconds = min(f["seconds"] for f in found)
            r1 = spread([f["t2v"]["R@1"] for f in found])
            rows.append(["pooling by t_s, M = 20", "query_conditioned", r1, f"{seconds:.2f}"])
        pictures = [("Cost and R@1 against M", scores_against_trials(points))] if points else []
        note = (
            "What evaluation costs against the number of samples M (the fastest of the seeds' runs), and pooling by "
            "the sample in place of the text."
        )
        return Section("Section 2", note, ["row", "protocol", "R@1", "seconds of scoring"], rows, pictures)

    def section_3(self) -> Section:
        rows = []
        for when, published in self.published["section_3"].items():
            rows.append([when, PUBLISHED, f"{published['tokens_m']:.2f} M", f"+{published['gain']:.1f}", ""])
        for when, suffix in (("before", ""), ("after", "-captions")):
            pairs = self._pairs(f"xpool{suffix}", f"tmass{suffix}")
            if pairs:
                tokens = _caption_tokens(self.layout.runs(f"tmass{suffix}")[0])
                where = f"{TITLES[self.layout.data]}, query_conditioned, {_seeds(pairs)}"
                rows.append([when, where, f"{tokens / 1e6:.3f} M", *_gain(pairs)])
            else:
                rows.append([when, self.absent or "not trained yet", "", "", ""])
        note = (
            "What T-MASS gains over X-Pool in R@1 before and after a captioner's captions were added to the "
            "training ones; tokens of all training captions. On the embedded benchmark the captioner is its generator."
        )
        return Section(
            "Section 3", note, ["captions", "source", "caption tokens", "R@1 gain over X-Pool", "95 %"], rows
        )

    def _pairs(self, first: str, second: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """What two systems gave on the same seed, for every seed that both have finished."""
        both = zip(self.layout.runs(first), self.layout.runs(second))
        return [(measure(one), measure(other)) for one, other in both if is_finished(one) and is_finished(other)]

    def gain(self) -> Section:
        rows = []
        for system in PARTS["gain"]:
            runs = self._finished(system)
            if not runs:
                rows.append([SYSTEMS[system].title, *["-"] * 8])
                continue
            honest = [measure(run)["t2v"] for run in runs]
            leaky = [measure(run, protocol="published_code")["t2v"]["R@1"] for run in runs]
            unsampled = [measure(run, trials=0)["t2v"]["R@1"] for run in runs]
            rows.append(
                [
                    SYSTEMS[system].title,
                    *(spread([metrics[name] for metrics in honest]) for name in ("R@1", "R@5", "R@10", "MnR")),
                    *(_gain(self._pairs("xpool", system)) if system != "xpool" else ("-", "")),
                    spread([metrics["R@1"] - plain for plain, metrics in zip(unsampled, honest)]),
                    spread([leak - metrics["R@1"] for leak, metrics in zip(leaky, honest)]),
                ]
            )
        note = (
            "Text to video, query_conditioned, M = 20. The gain is taken seed by seed (the same towers, order and "
            "data); its 95 % interval is a bootstrap over seeds and videos. For the same weights: what 20 samples add "
            "to the R@1 of the text itself, and what published_code adds to R@1 (the leak)."
        )
        columns = ["system", "R@1", "R@5", "R@10", "MnR", "R@1 gain over X-Pool", "95 %", "M = 20 over M = 0", "leak"]
        return Section("Is the gain real?", note, columns, rows)


def _seeds(runs: list[Any]) -> str:
    return f"{len(runs)} seed{'s' if len(runs) > 1 else ''}"


def _gain(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> tuple[str, str]:
    """Gain in R@1 over the seeds, and its interval."""
    if not pairs:
        return "-", ""
    gains, low, high = gain_of(pairs)
    return spread(gains), f"{low:+.1f} to {high:+.1f}"


def _caption_tokens(run: Path) -> int:
    """Tokens of all training captions, start and end included."""
    from tmass_dist.config import load_config
    from tmass_dist.data.index import read_sample
    from tmass_dist.models.backbone import build_tokenizer
    from tmass_dist.training.checks import load_splits

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
    where = f"{TITLES[layout.data]}, {_seeds(layout.runs('tmass'))} (of towers where it has its own, and of training)"
    head = (
        f"{where}. Mean ± standard deviation over seeds, R@K in percent. Checkpoints are chosen on the validation "
        "split; measured rows say data, protocol and seeds. The published checkpoints were chosen on the test set by "
        "code whose evaluation shows each video its answer, as published_code does here (docs/protocol.md)."
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
tr.published td{color:#777}tr.absent td{color:#aaa}tr.honest td{font-weight:600}
.label{background:#f3f3e7;padding:.5rem .8rem;border-radius:4px}
figure{margin:.5rem 0}img{max-width:100%}figcaption{color:#555}
</style>
<h1>What was reproduced</h1><p class="label">{{ head }}</p>
{% for section, pictures in sections %}<h2>{{ section.title }}</h2><p>{{ section.note }}</p>
{% if section.columns %}<table><tr>
{% for c in section.columns %}<th{% if c in ("source", "protocol") %} class="word"{% endif %}>
{{ c }}</th>{% endfor %}</tr>
{% for row in section.rows %}<tr class="{% if row[1].startswith("published (") %}published
{% elif row[1].startswith("no") %}absent{% elif "query_conditioned, " in row[1] %}honest{% endif %}">
{% for cell in row %}<td
{% if section.columns[loop.index0] in ("source", "protocol") %} class="word"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>{% endif %}
{% for caption, png in pictures %}<figure><img alt="{{ caption }}" src="data:image/png;base64,{{ png }}">
<figcaption>{{ caption }}</figcaption></figure>{% endfor %}{% endfor %}</html>
"""
