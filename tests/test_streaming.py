"""The streaming order: the same batches for every world size, each pair once, few shards open at a time."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import run
from tests.loaders import global_batches, make_loaders
from tests.resharded import reshard
from tmass_dist.config import DataConfig
from tmass_dist.data.deal import deal
from tmass_dist.data.index import Index
from tmass_dist.data.order import choose_order
from tmass_dist.data.samples import read_sample
from tmass_dist.data.streaming import StreamingOrder
from tmass_dist.errors import UserError

SPLITS = {
    "20 captions each": ([20] * 96, 8),
    "1 to 5 captions": ([1 + k * 7 % 5 for k in range(400)], 12),
    "1 caption, shards of different sizes": ([1] * 300, 10),
    "2 captions": ([2] * 64, 8),
}


def _order(split: str, seed: int = 0, batch_size: int = 8, lanes: int = 4, window: int = 2) -> StreamingOrder:
    num_captions, per_shard = SPLITS[split]
    shard_of = np.arange(len(num_captions), dtype=np.int32) // per_shard
    if "different" in split:
        shard_of[100:] //= 3
        shard_of = np.sort(shard_of)
    counts = np.array(num_captions, np.int32)
    return StreamingOrder(counts, shard_of, seed=seed, batch_size=batch_size, lanes=lanes, window=window)


def _epoch(order: StreamingOrder, epoch: int) -> np.ndarray:
    first = epoch * order.steps_per_epoch
    steps = range(first, first + order.steps_per_epoch)
    return np.stack([order.pairs(step, range(order.batch_size)) for step in steps])


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize(("batch_size", "lanes"), [(8, 4), (8, 8), (16, 2), (4, 1)])
@pytest.mark.parametrize("split", SPLITS)
def test_every_pair_once_an_epoch_and_no_video_twice_in_a_batch(
    split: str, batch_size: int, lanes: int, window: int
) -> None:
    order = _order(split, batch_size=batch_size, lanes=lanes, window=window)
    num_captions = np.array(SPLITS[split][0])
    epochs = [_epoch(order, epoch) for epoch in range(2)]
    for batches in epochs:
        pairs = [tuple(pair) for pair in batches.reshape(-1, 2).tolist()]
        assert len(set(pairs)) == len(pairs) == num_captions.sum() - order.left_out
        assert all(0 <= slot < num_captions[video] for video, slot in pairs)
        if batch_size // lanes * 2 <= SPLITS[split][1]:  # else the open shards may hold too few videos
            assert all(len(set(batch[:, 0])) == batch_size for batch in batches)
    assert 0 <= order.left_out < batch_size + lanes  # the lanes are equal in length, to one pair
    assert not np.array_equal(*epochs)


@pytest.mark.parametrize("split", SPLITS)
def test_a_lane_reads_the_same_shards_in_every_epoch_and_keeps_few_of_them_open(split: str) -> None:
    order, per_shard = _order(split), SPLITS[split][1]
    shard_of = np.arange(len(SPLITS[split][0])) // per_shard
    if "different" in split:
        return
    for lane in range(order.lanes):
        shards_by_epoch = []
        for epoch in range(2):
            uses = order.shard_uses(lane, epoch)
            first_step = epoch * order.steps_per_epoch
            open_by_step = []
            for step in range(first_step, first_step + order.steps_per_epoch):
                is_open = (uses.first_step <= step) & (step <= uses.last_step)
                open_by_step.append(set(uses.shard[is_open].tolist()))
                assert {int(shard_of[video]) for video in order.lane_batch_of(step, lane)[:, 0]} <= open_by_step[-1]
            assert max(map(len, open_by_step)) <= order.window + 1
            assert np.mean([len(shards) for shards in open_by_step]) <= order.window + 0.5
            assert len(uses.shard) == len(set(uses.shard.tolist()))  # a shard is opened once
            shards_by_epoch.append(set(uses.shard.tolist()))
        assert shards_by_epoch[0] == shards_by_epoch[1] <= set(order.shards_of(lane).tolist())
    shared = [len(set(order.shards_of(g)) & set(order.shards_of(g + 1))) for g in range(order.lanes - 1)]
    assert max(shared) <= 1


def test_a_window_mixes_its_shards_and_an_epoch_visits_them_in_another_order() -> None:
    shard_of = np.arange(2560, dtype=np.int32) // 256
    order = StreamingOrder(np.full(2560, 20, np.int32), shard_of, seed=0, batch_size=16, lanes=1)
    first, second = (shard_of[_epoch(order, epoch)[:, :, 0]] for epoch in range(2))
    # The first and the last half of a shard are read alone; all other batches mix two shards.
    assert np.mean([len(set(batch.tolist())) == 2 for batch in first]) > 0.88
    shares = [np.mean(batch == batch[0]) for batch in first[200:-200]]
    assert 0.4 < np.mean(shares) < 0.65
    assert not np.array_equal(first[:, 0], second[:, 0])


@pytest.mark.parametrize("seed", range(20))
def test_deal_keeps_the_pairs_of_a_video_apart(seed: int) -> None:
    rng = np.random.default_rng(seed)
    batch_size, num_batches = int(rng.integers(1, 9)), int(rng.integers(1, 12))
    videos: list[int] = []
    while len(videos) < batch_size * num_batches:  # no video has more pairs than there are batches
        videos += [len(videos)] * int(rng.integers(1, num_batches + 1))
    pairs = np.stack([np.array(videos), np.arange(len(videos))], axis=1)[: batch_size * num_batches]
    pairs = rng.permutation(pairs)
    batches = deal(pairs, batch_size, rng, {}, 0)
    assert sorted(map(tuple, batches.reshape(-1, 2).tolist())) == sorted(map(tuple, pairs.tolist()))
    assert all(len(set(batch[:, 0].tolist())) == batch_size for batch in batches)


@pytest.mark.parametrize("first_parity", [0, 1])
def test_deal_gives_shared_videos_to_batches_of_their_parity(first_parity: int) -> None:
    pairs = np.stack([np.repeat(np.arange(16), 4), np.tile(np.arange(4), 16)], axis=1)
    for seed in range(10):
        batches = deal(pairs, 4, np.random.default_rng(seed), {3: 0, 7: 1}, first_parity)
        for video, parity in ((3, 0), (7, 1)):
            steps = first_parity + np.flatnonzero((batches[:, :, 0] == video).any(axis=1))
            assert len(steps) == 4 and set(steps % 2) == {parity}


@pytest.fixture(scope="module")
def small_shards(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Index:
    packed = Path(next(o for o in data if o.startswith("data.train=")).removeprefix("data.train="))
    return reshard(packed, tmp_path_factory.mktemp("small"), per_shard=4, copies=2)


STREAMING = {"order": "streaming", "lanes": 8, "batch_size": 8}


def _content(index: Index, world_size: int, start: int, steps: int, **options) -> list[tuple]:
    batches = global_batches(make_loaders(index, world_size, **(STREAMING | options)), start, steps)
    pixels = [torch.cat([batch.pixels_BFHWC for batch in step]) for step in batches]
    pairs = [[pair for batch in step for pair in zip(batch.video_ids, batch.captions)] for step in batches]
    return list(zip(pairs, pixels))


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_any_world_size_workers_and_start_give_the_same_batches(small_shards: Index, num_workers: int) -> None:
    order = StreamingOrder(small_shards.num_captions, small_shards.columns["shard"], seed=1, batch_size=8, lanes=8)
    number = order.steps_per_epoch + 3  # into the second epoch
    one_rank = _content(small_shards, 1, 0, number)
    for world_size, start in ((2, 5), (4, 0), (8, 7), (8, order.steps_per_epoch - 1)):  # resumed within a window
        several = _content(small_shards, world_size, start, number - start, num_workers=num_workers)
        for (pairs, pixels), (expected_pairs, expected_pixels) in zip(several, one_rank[start:], strict=True):
            assert pairs == expected_pairs and torch.equal(pixels, expected_pixels)


def test_a_damaged_sample_is_replaced_from_its_lane_alike_on_any_world_size(
    small_shards: Index, tmp_path: Path
) -> None:
    index = reshard(Path(small_shards.directory), tmp_path, per_shard=4)
    order = StreamingOrder(index.num_captions, index.columns["shard"], seed=1, batch_size=8, lanes=4)
    batch_B2 = order.pairs(2, range(8))
    damaged = [int(batch_B2[0, 0]), int(batch_B2[1, 0]), int(batch_B2[7, 0])]  # two of lane 0, one of lane 3
    for number in damaged:
        sample = index.sample(number)
        path = index.path(sample)
        content = bytearray(path.read_bytes())
        content[sample.offset + sample.size // 2] ^= 0xFF
        path.write_bytes(content)
    slots = {}
    for world_size in (1, 2, 4):
        step = global_batches(make_loaders(index, world_size, **(STREAMING | {"lanes": 4})), 2, 1)[0]
        slots[world_size] = [pair for batch in step for pair in zip(batch.video_ids, batch.caption_slots)]
        assert len([entry for batch in step for entry in batch.damaged]) >= 3
    assert slots[1] == slots[2] == slots[4]
    for position in (0, 1, 7):
        offered = [video for video, _ in order.substitutes(2, position)]
        lane_shards = set(order.shards_of(position // 2).tolist())
        assert offered and {int(index.columns["shard"][video]) for video in offered} <= lane_shards
        assert not set(offered) & set(batch_B2[:, 0].tolist())
    first, second = ({video for video, _ in order.substitutes(2, position)} for position in (0, 1))
    assert not first & second


def test_substitutes_come_first_from_the_open_shards() -> None:
    order = _order("20 captions each", batch_size=4, lanes=2)
    uses = order.shard_uses(0, 0)
    for step in (0, 50, order.steps_per_epoch - 1):
        is_open = set(uses.shard[(uses.first_step <= step) & (step <= uses.last_step)].tolist())
        offered = [video // 8 for video, _ in order.substitutes(step, 0)]
        assert offered[0] in is_open
        assert all(shard in is_open for shard in offered[: offered.index(next(s for s in offered if s not in is_open))])


def test_the_first_start_chooses_order_and_lanes_and_later_starts_keep_them() -> None:
    local, remote = DataConfig(batch_size=32), DataConfig(batch_size=32, train="https://host/train", cache="/c")
    assert choose_order(local, 4, None).order == "global"
    chosen = choose_order(remote, 4, None)
    assert (chosen.order, chosen.lanes) == ("streaming", 8)
    assert choose_order(remote, 16, None).lanes == 16
    assert choose_order(replace(local, order="streaming", batch_size=6), 3, None).lanes == 6
    # Another cache, or another number of ranks, changes neither.
    for world_size in (1, 2, 8):
        assert choose_order(replace(remote, cache_gb=1.0), world_size, chosen) == replace(chosen, cache_gb=1.0)
    with pytest.raises(UserError, match=r"lanes=8 is not divisible by 16 ranks; use one of \[1, 2, 4, 8\] ranks"):
        choose_order(remote, 16, chosen)
    with pytest.raises(UserError, match=r"lanes=4 is not divisible by 3 ranks; use one of \[1, 2, 4\] ranks"):
        choose_order(replace(remote, lanes=4), 3, None)
    with pytest.raises(UserError, match=r"lanes=5 does not divide data\.batch_size=32; use one of \[1, 2, 4"):
        choose_order(replace(remote, lanes=5), 1, None)
    # A run of an older version has the global order, whatever its path.
    assert choose_order(remote, 4, remote).order == "global"
    for key, value in (("lanes", 4), ("cache_gb", 1.0)):
        with pytest.raises(UserError, match=f"data.{key} applies to data.order=streaming"):
            choose_order(replace(local, **{key: value}), 1, None)


def test_too_few_pairs_for_a_batch_are_one_line(small_shards: Index) -> None:
    few = small_shards.take(range(3))
    num_pairs = int(few.num_captions.sum())
    for lanes in (1, num_pairs):
        make_loaders(few, 1, **(STREAMING | {"batch_size": num_pairs, "lanes": lanes}))
    with pytest.raises(UserError, match=rf"{num_pairs} pairs are fewer than one batch of {2 * num_pairs}"):
        make_loaders(few, 1, **(STREAMING | {"batch_size": 2 * num_pairs, "lanes": 1}))


def test_a_run_records_its_order_and_resumes_on_another_number_of_ranks(
    data: list[str], small_shards: Index, tmp_path: Path
) -> None:
    more = [*data, f"data.train={small_shards.directory}", "data.num_workers=1", f"run_dir={tmp_path / 'run'}"]
    command = ["-m", "tmass_dist.train", "--config", "demo.yaml", *more]
    assert run(*command, "data.order=streaming", "data.lanes=4").returncode == 0
    saved = (tmp_path / "run" / "config.yaml").read_text()
    assert "order: streaming" in saved and "lanes: 4" in saved
    log = (tmp_path / "run" / "train.log").read_text()
    assert "data.order=streaming (4 lanes)" in log and "are left out of each epoch" in log
    assert run(*command).returncode == 0  # the recorded order, without being told
    done = run(*command, "data.order=global")
    assert done.returncode == 2 and "data.order: saved 'streaming', given 'global'" in done.stderr


def test_a_sample_of_the_streaming_order_is_the_one_of_its_number(small_shards: Index) -> None:
    """Pairs are sample numbers of the index, whatever the order of its shards."""
    shuffled = small_shards.take(np.random.default_rng(0).permutation(len(small_shards)))
    order = StreamingOrder(shuffled.num_captions, shuffled.columns["shard"], seed=0, batch_size=8, lanes=4)
    pairs = _epoch(order, 0).reshape(-1, 2)
    assert len(set(map(tuple, pairs.tolist()))) == len(pairs)
    number, slot = pairs[5].tolist()
    assert slot < len(read_sample(shuffled, number)[0]["captions"])
