"""Packing and loading, each against a bare decoder of the same files in the same run; a JSON line each.

``python benchmarks/data.py [--quick]``; the published loader's part needs ``pip install -e '.[bench]'`` (OpenCV).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import av  # noqa: E402
import numpy as np  # noqa: E402
import simplejpeg  # noqa: E402
import torch  # noqa: E402

from shards.make_shards import PackSettings, make_shards  # noqa: E402
from shards.pack_pool import Job, Limits, pack_all, pack_job  # noqa: E402
from shards.pack_video import Recipe  # noqa: E402
from tmass_dist.config import DataConfig  # noqa: E402
from tmass_dist.data.frames import uniform_frame_indices  # noqa: E402
from tmass_dist.data.index import Index, Sample, Shard, load_index, make_columns  # noqa: E402
from tmass_dist.data.loader import TrainLoader  # noqa: E402
from tmass_dist.data.order import epoch_batches  # noqa: E402
from tmass_dist.data.samples import read_sample  # noqa: E402
from tmass_dist.models.backbone import WordTokenizer  # noqa: E402

FRAMES, SIDE = 12, 224


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def cpu_seconds(work: Callable[[], object]) -> float:
    """Processor time of work that one thread does; other work on the machine changes it less than the time."""
    began = time.process_time()
    work()
    return time.process_time() - began


def in_turn(repeat: int, *works: Callable[[], object], clock: Callable[..., float] = seconds) -> list[float]:
    """The median seconds of each, run one after the other again and again, since the machine's speed wanders."""
    taken = [[clock(work) for work in works] for _ in range(repeat)]
    return [statistics.median(column) for column in zip(*taken)]


def resident_mb() -> float:
    """Memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def steady(work: Callable[[], Iterable[object]]) -> float:
    """Seconds for each result after the first eight: without the start of processes."""
    results = iter(work())
    for _ in range(8):
        next(results)
    began = time.perf_counter()
    number = sum(1 for _ in results)
    return (time.perf_counter() - began) / number


def in_two(paths: list[Path]) -> Iterator[None]:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        yield from pool.imap(bare_decode, paths, chunksize=4)


def line(name: str, value: float, unit: str, reference: str, ratio: float) -> None:
    print(json.dumps({"name": name, "value": round(value, 4), "unit": unit, "reference": reference, "ratio": ratio}))


def write_videos(directory: Path, number: int) -> None:
    """The committed clips, each from another frame on, as 10 s of 320x240 at 25 frames a second in H.264."""
    pictures = {}
    for clip in sorted((ROOT / "tests" / "clips").glob("*.mp4")):
        with av.open(str(clip)) as container:
            small = (frame.reformat(320, 240, "yuv420p") for frame in container.decode(video=0))
            pictures[clip] = [frame.to_ndarray() for frame in small]
    for k in range(number):
        frames = list(pictures.values())[k % len(pictures)]
        with av.open(str(directory / f"{k}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=25)  # its default: a key frame every 250
            stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
            stream.codec_context.bit_rate = 320_000  # MSR-VTT's
            for i in range(250):
                frame = av.VideoFrame.from_ndarray(frames[(k * 7 + i) % len(frames)], format="yuv420p")
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))


def bare_decode(path: Path) -> None:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        for _ in container.decode(stream):
            pass


def opencv_seek(path: Path) -> None:
    """What the published loader does for a video: a seek before each of 12 frames, resized at each access."""
    import cv2

    capture = cv2.VideoCapture(str(path))
    for number in uniform_frame_indices(int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), FRAMES):
        capture.set(cv2.CAP_PROP_POS_FRAMES, number)
        found, frame = capture.read()
        assert found
        pixels = torch.from_numpy(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)).permute(2, 0, 1)[None].float() / 255
        size = (SIDE, SIDE * 320 // 240)
        torch.nn.functional.interpolate(pixels, size, mode="bicubic", antialias=True)
    capture.release()


def many_shards(directory: Path, num_shards: int, per_shard: int) -> None:
    shards = tuple(Shard(f"shard-{k:06d}.tar", 512, "0" * 64) for k in range(num_shards))
    for shard in shards:
        (directory / shard.name).touch()
        os.truncate(directory / shard.name, shard.bytes)
    number = num_shards * per_shard
    columns = make_columns([Sample("v", 0, 1, 0, 512, 0)])
    columns = {name: np.resize(columns[name], number) for name in columns if name not in ("id_bytes", "id_end")}
    columns["shard"] = np.repeat(np.arange(num_shards, dtype=np.int32), per_shard)
    columns["num_captions"] = np.ones(number, np.int32)
    ids = np.frombuffer(b"".join(b"%011d" % k for k in range(number)), np.uint8)
    columns |= {"id_bytes": ids, "id_end": np.arange(11, 11 * number + 1, 11, dtype=np.int64)}
    Index(str(directory), "train", FRAMES, SIDE, "jpeg", shards, columns).save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer videos")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    number = 16 if arguments.quick else 48
    with tempfile.TemporaryDirectory() as temporary:
        videos, out = Path(temporary) / "videos", Path(temporary) / "shards"
        videos.mkdir()
        write_videos(videos, number)
        rows = [{"id": f"v{k}", "path": f"{k}.mp4", "captions": ["a b c"] * 20} for k in range(number)]
        jobs = [Job(row, videos, Recipe()) for row in rows]

        # Packing: bare sequential decoding of the same files, one core; then two processes.
        bare = lambda: [bare_decode(videos / row["path"]) for row in rows]  # noqa: E731
        bare_s, packed_s = in_turn(3, bare, lambda: list(map(pack_job, jobs)))
        line("pack-320x240-10s", number / packed_s, "videos/s/core", "bare PyAV decoding", round(bare_s / packed_s, 3))
        if (os.cpu_count() or 1) > 1:
            long = jobs * (4 if arguments.quick else 6)
            one_s, two_s = (steady(partial(pack_all, long, workers, Limits())) for workers in (1, 2))
            paths = [videos / job.row["path"] for job in long]
            bare_one_s, bare_two_s = steady(lambda: map(bare_decode, paths)), steady(lambda: in_two(paths))
            bound = f"one process; bare decoding in two gains {bare_one_s / bare_two_s:.2f}"
            line("pack-2-processes", 1 / two_s, "videos/s", bound, round(one_s / two_s, 2))

        settings = PackSettings("train", shard_size=16, max_bad=0.0)
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        sys.stdout, kept = open(os.devnull, "w"), sys.stdout  # noqa: SIM115
        make_shards(rows, videos, out, settings)
        sys.stdout, sys.stderr = kept, sys.__stderr__
        index = load_index(out)

        # Loading, one core: the same JPEGs decoded and thrown away; then the published loader's seeks.
        jpegs = [jpeg for k in range(len(index)) for jpeg in read_sample(index, k)[1]]
        config = DataConfig(batch_size=16, num_workers=0)
        loader = TrainLoader(index, config, rank=0, world_size=1, seed=0, tokenize=WordTokenizer(["a"], 32))
        steps = len(index) // 16
        batches = loader.batches(0)
        raw_s, ours_s = in_turn(
            15,
            lambda: [simplejpeg.decode_jpeg(jpeg) for jpeg in jpegs[: steps * 16 * FRAMES]],
            lambda: [next(batches) for _ in range(steps)],
        )
        ours_s /= steps * 16
        streamed = DataConfig(batch_size=16, num_workers=0, order="streaming", lanes=8)
        streaming_loader = TrainLoader(index, streamed, rank=0, world_size=1, seed=0, tokenize=WordTokenizer(["a"], 32))
        streaming_batches = streaming_loader.batches(0)
        both = (lambda: [next(batches) for _ in range(steps)], lambda: [next(streaming_batches) for _ in range(steps)])
        global_s, streaming_s = in_turn(5 if arguments.quick else 61, *both, clock=cpu_seconds)
        rate = steps * 16 / streaming_s
        line("load-streaming", rate, "videos/s/core", "data.order=global", round(global_s / streaming_s, 3))
        line("load-12x224", 1 / ours_s, "videos/s/core", "raw simplejpeg", round(raw_s / steps / 16 / ours_s, 3))
        try:
            import cv2

            cv2.setNumThreads(1)
            some = rows[:6]
            (published_s,) = in_turn(3, lambda: [opencv_seek(videos / row["path"]) for row in some])
            published_s /= len(some)
            line("load-vs-published", 1 / ours_s, "videos/s/core", "OpenCV seeks", round(published_s / ours_s, 1))
        except ImportError:
            print("load-vs-published is left out: pip install -e '.[bench]'", file=sys.stderr)

        # Memory over an epoch: what the process grows by between its first tenth and its end.
        epoch = loader.steps_per_epoch
        for _ in range(epoch // 10):
            next(batches)
        before = resident_mb()
        for _ in range(epoch):
            next(batches)
        grown = resident_mb() - before
        line("load-memory-growth", grown, "MB an epoch", "flat", round(grown, 1))

        # Start-up: the index of 10,000 shards of 256 videos, checked, and its first epoch laid out.
        many = Path(temporary) / "many"
        many.mkdir()
        many_shards(many, 10_000, 256)
        (start_up,) = in_turn(3, lambda: epoch_batches(load_index(many).num_captions, seed=0, epoch=0, batch_size=128))
        line("index-10000-shards", start_up, "s", "3 s", round(3 / start_up, 1))
    # In a process of its own, because its memory is measured.
    subprocess.run([sys.executable, str(ROOT / "benchmarks" / "streaming.py")], check=True)


if __name__ == "__main__":
    main()
