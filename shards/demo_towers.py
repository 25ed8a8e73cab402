"""Pretrain the demo's small towers on pictures of single scenes: ``python shards/demo_towers.py --out configs/towers``.

``demo-patch4`` has patches of half the side, and so four times as many as ``demo``, as ViT-B/16 has to ViT-B/32.
Only the first word of every group of synonyms is used, so that words remain to be learnt from videos.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from shards.demo_data import SCENES, VOCABULARY, caption, render  # noqa: E402
from tmass_dist.cli import program, run_command, writable_dir  # noqa: E402

WIDTH = 96
PATCHES = {"demo": 8, "demo-patch4": 4}
"""Side of a patch in pixels, by the name of the towers; a frame has 32 x 32 pixels."""


def description(name: str) -> dict[str, Any]:
    """What open_clip builds, and the words of the tokenizer."""
    vision = {"image_size": 32, "patch_size": PATCHES[name], "width": WIDTH, "layers": 3, "head_width": 32}
    text = {"context_length": 16, "vocab_size": len(VOCABULARY) + 3, "width": WIDTH, "heads": 3, "layers": 2}
    return {"embed_dim": WIDTH, "vision_cfg": vision, "text_cfg": text, "vocabulary": VOCABULARY}


def pretrain(out: Path, name: str, steps: int, batch_size: int, seed: int) -> None:
    """Train by symmetric InfoNCE of pictures and captions; writes the description and the weights in half precision.

    Args:
        out: directory of ``NAME.json`` and ``NAME.safetensors``.
        name: a key of :data:`PATCHES`.
        steps, batch_size, seed: of the training.
    """
    import numpy as np
    import torch
    import torch.nn.functional as F
    from safetensors.torch import save_file
    from tqdm import tqdm

    from tmass_dist.models.backbone import build_tokenizer, build_towers
    from tmass_dist.training.losses import column_info_nce
    from tmass_dist.training.optim import warmup_cosine

    writable_dir(out)
    (out / f"{name}.json").write_text(json.dumps(description(name), indent=1) + "\n", encoding="utf-8")
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    towers = build_towers(str(out / f"{name}.json"), None)
    tokenize = build_tokenizer(str(out / f"{name}.json"))
    # Rendered once: twelve pictures of every scene, 64 pixels wide; they are resized to 32 pixels as in packing.
    pictures = []
    for scene in tqdm(SCENES, desc="pictures"):
        pictures.append(np.concatenate([render(scene, 2, 64, rng) for _ in range(6)]))
    pictures_SNHWC = torch.from_numpy(np.stack(pictures))
    optimizer = torch.optim.AdamW(towers.parameters(), lr=2e-3, weight_decay=0.1)
    for step in (bar := tqdm(range(steps), desc="towers", unit="step")):
        optimizer.param_groups[0]["lr"] = 2e-3 * warmup_cosine(step, steps, steps // 10)
        scenes = rng.choice(len(SCENES), batch_size, replace=False)
        pick = rng.integers(pictures_SNHWC.shape[1], size=batch_size)
        pixels = pictures_SNHWC[scenes, pick].permute(0, 3, 1, 2).float()
        pixels = F.interpolate(pixels, size=32, mode="bicubic", antialias=True).clamp(0, 255).permute(0, 2, 3, 1)
        tokens = tokenize([caption(SCENES[s], rng, new_words=False) for s in scenes])
        text_BD = F.normalize(towers.encode_text(tokens), dim=-1)
        image_BD = F.normalize(towers.encode_frames(pixels[:, None])[:, 0], dim=-1)
        loss = column_info_nce((image_BD @ text_BD.T)[None], towers.logit_scale)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    weights = {name: tensor.detach().half().contiguous() for name, tensor in towers.clip.state_dict().items()}
    # Renamed when complete: a reproduction takes towers that are there for finished.
    save_file(weights, out / f"{name}.safetensors.tmp")
    os.replace(out / f"{name}.safetensors.tmp", out / f"{name}.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(prog=program("python shards/demo_towers.py"), description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "configs" / "towers")
    parser.add_argument("--name", choices=PATCHES, help="one pair of towers (default: all)")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for name in [arguments.name] if arguments.name else PATCHES:
        pretrain(arguments.out, name, arguments.steps, arguments.batch_size, arguments.seed)


if __name__ == "__main__":
    run_command(main)
