"""Loading: each pair once, the same order for every world size, resuming at any step, damaged samples replaced."""

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import run
from tests.loaders import TOKENIZE, copied, global_batches, make_loaders
from tests.resharded import reshard
from tmass_dist.data.index import Index, Sample, Shard, load_index, make_columns
from tmass_dist.data.order import epoch_batches, rounds, substitutes
from tmass_dist.data.samples import DamagedError, read_sample
from tmass_dist.data.videos import iterate_videos, num_batches
from tmass_dist.errors import PeerLostError


@pytest.fixture(scope="module")
def packed(data: list[str]) -> Path:
    return Path(next(o for o in data if o.startswith("data.train=")).removeprefix("data.train="))


def _by_pairs(counts: np.ndarray, seed: int, epoch: int, batch_size: int) -> list[list[tuple[int, int]]]:
    """The order that the docstring of ``epoch_batches`` describes, pair by pair."""
    queue = [tuple(pair) for part in rounds(counts, seed=seed, epoch=epoch) for pair in part.tolist()]
    assert len(set(queue)) == counts.sum()
    batches: list[list[tuple[int, int]]] = [[]]
    while queue:
        videos_in_batch = {video for video, _ in batches[-1]}
        pair = next((pair for pair in queue if pair[0] not in videos_in_batch), queue[0])
        queue.remove(pair)
        batches[-1].append(pair)
        if len(batches[-1]) == batch_size:
            batches.append([])
    return [batch for batch in batches if len(batch) == batch_size]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("counts", [[3] * 40, [1, 5, 2, 3] * 10, [1] * 33, [20] + [1] * 12, [2] * 7, [4] * 8])
@pytest.mark.parametrize("batch_size", [2, 8])
def test_every_pair_once_and_no_video_twice_in_a_batch(seed: int, counts: list[int], batch_size: int) -> None:
    plan = epoch_batches(np.array(counts), seed=seed, epoch=seed % 3, batch_size=batch_size)
    pairs = [tuple(pair) for pair in plan.reshape(-1, 2).tolist()]
    assert plan.shape == (sum(counts) // batch_size, batch_size, 2)  # only the last partial batch is dropped
    assert len(set(pairs)) == len(pairs) and all(slot < counts[video] for video, slot in pairs)
    oracle = _by_pairs(np.array(counts), seed, seed % 3, batch_size)
    repeats = [
        sum(len(set(b[:, 0])) < batch_size for b in plan),
        sum(len({v for v, _ in b}) < batch_size for b in oracle),
    ]
    assert repeats[0] <= repeats[1]  # a video repeats only if no other is left
    if repeats == [0, 0]:
        assert [[tuple(pair) for pair in batch] for batch in plan.tolist()] == oracle


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_any_world_size_workers_and_start_give_the_same_batches(packed: Path, num_workers: int) -> None:
    index = load_index(packed)

    def content(world_size: int, start: int, steps: int) -> list[tuple]:
        batches = global_batches(make_loaders(index, world_size, num_workers=num_workers), start, steps)
        pixels = [torch.cat([b.pixels_BFHWC for b in step]) for step in batches]
        return [([p for b in step for p in zip(b.video_ids, b.captions)], x) for step, x in zip(batches, pixels)]

    number = int(index.num_captions.sum()) // 4 + 3  # more than an epoch
    one_rank = content(1, 0, number)
    for several in (content(2, 0, number), content(4, 5, number - 5)):
        for (pairs, pixels), (expected_pairs, expected_pixels) in zip(several[::-1], one_rank[::-1]):
            assert pairs == expected_pairs and torch.equal(pixels, expected_pixels)


def test_a_resume_reads_nothing_of_what_came_before(packed: Path, tmp_path: Path) -> None:
    """Batch k+1 comes even if every shard that it does not need is missing."""
    index = reshard(packed, tmp_path, per_shard=2)
    batch_B2 = epoch_batches(index.num_captions, seed=1, epoch=0, batch_size=4)[7]
    needed = {index.sample(int(number)).shard for number in batch_B2[:, 0]}
    expected = copied(next(make_loaders(index, 1)[0].batches(7)))
    others = [shard for k, shard in enumerate(index.shards) if k not in needed]
    assert len(others) >= 10
    for shard in others:
        (tmp_path / shard.name).unlink()
    resumed = next(make_loaders(index, 1)[0].batches(7))
    assert resumed.video_ids == expected.video_ids and torch.equal(resumed.pixels_BFHWC, expected.pixels_BFHWC)


def test_evaluation_meets_every_video_once(packed: Path) -> None:
    index = load_index(packed)
    seen = [
        video
        for rank in range(3)
        for batch in iterate_videos(
            index, batches=range(num_batches(index, 2))[rank::3], batch_size=2, tokenize=TOKENIZE
        )
        for video in batch.video_ids
    ]
    assert sorted(seen) == sorted(index.ids)


@pytest.mark.parametrize(("num_workers", "cuda"), [(1, False), (3, False), (2, True)])
def test_workers_decode_the_same_videos_for_evaluation(
    packed: Path, num_workers: int, cuda: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where CUDA is in use, and workers must not be forked from this process."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: cuda)
    index = load_index(packed)
    batches = range(num_batches(index, 2))
    read = {
        workers: [
            (batch.pixels_BFHWC.clone(), batch.tokens_TL, batch.video_ids, batch.captions, batch.caption_ids)
            for batch in iterate_videos(
                index, batches=batches, batch_size=2, tokenize=TOKENIZE, num_frames=5, num_workers=workers
            )
        ]
        for workers in (0, num_workers)
    }
    assert len(read[0]) == len(read[num_workers]) == len(batches)
    for one, other in zip(read[0], read[num_workers]):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1]) and one[2:] == other[2:]


def test_a_damaged_video_stops_an_evaluation_with_workers_too(packed: Path, tmp_path: Path) -> None:
    shutil.copytree(packed, tmp_path / "copy")
    index = load_index(tmp_path / "copy")
    sample = index.sample(len(index) - 1)
    with index.path(sample).open("r+b") as file:
        file.seek(sample.offset + sample.size // 2)
        file.write(b"damaged")
    with pytest.raises(DamagedError, match="checksum"):
        batches = range(num_batches(index, 2))
        list(iterate_videos(index, batches=batches, batch_size=2, tokenize=TOKENIZE, num_workers=2))


@pytest.mark.parametrize("cuda", [False, True])
def test_a_killed_worker_of_an_evaluation_is_noticed(packed: Path, cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: cuda)
    index = load_index(packed)
    batches = iterate_videos(index, batches=[0] * 50, batch_size=2, tokenize=TOKENIZE, num_workers=1, timeout_s=200)
    next(batches)
    [worker] = multiprocessing.active_children()
    os.kill(worker.pid or 0, signal.SIGKILL)
    with pytest.raises(PeerLostError, match=r"a process that decodes .+ ended or hangs"):
        list(batches)


def test_held_out_videos_are_the_same_in_every_run_and_in_no_batch(packed: Path) -> None:
    index = load_index(packed)
    left, held = index.hold_out(3)
    ids = [set(left.ids), set(held.ids)]
    assert len(ids[1]) == 3 and not ids[0] & ids[1] and ids[0] | ids[1] == set(index.ids)
    assert set(index.hold_out(3)[1].ids) == ids[1]
    assert [read_sample(held, k)[0]["id"] for k in range(3)] == held.ids
    with pytest.raises(ValueError, match=f"data.holdout is {len(index)}"):
        index.hold_out(len(index))


def test_more_packed_frames_than_the_model_takes(packed: Path) -> None:
    index = load_index(packed)
    whole, middle, anywhere = (
        next(make_loaders(index, 1, num_frames=number, frames=choice)[0].batches(0)).pixels_BFHWC
        for number, choice in ((12, "uniform"), (4, "uniform"), (4, "random"))
    )
    assert torch.equal(middle, whole[:, [1, 4, 7, 10]])
    assert anywhere.shape == middle.shape and not torch.equal(anywhere, middle)


def _damage(directory: Path, index: Index, number: int) -> None:
    sample = index.sample(number)
    path = directory / index.shards[sample.shard].name
    content = bytearray(path.read_bytes())
    content[sample.offset + sample.size // 2] ^= 0xFF  # one byte
    path.write_bytes(content)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_sample_has_the_same_substitute_on_any_world_size(
    packed: Path, tmp_path: Path, num_workers: int
) -> None:
    shutil.copytree(packed, tmp_path, dirs_exist_ok=True)
    index = load_index(tmp_path)
    plan = epoch_batches(index.num_captions, seed=1, epoch=0, batch_size=4)
    bad = [int(plan[2, 0, 0]), int(plan[2, 3, 0])]  # two of one batch, on two ranks
    for number in bad:
        _damage(tmp_path, index, number)
    pairs = {}
    for world_size in (1, 2, 4):
        step = global_batches(make_loaders(index, world_size, num_workers=num_workers), 2, 1)[0]
        pairs[world_size] = [pair for b in step for pair in zip(b.video_ids, b.caption_slots)]
        damaged = [entry for b in step for entry in b.damaged]
        assert [video for video, _ in damaged] == [index.id_of(number) for number in bad]
        assert all("checksum" in reason and ".tar" in reason for _, reason in damaged)
    assert pairs[1] == pairs[2] == pairs[4]
    assert len({video for video, _ in pairs[1]}) == 4 and not {index.id_of(n) for n in bad} & {v for v, _ in pairs[1]}
    with pytest.raises(DamagedError, match="checksum"):
        list(iterate_videos(index, batches=range(num_batches(index, 4)), batch_size=4, tokenize=TOKENIZE))


def test_substitutes_hold_no_video_of_the_batch_and_are_disjoint() -> None:
    counts = np.array([2] * 30)
    batch = epoch_batches(counts, seed=0, epoch=0, batch_size=8)[1]
    offered = [list(substitutes(counts, batch, position, seed=0, step=1)) for position in range(8)]
    videos = [video for pairs in offered for video, _ in pairs]
    assert sorted(videos) == sorted(set(range(30)) - set(batch[:, 0].tolist()))
    none_left = list(substitutes(counts[:8], np.stack([np.arange(8), np.zeros(8, int)], 1), 0, seed=0, step=0))
    assert none_left == []


def test_training_replaces_damaged_videos_and_stops_at_too_many(data: list[str], tmp_path: Path) -> None:
    train = Path(next(o for o in data if o.startswith("data.train=")).removeprefix("data.train="))
    shutil.copytree(train, tmp_path / "train")
    index = load_index(tmp_path / "train")
    _damage(tmp_path / "train", index, 5)
    more = [
        *data,
        f"data.train={tmp_path / 'train'}",
        "epochs=1",
        "max_steps=null",
        "data.num_workers=1",
        "eval_every=100",
    ]
    command = ["-m", "tmass_dist.train", "--config", "demo.yaml", *more]
    done = run(*command, f"run_dir={tmp_path / 'run'}", "data.max_bad=0.1")
    assert done.returncode == 0, done.stderr
    entries = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert [entry["id"] for entry in entries] == [index.id_of(5)]
    assert "another video replaces it" in (tmp_path / "run" / "train.log").read_text()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert events.Scalars("progress/damaged_videos")[-1].value == 1
    done = run(*command, f"run_dir={tmp_path / 'other'}", "data.max_bad=0")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert index.id_of(5) in done.stderr and "more than data.max_bad allows" in done.stderr


def test_a_worker_that_hangs_is_named_with_its_shard(packed: Path, tmp_path: Path) -> None:
    """Reading the shard blocks for ever, as on a dead file server."""
    shutil.copytree(packed, tmp_path, dirs_exist_ok=True)
    index = load_index(tmp_path)
    loader = make_loaders(index, 1, num_workers=1, timeout_s=4)[0]
    for shard in index.shards:
        (tmp_path / shard.name).unlink()
        os.mkfifo(tmp_path / shard.name)
    stream = loader.batches(0)
    with pytest.raises(PeerLostError, match=r"hangs reading shard-000000\.tar of .*timed out"):
        next(stream)
    for shard in index.shards:  # lets the worker end: it ignores the signals that end other processes
        os.close(os.open(tmp_path / shard.name, os.O_WRONLY | os.O_NONBLOCK))


def test_an_index_of_many_shards_is_columns(tmp_path: Path) -> None:
    samples = [Sample(f"vidéo {k}", k // 10, 1 + k % 3, k % 10 * 512, 512, k) for k in range(1000)]
    shards = tuple(Shard(f"shard-{k:06d}.tar", 5120, "x") for k in range(100))
    for shard in shards:
        (tmp_path / shard.name).write_bytes(bytes(shard.bytes))
    Index(str(tmp_path), "train", 12, 224, "jpeg", shards, make_columns(samples)).save()
    index = load_index(tmp_path)
    assert [index.sample(k) for k in range(1000)] == samples and index.ids == [s.id for s in samples]
    part = index.take([7, 3])
    assert [part.sample(k) for k in range(2)] == [samples[7], samples[3]]
