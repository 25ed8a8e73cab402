"""Text embeddings for concurrent searches: texts that wait at the same time are encoded together."""

# Shapes: D embedding width.

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor

MOST = 16
"""Texts encoded together, which bounds the time that the first of them waits for the others."""

InThread = Callable[[Callable[[], None]], Awaitable[None]]


class TextBatches:
    """Encodes texts of concurrent searches: all that wait, in one batch.

    A batch takes about half the time of its texts one by one, since it reads the weights of the tower once. A search
    that waits for its text holds no thread, so the threads compute the results of others meanwhile.

    Args:
        encode: embeddings ``(T, D)`` of a list of texts; it is called by one thread at a time.
        in_thread: runs a call in a thread, once one is free.
    """

    def __init__(self, encode: Callable[[list[str]], Tensor], in_thread: InThread) -> None:
        self._encode, self._in_thread = encode, in_thread
        self._waiting: list[tuple[str, asyncio.Future[Tensor]]] = []
        self._encoder: asyncio.Task[None] | None = None

    async def embedding(self, text: str) -> Tensor:
        """The embedding ``(D,)`` of a text. It may differ by rounding from that of another batch."""
        future: asyncio.Future[Tensor] = asyncio.get_running_loop().create_future()
        self._waiting.append((text, future))
        if self._encoder is None:
            self._encoder = asyncio.create_task(self._encode_all())
        return await future

    async def _encode_all(self) -> None:
        while self._waiting:
            batch = _Batch([], [])
            try:
                await self._in_thread(partial(self._encode_waiting, batch))
            except Exception as error:
                for _, future in batch.texts or self._take(len(self._waiting)):  # no thread could be had
                    if not future.done():
                        future.set_exception(error)
            for (_, future), text_D in zip(batch.texts, batch.embeddings):
                if not future.done():  # the request may have been cancelled
                    future.set_result(text_D)
        self._encoder = None

    def _encode_waiting(self, batch: _Batch) -> None:
        # Only now, so that texts that came while the call waited for a thread are in the batch.
        batch.texts.extend(self._take(MOST))
        batch.embeddings.extend(self._encode([text for text, _ in batch.texts]))

    def _take(self, number: int) -> list[tuple[str, asyncio.Future[Tensor]]]:
        taken = self._waiting[:number]
        del self._waiting[: len(taken)]  # the same list: another text may be added meanwhile
        return taken


class _Batch(NamedTuple):
    texts: list[tuple[str, asyncio.Future[Tensor]]]
    embeddings: list[Tensor]
