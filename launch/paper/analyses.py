"""Sections 2 and 3 of the supplementary, and the gain of T-MASS over X-Pool under the query_conditioned protocol."""

from __future__ import annotations

from pathlib import Path

from launch.paper.figures import scores_against_trials
from launch.paper.measure import mean_and_deviation, measure
from launch.paper.results import PUBLISHED, Results, Row, Section, count_seeds, gain_cells
from launch.paper.systems import PARTS, SYSTEMS


def section_2(results: Results) -> Section:
    """Cost and R@1 against the number of samples."""
    runs, points, rows = results.finished("tmass"), [], []
    for trials in (0, 1, 5, 10, 20, 40) if runs else ():
        measured = [measure(run, trials=trials) for run in runs]
        r1 = [one["t2v"]["R@1"] for one in measured]
        seconds = min(one["seconds"] for one in measured)
        points.append((trials, r1, seconds))
        name = f"pooling by t, M = {trials}" if trials else "pooling by t, the text itself (M = 0)"
        rows.append(Row([name, "query_conditioned", mean_and_deviation(r1), f"{seconds:.2f}"]))
    by_sample = results.finished("by-sample")
    if by_sample:
        measured = [measure(run) for run in by_sample]
        seconds = min(one["seconds"] for one in measured)
        r1 = mean_and_deviation([one["t2v"]["R@1"] for one in measured])
        rows.append(Row(["pooling by t_s, M = 20", "query_conditioned", r1, f"{seconds:.2f}"]))
    pictures = [("Cost and R@1 against M", scores_against_trials(points))] if points else []
    note = (
        "Cost of evaluation against the number of samples M (the fastest seed), and pooling by the sample instead of "
        "the text."
    )
    return Section("Section 2", note, ["row", "protocol", "R@1", "seconds of scoring"], rows, pictures)


def section_3(results: Results) -> Section:
    """The gain with and without a captioner's captions."""
    rows: list[Row] = []
    for when, published in results.published["section_3"].items():
        cells = [when, PUBLISHED, f"{published['tokens_m']:.2f} M", f"+{published['gain']:.1f}", ""]
        rows.append(Row(cells, "published"))
    for when, suffix in (("before", ""), ("after", "-captions")):
        pairs = results.seed_pairs(f"xpool{suffix}", f"tmass{suffix}")
        if pairs:
            tokens = _count_caption_tokens(results.layout.runs(f"tmass{suffix}")[0])
            source = f"{results.data_title}, query_conditioned, {count_seeds(pairs)}"
            rows.append(Row([when, source, f"{tokens / 1e6:.3f} M", *gain_cells(pairs)], "query_conditioned"))
        else:
            reason = f"no data: {results.missing_data}" if results.missing_data else "not trained yet"
            rows.append(Row([when, reason, "", "", ""], "missing"))
    note = (
        "Gain of T-MASS over X-Pool in R@1 before and after a captioner's captions were added to the training set, "
        "with the tokens of all training captions. On the embedded benchmark the captioner is its generator."
    )
    columns = ["captions", "source", "caption tokens", "R@1 gain over X-Pool", "95 %"]
    return Section("Section 3", note, columns, rows)


def gain(results: Results) -> Section:
    """Every variant against X-Pool, on equal terms."""
    rows: list[Row] = []
    for system in PARTS["gain"]:
        runs = results.finished(system)
        if not runs:
            rows.append(Row([SYSTEMS[system].title, *["-"] * 8]))
            continue
        conditioned = [measure(run)["t2v"] for run in runs]
        leaked_r1 = [measure(run, protocol="published_code")["t2v"]["R@1"] for run in runs]
        unsampled_r1 = [measure(run, trials=0)["t2v"]["R@1"] for run in runs]
        cells = [
            SYSTEMS[system].title,
            *(mean_and_deviation([metrics[name] for metrics in conditioned]) for name in ("R@1", "R@5", "R@10", "MnR")),
            *(gain_cells(results.seed_pairs("xpool", system)) if system != "xpool" else ("-", "")),
            mean_and_deviation([metrics["R@1"] - plain for plain, metrics in zip(unsampled_r1, conditioned)]),
            mean_and_deviation([leak - metrics["R@1"] for leak, metrics in zip(leaked_r1, conditioned)]),
        ]
        rows.append(Row(cells))
    note = (
        "Text to video, query_conditioned, M = 20. The gain is the difference at the same seed (the same towers, data "
        "order and data); its 95 % interval is a bootstrap over seeds and videos. The last two columns compare the "
        "same weights: R@1 with 20 samples minus R@1 of the text itself, and R@1 under published_code minus R@1 under "
        "query_conditioned (the leak)."
    )
    columns = ["system", "R@1", "R@5", "R@10", "MnR", "R@1 gain over X-Pool", "95 %", "M = 20 over M = 0", "leak"]
    return Section("Is the gain real?", note, columns, rows)


def _count_caption_tokens(run: Path) -> int:
    """Tokens of all training captions, start and end tokens included."""
    from tmass_dist.config import load_config
    from tmass_dist.data.samples import read_sample
    from tmass_dist.models.backbone import build_tokenizer
    from tmass_dist.training.checks import load_splits

    config = load_config(str(run / "config.yaml"))
    training, _ = load_splits(config)
    tokenize = build_tokenizer(config.model.architecture)
    texts = [text for number in range(len(training)) for text in read_sample(training, number)[0]["captions"]]
    return sum(int(tokenize([text]).shape[1]) for text in texts)
