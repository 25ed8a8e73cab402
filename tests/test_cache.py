"""The limited cache of a node: what is downloaded and deleted when, shared by ranks, left whole by a killed run."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import ROOT, run
from tests.faulty_server import FaultyServer
from tests.loaders import global_batches, make_loaders
from tests.processes import train_and_be_killed, until
from tests.ranks import on_ranks
from tests.resharded import reshard
from tmass_dist.config import load_config
from tmass_dist.data.cache import GB, CachePlan, check_capacity, needed_bytes, node_uses
from tmass_dist.data.fetcher import Fetcher
from tmass_dist.data.index import Index, load_index
from tmass_dist.data.remote import DownloadError
from tmass_dist.data.streaming import StreamingOrder
from tmass_dist.errors import UserError
from tmass_dist.training.loop import train


def _order(num_shards: int = 400, per_shard: int = 16, lanes: int = 16, batch_size: int = 64) -> StreamingOrder:
    shard_of = np.repeat(np.arange(num_shards, dtype=np.int32), per_shard)
    num_captions = np.ones(len(shard_of), np.int32)
    return StreamingOrder(num_captions, shard_of, seed=3, batch_size=batch_size, lanes=lanes)


def _run_plan(order: StreamingOrder, lanes: list[int], sizes: np.ndarray, capacity: int, epochs: int) -> Counter[int]:
    """Downloads of each shard, with every needed shard checked to be there at every step."""
    plan = CachePlan(node_uses(order, lanes), sizes, capacity, order.steps_per_epoch, 0)
    downloads: Counter[int] = Counter()
    for step in range(epochs * order.steps_per_epoch):
        plan.advance(step)
        while next_download := plan.next_download():
            downloads[next_download[0]] += 1
            plan.downloaded(next_download[0])
            assert plan.used_bytes == sizes[[*plan.held]].sum() <= capacity
        needed = {int(v) // 16 for lane in lanes for v in order.lane_batch_of(step, lane)[:, 0]}
        assert needed <= plan.held
    return downloads


@pytest.mark.parametrize("node", range(4))
def test_a_shard_is_downloaded_once_in_each_epoch_with_the_smallest_cache(node: int) -> None:
    order, epochs = _order(), 4
    sizes = np.random.default_rng(0).integers(50, 150, 400)
    lanes = [*range(4 * node, 4 * node + 4)]
    share = np.unique(np.concatenate([order.shards_of(lane) for lane in lanes]))
    downloads = _run_plan(order, lanes, sizes, needed_bytes(order, lanes, sizes, order.window + 2), epochs)
    # A lane may share the shard at its boundary with its neighbour. The last downloads are for the epoch to come.
    ahead = (order.window + 2) * len(lanes)
    assert downloads.total() <= epochs * (1.05 * len(share) + len(lanes)) + ahead
    assert set(downloads) == set(share.tolist())


def test_a_share_that_fits_is_downloaded_once() -> None:
    order, sizes = _order(), np.full(400, 100)
    lanes = [0, 1, 2, 3]
    share = np.unique(np.concatenate([order.shards_of(lane) for lane in lanes]))
    assert _run_plan(order, lanes, sizes, int(sizes[share].sum()), 3) == Counter(share.tolist())


def test_a_cache_that_is_too_small_is_refused_with_the_size_that_would_do() -> None:
    order, sizes = _order(), np.full(400, 10**9)
    with pytest.raises(UserError, match=r"data\.cache_gb=3 is too small: the 4 lanes of this node need 16\.0, "):
        check_capacity(3, order, [0, 1, 2, 3], sizes)
    check_capacity(16, order, [0, 1, 2, 3], sizes)
    small = np.full(400, 1234)
    with pytest.raises(UserError) as caught:
        check_capacity(1e-9, order, [0], small)
    check_capacity(float(str(caught.value).split("need ")[1].split(",")[0]), order, [0], small)


def test_a_cache_that_was_larger_shrinks_and_keeps_what_is_needed_first() -> None:
    order, sizes = _order(), np.full(400, 100)
    uses = node_uses(order, [0])
    share = order.shards_of(0)
    plan = CachePlan(uses, sizes, 1000, order.steps_per_epoch, 0, held=share.tolist())
    deleted = plan.shrink()
    assert plan.used_bytes <= 1000 and len(deleted) == len(share) - 10
    assert max(plan.next_use(shard) for shard in plan.held) <= min(plan.next_use(shard) for shard in deleted)


@pytest.fixture(scope="module")
def local(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Index:
    """160 shards."""
    packed = Path(next(o for o in data if o.startswith("data.train=")).removeprefix("data.train="))
    return reshard(packed, tmp_path_factory.mktemp("local"), per_shard=2, copies=8)


@pytest.fixture
def server(local: Index, tmp_path: Path) -> Iterator[FaultyServer]:
    shutil.copytree(local.directory, tmp_path / "served")
    server = FaultyServer(tmp_path / "served")
    yield server
    server.close()


OPTIONS = {"order": "streaming", "lanes": 4, "batch_size": 8}


def _tenth(index: Index) -> float:
    return sum(shard.bytes for shard in index.shards) / 10 / GB


def _cached_bytes(cache: Path) -> int:
    """Bytes of all shards, complete or not, while another process renames and deletes them."""
    sizes = {}
    for path in [*cache.rglob("*.tmp"), *cache.rglob("*.tar")]:
        with contextlib.suppress(FileNotFoundError):
            sizes[path.name.split(".tar")[0]] = path.stat().st_size
    return sum(sizes.values())


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (2, 1)])
def test_batches_through_a_cache_of_a_tenth_are_those_of_local_shards(
    server: FaultyServer, local: Index, tmp_path: Path, world_size: int, num_workers: int
) -> None:
    assert len(local.shards) == 160
    cache = tmp_path / "cache"
    remote = load_index(server.url, str(cache))
    options = OPTIONS | {"cache": str(cache), "cache_gb": _tenth(local), "train": server.url, "val": "x"}
    loaders = make_loaders(remote, world_size, num_workers=num_workers, **options)
    expected = make_loaders(local, world_size, **OPTIONS)
    steps, peak = 2 * loaders[0].steps_per_epoch, 0
    streams, expected_streams = ([loader.batches(0) for loader in group] for group in (loaders, expected))
    for _ in range(steps):
        for stream, expected_stream in zip(streams, expected_streams):
            batch, expected_batch = next(stream), next(expected_stream)
            assert batch.video_ids == expected_batch.video_ids and not batch.damaged
            assert torch.equal(batch.pixels_BFHWC, expected_batch.pixels_BFHWC)
        peak = max(peak, _cached_bytes(cache))
    for stream in [*streams, *expected_streams]:
        stream.close()
    downloads = [server.requests[shard.name] for shard in local.shards]
    ahead = 16  # the cache holds shards of the epoch to come
    assert sum(downloads) <= 2 * (1.05 * 160 + 4) + ahead and min(downloads) >= 1
    assert peak <= _tenth(local) * GB


def test_only_what_was_downloaded_here_is_deleted(server: FaultyServer, local: Index, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    remote = load_index(server.url, str(cache))
    folder = next(path for path in cache.iterdir() if path.is_dir())
    own = [shard.name for shard in local.shards[:20]]
    for name in own:  # put there by a person
        shutil.copy(Path(local.directory) / name, folder / name)
    (folder / "notes.txt").write_text("keep")
    (folder / "shard-000000.tar.99999999.tmp").write_text("left by a killed run")
    options = OPTIONS | {"cache": str(cache), "cache_gb": _tenth(local), "train": server.url, "val": "x"}
    loader = make_loaders(remote, 1, **options)[0]
    global_batches([loader], 0, loader.steps_per_epoch)
    assert all((folder / name).is_file() for name in [*own, "notes.txt"])
    assert not any(server.requests[name] for name in own)
    assert not (folder / "shard-000000.tar.99999999.tmp").exists()


def test_a_shard_that_someone_deletes_is_downloaded_again(server: FaultyServer, local: Index, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    options = OPTIONS | {"cache": str(cache), "cache_gb": _tenth(local), "train": server.url, "val": "x"}
    stream = make_loaders(load_index(server.url, str(cache)), 1, **options)[0].batches(0)
    next(stream)
    for path in cache.rglob("*.tar"):
        path.unlink()
    assert not next(stream).damaged
    stream.close()


def test_a_download_that_fails_ends_the_run_as_a_failure_of_a_machine(
    server: FaultyServer, local: Index, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    options = OPTIONS | {"cache": str(cache), "cache_gb": _tenth(local), "train": server.url, "val": "x", "retry_s": 1}
    for num_workers in (0, 1):
        index = load_index(server.url, str(cache))
        for shard in index.shards:
            server.faults[shard.name] = ["always 500"]
        with pytest.raises(DownloadError, match=r"shard-\d+\.tar cannot be downloaded, tried for"):
            next(make_loaders(index, 1, num_workers=num_workers, **options)[0].batches(0))
        (server.directory / "moved").mkdir(exist_ok=True)
    for shard in local.shards:
        server.faults[shard.name] = []
        (server.directory / shard.name).unlink()
    with pytest.raises(UserError, match=r"shard-\d+\.tar does not exist"):
        next(make_loaders(index, 1, **options)[0].batches(0))


def test_two_runs_do_not_share_a_limited_cache(server: FaultyServer, local: Index, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    options = OPTIONS | {"cache": str(cache), "cache_gb": _tenth(local), "train": server.url, "val": "x"}
    index = load_index(server.url, str(cache))
    first, second = (make_loaders(index, 1, **options)[0].batches(0) for _ in range(2))
    next(first)
    with pytest.raises(UserError, match=r"another run with data\.cache_gb uses .*cache; set another data\.cache"):
        next(second)
    next(first)
    first.close()
    third = make_loaders(index, 1, **options)[0].batches(0)
    next(third)
    third.close()


def test_the_fetcher_ends_with_a_killed_run_and_the_next_run_goes_on(
    server: FaultyServer, local: Index, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    code = f"""
import time
from tests.loaders import make_loaders
from tmass_dist.data.index import load_index
options = {OPTIONS | {"cache": str(cache), "cache_gb": _tenth(local), "train": server.url, "val": "x"}!r}
stream = make_loaders(load_index({server.url!r}, {str(cache)!r}), 1, num_workers=1, **options)[0].batches(0)
next(stream)
print("reading", flush=True)
time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "reading\n"
    children = _children(process.pid)
    assert len(children) >= 2  # a worker and the fetcher
    process.send_signal(signal.SIGKILL)
    process.wait()
    until(lambda: not any(Path(f"/proc/{child}").exists() for child in children), "end of its processes")
    options = OPTIONS | {"cache": str(cache), "cache_gb": _tenth(local), "train": server.url, "val": "x"}
    resumed = global_batches(make_loaders(load_index(server.url, str(cache)), 1, **options), 3, 5)
    expected = global_batches(make_loaders(local, 1, **OPTIONS), 3, 5)
    for (batch,), (expected_batch,) in zip(resumed, expected):
        assert torch.equal(batch.pixels_BFHWC, expected_batch.pixels_BFHWC)
    assert not list(cache.rglob("*.tmp"))


def _children(parent: int) -> list[int]:
    """Children of a process."""
    children = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            children.append(int(path.parent.name))
    return children


def test_settings_that_do_not_fit_are_one_line(data: list[str], server: FaultyServer, tmp_path: Path) -> None:
    common = ["-m", "tmass_dist.train", "--config", "demo.yaml", *data]
    url = [f"data.train={server.url}", f"data.cache={tmp_path / 'cache'}"]
    for more, message in (
        (["data.order=streaming", "data.cache_gb=1"], "data.cache_gb limits the shards of URLs"),
        (["data.cache_gb=1"], "data.cache_gb applies to data.order=streaming"),
        ([*url, "data.cache_gb=1e-9", "data.lanes=4"], "data.cache_gb=1e-09 is too small"),
        ([*url, "data.cache_gb=1", "data.val=null", "data.holdout=3"], "held-out videos lie in all shards"),
        ([*url, "data.retry_s=700"], "data.retry_s is 700"),
    ):
        done = run(*common, *more, f"run_dir={tmp_path / message[-8:]}")
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_fetcher_that_cannot_start_says_so(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, not a directory")
    order = _order()
    plan = CachePlan(node_uses(order, [0]), np.full(400, 1), None, order.steps_per_epoch, 0)
    with pytest.raises(Exception, match="did not start"):
        Fetcher([], lambda *_: plan, tmp_path / "cache", [0], 1.0)
    assert os.path.isfile(tmp_path / "cache")


def _train(overrides: list[str]) -> None:
    train(load_config("demo.yaml", overrides))


def _losses(run_dir: Path) -> dict[int, float]:
    events = EventAccumulator(str(run_dir))
    events.Reload()
    return {event.step: event.value for event in events.Scalars("loss/total")}


def test_a_run_through_a_small_cache_has_the_losses_of_local_shards_though_killed_and_resumed_on_two_ranks(
    data: list[str], server: FaultyServer, local: Index, tmp_path: Path
) -> None:
    common = [*data, "max_steps=40", "epochs=9", "eval_every=20", "log_every=1", "data.num_workers=1"]
    common += ["data.order=streaming", "data.lanes=4"]
    done = run(
        "-m",
        "tmass_dist.train",
        "--config",
        "demo.yaml",
        *common,
        f"data.train={local.directory}",
        f"run_dir={tmp_path / 'local'}",
    )
    assert done.returncode == 0, done.stderr
    remote = [*common, f"data.train={server.url}", f"data.cache={tmp_path / 'cache'}", f"run_dir={tmp_path / 'remote'}"]
    remote += [f"data.cache_gb={_tenth(local)}"]
    train_and_be_killed(27, ["--config", "demo.yaml", *remote], tmp_path)
    (tmp_path / "ranks").mkdir()
    on_ranks(2, _train, remote, tmp_path=tmp_path / "ranks")
    expected, losses = _losses(tmp_path / "local"), _losses(tmp_path / "remote")
    assert sorted(losses) == sorted(expected) == [*range(1, 41)]
    assert all(abs(losses[step] - expected[step]) < 1e-4 for step in losses)
    assert "step 20 of 40, 2 ranks" in (tmp_path / "remote" / "train.log").read_text()
    assert _cached_bytes(tmp_path / "cache") <= _tenth(local) * GB
