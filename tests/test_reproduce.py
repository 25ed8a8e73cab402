"""launch/reproduce.py trains the missing runs and writes published and measured numbers on one page."""

import json
from pathlib import Path

import pytest
import yaml

from launch.paper.layout import Layout
from launch.paper.measure import measure
from launch.paper.runs import prepare_towers
from launch.paper.systems import PARTS, SIZES, SYSTEMS, systems_of
from tests.conftest import ROOT, run
from tmass_dist.config import load_config
from tmass_dist.models.backbone import build_towers

PUBLISHED = yaml.safe_load((ROOT / "launch" / "paper" / "published.yaml").read_text())


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reproduced")
    command = ["launch/reproduce.py", "--table", "4", "--figure", "2", "--figure", "10", "--steps", "3"]
    done = run(*command, "--out", str(out), timeout_s=500)
    assert done.returncode == 0, done.stderr[-2000:]
    again = run(*command, "--out", str(out))  # nothing is left to train
    assert again.returncode == 0 and "0run" in again.stderr.replace(" ", ""), again.stderr[-500:]
    return out / "demo-ci"


def test_the_page_sets_published_and_measured_side_by_side(page: Path) -> None:
    text = (page / "index.md").read_text()
    assert "| MSR-VTT 1k-A, v2t | published (published code, see protocol) | 50.9 | 80.2 | 88.0 | 1.0 | 7.4 |" in text
    assert "not measured here: --data vatex" in text
    for protocol in ("published_code", "query_conditioned"):
        assert f"| embedded benchmark, t2v | embedded benchmark, {protocol}, 1 seed |" in text
    found = measure(page / "tmass" / "seed-0")
    assert f"1 seed | {found['t2v']['R@1']:.1f} | {found['t2v']['R@5']:.1f}" in text
    assert found["protocol"] == "query_conditioned" and found["selected_on"] == "val"
    # The same weights, by the evaluation itself.
    result = json.loads((page / "tmass" / "seed-0" / "evaluation" / "metrics.json").read_text())
    assert result["t2v"] == found["t2v"] and result["v2t"] == found["v2t"]
    html = (page / "index.html").read_text()
    assert html.count("<figure>") == text.count("![") >= 2 and 'src="data:image/png' in html
    assert len(list((page / "pictures").glob("figures-3-to-10-*.png"))) >= 1


def test_every_part_names_known_systems_and_every_system_is_a_config() -> None:
    assert {name for names in PARTS.values() for name in names} == set(SYSTEMS)
    for system in SYSTEMS.values():
        load_config("demo.yaml", [*system.overrides, f"data.batch_size={system.batch_size}"])
    assert "batch-256" not in systems_of(list(PARTS), SIZES["ci"].largest_batch)


def test_finer_patches_are_towers_of_the_benchmark_or_those_of_clip(tmp_path: Path) -> None:
    """Table 2: ViT-B/16 on real data; on the embedded benchmark, committed towers or towers of each seed."""
    layout = Layout("demo", "ci", 1, 3, tmp_path)
    prepare_towers(layout, ["tmass", "tmass-finer"])  # without pretraining: they are committed
    for system, patches in (("tmass", 16), ("tmass-finer", 64)):
        config = load_config("demo.yaml", layout.overrides(system, 0))
        towers = build_towers(config.model.architecture, config.model.pretrained)
        assert towers.clip.visual.positional_embedding.shape[0] == patches + 1
    full = Layout("demo", "full", 2, None, tmp_path)
    assert [full.towers("tmass-finer", seed).parent.name for seed in (0, 1)] == ["towers-0", "towers-1"]
    real = load_config("msrvtt.yaml", Layout("msrvtt", "full", 1, None, tmp_path).overrides("tmass-finer", 0))
    assert real.model.architecture == "ViT-B-16-quickgelu" and real.model.pretrained == "openai"


def test_published_figures_are_those_of_the_supplementary() -> None:
    """Read again from the text of the paper where it lies; the sums guard what is committed."""
    sums = {
        "table_1": sum(sum(v) for rows in PUBLISHED["table_1"].values() for v in rows.values()),
        "table_2": sum(sum(v) for rows in PUBLISHED["table_2"].values() for v in rows.values()),
    }
    paper = ROOT.parent / "shared" / "docs" / "seed_tmass_supplementary.txt"
    if not paper.is_file():
        assert {name: round(total, 1) for name, total in sums.items()} == {"table_1": 2138.7, "table_2": 2200.1}
        return
    lines = {tuple(float(x) for x in line.split("\t")[-5:]) for line in paper.read_text().splitlines() if _is_row(line)}
    lines |= {
        tuple(float(x) for x in line.split("\t")[-10:-5])
        for line in paper.read_text().splitlines()
        if _is_row(line, 10)
    }
    for name, rows in PUBLISHED.items():
        if name.startswith("table"):
            flat = rows.values() if name == "table_3" else (v for found in rows.values() for v in found.values())
            assert all(tuple(values) in lines for values in flat), name
    assert {name: round(total, 1) for name, total in sums.items()} == {"table_1": 2138.7, "table_2": 2200.1}


def _is_row(line: str, number: int = 5) -> bool:
    cells = line.split("\t")[-number:]
    return len(cells) == number and all(cell.replace(".", "", 1).isdigit() for cell in cells)


def test_data_that_is_not_there_is_said_and_bad_arguments_are_one_line(tmp_path: Path) -> None:
    done = run("launch/reproduce.py", "--table", "1", "--data", "vatex", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "vatex-ci" / "index.md").read_text()
    assert "no data: no shards in data/vatex/train" in text and "63.0" in text
    for more, said in (
        (["--seeds", "0"], "--seeds is 0"),
        ([], "nothing to reproduce"),
        (["--table", "7"], "choose from"),
    ):
        if said != "nothing to reproduce":
            more = [*more, "--all"]
        done = run("launch/reproduce.py", "--out", str(tmp_path), *more)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_everything_on_the_embedded_benchmark(tmp_path: Path) -> None:
    done = run("launch/reproduce.py", "--all", "--size", "ci", "--out", str(tmp_path), timeout_s=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    text = (tmp_path / "demo-ci" / "index.md").read_text()
    assert all(
        f"## {title}" in text for title in ("Table 5", "Figure 1", "Section 2", "Section 3", "Is the gain real?")
    )
    assert "not trained yet" not in text
