"""Packing and loading: same bytes, exactly once, one order for every world size, clear words for damage."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shards.demo_data import generate
from shards.make_shards import safe_key
from shards.video import BadVideoError, pack_video
from tmass_dist.config import load_config
from tmass_dist.data.frames import uniform_frame_indices
from tmass_dist.data.index import Index, Sample, Shard, load_index
from tmass_dist.data.loader import TrainLoader, epoch_batches, iterate_videos
from tmass_dist.data.transforms import augment
from tmass_dist.models.backbone import WordTokenizer, build_tokenizer, build_towers, load_weights
from tmass_dist.models.tmass import build_model

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
    shutil.copytree(packed, tmp_path, dirs_exist_ok=True)
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


def _write_avi(path: Path, num_frames: int) -> None:
    """Frame ``i`` is a plain grey of its own."""
    import av
    import numpy as np

    with av.open(str(path), "w", format="avi") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for number in range(num_frames):
            grey = np.full((48, 64, 3), 4 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode(None))


@pytest.mark.parametrize(("window", "share"), [((None, None), 1.0), ((1.0, 3.0), 1.0), ((None, None), 0.6)])
def test_the_right_frames_are_packed_whatever_the_header_claims(
    tmp_path: Path, window: tuple[float | None, float | None], share: float
) -> None:
    """Also of a file that was cut off: its header claims the frames that were lost."""
    import simplejpeg

    path = tmp_path / "grey.avi"
    _write_avi(path, 50)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    jpegs, facts = pack_video(path, 5, 32, 95, *window)
    decoded = facts["num_decoded_frames"]
    assert decoded == 50 if window == (None, None) and share == 1 else decoded < 50
    first, last = (0, decoded) if window[0] is None else (10, 30)
    assert facts["frame_indices"] == [first + i for i in uniform_frame_indices(last - first, 5)]
    greys = [simplejpeg.decode_jpeg(jpeg).mean() for jpeg in jpegs]
    assert all(abs(grey - 4 * index) < 3 for grey, index in zip(greys, facts["frame_indices"]))


def test_a_window_after_the_end_is_a_reason_for_the_quarantine(tmp_path: Path) -> None:
    _write_avi(tmp_path / "short.avi", 20)
    with pytest.raises(BadVideoError, match=r"ends after 2\.0 s"):
        pack_video(tmp_path / "short.avi", 5, 32, 95, 10.0, 15.0)


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


@pytest.mark.parametrize(
    ("name", "embed_dim"), [("ViT-B-32-quickgelu", 512), ("ViT-B-16-quickgelu", 512), ("EVA02-B-16", 512)]
)
def test_real_architecture_builds(name: str, embed_dim: int) -> None:
    towers = build_towers(name, None)
    assert towers.embed_dim == embed_dim and towers.image_size == 224 and towers.logit_scale.shape == (1,)
    with torch.inference_mode():
        assert towers.encode_text(build_tokenizer(name)(["a cat"])).shape == (1, embed_dim)
        assert towers.encode_frames(torch.zeros(1, 1, 224, 224, 3, dtype=torch.uint8)).shape == (1, 1, embed_dim)


def test_openai_weights_load_from_each_form_of_file(tmp_path: Path) -> None:
    """OpenAI's own ``.pt`` is a TorchScript archive; others hold a state_dict, or are safetensors."""
    towers = build_towers("towers/demo.json", "towers/demo.safetensors")
    weights = towers.clip.state_dict()
    torch.save(weights, tmp_path / "plain.pt")

    class Archive(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("input_resolution", torch.tensor(32))
            for name, value in weights.items():
                module: torch.nn.Module = self
                *path, leaf = name.split(".")
                for step in path:
                    if not hasattr(module, step):
                        module.add_module(step, torch.nn.Module())
                    module = getattr(module, step)
                value = value.reshape(()) if name == "logit_scale" else value
                module.register_parameter(leaf, torch.nn.Parameter(value))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    torch.jit.script(Archive()).save(str(tmp_path / "archive.pt"))
    for name in ("plain.pt", "archive.pt"):
        found = build_towers("towers/demo.json", str(tmp_path / name)).clip.state_dict()
        assert all(torch.equal(found[key], value) for key, value in weights.items())


def test_a_checkpoint_of_another_architecture_names_what_differs_and_what_it_asks_for() -> None:
    made = build_model(load_config("demo.yaml", ["model.num_frames=8"]))
    for overrides, said in (
        (["model.num_frames=12"], r"head\.mass\.linear\.weight is \(96, 8\) and not \(96, 12\).*model\.num_frames=8"),
        (["model.pooling=mean"], r"has head\.pooling\.query\.weight too.*model\.pooling=xpool"),
    ):
        with pytest.raises(ValueError, match=said):
            load_weights(build_model(load_config("demo.yaml", overrides)), made.state_dict(), "best.safetensors")
    clip = build_towers("ViT-B-32-quickgelu", None).clip.state_dict()
    with pytest.raises(ValueError, match=r"model\.architecture=ViT-B-32-quickgelu"):
        load_weights(build_towers("towers/demo.json", None).clip, clip, "file.pt")


def test_held_out_videos_are_the_same_in_every_run_and_in_no_batch(packed: Path) -> None:
    index = load_index(packed)
    left, held = index.hold_out(3)
    ids = [{sample.id for sample in part.samples} for part in (left, held)]
    assert len(ids[1]) == 3 and not ids[0] & ids[1] and len(ids[0] | ids[1]) == SIZES["train"]
    assert {sample.id for sample in index.hold_out(3)[1].samples} == ids[1]
    with pytest.raises(ValueError, match=r"data\.holdout is 10"):
        index.hold_out(10)


def test_augmentation_belongs_to_the_pair_and_is_one_crop_for_all_frames() -> None:
    pixels = torch.arange(2 * 1 * 8 * 8 * 3, dtype=torch.uint8).view(2, 1, 8, 8, 3).expand(2, 4, 8, 8, 3)
    both = augment(pixels, [1, 2], 8)
    assert torch.equal(augment(pixels[1:], [2], 8)[0], both[1])
    assert all(torch.equal(both[:, 0], both[:, frame]) for frame in range(4))
    assert not torch.equal(both[0], pixels[0].float())


def test_more_packed_frames_than_the_model_takes(packed: Path) -> None:
    index = load_index(packed)
    options = {"batch_size": 2, "rank": 0, "world_size": 1, "seed": 0, "tokenize": TOKENIZE, "num_workers": 0}
    whole, middle, anywhere = (
        next(TrainLoader(index, **options, num_frames=n, random_frames=r).batches(0)).pixels_BFHWC
        for n, r in ((12, False), (4, False), (4, True))
    )
    assert torch.equal(middle, whole[:, [1, 4, 7, 10]])
    assert anywhere.shape == middle.shape and not torch.equal(anywhere, middle)


def test_bad_towers_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ViT-B-32"):
        build_towers("ViT-B-33", None)
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes((ROOT / "configs" / "towers" / "demo.safetensors").read_bytes()[:5000])
    with pytest.raises(ValueError, match="torn"):
        build_towers("towers/demo.json", str(torn))
    with pytest.raises(ValueError, match="it has openai"):
        build_towers("ViT-B-32-quickgelu", "opnai")
    with pytest.raises(ValueError, match="no file"):
        build_towers("towers/demo.json", "nowhere.safetensors")
