"""Packed shards: verified, looked at, and read back as training reads them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT, run
from tests.packing import pack
from tmass_dist.data.index import load_index
from tmass_dist.data.samples import read_into
from tmass_dist.data.video import read_video, uniform

CLIPS = ROOT / "tests" / "clips"
SHARED = ROOT.parent / "shared"


def test_damage_is_named(demo_shards: Path, tmp_path: Path) -> None:
    shutil.copytree(demo_shards, tmp_path, dirs_exist_ok=True)
    assert run("shards/verify_shards.py", str(tmp_path)).returncode == 0
    shard = tmp_path / "shard-000001.tar"
    content = bytearray(shard.read_bytes())
    content[3000:3600] = b"\0" * 600
    shard.write_bytes(content)
    done = run("shards/verify_shards.py", str(tmp_path), "--decode", "3")
    assert done.returncode == 2 and "shard-000001.tar" in done.stderr and "at sample" in done.stderr
    assert "Traceback" not in done.stderr
    shard.unlink()
    with pytest.raises(ValueError, match=r"shard-000001\.tar is missing.*shard-000000\.tar"):
        load_index(tmp_path)
    with pytest.raises(ValueError, match=r"index\.safetensors is missing"):
        load_index(tmp_path / "nowhere")
    (tmp_path / "index.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="damaged"):
        load_index(tmp_path)


def test_a_contact_sheet(demo_shards: Path, tmp_path: Path) -> None:
    from PIL import Image

    done = run(
        "shards/inspect_shards.py", str(demo_shards), "--shard", "shard-000001.tar", "--out", str(tmp_path / "s.png")
    )
    assert done.returncode == 0 and "4 of 10 videos" in done.stdout, done.stderr
    assert np.asarray(Image.open(tmp_path / "s.png")).std() > 10
    done = run("shards/inspect_shards.py", str(demo_shards), "--out", str(tmp_path))
    assert done.returncode == 2 and done.stderr == f"error: --out is {tmp_path}; name a .png or .jpg file\n"
    done = run("shards/inspect_shards.py", str(demo_shards), "--shard", "shard-9.tar")
    assert done.returncode == 2 and "it has shard-000000.tar" in done.stderr


def _clips() -> list[Path]:
    """The committed clips, and where it is there the larger collection."""
    return [CLIPS, *([SHARED / "clips"] if (SHARED / "clips").is_dir() else [])]


@pytest.mark.parametrize("clips", _clips(), ids=lambda path: path.parent.name)
def test_real_clips_go_through_packing_training_input_and_back(clips: Path, tmp_path: Path) -> None:
    done = pack(clips, tmp_path, "--image-size", "224", kind="folder")
    assert done.returncode == 0, done.stderr
    listed = [json.loads(line) for line in (clips / "captions.jsonl").read_text().splitlines()]
    index = load_index(tmp_path)
    assert len(index) == len(listed) and (tmp_path / "quarantine.jsonl").read_text() == ""
    frames = np.zeros((12, 224, 224, 3), np.uint8)
    for number, entry in enumerate(listed):
        meta = read_into(frames, index, number)
        assert meta["source"] == entry["file"] and meta["captions"] == [entry["caption"]]
        # Back: what training sees are the frames of the file, but for what JPEG loses.
        again, facts = read_video(clips / entry["file"], uniform(12), 224)
        assert facts["frame_indices"] == meta["frame_indices"]
        assert np.abs(np.stack(again)[..., :3].astype(int) - frames).mean() < 5, entry["file"]
        if entry["file"] == "opencv_tree.avi":  # its header claims 444
            assert meta["num_decoded_frames"] == 68 and max(meta["frame_indices"]) < 68
    assert run("shards/verify_shards.py", str(tmp_path)).returncode == 0
