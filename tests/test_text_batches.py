"""Texts of concurrent calls are encoded together; a failure reaches each call of its batch, and no other."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from tmass_dist.web.text_batches import MOST, TextBatches


def _embeddings(texts: list[str]) -> Tensor:
    return torch.tensor([[float(text)] for text in texts])


def _encode(batches: TextBatches, text: str) -> Tensor:
    return batches.embedding(batches.add(text))


def test_texts_that_wait_are_encoded_together_and_each_call_gets_its_own() -> None:
    sizes: list[int] = []
    first_started, all_wait = threading.Event(), threading.Event()

    def encode(texts: list[str]) -> Tensor:
        sizes.append(len(texts))
        first_started.set()
        assert all_wait.wait(60)
        return _embeddings(texts)

    batches = TextBatches(encode)
    number = 2 * MOST + 1
    with ThreadPoolExecutor(number + 1) as pool:
        first = pool.submit(_encode, batches, "0")
        assert first_started.wait(60)
        others = [pool.submit(_encode, batches, str(text)) for text in range(1, number + 1)]
        while len(batches._waiting) < number:
            threading.Event().wait(0.001)
        all_wait.set()
        assert first.result(60).tolist() == [0.0]
        assert [other.result(60).tolist() for other in others] == [[float(text)] for text in range(1, number + 1)]
    assert sizes == [1, MOST, MOST, 1]


def test_a_failure_is_raised_in_its_call_and_the_next_call_is_answered() -> None:
    batches = TextBatches(_embeddings)
    with pytest.raises(ValueError, match="could not convert"):
        _encode(batches, "no number")
    assert _encode(batches, "3").tolist() == [3.0]
