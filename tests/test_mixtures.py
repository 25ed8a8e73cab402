"""Mixtures of splits: exact counts, the same batches for every world size, resume at any step."""

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import run
from tests.faulty_server import FaultyServer
from tests.loaders import global_batches, make_loaders
from tests.processes import train_and_be_killed
from tests.ranks import on_ranks
from tests.resharded import reshard
from tmass_dist.config import DataConfig, TrainPart, load_config, to_yaml
from tmass_dist.data.cache import GB, CachePlan, needed_bytes, node_uses
from tmass_dist.data.index import Index, Shard, load_index
from tmass_dist.data.mixed_order import OneSetStreamingOrder, make_order
from tmass_dist.data.mixture import Mixture, make_mixture, part_names
from tmass_dist.data.samples import read_sample
from tmass_dist.data.streaming import StreamingOrder
from tmass_dist.errors import UserError
from tmass_dist.training.loop import train

KINDS = [(order, batch_from) for order in ("global", "streaming") for batch_from in ("mixed", "one")]


def _index(directory: str, num_captions: list[int], per_shard: int, image_size: int = 32) -> Index:
    """An index without files."""
    number = len(num_captions)
    ids = "".join(f"v{k:04d}" for k in range(number)).encode()
    columns = {
        "shard": (np.arange(number) // per_shard).astype(np.int32),
        "num_captions": np.array(num_captions, np.int32),
        "offset": np.zeros(number, np.int64),
        "size": np.full(number, 512, np.int64),
        "crc32": np.zeros(number, np.uint32),
        "id_bytes": np.frombuffer(ids, np.uint8),
        "id_end": np.arange(5, 5 * number + 1, 5, dtype=np.int64),
    }
    shards = tuple(Shard(f"shard-{k:06d}.tar", 1000, "0" * 64) for k in range(-(-number // per_shard)))
    return Index(directory, "train", 12, image_size, "jpeg", shards, columns)


MIXTURES = {
    "20 and 1 captions": ([[20] * 60, [1] * 300], [5, 30], (1, 3)),
    "1 to 5 and 2 captions": ([[1 + k * 7 % 5 for k in range(200)], [2] * 90], [10, 9], (2, 1)),
    "three parts": ([[3] * 80, [1] * 200, [5] * 40], [8, 10, 4], (1, 2, 1)),
}


def _mixture(name: str) -> Mixture:
    captions, per_shard, weights = MIXTURES[name]
    parts = [_index(f"data/{k}/train", counts, per) for k, (counts, per) in enumerate(zip(captions, per_shard))]
    return make_mixture(parts, weights)


def _config(order: str, batch_from: str, batch_size: int = 8, lanes: int = 4) -> DataConfig:
    more = {"lanes": lanes} if order == "streaming" else {}
    settings: dict = {"order": order, "batch_from": batch_from, "batch_size": batch_size}
    return DataConfig(train=["data/0/train", "data/1/train"], **settings, **more)


@pytest.mark.parametrize(("order", "batch_from"), KINDS)
@pytest.mark.parametrize("name", MIXTURES)
def test_an_epoch_reads_each_pair_as_often_as_its_weight_says(name: str, order: str, batch_from: str) -> None:
    mixture = _mixture(name)
    made = make_order(mixture, _config(order, batch_from), seed=1)
    expected = Counter()
    for number, num_captions in enumerate(mixture.num_captions.tolist()):
        for slot in range(num_captions):
            expected[number, slot] = mixture.weights[mixture.part_of(number)]
    assert made.left_out == expected.total() - made.steps_per_epoch * 8
    for epoch in range(2):
        steps = range(epoch * made.steps_per_epoch, (epoch + 1) * made.steps_per_epoch)
        batches = [made.pairs(step, range(8)) for step in steps]
        counts = Counter(tuple(pair) for batch in batches for pair in batch.tolist())
        assert counts <= expected and counts.total() == expected.total() - made.left_out
        assert all(len(set(batch[:, 0].tolist())) == 8 for batch in batches)
        parts = [{mixture.part_of(video) for video in batch[:, 0].tolist()} for batch in batches]
        if batch_from == "one":
            assert all(len(in_batch) == 1 for in_batch in parts)
            assert len({min(in_batch) for in_batch in parts[:20]}) > 1  # in turn, not one after the other


@pytest.mark.parametrize("name", MIXTURES)
def test_all_mixed_batches_have_nearly_the_same_share_of_each_part(name: str) -> None:
    mixture = _mixture(name)
    totals = np.array([part.num_captions.sum() * w for part, w in zip(mixture.parts, mixture.weights)])
    for order, tolerance in (("global", 2 / 8), ("streaming", 0.5)):
        made = make_order(mixture, _config(order, "mixed"), seed=1)
        shares = []
        for step in range(made.steps_per_epoch):
            parts = [mixture.part_of(video) for video in made.pairs(step, range(8))[:, 0].tolist()]
            shares.append(np.bincount(parts, minlength=len(totals)) / 8)
        assert np.abs(np.mean(shares, axis=0) - totals / totals.sum()).max() < 0.02
        windows = np.stack([np.mean(shares[k : k + 8], axis=0) for k in range(0, len(shares) - 8, 8)])
        assert np.abs(windows - totals / totals.sum()).max() < tolerance


@pytest.mark.parametrize(("order", "batch_from"), KINDS)
def test_a_run_resumes_in_closed_form(order: str, batch_from: str) -> None:
    mixture, config = _mixture("three parts"), _config(order, batch_from)
    one = make_order(mixture, config, seed=1)
    whole = [one.pairs(step, range(8)) for step in range(2 * one.steps_per_epoch)]
    for start in (1, one.steps_per_epoch - 1, one.steps_per_epoch + 7):
        resumed = make_order(mixture, config, seed=1)
        assert np.array_equal(resumed.pairs(start, range(8)), whole[start])
        assert np.array_equal(resumed.pairs(start, range(2, 6)), whole[start][2:6])
    other_seed = make_order(mixture, config, seed=2)
    assert not np.array_equal(other_seed.pairs(0, range(8)), whole[0])


@pytest.mark.parametrize(("order", "batch_from"), KINDS)
def test_a_damaged_pair_is_replaced_from_its_part(order: str, batch_from: str) -> None:
    mixture = _mixture("three parts")
    made = make_order(mixture, _config(order, batch_from), seed=1)
    for step in (0, 5, 11):
        batch_B2 = made.pairs(step, range(8))
        offered = []
        for position in range(8):
            substitutes = list(made.substitutes(step, position))
            own_part = mixture.part_of(int(batch_B2[position, 0]))
            assert substitutes and mixture.part_of(substitutes[0][0]) == own_part
            assert all(0 <= slot < mixture.num_captions[video] for video, slot in substitutes)
            offered.append({video for video, _ in substitutes})
            assert not offered[-1] & set(batch_B2[:, 0].tolist())
        assert sum(map(len, offered)) == len(set.union(*offered))  # no two positions have one in common


@pytest.mark.parametrize("batch_from", ["mixed", "one"])
def test_the_cache_holds_what_a_lane_reads(batch_from: str) -> None:
    """Every shard that a batch needs is in the smallest cache when it is needed."""
    mixture = _mixture("20 and 1 captions")
    order = make_order(mixture, _config("streaming", batch_from, lanes=2), seed=1)
    assert isinstance(order, StreamingOrder | OneSetStreamingOrder)
    sizes = np.full(len(mixture.shards), 1000)
    for lane in range(2):
        capacity = needed_bytes(order, [lane], sizes, order.window + 2)
        plan = CachePlan(node_uses(order, [lane]), sizes, capacity, order.steps_per_epoch, 0)
        for step in range(2 * order.steps_per_epoch):
            plan.advance(step)
            while next_download := plan.next_download():
                plan.downloaded(next_download[0])
            pairs = order.pairs(step, range(lane * 4, lane * 4 + 4))
            assert set(mixture.columns["shard"][pairs[:, 0]].tolist()) <= plan.held
            assert plan.used_bytes <= capacity


@pytest.fixture(scope="module")
def parts(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two splits on disk with the same ids."""
    packed = Path(next(o for o in data if o.startswith("data.train=")).removeprefix("data.train="))
    out = tmp_path_factory.mktemp("parts")
    reshard(packed, out / "one" / "train", per_shard=2, copies=1)
    reshard(packed, out / "two" / "train", per_shard=5, copies=2)
    return [str(out / "one" / "train"), str(out / "two" / "train")]


def _loaded(parts: list[str]) -> Mixture:
    return make_mixture([load_index(path) for path in parts], [2, 1])


def _content(mixture: Index, world_size: int, start: int, steps: int, **options) -> list[tuple]:
    batches = global_batches(make_loaders(mixture, world_size, **options), start, steps)
    pixels = [torch.cat([batch.pixels_BFHWC for batch in step]) for step in batches]
    pairs = [[row for batch in step for row in zip(batch.video_ids, batch.captions, batch.parts)] for step in batches]
    return list(zip(pairs, pixels))


@pytest.mark.parametrize(("order", "batch_from"), KINDS)
def test_any_world_size_workers_and_start_give_the_same_batches(parts: list[str], order: str, batch_from: str) -> None:
    mixture = _loaded(parts)
    options = {"train": parts, "order": order, "batch_from": batch_from, "batch_size": 8}
    options |= {"lanes": 4} if order == "streaming" else {}
    number = 12
    one_rank = _content(mixture, 1, 0, number, **options)
    for world_size, start, num_workers in ((2, 3, 1), (4, 5, 0), (4, 0, 2)):
        several = _content(mixture, world_size, start, number - start, num_workers=num_workers, **options)
        for (pairs, pixels), (expected_pairs, expected_pixels) in zip(several, one_rank[start:], strict=True):
            assert pairs == expected_pairs and torch.equal(pixels, expected_pixels)
    for pairs, _ in one_rank:
        assert all(video_id.startswith(("one/train/", "two/train/")[part]) for video_id, _, part in pairs)


def test_a_sample_of_a_mixture_is_that_of_its_part(parts: list[str]) -> None:
    mixture = _loaded(parts)
    for number in (0, len(mixture.parts[0]) - 1, len(mixture.parts[0]), len(mixture) - 1):
        part, own_number = mixture.locate(number)
        meta, frames = read_sample(mixture, number)
        own_meta, own_frames = read_sample(part, own_number)
        assert frames == own_frames and meta["captions"] == own_meta["captions"]
        assert meta["id"] == mixture.id_of(number) == f"{mixture.names[mixture.part_of(number)]}/{own_meta['id']}"
        sample = mixture.sample(number)
        assert mixture.path(sample) == part.path(part.sample(own_number))


def test_held_out_videos_come_from_all_parts_and_are_not_trained_on(parts: list[str]) -> None:
    mixture = _loaded(parts)
    training, selection = mixture.hold_out(30)
    assert isinstance(training, Mixture) and isinstance(selection, Mixture)
    assert len(selection) == 30 and len(selection.parts) == 2
    assert not set(selection.ids) & set(training.ids) and training.weights == (2, 1)


def test_captions_of_a_model_go_to_the_part_that_has_the_ids(parts: list[str], tmp_path: Path) -> None:
    mixture = _loaded(parts)
    video_id = mixture.parts[1].id_of(0)
    line = json.dumps({"id": video_id, "captions": ["new"]}) + "\n"
    in_directory = Path(parts[1]) / "more.jsonl"
    in_directory.write_text(line)
    for path in ("more.jsonl", str(in_directory)):
        extended = mixture.with_captions(path)
        gained = extended.num_captions - mixture.num_captions
        # In this split each id occurs twice, and the file is read by ids.
        assert gained.sum() > 0 and set(np.flatnonzero(gained)) <= set(range(len(mixture.parts[0]), len(mixture)))
    (tmp_path / "both.jsonl").write_text(line)
    with pytest.raises(UserError, match=r"both\.jsonl has ids of one/train and of two/train; put a file for each"):
        mixture.with_captions(str(tmp_path / "both.jsonl"))
    (tmp_path / "none.jsonl").write_text(json.dumps({"id": "nobody", "captions": ["new"]}) + "\n")
    with pytest.raises(UserError, match=r"none\.jsonl has no caption for any video of .*one/train \+ .*two/train"):
        mixture.with_captions(str(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match=r"no file of captions nowhere\.jsonl"):
        mixture.with_captions("nowhere.jsonl")


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("[]", "data.train is []: it is a path, or a list such as"),
        ("null", "data.train is None: it is a path"),
        ("[{path: a, weight: 0}]", "the weight of a in data.train is 0: it is how many times an epoch reads"),
        ("[{path: a, weight: -1}, b]", "the weight of a in data.train is -1"),
        ("[{path: a, weight: 0.5}, b]", "the weight of a in data.train is 0.5"),
        ("[{path: a, weight: .nan}, b]", "the weight of a in data.train is nan"),
        ("[{path: a, weight: true}, b]", "the weight of a in data.train is True"),
        ("[{path: a, weight: two}, b]", "the weight of a in data.train is 'two'"),
        ("[{path: a, weight: 1001}, b]", "the weight of a in data.train is 1001: it is how many times an epoch reads"),
        ("[{path: a, weight: .inf}, b]", "the weight of a in data.train is inf"),
        ("[{path: a, weight: null}, b]", "the weight of a in data.train is None"),
        ("[{path: a, wieght: 2}, b]", "an entry of data.train is {'path': 'a', 'wieght': 2}"),
        ("[{weight: 2}, b]", "an entry of data.train is {'weight': 2}"),
        ("[[a], b]", "an entry of data.train is ['a']"),
        ("['', b]", "a path of data.train is ''"),
        ("[a, b, a/]", "it names a split twice; give it a weight instead"),
        ("{path: a}", "data.train is {'path': 'a'}: it is a path, or a list"),
    ],
)
def test_what_is_no_mixture_is_one_line(train: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        load_config("demo.yaml", [f"data.train={train}"])
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_list_of_one_split_is_that_split(parts: list[str], tmp_path: Path) -> None:
    plain = load_config("demo.yaml", [f"data.train={parts[0]}"])
    for text in (f"[{parts[0]}]", f"[{{path: {parts[0]}, weight: 1}}]"):
        assert load_config("demo.yaml", [f"data.train={text}"]) == plain
    with pytest.raises(UserError, match=r"data\.batch_from is 'one': it applies to a data\.train with several splits"):
        load_config("demo.yaml", [f"data.train=[{parts[0]}]", "data.batch_from=one"])
    mixture = load_config("demo.yaml", [f"data.train=[{{path: {parts[0]}, weight: 2}}, {parts[1]}]"])
    assert mixture.data.train == (TrainPart(parts[0], 2), TrainPart(parts[1]))
    (tmp_path / "config.yaml").write_text(to_yaml(mixture))
    assert load_config(str(tmp_path / "config.yaml")) == mixture


def test_splits_that_do_not_fit_together_are_one_line(parts: list[str], tmp_path: Path) -> None:
    one, other = _index("data/a/train", [1] * 20, 5), _index("data/b/train", [1] * 20, 5, image_size=64)
    with pytest.raises(UserError, match=r"differ in the size of their frames: data/a/train has 32 pixels and data/b/t"):
        make_mixture([one, other], [1, 1])
    link = tmp_path / "link"
    link.symlink_to(parts[0])
    with pytest.raises(UserError, match=r"names .*one/train twice; give it a weight instead"):
        make_mixture([load_index(parts[0]), load_index(link)], [1, 1])
    with pytest.raises(UserError, match=r"data/b/train of data\.train has no video"):
        make_mixture([one, _index("data/b/train", [], 5)], [1, 1])
    few = make_mixture([_index("data/a/train", [1] * 400, 5), _index("data/b/train", [1] * 2, 1)], [1, 200])
    for order in ("global", "streaming"):
        with pytest.raises(
            UserError, match="b/train has 2 videos, and its weight gives it 4 of the 8 pairs of a batch"
        ):
            make_order(few, _config(order, "mixed"), seed=0)
    with pytest.raises(UserError, match=r"data/b/train: 2 pairs are fewer than one batch of 8"):
        make_order(few, _config("global", "one"), seed=0)


def test_names_are_as_short_as_they_can_be() -> None:
    assert part_names(["/data/msrvtt/train", "/data/vatex/train"]) == ["msrvtt/train", "vatex/train"]
    assert part_names(["/x/one", "https://host/two"]) == ["one", "two"]
    assert part_names(["https://a/train", "/b/train"]) == ["a/train", "b/train"]


class _StopAtStep:
    """Asks the run to stop when it asks for the n-th time."""

    def __init__(self, step: int) -> None:
        self.step, self.asked = step, 0

    @property
    def requested(self) -> bool:
        self.asked += 1
        return self.asked >= self.step


def _train(overrides: list[str], stop_at: int | None) -> bool:
    stop: Any = _StopAtStep(stop_at) if stop_at else None
    return train(load_config("demo.yaml", overrides), stop)


def _curves(run_dir: Path) -> dict[str, dict[int, float]]:
    events = EventAccumulator(str(run_dir))
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize(("order", "batch_from"), [("global", "mixed"), ("streaming", "one")])
def test_a_run_on_a_mixture_logs_its_parts_and_resumes_on_two_ranks(
    data: list[str], parts: list[str], tmp_path: Path, order: str, batch_from: str
) -> None:
    common = [*data, f"data.train=[{{path: {parts[0]}, weight: 2}}, {parts[1]}]", f"data.order={order}"]
    common += [f"data.batch_from={batch_from}", "max_steps=8", "eval_every=4", "log_every=1", "data.num_workers=1"]
    common += ["data.lanes=4"] if order == "streaming" else []
    whole, resumed = [f"run_dir={tmp_path / 'whole'}"], [f"run_dir={tmp_path / 'resumed'}"]
    done = run("-m", "tmass_dist.train", "--config", "demo.yaml", *common, *whole)
    assert done.returncode == 0, done.stderr
    for num_ranks, stop_at, at_end in ((1, 3, False), (2, None, True)):
        (tmp_path / f"{num_ranks}").mkdir()
        ended = on_ranks(num_ranks, _train, [*common, *resumed], stop_at, tmp_path=tmp_path / f"{num_ranks}")
        assert ended == [at_end] * num_ranks
    assert re.search("step [1-7] of 8, 2 ranks", (tmp_path / "resumed" / "train.log").read_text())
    expected, curves = _curves(tmp_path / "whole"), _curves(tmp_path / "resumed")
    for step, loss in expected["loss/total"].items():
        assert abs(curves["loss/total"][step] - loss) < 1e-4
    shares = [expected[f"mixture/{name}/share"] for name in ("one/train", "two/train")]
    assert sorted(shares[0]) == [*range(1, 9)]
    for step in shares[0]:
        assert abs(shares[0][step] + shares[1][step] - 1) < 1e-6
    for tag in (tag for tag in expected if tag.startswith("mixture/")):
        assert expected[tag].keys() == curves[tag].keys()
        assert all(abs(curves[tag][step] - value) < 1e-4 for step, value in expected[tag].items())
    log = (tmp_path / "whole" / "train.log").read_text()
    assert re.search(r"data\.train: one/train: \d+ pairs, weight 2, 50\.0% of an epoch", log)
    # Another weight would be another order.
    changed = [entry.replace("weight: 2", "weight: 3") for entry in common]
    done = run("-m", "tmass_dist.train", "--config", "demo.yaml", *changed, *resumed)
    assert done.returncode == 2 and "holds a run with another config (data.train: saved" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def server(parts: list[str]) -> Iterator[FaultyServer]:
    server = FaultyServer(Path(parts[0]).parents[1])
    yield server
    server.close()


@pytest.fixture(scope="module")
def damaged(parts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The second split with a byte of each sample changed in every other shard."""
    out = tmp_path_factory.mktemp("damaged") / "two" / "train"
    shutil.copytree(parts[1], out)
    index = load_index(out)
    for sample in map(index.sample, range(len(index))):
        if sample.shard % 2:
            with (out / index.shards[sample.shard].name).open("r+b") as shard:
                shard.seek(sample.offset + sample.size // 2)
                byte = shard.read(1)[0]
                shard.seek(-1, os.SEEK_CUR)
                shard.write(bytes([byte ^ 0xFF]))
    return out


@pytest.mark.parametrize("batch_from", ["mixed", "one"])
def test_a_mixture_through_a_small_cache_has_the_batches_of_local_shards(
    parts: list[str], damaged: Path, server: FaultyServer, tmp_path: Path, batch_from: str
) -> None:
    """One part is behind a URL; shards of the other are damaged."""
    own = [load_index(parts[0]), load_index(damaged)]
    remote = make_mixture([load_index(f"{server.url}/one/train", str(tmp_path / "cache")), own[1]], [2, 1])
    options = {"order": "streaming", "lanes": 2, "batch_size": 8, "batch_from": batch_from}
    options["train"] = [part.directory for part in own]
    expected = _content(make_mixture(own, [2, 1]), 1, 0, 12, **options)
    cache = {"cache": str(tmp_path / "cache"), "val": "x"}
    with pytest.raises(UserError, match=r"data\.cache_gb=1e-06 is too small: the 2 lanes of this node need ") as raised:
        make_loaders(remote, 2, **options, **cache, cache_gb=1e-6)
    sufficient = float(re.findall(r"need ([\d.]+)", str(raised.value))[0])
    assert sufficient * 1e9 < sum(shard.bytes for shard in own[0].shards) / 2
    through = _content(remote, 2, 0, 12, num_workers=1, **options, **cache, cache_gb=sufficient)
    for (pairs, pixels), (expected_pairs, expected_pixels) in zip(through, expected, strict=True):
        assert pairs == expected_pairs and torch.equal(pixels, expected_pixels)
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.tar")) <= sufficient * 1e9
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_mixture_with_damaged_shards_is_killed_and_resumed_on_two_ranks(
    data: list[str], parts: list[str], damaged: Path, server: FaultyServer, tmp_path: Path
) -> None:
    """From a URL through a small cache, with the losses of local shards on one rank."""
    common = [*data, "max_steps=8", "eval_every=4", "log_every=1", "data.num_workers=1", "data.max_bad=0.9"]
    common += ["data.order=streaming", "data.lanes=4"]
    whole = [*common, f"run_dir={tmp_path / 'whole'}", f"data.train=[{{path: {parts[0]}, weight: 2}}, {damaged}]"]
    done = run("-m", "tmass_dist.train", "--config", "demo.yaml", *whole)
    assert done.returncode == 0, done.stderr
    cached = [*common, f"run_dir={tmp_path / 'cached'}", f"data.cache={tmp_path / 'cache'}"]
    cached += [f"data.train=[{{path: {server.url}/one/train, weight: 2}}, {damaged}]"]
    smallest = 16.1 * max(shard.bytes for shard in load_index(parts[0]).shards) / GB
    cached += [f"data.cache_gb={smallest}"]
    train_and_be_killed(6, ["--config", "demo.yaml", *cached], tmp_path)
    (tmp_path / "ranks").mkdir()
    assert on_ranks(2, _train, cached, None, tmp_path=tmp_path / "ranks") == [True, True]
    assert "step 4 of 8, 2 ranks" in (tmp_path / "cached" / "train.log").read_text()
    expected, curves = _curves(tmp_path / "whole"), _curves(tmp_path / "cached")
    assert sorted(curves["loss/total"]) == [*range(1, 9)]
    for tag in ("loss/total", "mixture/one/train/share", "mixture/two/train/loss"):
        assert all(abs(curves[tag][step] - value) < 1e-4 for step, value in expected[tag].items())
    quarantined = {
        name: {json.loads(line)["id"] for line in (tmp_path / name / "quarantine.jsonl").read_text().splitlines()}
        for name in ("whole", "cached")
    }
    assert quarantined["whole"] == quarantined["cached"] and all(i.startswith("two/") for i in quarantined["whole"])
    assert not [*(tmp_path / "cache").rglob("*.tmp"), *(tmp_path / "cached").rglob("*.tmp")]
