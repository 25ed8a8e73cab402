"""Text embeddings for concurrent searches: texts that wait at the same time are encoded together."""

# Shapes: D embedding width.

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

from torch import Tensor

MOST = 16
"""Texts encoded together, which bounds the time that the first of them waits for the others."""


class TextBatches:
    """Encodes texts of concurrent searches: all that wait, in one batch.

    A batch takes about half the time of its texts one by one, since it reads the weights of the tower once.

    Args:
        encode: embeddings ``(T, D)`` of a list of texts; it is called by one thread at a time.
    """

    def __init__(self, encode: Callable[[list[str]], Tensor]) -> None:
        self._encode = encode
        self._waiting: list[tuple[str, Future[Tensor]]] = []
        self._change, self._tower = threading.Lock(), threading.Lock()

    def add(self, text: str) -> Future[Tensor]:
        """Have a text wait: the next batch encodes it. :meth:`embedding` takes what this returns."""
        future: Future[Tensor] = Future()
        with self._change:
            self._waiting.append((text, future))
        return future

    def embedding(self, future: Future[Tensor]) -> Tensor:
        """The embedding ``(D,)`` of a text. It may differ by rounding from that of another batch."""
        # Whoever gets the tower first encodes for all that wait. The others then find their embeddings ready.
        while not future.done():
            with self._tower:
                if not future.done():
                    self._encode_waiting()
        return future.result()

    def _encode_waiting(self) -> None:
        with self._change:
            batch, self._waiting = self._waiting[:MOST], self._waiting[MOST:]
        try:
            embeddings = self._encode([text for text, _ in batch])
        except BaseException as error:
            for _, future in batch:
                future.set_exception(error)
            return
        for (_, future), text_D in zip(batch, embeddings):
            future.set_result(text_D)
