"""The supplementary's figures from finished runs, as PNG, and the sections that show them."""

from __future__ import annotations

import re
from pathlib import Path

from launch.paper.measure import TRIALS
from launch.paper.results import PUBLISHED, Results, Row, Section
from launch.paper.systems import SYSTEMS
from tmass_dist.evaluation.report import COLUMNS
from tmass_dist.pictures import figure, png

VALIDATION = re.compile(r"metrics/val/query_conditioned/(M\d+/)?t2v_R@1")
"""The tag of the validations; version 0.1 left M out."""


def figure_1(results: Results) -> Section:
    """Training curves of T-MASS and its KL variant."""
    tmass, kl = results.finished("tmass"), results.finished("kl")
    pictures = [("Figure 1", training_curves(tmass, kl))] if tmass and kl else []
    rows = results.measured_rows("T-MASS", "tmass") + results.measured_rows(SYSTEMS["kl"].title, "kl")
    bound = f"below {results.published['figure_1']['kl_below']:.0f}"
    rows.append(Row(["KL, MSR-VTT", PUBLISHED, bound, "", "", "", ""], "published"))
    note = (
        f"R@1 (query_conditioned, M = {TRIALS}) on the validation split and the KL term during training, weight 1, "
        "prior N(0, I)."
    )
    return Section("Figure 1", note, ["row", "source", *COLUMNS], rows, pictures)


def figure_2(results: Results) -> Section:
    """Radii of one query."""
    pictures = []
    if results.radii is not None:
        kind, text = results.radii.example_queries()[0]
        pictures.append((f"“{results.radii.features.captions[text]}” ({kind})", results.radii.vectors_picture(text)))
    note = "Radius of the right pair in red, of the five next best videos in blue; the first query of Figures 3 to 10."
    return Section("Figure 2", note, pictures=pictures)


def figure_3(results: Results) -> Section:
    """Norms of the radii of eight queries, and how often the paper's observation holds."""
    radii = results.radii
    pictures, rows = [], []
    if radii is not None:
        for kind, text in radii.example_queries():
            pictures.append((f"“{radii.features.captions[text]}” ({kind})", radii.norms_picture(text)))
        smallest = float((radii.norm_rank_T == 1).float().mean()) * 100
        smaller_half = float((radii.norm_rank_T <= radii.norm_TV.shape[1] / 2).float().mean()) * 100
        rows = [
            Row(["the right video has the smallest |R|_1", f"{smallest:.1f} %"]),
            Row(["the right video is in the smaller half", f"{smaller_half:.1f} %"]),
        ]
    note = (
        "|R|_1 of a query with every video. The queries are chosen by rule: seven evenly spaced ones among those whose "
        "right video is at rank 1, then the failing one whose right video has the largest place in |R|_1. The paper "
        "says that the right video has the smallest; the table counts it over all queries (seed 0)."
    )
    return Section("Figures 3 to 10", note, ["of all queries", "share"] if rows else [], rows, pictures)


def training_curves(tmass: list[Path], kl: list[Path]) -> bytes:
    """Figure 1: validation R@1 and the KL term over training, T-MASS and the KL variant, a line for each seed."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    drawn, (left, right) = figure(2)
    for runs, colour, name in ((tmass, "tab:red", "T-MASS"), (kl, "tab:blue", "KL variant")):
        for number, run in enumerate(runs):
            events = EventAccumulator(str(run)).Reload()
            tags = [tag for tag in events.Tags()["scalars"] if VALIDATION.fullmatch(tag)]
            points = [point for tag in tags for point in events.Scalars(tag)]
            label = name if number == 0 else None
            left.plot([p.step for p in points], [p.value for p in points], color=colour, marker=".", label=label)
            if name == "KL variant":
                points = events.Scalars("loss/kl")
                right.plot([p.step for p in points], [p.value for p in points], color=colour, label=label)
    left.set(xlabel="step", ylabel="R@1 on val")
    right.set(xlabel="step", ylabel="KL term of the loss")
    left.legend()
    return png(drawn)


def scores_against_trials(points: list[tuple[int, list[float], float]]) -> bytes:
    """Section 2: R@1 and seconds against M.

    Args:
        points: ``(M, R@1 of each seed, seconds)``.
    """
    drawn, (left, right) = figure(2)
    trials = [m for m, _, _ in points]
    for values in zip(*(r1 for _, r1, _ in points)):
        left.plot(trials, values, marker="o")
    left.set(xlabel="M (0: the text itself)", ylabel="R@1, a line for each seed")
    right.plot(trials, [seconds for _, _, seconds in points], marker="o")
    right.set(xlabel="M", ylabel="seconds of scoring", ylim=(0, None), xlim=(0, None))
    return png(drawn)
