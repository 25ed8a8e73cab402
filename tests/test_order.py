"""The order of training, in one process: its exact pairs, shuffled captions, epochs, settings and substitutes."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from tmass_dist.config import DataConfig
from tmass_dist.data.index import Index, Sample, Shard, make_columns
from tmass_dist.data.mixed_order import make_order
from tmass_dist.data.order import GlobalOrder, choose_order, epoch_batches, rounds, substitutes
from tmass_dist.data.streaming import StreamingOrder
from tmass_dist.errors import UserError


def test_the_order_of_a_seed_is_the_same_in_every_version() -> None:
    """A run that resumes with a later version must meet the pairs that are left."""
    pairs = [part.tolist() for part in rounds(np.array([2, 1, 3]), seed=5, epoch=1)]
    assert pairs == [[[2, 2], [0, 0], [1, 0]], [[2, 0], [0, 1]], [[2, 1]]]
    batches = epoch_batches(np.array([2, 1, 3, 2, 1]), seed=5, epoch=1, batch_size=3).tolist()
    assert batches == [[[4, 0], [2, 2], [3, 1]], [[0, 0], [1, 0], [2, 0]], [[0, 1], [3, 0], [2, 1]]]
    counts, batch_B2 = np.array([2, 1, 3, 2, 1, 4, 1]), np.array([[0, 0], [2, 1]])
    offered = [list(substitutes(counts, batch_B2, position, seed=5, step=2)) for position in range(2)]
    assert offered == [[(3, 0), (4, 0), (1, 0)], [(6, 0), (5, 3)]]


def test_the_captions_of_a_video_come_in_every_order_equally_often() -> None:
    orders: dict[int, list[int]] = {}
    for part in rounds(np.full(2400, 3), seed=1, epoch=0):
        assert part.dtype == np.int32
        for video, slot in part.tolist():
            orders.setdefault(video, []).append(slot)
    counts = Counter(tuple(order) for order in orders.values())
    assert len(counts) == 6 and max(abs(count - 400) for count in counts.values()) < 75  # 4 standard deviations


@pytest.mark.parametrize("counts", [[], [0, 0], [3, 0, 2], [1, 1]])
def test_a_video_without_captions_is_in_no_pair(counts: list[int]) -> None:
    pairs = [tuple(pair) for part in rounds(np.array(counts, int), seed=0, epoch=0) for pair in part.tolist()]
    assert sorted(pairs) == [(video, slot) for video, count in enumerate(counts) for slot in range(count)]


def test_too_few_pairs_make_no_batch() -> None:
    none = epoch_batches(np.array([1, 1]), seed=0, epoch=0, batch_size=3)
    assert none.shape == (0, 3, 2) and none.dtype == np.int32
    with pytest.raises(UserError, match=r"^2 pairs are fewer than one batch of 3$"):
        GlobalOrder(np.array([1, 1]), seed=0, batch_size=3)


def test_epochs_follow_each_other_and_any_step_can_be_read_first() -> None:
    counts = np.array([2, 1, 3, 2, 1, 2])
    order = GlobalOrder(counts, seed=3, batch_size=4)
    assert order.steps_per_epoch == 2 and order.left_out == 3
    for step in (5, 0, 3, 2):
        expected = epoch_batches(counts, seed=3, epoch=step // 2, batch_size=4)[step % 2]
        assert order.pairs(step, range(4)).tolist() == expected.tolist()
        assert order.pairs(step, range(1, 3)).tolist() == expected[1:3].tolist()
        whole = list(substitutes(counts, expected, 2, seed=3, step=step))
        assert list(order.substitutes(step, 2)) == whole


def _index(counts: list[int]) -> Index:
    samples = [Sample(f"v{k}", k // 2, count, k % 2 * 512, 512, 0) for k, count in enumerate(counts)]
    shards = tuple(Shard(f"{k}.tar", 1024, "x") for k in range((len(counts) + 1) // 2))
    return Index("data/train", "train", 12, 32, "jpeg", shards, make_columns(samples))


def test_the_order_of_the_settings_is_made_and_an_error_names_the_split() -> None:
    index = _index([2, 2, 2, 2])
    made = make_order(index, DataConfig(batch_size=2, order="global"), 7)
    assert isinstance(made, GlobalOrder) and made.steps_per_epoch == 4
    assert (
        made.pairs(0, range(2)).tolist() == epoch_batches(index.num_captions, seed=7, epoch=0, batch_size=2)[0].tolist()
    )
    for lanes in (2, None):
        streaming = make_order(index, DataConfig(batch_size=2, order="streaming", lanes=lanes, window=1), 7)
        alike = StreamingOrder(index.num_captions, index.columns["shard"], seed=7, batch_size=2, lanes=2, window=1)
        assert isinstance(streaming, StreamingOrder) and streaming.steps_per_epoch == alike.steps_per_epoch == 4
        assert all((streaming.pairs(k, range(2)) == alike.pairs(k, range(2))).all() for k in range(4))
    for order in ("global", "streaming"):
        with pytest.raises(UserError, match=r"^data/train: 8 pairs are (too )?few"):
            make_order(index, DataConfig(batch_size=16, order=order), 7)


@pytest.mark.parametrize(
    ("batch_size", "world_size", "lanes"),
    [(32, 1, 8), (32, 4, 8), (32, 16, 16), (6, 3, 6), (6, 1, 6), (24, 3, 12), (4, 2, 4)],
)
def test_lanes_are_the_smallest_number_of_at_least_8_that_the_ranks_divide(
    batch_size: int, world_size: int, lanes: int
) -> None:
    chosen = choose_order(DataConfig(batch_size=batch_size, order="streaming"), world_size, None)
    assert chosen == DataConfig(batch_size=batch_size, order="streaming", lanes=lanes)


def test_ranks_that_divide_no_lanes_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"lanes=5 does not divide data\.batch_size=32; use one of \[1, 2, 4, 8, 16, 32\]"
    ):
        choose_order(DataConfig(batch_size=32, order="streaming"), 5, None)
    with pytest.raises(UserError, match=r"lanes=8 is not divisible by 3 ranks; use one of \[1, 2, 4, 8\] ranks"):
        choose_order(DataConfig(batch_size=24, order="streaming", lanes=8), 3, None)
    with pytest.raises(UserError, match=r"data\.cache_gb applies to data\.order=streaming, and this run has"):
        choose_order(DataConfig(batch_size=8, cache_gb=1.0), 1, None)


def test_later_starts_keep_what_the_first_start_chose() -> None:
    first = choose_order(DataConfig(batch_size=32, order="streaming", lanes=16), 2, None)
    again = choose_order(DataConfig(batch_size=32), 4, first)
    assert (again.order, again.lanes) == ("streaming", 16)
    assert choose_order(replace(first, lanes=None), 8, first).lanes == 16
    local = choose_order(DataConfig(batch_size=32), 4, None)
    assert (local.order, local.lanes) == ("global", None)
    assert choose_order(DataConfig(batch_size=32, train="https://host/train", cache="/c"), 4, local).order == "global"
