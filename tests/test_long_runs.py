"""The long comparison: which run is next, and results that survive a kill."""

import json
import math
from pathlib import Path

import pytest
import torch

from launch.paper.long_runs import (
    COMPARED,
    WITHOUT_HEAD,
    LongRun,
    Rates,
    Setting,
    append_result,
    chosen_rates,
    hits_of,
    missing_runs,
    read_results,
)
from launch.paper.long_table import calibration_table, long_table
from launch.paper.systems import SYSTEMS as PAPER_SYSTEMS
from tests.conftest import ROOT, run
from tmass_dist.config import load_config
from tmass_dist.errors import UserError
from tmass_dist.models.head import build_head

SETTING = Setting("trained", 400, 1200)
SYSTEMS = ["xpool", "best-frame"]


def _row(system: str, seed: int, rate: float, recall: float) -> dict[str, object]:
    setting = {"image_tower": SETTING.image_tower, "videos": SETTING.videos, "steps": SETTING.steps}
    return {**setting, "system": system, "seed": seed, "rate": rate, "val_R@1": recall}


def test_first_the_rates_of_seed_0_until_the_best_has_both_neighbours_then_every_seed_at_it() -> None:
    best = {"xpool": Rates(1.0), "best-frame": Rates(10.0)}
    done: list[dict[str, object]] = []
    order = []
    while run := next(missing_runs(done, SETTING, SYSTEMS, 2), None):
        order.append((run.system, run.seed, run.rates.towers))
        done.append(_row(*order[-1], recall=-abs(math.log(run.rates.towers / best[run.system].towers))))
    assert order == [
        *(("xpool", 0, rate) for rate in (1.0, 0.3, 3.0)),
        *(("best-frame", 0, rate) for rate in (1.0, 0.3, 3.0, 10.0)),
        ("xpool", 1, 1.0),
        ("best-frame", 1, 10.0),
    ]
    assert chosen_rates(done, SETTING) == best
    assert next(missing_runs(done, Setting("frozen", 400, 1200), SYSTEMS, 1)).seed == 0


def test_the_best_rates_may_have_another_rate_of_the_head() -> None:
    done = [_row("xpool", 0, rate, recall=-abs(math.log(rate))) for rate in (0.3, 1.0, 3.0)]
    order = []
    while run := next(missing_runs(done, SETTING, ["xpool"], 2, "third"), None):
        order.append((run.seed, run.rates))
        better = 1 - abs(math.log(run.rates.towers / 3))
        done.append(_row("xpool", run.seed, run.rates.towers, recall=better) | {"head_rate": run.rates.head})
    thirds = [Rates(rate, "third") for rate in (3.0, 1.0, 10.0)]
    assert order == [*((0, rates) for rates in thirds), (1, thirds[0])]
    assert chosen_rates(done, SETTING) == {"xpool": Rates(3.0, "third")}
    assert LongRun(SETTING, "xpool", 1, thirds[0]).name == "trained-400-1200/xpool/seed-1-rate-3-head-third"


def test_a_rate_of_a_head_without_weights_is_refused(tmp_path: Path) -> None:
    heads = {
        name: build_head(load_config("demo.yaml", list(PAPER_SYSTEMS[name].overrides)).model, 8) for name in COMPARED
    }
    assert tuple(name for name, head in heads.items() if not list(head.parameters())) == WITHOUT_HEAD
    done = run("launch/long_runs.py", "--out", str(tmp_path / "out"), "--head-rate", "third")
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert done.stderr == "error: --head-rate third: best-frame has no weights in its head; name --systems\n"


def test_options_of_training_do_not_go_with_the_table() -> None:
    done = run("launch/long_runs.py", "--table", "--seeds", "3")
    assert done.returncode == 2
    assert done.stderr == "error: --seeds does not go with --table, which trains nothing\n"


def test_a_best_rate_at_the_edge_of_those_measured_is_not_chosen() -> None:
    done = [_row("xpool", 0, rate, recall=rate) for rate in (0.3, 1.0, 3.0)]
    assert chosen_rates(done, SETTING) == {}
    assert chosen_rates([*done, _row("xpool", 0, 10.0, recall=0.0)], SETTING) == {"xpool": Rates(3.0)}


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


def _with_calibration(
    system: str, seed: int, rate: float, recall: float, **signals: tuple[float, float, float]
) -> dict:
    found = {name: {"auroc": value, "interval_95": [low, high]} for name, (value, low, high) in signals.items()}
    return _row(system, seed, rate, recall) | {"calibration": found}


def test_calibration_is_averaged_over_the_seeds_of_the_chosen_rate() -> None:
    done = [
        _row("xpool", 0, 1.0, 50.0),  # of a version that did not keep it
        _with_calibration("best-frame", 0, 1.0, 60.0, score=(0.6, 0.55, 0.65)),
        _with_calibration("best-frame", 0, 3.0, 50.0, score=(0.9, 0.85, 0.95)),  # not the best rate
        _with_calibration("best-frame", 1, 1.0, 40.0, score=(0.4, 0.35, 0.45)),
        _with_calibration("tmass", 0, 1.0, 40.0, score=(0.5, 0.4, 0.6), radius=(0.3, 0.2, 0.4)),
    ]
    lines = calibration_table(done).splitlines()
    assert lines[0] == "| setting | system | seeds | score | radius |"
    where = "trained, 400 videos, 1200 steps"
    assert lines[2:] == [
        f"| {where} | best frame, trained | 2 | 0.50 (above on 1, below on 1) |  |",
        f"| {where} | T-MASS | 1 | 0.50 (above on 0, below on 0) | 0.30 (above on 0, below on 1) |",
    ]
    assert calibration_table(done[:1]) == "no calibration"


def test_the_table_of_the_findings_is_made_from_the_committed_results() -> None:
    path = ROOT / "docs" / "long_runs.jsonl"
    rows = read_results(path)
    assert all(sum(map(int, row["hits"]["result"])) / 14.4 == pytest.approx(row["t2v"]["R@1"]) for row in rows)
    findings = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
    assert long_table(rows) in findings and calibration_table(rows) in findings
    assert json.loads(path.read_text().splitlines()[0])["protocol"] == "query_conditioned"
