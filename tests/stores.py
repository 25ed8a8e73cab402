"""Stored features of a small generated split, with the head of an untrained model."""

from __future__ import annotations

from pathlib import Path

import torch

from tmass_dist.config import ModelConfig, load_config, to_yaml
from tmass_dist.evaluation import features as store
from tmass_dist.models.head import build_head

V, F, D = 90, 12, 32
"""Videos, frames of a video, and width of the stored features."""


def make_part(video_numbers: list[int]) -> store.Part:
    """Features of some videos, each drawn by its number; one to three captions per video."""
    frames, texts, caption_ids = [], [], []
    for number in video_numbers:
        generator = torch.Generator().manual_seed(number)
        frames.append(torch.randn(F, D, generator=generator))
        for slot in range(1 + number % 3):
            texts.append(frames[-1].mean(dim=0) + 0.3 * torch.randn(D, generator=generator))
            caption_ids.append((f"v{number}", slot))
    captions = [f"<script>alert(1)</script> & caption {v} {s}" for v, s in caption_ids]
    return store.Part([f"v{n}" for n in video_numbers], torch.stack(frames), caption_ids, captions, torch.stack(texts))


def write_store(
    directory: Path, *, precision: str = "float32", overrides: tuple[str, ...] = (), **about: object
) -> Path:
    """A store of all videos, written in three pieces, by an untrained head of the demo config."""
    ids = [f"v{n}" for n in range(V)]
    config = load_config("demo.yaml", list(overrides))
    writer = store.StoreWriter(directory, ids, (F, D), precision)
    for numbers in (range(31), range(31, 80), range(80, V)):
        writer.add(store.merge([make_part(list(numbers))], [ids[n] for n in numbers]))
    known: dict[str, object] = {"config": to_yaml(config), "split": "test", "checkpoint": "best.safetensors"}
    known |= {"fingerprint": "made-from", "weights_sha256": "w", "selection": {"selected_on": "val"}}
    head = build_head(ModelConfig(num_frames=F, radius=config.model.radius), D)
    writer.finish(head.state_dict(), known | about)
    return directory
