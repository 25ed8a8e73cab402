"""Tables 1 to 5 of the supplementary, published and measured side by side."""

from __future__ import annotations

from typing import Any

from launch.paper.results import TITLES, Results, Row, Section
from launch.paper.systems import PARTS, SYSTEMS
from tmass_dist.evaluation.report import COLUMNS

POST_PROCESSING: dict[str, dict[str, Any]] = {"none": {"post": "none"}, "dsl": {"post": "dsl"}}


def _data_set_table(
    results: Results, number: int, note: str, variants: dict[str, dict[str, Any]], system: str = "tmass"
) -> Section:
    """A table with a row for each data set and variant; the embedded benchmark's rows come last."""
    rows: list[Row] = []
    for data, published in results.published[f"table_{number}"].items():
        for key, values in published.items():
            label = f"{TITLES[data]}, {key}" if key != "none" else TITLES[data]
            rows += [
                results.published_row(label, values),
                *results.measured_rows(label, system, data, **variants[key]),
            ]
    if results.layout.data == "demo":
        for key, options in variants.items():
            label = f"{TITLES['demo']}, {key}" if key != "none" else TITLES["demo"]
            rows += results.measured_rows(label, system, **options)
    return Section(f"Table {number}", note, ["row", "source", *COLUMNS], rows)


def table_1(results: Results) -> Section:
    """ViT-B/32, text to video."""
    note = (
        "Text to video with ViT-B/32 (the embedded benchmark: its own towers), without and with DSL, which uses all "
        "test queries at once (transductive)."
    )
    return _data_set_table(results, 1, note, POST_PROCESSING)


def table_2(results: Results) -> Section:
    """ViT-B/16, text to video."""
    note = (
        "Text to video with ViT-B/16 (the embedded benchmark: its own towers, with patches of 4 pixels in place of 8), "
        "without and with DSL, which uses all test queries at once (transductive)."
    )
    return _data_set_table(results, 2, note, POST_PROCESSING, "tmass-finer")


def table_3(results: Results) -> Section:
    """The unlearnable radius, with and without the loss on samples."""
    rows: list[Row] = []
    for name, values in results.published["table_3"].items():
        system, _, trials = name.rpartition("-") if name.startswith("sampled-only") else (name, "", "20")
        label = SYSTEMS[system].title + (f", M = {trials}" if system != "xpool" else "")
        rows += [results.published_row(label, values), *results.measured_rows(label, system, trials=int(trials))]
    note = "Sampling with the unlearnable radius, with and without L_s. Published: MSR-VTT 1k-A."
    return Section("Table 3", note, ["row", "source", *COLUMNS], rows)


def table_4(results: Results) -> Section:
    """Both directions."""
    variants = {"t2v": {"direction": "t2v"}, "v2t": {"direction": "v2t"}}
    return _data_set_table(results, 4, "Text to video and video to text.", variants)


def table_5(results: Results) -> Section:
    """Larger batches."""
    rows: list[Row] = []
    for data, published in results.published["table_5"].items():
        for batch, values in published.items():
            label = f"{TITLES[data]}, batch {batch}"
            rows.append(results.published_row(label, values))
            if data != results.layout.data:
                rows += results.measured_rows(label, "tmass" if batch == 32 else f"batch-{batch}", data)
    for name in PARTS["table 5"]:
        system = SYSTEMS[name]
        if system.batch_size <= results.layout.size.largest_batch:
            same_steps = ", as many steps" if system.as_many_steps else ""
            rows += results.measured_rows(f"{results.data_title}, batch {system.batch_size}{same_steps}", name)
    note = (
        "Larger global batches at the same learning rates. Every run sees as many pairs, so a larger batch takes "
        "fewer steps; one row has as many steps as batch 32 instead."
    )
    return Section("Table 5", note, ["row", "source", *COLUMNS], rows)
