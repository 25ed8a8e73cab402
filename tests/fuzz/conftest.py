"""The seed of the cases, files to damage, and the table of cases by form of input."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import hypothesis.core
import numpy as np
import pytest
import simplejpeg
import torch

from shards.shard_writer import ShardWriter
from tests.fuzz import rule
from tmass_dist import TMass
from tmass_dist.config import load_config
from tmass_dist.data.index import Index, make_columns
from tmass_dist.models.tmass import build_model
from tmass_dist.retrieval import build
from tmass_dist.retrieval.videos import files_of


def _seed() -> int:
    """``FUZZ_SEED``, or a number made from the commit, so that each commit runs other cases."""
    if given := os.environ.get("FUZZ_SEED"):
        return int(given)
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=rule.ROOT, capture_output=True, text=True)
    return int(done.stdout.strip()[:8] or "0", 16)


SEED = _seed()


@pytest.fixture(autouse=True)
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    if hypothesis.core.global_force_seed is None:
        monkeypatch.setattr(hypothesis.core, "global_force_seed", SEED)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not rule.counts:
        return
    terminalreporter.write_sep("-", f"hostile input, seed {hypothesis.core.global_force_seed or SEED}")
    terminalreporter.write_line(
        f"{'form of input':34} {'cases':>7} {'results':>8} {'errors':>7} {'failures':>9} {'s':>7}"
    )
    rows = [(form, count, rule.seconds[form]) for form, count in sorted(rule.counts.items())]
    whole = sum((count for _, count, _ in rows), rule.Counter())
    for form, count, time_s in [*rows, ("all", whole, sum(rule.seconds.values()))]:
        numbers = f"{count['cases']:7} {count['results']:8} {count['errors']:7} {count['failures']:9} {time_s:7.1f}"
        terminalreporter.write_line(f"{form:34} {numbers}")


@pytest.fixture(scope="session")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed split of two shards with two samples each: 2 frames of 16 pixels and 2 captions."""
    out = tmp_path_factory.mktemp("split")
    jpeg = simplejpeg.encode_jpeg(np.full((16, 16, 3), 90, np.uint8), colorspace="RGB")
    shards, samples = [], []
    for number in range(2):
        writer = ShardWriter(out / f"shard-{number:06d}.tar")
        for name in ("a", "b"):
            row = {"id": f"{name}{number}", "path": f"{name}.mp4", "captions": [f"caption {name}", "another"]}
            writer.add(row, {"000.jpg": jpeg, "001.jpg": jpeg}, {})
        shard, places = writer.close()
        shards.append(shard)
        samples += [replace(place, shard=number) for place in places]
    Index(str(out), "train", 2, 16, "jpeg", tuple(shards), make_columns(samples)).save()
    return out


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stored features of a split, with a head."""
    from tests.stores import write_store

    return write_store(tmp_path_factory.mktemp("store") / "features")


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model of the demo's size."""
    out = tmp_path_factory.mktemp("export") / "model"
    torch.manual_seed(0)
    config = load_config("demo.yaml")
    model = TMass.of_weights(config, build_model(config.model).state_dict(), "this test")
    model.save_pretrained(out)
    return out


@pytest.fixture(scope="session")
def gallery(export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gallery of two short clips."""
    out = tmp_path_factory.mktemp("gallery")
    videos = out / "videos"
    videos.mkdir()
    for name in ("gradio_a.mp4", "pyfeat_no_face.mp4"):
        shutil.copy(rule.ROOT / "tests" / "clips" / name, videos)
    build.update(TMass.from_pretrained(export), str(export), out / "gallery", files_of(videos))
    return out / "gallery"
