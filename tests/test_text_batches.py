"""Texts of concurrent calls are encoded together; a failure reaches each call of its batch, and no other."""

import asyncio
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tmass_dist.web.text_batches import MOST, TextBatches


def _embeddings(texts: list[str]) -> Tensor:
    return torch.tensor([[float(text)] for text in texts])


async def _in_thread(work: Callable[[], None]) -> None:
    await asyncio.to_thread(work)


def test_texts_that_wait_are_encoded_together_and_each_call_gets_its_own() -> None:
    sizes: list[int] = []

    def encode(texts: list[str]) -> Tensor:
        sizes.append(len(texts))
        return _embeddings(texts)

    async def calls() -> list[Tensor]:
        thread_is_free = asyncio.Event()

        async def in_thread(work: Callable[[], None]) -> None:
            await thread_is_free.wait()
            await asyncio.to_thread(work)

        batches = TextBatches(encode, in_thread)
        first = [asyncio.create_task(batches.embedding(str(text))) for text in range(2 * MOST)]
        await asyncio.sleep(0)
        others = [asyncio.create_task(batches.embedding(str(text))) for text in range(2 * MOST, 2 * MOST + 1)]
        await asyncio.sleep(0)  # also those that came while the first waited for a thread
        thread_is_free.set()
        return await asyncio.gather(*first, *others)

    found = asyncio.run(calls())
    assert [one.tolist() for one in found] == [[float(text)] for text in range(2 * MOST + 1)]
    assert sizes == [MOST, MOST, 1]


def test_a_failure_is_raised_in_the_calls_of_its_batch_and_the_next_call_is_answered() -> None:
    async def calls() -> None:
        batches = TextBatches(_embeddings, _in_thread)
        both = await asyncio.gather(batches.embedding("no number"), batches.embedding("2"), return_exceptions=True)
        assert all(isinstance(error, ValueError) and "could not convert" in str(error) for error in both)
        assert (await batches.embedding("3")).tolist() == [3.0]

    asyncio.run(calls())


def test_a_failure_to_get_a_thread_is_raised_too() -> None:
    async def no_thread(_: Callable[[], None]) -> None:
        raise RuntimeError("can't start new thread")

    async def calls() -> None:
        batches = TextBatches(_embeddings, no_thread)
        both = await asyncio.gather(batches.embedding("1"), batches.embedding("2"), return_exceptions=True)
        assert [str(error) for error in both] == ["can't start new thread"] * 2

    asyncio.run(calls())


def test_a_call_that_is_cancelled_takes_nothing_from_the_others() -> None:
    async def calls() -> None:
        batches = TextBatches(_embeddings, _in_thread)
        cancelled = asyncio.create_task(batches.embedding("1"))
        other = asyncio.create_task(batches.embedding("2"))
        await asyncio.sleep(0)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert (await other).tolist() == [2.0]
        assert (await batches.embedding("3")).tolist() == [3.0]

    asyncio.run(calls())
