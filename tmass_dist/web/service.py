"""What the server answers with: a searcher that loads in the background, and a limit on concurrent work."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import anyio
import anyio.to_thread
from torch import Tensor

from tmass_dist.errors import UserError
from tmass_dist.pages import PLAYABLE
from tmass_dist.retrieval.searcher import Result, Searcher, check_query
from tmass_dist.score_labels import label_words
from tmass_dist.web.text_batches import TextBatches

Value = TypeVar("Value")

WORKERS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
"""Searches that run at once. More would only take turns on the processors, and each the other's cache."""
MAX_WAITING, MAX_RESULTS = 64, 100
"""Searches that may wait, and results of a search."""


class BusyError(RuntimeError):
    """Too many searches are waiting."""


class NotReadyError(RuntimeError):
    """The model is still loading, or could not be loaded."""


class Service:
    """A gallery behind the page.

    Args:
        load: loads gallery and model; it is called in a thread by :meth:`start`.
    """

    def __init__(self, load: Callable[[], Searcher]) -> None:
        self._load = load
        self._searcher: Searcher | None = None
        self._texts: TextBatches | None = None
        self._failure: str | None = None
        self._waiting = 0
        self._limiter: anyio.CapacityLimiter | None = None

    def start(self) -> None:
        """Load in the background; meanwhile the page says so."""
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            searcher = self._load()
            self._texts = TextBatches(searcher.model.encode_text, self._in_thread)
            self._searcher = searcher
        except Exception as error:
            self._failure = " ".join(str(error).split()) or type(error).__name__
            if not isinstance(error, UserError):
                raise  # its traceback belongs into the log

    @property
    def searcher(self) -> Searcher:
        """The loaded searcher.

        Raises:
            NotReadyError: it is not loaded (yet).
        """
        if self._searcher is None:
            raise NotReadyError(self._failure or "the model is loading; try again in a moment")
        return self._searcher

    def state(self) -> dict[str, Any]:
        """Whether searches are possible, and what to tell the user if not."""
        if self._failure:
            return {"state": "failed", "message": self._failure, "videos": 0}
        if self._searcher is None:
            return {"state": "loading", "message": "The model is loading …", "videos": 0}
        size = len(self._searcher.gallery)
        empty = "The gallery is empty. Add videos with: tmass index MODEL --videos DIR --out GALLERY"
        return {"state": "ready", "message": "" if size else empty, "videos": size}

    async def search(self, query: str, k: int, name: str | None) -> dict[str, Any]:
        """Answer of ``/api/search``.

        Raises:
            UserError: what was asked cannot be answered.
            NotReadyError: there is no model.
            BusyError: too many searches are waiting.
        """
        searcher, texts, text = self.searcher, self._texts, check_query(query)
        assert texts is not None
        with self._place():
            text_D = await texts.embedding(text)
            return await self._in_thread(lambda: self._found(searcher, query, text, text_D, k, name or None))

    async def similar(self, row: int, k: int) -> dict[str, Any]:
        """Answer of ``/api/similar``; it raises what :meth:`search` does."""
        searcher = self.searcher
        results = await self.run(lambda: searcher.similar(row, k))
        return {"similar_to": searcher.gallery.video(row).id, **self._answer(results)}

    async def run(self, work: Callable[[], Value]) -> Value:
        """Run ``work`` in a thread.

        Raises:
            BusyError: too many calls are waiting.
        """
        with self._place():
            return await self._in_thread(work)

    @contextmanager
    def _place(self) -> Iterator[None]:
        if self._waiting >= WORKERS + MAX_WAITING:
            raise BusyError("too many searches at once; try again in a moment")
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1

    async def _in_thread(self, work: Callable[[], Value]) -> Value:
        if self._limiter is None:
            self._limiter = anyio.CapacityLimiter(WORKERS)
        return await anyio.to_thread.run_sync(work, limiter=self._limiter)

    def _found(
        self, searcher: Searcher, query: str, text: str, text_D: Tensor, k: int, name: str | None
    ) -> dict[str, Any]:
        [results] = searcher.search_encoded([text], text_D[None], k, name=name)
        labels = searcher.labels(k, name)
        return {"query": query, "labels": labels, "label": ", ".join(label_words(labels)), **self._answer(results)}

    def _answer(self, results: list[Result]) -> dict[str, Any]:
        return {
            "videos": len(self.searcher.gallery),
            "absent": sum(result.absent for result in results),
            "results": [
                {
                    "row": result.row,
                    "id": result.id,
                    "score": round(result.score, 4),
                    "time_s": round(result.time_s, 3),
                    "seconds": round(result.seconds, 3),
                    "frame": result.frame,
                    "times_s": result.times_s,
                    "attention": result.attention,
                    "thumbnails": [f"/thumbnail/{result.row}/{frame}.jpg" for frame in range(len(result.times_s))],
                    "video": f"/video/{result.row}" if _is_playable(result) else None,
                }
                for result in results
            ],
        }


def _is_playable(result: Result) -> bool:
    return result.path.lower().endswith(PLAYABLE) and not result.absent and not Path(result.path).is_symlink()
