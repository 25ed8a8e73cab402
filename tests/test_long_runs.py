"""The long comparison: which run is next, and results that survive a kill."""

import json
from pathlib import Path

import pytest
import torch

from launch.paper.long_runs import RATES, Setting, append_result, chosen_rates, hits_of, missing_runs, read_results
from launch.paper.long_table import long_table
from tests.conftest import ROOT
from tmass_dist.errors import UserError

SETTING = Setting("trained", 400, 1200)
SYSTEMS = ["xpool", "best-frame"]


def _row(system: str, seed: int, rate: float, recall: float) -> dict[str, object]:
    setting = {"image_tower": SETTING.image_tower, "videos": SETTING.videos, "steps": SETTING.steps}
    return {**setting, "system": system, "seed": seed, "rate": rate, "val_R@1": recall}


def test_first_every_seed_at_one_rate_then_the_rates_then_every_seed_at_the_chosen_rate() -> None:
    done: list[dict[str, object]] = []
    order = []
    while run := next(missing_runs(done, SETTING, SYSTEMS, 2), None):
        order.append((run.system, run.seed, run.rate))
        done.append(_row(*order[-1], recall=run.rate if run.system == "best-frame" else -run.rate))
    first = [(system, seed, 1.0) for seed in (0, 1) for system in SYSTEMS]
    rates = [(system, 0, rate) for rate in RATES[1:] for system in SYSTEMS]
    assert chosen_rates(done, SETTING) == {"xpool": 0.3, "best-frame": 3.0}
    assert order == [*first, *rates, ("xpool", 1, 0.3), ("best-frame", 1, 3.0)]
    assert next(missing_runs(done, Setting("frozen", 400, 1200), SYSTEMS, 1)).seed == 0


def test_an_incomplete_last_line_is_left_out_and_another_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    append_result(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"a": 2')
    assert read_results(path) == [{"a": 1}]
    append_result(path, {"a": 3})
    assert read_results(path) == [{"a": 1}, {"a": 3}]
    path.write_text('{"a"\n{"a": 1}\n')
    with pytest.raises(UserError, match=r"results.jsonl:1 is damaged"):
        read_results(path)


def test_hits_are_counted_for_each_video() -> None:
    assert hits_of(torch.tensor([1, 2, 1, 1]), torch.tensor([0, 0, 2, 2])) == "102"


def test_the_table_of_the_findings_is_made_from_the_committed_results() -> None:
    path = ROOT / "docs" / "long_runs.jsonl"
    rows = read_results(path)
    assert all(sum(map(int, row["hits"]["result"])) / 14.4 == pytest.approx(row["t2v"]["R@1"]) for row in rows)
    assert long_table(rows) in (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
    assert json.loads(path.read_text().splitlines()[0])["protocol"] == "query_conditioned"
