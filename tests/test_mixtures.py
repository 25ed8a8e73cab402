"""Mixtures of splits: exact counts, the same batches for every world size, resume at any step."""

from collections import Counter

import numpy as np
import pytest

from tmass_dist.config import DataConfig
from tmass_dist.data.cache import CachePlan, needed_bytes, node_uses
from tmass_dist.data.index import Index
from tmass_dist.data.mixed_order import OneSetStreamingOrder, make_order
from tmass_dist.data.mixture import Mixture, make_mixture
from tmass_dist.data.streaming import StreamingOrder

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
    from tmass_dist.data.index import Shard

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
