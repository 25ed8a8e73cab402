"""Heartbeats through a real store: what a rank asks for does not grow with the ranks, and a silent rank is named."""

import time
from collections import Counter
from typing import Any

import pytest
from torch.distributed import TCPStore

from tmass_dist.training.heartbeats import Heartbeats


class CountingStore:
    """A store that counts its requests by kind."""

    def __init__(self, store: TCPStore) -> None:
        self.store, self.requests = store, Counter()

    def __getattr__(self, name: str) -> Any:
        def request(*arguments: Any) -> Any:
            self.requests[name] += 1
            return getattr(self.store, name)(*arguments)

        return request


def connect(world_size: int, period_s: float = 0.05) -> tuple[list[Heartbeats], list[CountingStore]]:
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    clients = [server] + [TCPStore("127.0.0.1", server.port, is_master=False) for _ in range(world_size - 1)]
    stores = [CountingStore(client) for client in clients]
    ranks = [Heartbeats(store, rank, world_size, period_s) for rank, store in enumerate(stores)]
    for store in stores:
        store.requests.clear()
    return ranks, stores


@pytest.mark.parametrize("world_size", [2, 64])
def test_the_requests_of_a_rank_do_not_depend_on_the_number_of_ranks(world_size: int) -> None:
    ranks, stores = connect(world_size)
    for heartbeats in ranks:
        heartbeats.exchange(3, 10)
    assert stores[0].requests == {"set": 2, "get": 2, "multi_get": 1}
    assert all(store.requests == {"set": 1, "get": 1} for store in stores[1:])


def test_silent_failed_and_late_ranks_are_named_to_all() -> None:
    ranks, _ = connect(4)
    for number in range(8):
        for rank, heartbeats in enumerate(ranks):
            if rank != 2 or number < 2:  # rank 2 is silent after its second heartbeat
                heartbeats.exchange(number, 10 * number - (rank == 3))
        time.sleep(0.05)
    ranks[1].report_failure("RuntimeError: no luck\nsecond line")
    ranks[0].exchange(8, 80)
    ranks[3].exchange(8, 79)
    summary = ranks[3].summary
    [(silent, step, age)] = summary.silent
    assert (silent, step) == (2, 2) and age > 0.2
    assert summary.failed == {"1": "RuntimeError: no luck\nsecond line"}
    assert tuple(summary.behind) == (2, 2)


def test_a_rank_sees_that_rank_0_no_longer_writes_summaries() -> None:
    ranks, _ = connect(2)
    for heartbeats in ranks:
        heartbeats.exchange(0, 0)
    changed_at = ranks[1].summary_changed_at
    time.sleep(0.05)
    ranks[1].exchange(1, 1)
    assert ranks[1].summary_changed_at == changed_at
    ranks[0].exchange(1, 1)
    ranks[1].exchange(1, 1)
    assert ranks[1].summary_changed_at > changed_at
