"""Groups of ``benchmarks/scale.py`` against the number of samples: index, order, start; memory of an evaluation."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.points import in_fresh_process, reset_peak, resident_peak_mb, say, say_growth

if TYPE_CHECKING:
    import torch

SAMPLES = (10**4, 10**5, 10**6, 10**7)
SAMPLES_PER_SHARD, NUM_CAPTIONS, SAMPLE_BYTES = 1000, 2, 100_000
NUM_FRAMES, WIDTH = 12, 512
VIDEOS_PER_PIECE = 500
LIMIT_MB = 4000
"""What a task may take for 100,000 texts x 100,000 videos."""


def write_split(directory: str, num_samples: int) -> None:
    """A split of ``num_samples`` videos: its real index, and shards of the right size without content."""
    import numpy as np

    from tmass_dist.data.index import Index, Shard

    numbers = np.arange(num_samples)
    columns = {
        "shard": (numbers // SAMPLES_PER_SHARD).astype(np.int32),
        "num_captions": np.full(num_samples, NUM_CAPTIONS, np.int32),
        "offset": (numbers % SAMPLES_PER_SHARD * SAMPLE_BYTES).astype(np.int64),
        "size": np.full(num_samples, SAMPLE_BYTES, np.int64),
        "crc32": numbers.astype(np.uint32),
    }
    ids = b"".join(b"video%08d" % number for number in range(num_samples))
    columns["id_bytes"] = np.frombuffer(ids, np.uint8)
    columns["id_end"] = (numbers + 1) * 13
    size = SAMPLES_PER_SHARD * SAMPLE_BYTES
    shards = tuple(Shard(f"{number:06d}.tar", size, "") for number in range(num_samples // SAMPLES_PER_SHARD))
    Path(directory).mkdir(parents=True, exist_ok=True)
    for shard in shards:
        (Path(directory) / shard.name).touch()
        os.truncate(Path(directory) / shard.name, size)
    Index(directory, "train", NUM_FRAMES, 224, "jpeg", shards, columns).save()


def _measured(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds, and MB of resident memory above those before."""
    before = reset_peak()
    began = time.perf_counter()
    kept = work()
    taken = time.perf_counter() - began
    del kept
    return taken, resident_peak_mb() - before


def load(directory: str) -> tuple[float, float]:
    """Reading the index and checking the size of every shard."""
    from tmass_dist.data.index import load_index

    return _measured(lambda: load_index(directory))


def order(directory: str, kind: str) -> tuple[float, float]:
    """The order of an epoch, up to its first batch."""
    from tmass_dist.config import DataConfig
    from tmass_dist.data.index import load_index
    from tmass_dist.data.mixed_order import make_order

    index = load_index(directory, check_shards=False)
    config = DataConfig(order=kind, batch_size=1024, lanes=64 if kind == "streaming" else None)  # pyright: ignore[reportArgumentType]
    return _measured(lambda: make_order(index, config, 0).pairs(0, range(1024)))


def _no_tokens(captions: list[str]) -> torch.Tensor:
    raise AssertionError("no caption is read")


def start(directory: str, world_size: int) -> tuple[float, float]:
    """What the first rank of ``world_size`` does with the data before the first batch: checks, index, order, loader.

    Images are not decoded: the shards have no content.
    """

    from tmass_dist.config import load_config
    from tmass_dist.data.loader import TrainLoader
    from tmass_dist.training.checks import check_and_load

    places = [f"data.{split}={directory}" for split in ("train", "val", "test")]
    settings = [
        *places,
        "model.pretrained=null",
        "data.batch_size=1024",
        "data.num_workers=0",
        f"run_dir={directory}/run",
    ]
    config = load_config("msrvtt.yaml", settings)

    def work() -> Any:
        checked, splits = check_and_load(config, world_size)
        loader = TrainLoader(
            splits[0],
            checked.data,
            rank=0,
            world_size=world_size,
            seed=0,
            tokenize=_no_tokens,
            num_frames=NUM_FRAMES,
        )
        return splits, loader, loader._dataset.order.pairs(0, loader._dataset.positions)

    return _measured(work)


def _sample_lines(name: str, function: Callable[..., tuple[float, float]], *arguments: Any) -> None:
    seconds: dict[int, float] = {}
    memory: dict[int, float] = {}
    for n in SAMPLES:
        with tempfile.TemporaryDirectory() as directory:
            in_fresh_process(write_split, directory, n)
            seconds[n], memory[n] = in_fresh_process(function, directory, *arguments)
        say(f"{name}-time", seconds[n], "s", n, "60 s", 60 / seconds[n])
        say(f"{name}-memory", memory[n], "MB", n, "4,000 MB", 4000 / max(memory[n], 0.1))
    say_growth(f"{name}-time", seconds, 10**5)
    say_growth(f"{name}-memory", memory, 10**5)


def index_lines() -> None:
    """``index``: reading and checking the index of a split."""
    _sample_lines("index", load)


def order_lines() -> None:
    """``order``: the batches of an epoch, for both orders."""
    _sample_lines("order-global", order, "global")
    _sample_lines("order-streaming", order, "streaming")


def start_lines() -> None:
    """``start``: what rank 0 of 64 does with the data before the first batch; train and val have n samples each."""
    _sample_lines("start", start, 64)


def write_store(directory: str, num_videos: int, precision: str) -> None:
    """A feature store of random features, one caption for each video."""
    import torch

    from tmass_dist.config import load_config, to_yaml
    from tmass_dist.evaluation.features import Features, StoreWriter
    from tmass_dist.models.head import build_head

    config = load_config("msrvtt.yaml", ["model.pretrained=null"])
    ids = [f"v{number}" for number in range(num_videos)]
    writer = StoreWriter(Path(directory), ids, (NUM_FRAMES, WIDTH), precision)
    generator = torch.Generator().manual_seed(0)
    for first in range(0, num_videos, VIDEOS_PER_PIECE):
        some = ids[first : first + VIDEOS_PER_PIECE]
        frames_VFD = torch.randn(len(some), NUM_FRAMES, WIDTH, generator=generator)
        text_TD = torch.randn(len(some), WIDTH, generator=generator)
        captions = [f"caption of {video}" for video in some]
        owner_T = torch.arange(len(some))
        writer.add(Features(some, frames_VFD, [(video, 0) for video in some], captions, text_TD, owner_T))
    head = build_head(config.model, WIDTH).state_dict()
    about = {"fingerprint": f"{num_videos}", "config": to_yaml(config), "checkpoint": "none", "weights_sha256": "none"}
    writer.finish(head, about | {"split": "random"})


def score_task(store: str, number: int = 0, count: int = 1, most_texts: int | None = None) -> dict[str, float]:
    """One task of a scoring job, on one thread.

    Args:
        store: the features.
        number, count: task ``number`` of ``count``.
        most_texts: stop after so many texts. Memory grows up to the end of a task's first group of blocks only; what
            the rest of that group would add is estimated and contained in ``peak_mb``.

    Returns:
        Number of texts, seconds, and peak resident memory, the memory-mapped features included.
    """
    import torch

    from tmass_dist.evaluation import blocks
    from tmass_dist.evaluation.stored import StoredSplit

    torch.set_num_threads(1)
    scorer = StoredSplit(Path(store), []).scorer
    own = scorer.blocks[number::count]
    group = next(scorer._groups(own))
    missing = 0
    if most_texts is not None:
        done = own[: max(1, most_texts // blocks.TEXTS_PER_BLOCK)]
        missing = max(0, _num_texts(group) - _num_texts(done))
        scorer.blocks, number, count = done, 0, 1
    began = time.perf_counter()
    blocks.BlockFiles(Path(store) / "scores", scorer).compute(number, count)
    bytes_per_text = 4 * (len(scorer.features.video_ids) + scorer.config.stochastic.num_trials * WIDTH)
    measured = resident_peak_mb()
    return {
        "num_texts": _num_texts(scorer.blocks[number::count]),
        "seconds": time.perf_counter() - began,
        "measured_mb": measured,
        "peak_mb": measured + missing * bytes_per_text / 1e6,
    }


def _num_texts(blocks: list[slice]) -> int:
    return sum(texts.stop - texts.start for texts in blocks)


def evaluation_lines() -> None:
    """``evaluation-memory``: peak of one scoring task of a job for n texts x n videos.

    The jobs of 2,000 and 10,000 are computed whole, by two tasks at the same time, one thread each. At 100,000 a task
    computes 64 texts against all videos with the tiles and blocks of the whole job; ``evaluation-memory-of-64-texts``
    is the same at 10,000, so that the estimate stands beside the measured value.
    """
    peaks: dict[int, float] = {}
    for n in (2000, 10_000):
        with tempfile.TemporaryDirectory() as directory:
            in_fresh_process(write_store, directory, n, "float32")
            with ThreadPoolExecutor(2) as pool:
                tasks = list(pool.map(lambda number: in_fresh_process(score_task, directory, number, 2), range(2)))
            assert sum(task["num_texts"] for task in tasks) == n == _num_scored(directory)
            peaks[n] = max(task["peak_mb"] for task in tasks)
            seconds = max(task["seconds"] for task in tasks)
            reference = f"{LIMIT_MB} MB a task; all {n} x {n} scores computed by 2 tasks"
            say("evaluation-memory", peaks[n], "MB", n, reference, LIMIT_MB / peaks[n])
            say("evaluation-time", seconds, "s", n, "600 s, one thread a task", 600 / seconds)
            if n == 10_000:
                shutil.rmtree(Path(directory) / "scores")
                part = in_fresh_process(score_task, directory, 0, 2, 64)
                reference = "the measured task; 64 texts computed, the rest of the group estimated"
                say("evaluation-memory-of-64-texts", part["peak_mb"], "MB", n, reference, peaks[n] / part["peak_mb"])
    for precision in ("float32", "float16"):
        with tempfile.TemporaryDirectory() as directory:
            in_fresh_process(write_store, directory, 100_000, precision)
            part = in_fresh_process(score_task, directory, 0, 64, 64)
        if precision == "float32":
            peaks[100_000] = part["peak_mb"]
        name = "evaluation-memory" + ("" if precision == "float32" else f"-{precision}")
        computed = (
            f"{part['num_texts']} texts computed in {part['seconds']:.0f} s, {part['measured_mb']:.0f} MB measured"
        )
        reference = f"{LIMIT_MB} MB a task; {computed}"
        say(name, part["peak_mb"], "MB", 100_000, reference, LIMIT_MB / part["peak_mb"])
    say_growth("evaluation-memory", peaks, 10_000)


def _num_scored(store: str) -> int:
    """Texts in the files of blocks."""
    from safetensors import safe_open

    num_texts = 0
    for path in (Path(store) / "scores").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            num_texts += file.get_slice("similarity").get_shape()[0]
    return num_texts
