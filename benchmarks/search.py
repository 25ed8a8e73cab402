"""Search in large galleries: recall, latency, memory and the time to build the index, as JSON lines.

``python benchmarks/search.py`` (about half an hour on 2 cores, 3 GB of disk), or ``--videos 10000``. In pieces, with
``--gallery DIR``, which keeps the galleries and uses them again: ``build`` (the index of 10,000 videos took 35 s, of
100,000 505 s), ``recall`` (``--queries 60`` shortens it), ``api``, and ``demo``, which needs the demo's gallery
(``make serve``).

The large gallery is generated. Random vectors would not do: in 512 dimensions all of them are equally far apart, which
no graph index can search and no encoder produces. Here a scene is a cluster centre plus its own part, both with a
decaying spectrum, a video has three scenes of several frames, and a text is a scene plus noise; the amounts are fitted
to the cosines of the trained demo, which the first line shows beside those of the generated vectors.
"""

# Shapes: T texts, V videos, F frames, D embedding width.

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

FRAMES, WIDTH, QUERIES, CLIENTS = 12, 512, 200, 8
MOST_CANDIDATES = 5000
PIECES = ("demo", "build", "recall", "api")
# Cosines of the demo (`tmass index runs/demo`, 200 test videos and their captions): mean or median, and deviation.
DEMO = {"frames_of_two_videos_std": 0.34, "neighbouring_frames_median": 0.986, "text_with_its_best_frame": 0.916}
CLUSTERS, SHARED, DECAY, FRAME_NOISE, TEXT_NOISE = 2000, 0.6, 0.735, 0.118, 0.44


def line(name: str, **values: Any) -> None:
    print(json.dumps({"benchmark": name, **values}), flush=True)


class Generator:
    """Vectors with the cosines of ``DEMO``; the same seed gives the same gallery."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.spectrum = np.arange(1, WIDTH + 1) ** -DECAY
        self.spectrum /= np.sqrt((self.spectrum**2).mean())
        self.centres = self._vectors(CLUSTERS)

    def _vectors(self, number: int) -> np.ndarray:
        return self.rng.standard_normal((number, WIDTH)).astype(np.float32) * self.spectrum.astype(np.float32)

    def _noisy(self, vectors: np.ndarray, amount: float) -> np.ndarray:
        # Noise with the same spectrum: without it, noise would be in directions that carry nothing else.
        return vectors + amount * self._vectors(len(vectors))

    def videos(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings ``(V, F, D)`` float16, and one scene of each video ``(V, D)``."""
        cluster = self.rng.integers(CLUSTERS, size=3 * number)
        scenes = SHARED**0.5 * self.centres[cluster] + (1 - SHARED) ** 0.5 * self._vectors(3 * number)
        cuts = np.sort(self.rng.integers(1, FRAMES, size=(number, 2)), axis=1)
        which = (np.arange(FRAMES)[None] >= cuts[:, :1]).astype(int) + (np.arange(FRAMES)[None] >= cuts[:, 1:])
        of_frame = (3 * np.arange(number)[:, None] + which).ravel()
        frames = self._noisy(scenes[of_frame], FRAME_NOISE).reshape(number, FRAMES, WIDTH)
        told = scenes[3 * np.arange(number) + which[:, FRAMES // 2]]
        return frames.astype(np.float16), told

    def texts(self, scenes: np.ndarray) -> np.ndarray:
        return self._noisy(scenes, TEXT_NOISE)


def cosines(frames_VFD: np.ndarray, text_TD: np.ndarray) -> dict[str, float]:
    """The cosines that ``DEMO`` lists, of some generated videos and their texts."""
    unit = frames_VFD.astype(np.float32)
    unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
    text = text_TD / np.linalg.norm(text_TD, axis=-1, keepdims=True)
    return {
        "frames_of_two_videos_std": round(float((unit[:-1, 0] * unit[1:, 5]).sum(-1).std()), 3),
        "neighbouring_frames_median": round(float(np.median((unit[:, 1:] * unit[:, :-1]).sum(-1))), 3),
        "text_with_its_best_frame": round(float(np.einsum("vfd,vd->vf", unit, text).max(-1).mean()), 3),
    }


def make_model(out: Path) -> None:
    """ViT-B/32 with random towers, and a head near its initial state: it costs what a trained one costs."""
    import torch

    from tmass_dist import TMass

    torch.manual_seed(0)
    model = TMass(settings={})
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(out)


def make_gallery(out: Path, size: int, fingerprint: str, model: Path) -> tuple[np.ndarray, float]:
    """Write a generated gallery; returns texts ``(T, D)`` and the seconds that the index took."""
    import io

    from PIL import Image

    from tmass_dist.retrieval import build

    generator, told, names = Generator(), [], []
    picture = io.BytesIO()
    Image.new("RGB", (128, 128), "gray").save(picture, "JPEG")
    out.mkdir()
    for start in range(0, size, 1024):
        number = min(1024, size - start)
        frames_VFD, scenes_VD = generator.videos(number)
        told.append(scenes_VD[: max(1, QUERIES * number // size + 1)])
        videos = [{"id": f"video-{start + n:07d}", "path": "", "seconds": 24.0, "state": []} for n in range(number)]
        times_VF = np.tile(np.arange(FRAMES, dtype=np.float32) * 2 + 1, (number, 1))
        names.append(f"part-{start:07d}")
        build.write_part(out, names[-1], videos, [], frames_VFD, times_VF, [picture.getvalue()] * (number * FRAMES))
    text_TD = generator.texts(np.concatenate(told)[:QUERIES])
    first = Generator()
    frames_VFD, scenes_VD = first.videos(1024)
    line("search-generator", demo=DEMO, generated=cosines(frames_VFD, first.texts(scenes_VD)))
    started = time.perf_counter()
    build.commit(out, None, names, set(), fingerprint, str(model), (FRAMES, WIDTH))
    return text_TD, time.perf_counter() - started


def exhaustive(model: Any, gallery: Any, texts: list[str], text_TD: Any, k: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Rows ``(T, k)`` of the best videos by the exact score of all, and rows of all ``(T, V)`` by their best frame."""
    import torch

    from tmass_dist.retrieval.searcher import best_frames

    rows, scores, frame_cosines = list(gallery.rows.values()), [], []
    for start in range(0, len(rows), 2048):
        frames_VFD = gallery.frames(rows[start : start + 2048])
        scores.append(model.similarity(texts, frames_VFD, text_TD=text_TD).cpu())
        frame_cosines.append(best_frames(text_TD, frames_VFD).T)
    by_score_TK = torch.cat(scores, dim=1).topk(k, dim=1).indices
    by_frame_TV = torch.cat(frame_cosines, dim=1).argsort(dim=1, descending=True)
    return np.array(rows)[by_score_TK.numpy()], np.array(rows)[by_frame_TV.numpy()]


def held(candidates: Any, exact_TK: np.ndarray) -> float:
    """Percentage of the exact top 10 that is among each query's candidates."""
    hits = [np.isin(exact_K, rows).mean() for exact_K, rows in zip(exact_TK, candidates)]
    return round(100 * float(np.mean(hits)), 2)


def measure(
    searcher: Any, text_TD: Any, texts: list[str], exact_TK: np.ndarray, by_frame_TV: np.ndarray
) -> dict[str, Any]:
    """Recall against the exact top 10, what loses it, and the latency of single queries whose text is encoded."""
    import torch

    from tmass_dist.evaluation.shortlist import shortlist_size

    hits, first, seconds, candidates, shortlists = 0, 0, [], [], []
    for text, row_D, exact_K in zip(texts, text_TD, exact_TK):
        started = time.perf_counter()
        with torch.inference_mode():
            [results] = searcher.search_encoded([text], row_D[None])
        seconds.append(time.perf_counter() - started)
        found = [result.row for result in results]
        candidates += searcher.candidates(row_D[None], searcher.num_candidates)
        size = shortlist_size(10)
        shortlists.append([result.row for result in searcher.best(text, row_D, candidates[-1], size, size)])
        hits += len(set(found) & set(exact_K.tolist()))
        first += found[0] == exact_K[0]
    return {
        "recall_at_10_percent": round(100 * hits / exact_TK.size, 2),
        # What the next one, without the index, lacks is lost by the rule, the rest by graph, 8 bits and merged frames.
        "held_by_candidates_percent": held(candidates, exact_TK),
        "held_by_exhaustive_candidates_percent": held(by_frame_TV[:, : searcher.num_candidates], exact_TK),
        "held_by_shortlist_percent": held(shortlists, exact_TK),
        "first_is_first_percent": round(100 * first / len(texts), 2),
        "latency_ms_p50": round(1e3 * float(np.percentile(seconds[5:], 50)), 1),
        "latency_ms_p95": round(1e3 * float(np.percentile(seconds[5:], 95)), 1),
    }


def processor_seconds(pid: int) -> float:
    """Processor time that a process has used, in user and in system mode."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def through_the_page(gallery: Path, queries_of_each: int = 25) -> dict[str, Any]:
    """Latency of ``/api/search``, text tower included, under 8 clients; and the server's resident memory."""
    command = [sys.executable, "-m", "tmass_dist", "serve", str(gallery), "--port", "0"]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().split()[0]

        def get(path: str) -> dict[str, Any]:
            with urllib.request.urlopen(url + path, timeout=120) as answer:
                return json.load(answer)

        while get("api/state")["state"] == "loading":
            time.sleep(0.2)
        seconds: list[float] = []

        def client(number: int) -> None:
            for query in range(queries_of_each):
                words = urllib.parse.quote(f"a person number {number} opens door {query} and walks into the garden")
                started = time.perf_counter()
                assert len(get(f"api/search?q={words}")["results"]) == 10
                seconds.append(time.perf_counter() - started)

        client(99)
        seconds.clear()
        before = processor_seconds(server.pid)
        threads = [threading.Thread(target=client, args=(n,)) for n in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        used = processor_seconds(server.pid) - before
        status = Path(f"/proc/{server.pid}/status").read_text()
        kilobytes = {
            key: int(value.split()[0])
            for key, value in (row.split(":", 1) for row in status.splitlines() if "kB" in row)
        }
        return {
            "clients": CLIENTS,
            "api_ms_p50": round(1e3 * float(np.percentile(seconds, 50)), 1),
            "api_ms_p95": round(1e3 * float(np.percentile(seconds, 95)), 1),
            # Of the server. On N idle cores, C clients wait about C / N of this.
            "processor_ms_per_query": round(1e3 * used / len(seconds), 1),
            "resident_gb": round(kilobytes["VmRSS"] / 2**20, 3),
            "resident_peak_gb": round(kilobytes["VmHWM"] / 2**20, 3),
        }
    finally:
        server.terminate()
        server.wait()


def demo() -> None:
    """Recall on the demo: the captions of its test videos, searched in all of its videos."""
    from tmass_dist.retrieval.searcher import open_searcher

    gallery, manifest = ROOT / "build/demo/gallery", ROOT / "build/demo/videos/manifest.jsonl"
    if not (gallery / "gallery.json").is_file():
        line("search-demo", skipped="there is no build/demo/gallery; make serve builds it")
        return
    rows = [json.loads(row) for row in manifest.read_text(encoding="utf-8").splitlines()]
    texts = [row["captions"][0] for row in rows if row["split"] == "test"]
    searcher = open_searcher(gallery)
    text_TD = searcher.model.encode_text(texts)
    exact_TK, by_frame_TV = exhaustive(searcher.model, searcher.gallery, texts, text_TD)
    for candidates in (25, 100, 300, 1000, len(searcher.gallery)):
        searcher.num_candidates = candidates
        found = measure(searcher, text_TD, texts, exact_TK, by_frame_TV)
        line("search-demo", videos=len(searcher.gallery), queries=len(texts), candidates=candidates, **found)


def prepare(folder: Path, size: int, model: Path) -> Path:
    """The gallery of ``size`` videos in ``folder``; a finished one is used again."""
    from tmass_dist import TMass
    from tmass_dist.retrieval.gallery import VideoGallery

    out, texts = folder / f"gallery-{size}", folder / f"texts-{size}.npy"
    if texts.is_file():  # written last: the gallery is finished
        return out
    shutil.rmtree(out, ignore_errors=True)
    text_TD, seconds = make_gallery(out, size, TMass.from_pretrained(model).fingerprint(), model)
    gallery = VideoGallery(out)
    on_disk = {
        "frames_gb": round(sum(p.stat().st_size for p in out.glob("*.frames.npy")) / 2**30, 3),
        "index_gb": round(gallery.about["index"]["bytes"] / 2**30, 3),
    }
    line("search-build", videos=size, indexed_frames=len(gallery.index), seconds=round(seconds, 1), **on_disk)
    np.save(texts, text_TD)
    return out


def recall(out: Path, size: int, model: Path, queries: int, candidates: list[int]) -> None:
    """Recall and latency of single queries, for each number of candidates."""
    import torch

    from tmass_dist import TMass
    from tmass_dist.retrieval.gallery import VideoGallery
    from tmass_dist.retrieval.searcher import Searcher

    text_TD = torch.from_numpy(np.load(out.parent / f"texts-{size}.npy"))
    # Texts are grouped by the part that their video is in, so a smaller number takes them from all parts.
    text_TD = text_TD[torch.linspace(0, len(text_TD) - 1, min(queries, len(text_TD))).long()]
    texts = [f"query {n}" for n in range(len(text_TD))]
    searcher = Searcher(TMass.from_pretrained(model), VideoGallery(out))
    scanned = out.parent / f"scan-{size}-{len(texts)}.npz"
    if not scanned.is_file():
        exact_TK, by_frame_TV = exhaustive(searcher.model, searcher.gallery, texts, text_TD)
        np.savez(scanned, exact=exact_TK, by_frame=by_frame_TV[:, :MOST_CANDIDATES])
    with np.load(scanned) as scan:
        exact_TK, by_frame_TV = scan["exact"], scan["by_frame"]
    for number in candidates:
        searcher.num_candidates = number
        found = measure(searcher, text_TD, texts, exact_TK, by_frame_TV)
        line("search", videos=size, candidates=number, queries=len(texts), **found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pieces", nargs="*", metavar="PIECE", help=f"{', '.join(PIECES)} (default: all)")
    parser.add_argument(
        "--videos", type=int, nargs="+", default=[10_000, 100_000], help="sizes of the generated gallery"
    )
    parser.add_argument("--gallery", type=Path, help="where galleries are kept and used again (default: temporary)")
    parser.add_argument("--queries", type=int, default=QUERIES, help=f"queries of recall, 6 to {QUERIES}")
    parser.add_argument(
        "--candidates", type=int, nargs="+", default=[100, 300, 1000, 1500, 2000, 3000], help="of recall"
    )
    arguments = parser.parse_args()
    pieces = arguments.pieces or list(PIECES)
    if unknown := set(pieces) - set(PIECES):
        parser.error(f"no such piece: {', '.join(sorted(unknown))}; there are {', '.join(PIECES)}")
    if not 6 <= arguments.queries <= QUERIES:
        parser.error(f"--queries is {arguments.queries}; 6 to {QUERIES}")
    if not 1 <= min(arguments.candidates) <= max(arguments.candidates) <= MOST_CANDIDATES:
        parser.error(f"--candidates is {arguments.candidates}; 1 to {MOST_CANDIDATES}")
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = (arguments.gallery or Path(name)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        if "demo" in pieces:
            demo()
        if pieces == ["demo"]:
            return
        model = folder / "model"
        if not model.exists():
            make_model(model)
        for size in arguments.videos:
            out = prepare(folder, size, model)
            if "recall" in pieces:
                recall(out, size, model, arguments.queries, arguments.candidates)
            if "api" in pieces:
                line("search-api", videos=size, **through_the_page(out))
            if arguments.gallery is None:
                shutil.rmtree(out)


if __name__ == "__main__":
    main()
