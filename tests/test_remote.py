"""Shards behind a URL: complete or absent, whatever the store does; failures of machines and errors of users."""

import multiprocessing
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.faulty_server import FaultyServer
from tests.loaders import global_batches, make_loaders
from tests.resharded import reshard
from tmass_dist.data.index import load_index
from tmass_dist.data.remote import DownloadError, cached_path, fetch, sha256_of
from tmass_dist.data.samples import DamagedError, read_sample
from tmass_dist.errors import UserError


@pytest.fixture(scope="module")
def local(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    packed = Path(next(o for o in data if o.startswith("data.train=")).removeprefix("data.train="))
    return Path(reshard(packed, tmp_path_factory.mktemp("local"), per_shard=8).directory)


@pytest.fixture
def server(local: Path, tmp_path: Path) -> Iterator[FaultyServer]:
    shutil.copytree(local, tmp_path / "served")
    server = FaultyServer(tmp_path / "served")
    yield server
    server.close()


@pytest.fixture
def file(server: FaultyServer) -> tuple[str, int, str]:
    """URL, size and checksum of a file of 2 MB."""
    path = server.directory / "big.bin"
    path.write_bytes(bytes(range(250)) * 8000)
    return f"{server.url}/big.bin", path.stat().st_size, sha256_of(path)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_from_a_url_are_those_of_local_shards(
    server: FaultyServer, local: Path, tmp_path: Path, num_workers: int
) -> None:
    cache = tmp_path / "cache"
    remote = load_index(server.url, str(cache))
    options = {"num_workers": num_workers, "order": "global"}
    batches, expected = (
        global_batches(make_loaders(index, 2, **options), 0, 5) for index in (remote, load_index(local))
    )
    for step, expected_step in zip(batches, expected):
        assert all(torch.equal(a.pixels_BFHWC, b.pixels_BFHWC) for a, b in zip(step, expected_step))
    cached = {path.name for path in cache.rglob("*.tar")}
    assert cached <= {shard.name for shard in remote.shards} and not list(cache.rglob("*.tmp"))
    assert all(server.requests[name] == 1 for name in cached)  # once, by whichever process was first
    (server.directory / remote.shards[0].name).unlink()
    shutil.rmtree(cache)
    with pytest.raises(UserError, match=r"shard-000000\.tar does not exist"):
        global_batches(make_loaders(remote, 1, **options), 0, 9)


FAULTS = ["cut", "stall", "500", "403", "short", "long", "corrupt", "endless"]


@pytest.mark.parametrize("fault", FAULTS)
def test_one_failure_is_tried_again(
    server: FaultyServer, file: tuple[str, int, str], tmp_path: Path, fault: str
) -> None:
    url, size, checksum = file
    server.faults["big.bin"] = [fault]
    path = fetch(url, str(tmp_path / "cache"), size, checksum, retry_s=6)
    assert sha256_of(path) == checksum and server.requests["big.bin"] == 2
    assert fetch(url, str(tmp_path / "cache"), size, checksum) == path and server.requests["big.bin"] == 2
    assert not list(path.parent.glob("*.tmp"))


@pytest.mark.parametrize("fault", ["cut", "stall", "500", "403", "short"])
def test_a_store_that_keeps_failing_is_a_failure_of_a_machine(
    server: FaultyServer, file: tuple[str, int, str], tmp_path: Path, fault: str
) -> None:
    url, size, checksum = file
    server.faults["big.bin"] = [f"always {fault}"]
    began = time.monotonic()
    with pytest.raises(DownloadError, match=r"big\.bin cannot be downloaded, tried for \d+ s: \w+Error") as caught:
        fetch(url, str(tmp_path / "cache"), size, checksum, retry_s=2)
    assert not isinstance(caught.value, UserError) and time.monotonic() - began < 60
    assert server.requests["big.bin"] >= 2 and not list((tmp_path / "cache").rglob("*.tmp"))


@pytest.mark.parametrize("fault", ["long", "corrupt", "endless"])
def test_another_file_than_the_index_describes_is_an_error_of_the_user(
    server: FaultyServer, file: tuple[str, int, str], tmp_path: Path, fault: str
) -> None:
    url, size, checksum = file
    server.faults["big.bin"] = [f"always {fault}"]
    with pytest.raises(UserError, match=r"big\.bin is not the file that its index describes: .*upload the whole split"):
        fetch(url, str(tmp_path / "cache"), size, checksum, retry_s=60)
    assert server.requests["big.bin"] == 2  # once more, in case the transfer was at fault


def test_an_endless_download_stops_near_the_size_that_the_index_knows(
    server: FaultyServer, file: tuple[str, int, str], tmp_path: Path
) -> None:
    size = file[1]
    server.faults["big.bin"] = ["always endless"]
    largest, process = 0, multiprocessing.get_context("fork").Process(target=_fetch_quietly, args=(*file, tmp_path))
    process.start()
    while process.is_alive():
        sizes = [path.stat().st_size for path in tmp_path.rglob("*.tmp") if path.exists()]
        largest = max([largest, *sizes])
        time.sleep(0.002)
    assert 0 < largest < size + 6 * 2**20  # one chunk more


def _fetch_quietly(url: str, size: int, checksum: str, cache: Path) -> None:
    with pytest.raises(UserError):
        fetch(url, str(cache), size, checksum, retry_s=30)


def test_what_a_killed_download_left_is_removed_by_the_next_one(file: tuple[str, int, str], tmp_path: Path) -> None:
    path = cached_path(file[0], str(tmp_path))
    path.parent.mkdir()
    path.with_name("big.bin.99999999.tmp").write_bytes(b"half")
    path.with_name("other.bin.99999999.tmp").write_bytes(b"of another file")
    assert fetch(file[0], str(tmp_path), *file[1:]) == path
    assert [left.name for left in path.parent.glob("*.tmp")] == ["other.bin.99999999.tmp"]


def test_nothing_there_is_one_line_at_once(server: FaultyServer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"set data\.cache"):
        load_index(server.url)
    with pytest.raises(UserError, match=r"nowhere/index\.safetensors does not exist"):
        load_index(f"{server.url}/nowhere", str(tmp_path))
    with pytest.raises(UserError, match="cannot be opened"):
        load_index("nosuchprotocol://host/train", str(tmp_path))
    with pytest.raises(DownloadError, match="cannot be downloaded, tried for 0 s"):
        load_index("http://127.0.0.1:9", str(tmp_path), retry_s=0)


def test_a_damaged_copy_is_downloaded_again_and_a_damaged_original_is_not(
    server: FaultyServer, local: Path, tmp_path: Path
) -> None:
    index = load_index(server.url, str(tmp_path / "cache"))
    expected = read_sample(load_index(local), 3)
    sample = index.sample(3)
    path = index.path(sample)
    for _ in range(2):
        content = bytearray(path.read_bytes())
        content[sample.offset + 700] ^= 1
        path.write_bytes(content)
        assert read_sample(index, 3) == expected
    assert server.requests[path.name] == 3
    # The store's shard is what its index describes, but a sample in it differs from the sample's checksum.
    index.columns["crc32"] = index.columns["crc32"] ^ 1
    with pytest.raises(DamagedError, match="its checksum differs from the index"):
        read_sample(index, 3)
    assert server.requests[path.name] == 3


def test_a_failed_download_in_a_worker_keeps_its_kind(server: FaultyServer, tmp_path: Path) -> None:
    index = load_index(server.url, str(tmp_path / "cache"), 1.0)
    for shard in index.shards:
        server.faults[shard.name] = ["always 500"]
    with pytest.raises(DownloadError, match="cannot be downloaded"):
        next(make_loaders(index, 1, num_workers=1, order="global")[0].batches(0))


@pytest.fixture(scope="module")
def bucket(local: Path) -> Iterator[str]:
    """The split in a bucket of moto's S3 server on loopback."""
    boto3 = pytest.importorskip("boto3", reason="needs pip install -e '.[test]'")
    moto_server = pytest.importorskip("moto.server", reason="needs pip install -e '.[test]'")
    server = moto_server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    patch = pytest.MonkeyPatch()
    endpoint = f"http://{host}:{port}"
    for name, value in (("ACCESS_KEY_ID", "test"), ("SECRET_ACCESS_KEY", "test"), ("ENDPOINT_URL", endpoint)):
        patch.setenv(f"AWS_{name}", value)
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
    client.create_bucket(Bucket="videos")
    for path in local.iterdir():
        client.upload_file(str(path), "videos", f"train/{path.name}")
    yield "s3://videos/train"
    patch.undo()
    server.stop()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_from_an_s3_server_are_those_of_local_shards(
    bucket: str, local: Path, tmp_path: Path, num_workers: int
) -> None:
    remote = load_index(bucket, str(tmp_path / "cache"))
    options = {"num_workers": num_workers, "order": "global"}
    batches, expected = (
        global_batches(make_loaders(index, 1, **options), 0, 3) for index in (remote, load_index(local))
    )
    for (batch,), (expected_batch,) in zip(batches, expected):
        assert torch.equal(batch.pixels_BFHWC, expected_batch.pixels_BFHWC)
    with pytest.raises(UserError, match="does not exist"):
        load_index(f"{bucket}/nowhere", str(tmp_path / "cache"))
