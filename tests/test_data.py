"""Packing and loading: same bytes, exactly once, one order for every world size, clear words for damage."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shards.demo_data import generate
from shards.make_shards import safe_key
from tmass_dist.data.index import Index, Sample, Shard, load_index
from tmass_dist.data.loader import TrainLoader, epoch_batches, iterate_videos
from tmass_dist.models.backbone import WordTokenizer, build_tokenizer, build_towers

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"train": 10, "val": 4, "test": 4}
TOKENIZE = WordTokenizer(["a"], 8)


def _pack(source: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "shards/make_shards.py", "--source", "manifest", "--annotations"]
    command += [str(source / "manifest.jsonl"), "--videos", str(source), "--split", "train", "--out", str(out)]
    command += ["--image-size", "32", "--shard-size", "4", "--workers", "1", *more]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("videos")
    generate(out, SIZES, seed=0)
    return out


@pytest.fixture(scope="module")
def packed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards")
    done = _pack(source, out)
    assert done.returncode == 0, done.stderr
    return out


def test_generated_data_is_the_same_bytes_and_disjoint(source: Path, tmp_path: Path) -> None:
    generate(tmp_path, SIZES, seed=0)
    files = sorted(p.relative_to(source) for p in source.rglob("*") if p.is_file())
    assert len(files) == sum(SIZES.values()) + 1
    assert all((source / f).read_bytes() == (tmp_path / f).read_bytes() for f in files)
    rows = [json.loads(line) for line in (source / "manifest.jsonl").read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows)


def test_packing_twice_gives_the_same_bytes(source: Path, packed: Path, tmp_path: Path) -> None:
    assert _pack(source, tmp_path).returncode == 0
    tars = sorted(packed.glob("*.tar"))
    assert len(tars) == 3
    assert all(tar.read_bytes() == (tmp_path / tar.name).read_bytes() for tar in tars)


def test_webdataset_reads_our_tars(packed: Path) -> None:
    import webdataset as wds

    samples = list(wds.WebDataset([str(t) for t in sorted(packed.glob("*.tar"))], shardshuffle=False))
    assert len(samples) == SIZES["train"]
    assert all("json" in s and "000.jpg" in s and "011.jpg" in s for s in samples)


def test_broken_video_goes_to_quarantine_and_fails_the_packing(source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "source"
    copy.mkdir()
    (copy / "videos").symlink_to(source / "videos")
    (copy / "broken.mp4").write_bytes(b"not a video at all")
    row = {"id": "broken", "path": "broken.mp4", "captions": ["a"], "split": "train"}
    lines = (source / "manifest.jsonl").read_text()
    (copy / "manifest.jsonl").write_text(lines + json.dumps(row) + "\n")
    done = _pack(copy, tmp_path / "out")
    assert done.returncode == 2 and "broken.mp4" in done.stderr and "Traceback" not in done.stderr
    assert json.loads((tmp_path / "out" / "quarantine.jsonl").read_text())["id"] == "broken"
    assert _pack(copy, tmp_path / "out", "--max-bad", "10%").returncode == 0
    assert len(load_index(tmp_path / "out").samples) == SIZES["train"]


def test_damage_is_named(packed: Path, tmp_path: Path) -> None:
    for file in packed.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    verify = [sys.executable, "shards/verify_shards.py", str(tmp_path)]
    assert subprocess.run(verify, cwd=ROOT, capture_output=True, timeout=60).returncode == 0
    shard = tmp_path / "shard-000001.tar"
    content = bytearray(shard.read_bytes())
    content[3000:3600] = b"\0" * 600
    shard.write_bytes(content)
    done = subprocess.run(verify, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "shard-000001.tar" in done.stderr and "Traceback" not in done.stderr
    shard.unlink()
    with pytest.raises(ValueError, match=r"shard-000001\.tar is missing.*shard-000000\.tar"):
        load_index(tmp_path)
    with pytest.raises(ValueError, match=r"index\.json is missing"):
        load_index(tmp_path / "nowhere")


def test_keys_are_safe_and_distinct() -> None:
    assert safe_key("video7") == "video7"
    assert "." not in safe_key('1012_"Unbreakable_00.05') and safe_key("a.b") != safe_key("a-b") != safe_key("a_b")


def _index(counts: list[int]) -> Index:
    samples = tuple(Sample(f"v{i}", f"v{i}", count, 0, 0) for i, count in enumerate(counts))
    return Index(Path("nowhere"), "train", 12, 32, (Shard("s", 0, "", samples),))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("counts", [[3] * 40, [1, 5, 2, 3] * 10, [1] * 33])
def test_every_pair_once_and_no_video_twice_in_a_batch(seed: int, counts: list[int]) -> None:
    batches = epoch_batches(_index(counts), seed=seed, epoch=1, batch_size=8)
    pairs = [pair for batch in batches for pair in batch]
    assert len(batches) == sum(counts) // 8
    assert len(set(pairs)) == len(pairs) and all(slot < counts[video] for video, slot in pairs)
    repeated = [batch for batch in batches if len({video for video, _ in batch}) < 8]
    assert len(repeated) <= 2  # at the very end a video with many captions may be all that is left


@pytest.mark.parametrize("num_workers", [0, 2])
def test_any_world_size_and_any_start_gives_the_same_batches(packed: Path, num_workers: int) -> None:
    index = load_index(packed)

    def ids(world_size: int, start: int, steps: int) -> list[list[tuple[str, str]]]:
        loaders = [
            TrainLoader(
                index,
                batch_size=4,
                rank=rank,
                world_size=world_size,
                seed=1,
                tokenize=TOKENIZE,
                num_workers=num_workers,
            ).batches(start)
            for rank in range(world_size)
        ]
        parts = [[next(loader) for loader in loaders] for _ in range(steps)]
        return [[pair for b in step for pair in zip(b.video_ids, b.captions)] for step in parts]

    alone = ids(1, 0, 10)  # more than an epoch: 30 pairs are 7 batches
    assert ids(2, 0, 10) == alone
    assert ids(4, 5, 5) == alone[5:]


def test_evaluation_meets_every_video_once(packed: Path) -> None:
    index = load_index(packed)
    seen = [
        video
        for rank in range(3)
        for batch in iterate_videos(index, rank=rank, world_size=3, batch_size=2, tokenize=TOKENIZE)
        for video in batch.video_ids
    ]
    assert sorted(seen) == sorted(sample.id for sample in index.samples)


def test_committed_towers_load_and_encode() -> None:
    towers = build_towers("towers/demo.json", "towers/demo.safetensors")
    tokens = build_tokenizer("towers/demo.json")(["a red circle moving left on a plain ground"])
    assert towers.logit_scale.shape == (1,)
    assert towers.encode_text(tokens).shape == (1, towers.embed_dim)
    pixels = torch.zeros(1, 12, 32, 32, 3, dtype=torch.uint8)
    assert towers.encode_frames(pixels).shape == (1, 12, towers.embed_dim)


def test_real_clip_architecture_builds() -> None:
    towers = build_towers("ViT-B-32-quickgelu", None)
    assert towers.embed_dim == 512 and towers.image_size == 224 and towers.logit_scale.shape == (1,)


def test_bad_towers_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ViT-B-32"):
        build_towers("ViT-B-33", None)
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes((ROOT / "configs" / "towers" / "demo.safetensors").read_bytes()[:5000])
    with pytest.raises(ValueError, match="torn"):
        build_towers("towers/demo.json", str(torn))
    with pytest.raises(ValueError, match="no file"):
        build_towers("towers/demo.json", "nowhere.safetensors")
