"""Validation during training, and the choice of the checkpoint that will be reported."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tmass_dist.cli import write_json
from tmass_dist.config import Config
from tmass_dist.data.index import Index
from tmass_dist.data.samples import read_into
from tmass_dist.distributed import is_main
from tmass_dist.evaluation.blocks import Scorer
from tmass_dist.evaluation.encode import encode, ranks_of
from tmass_dist.evaluation.features import Features
from tmass_dist.evaluation.ranking import metrics
from tmass_dist.models.tmass import RetrievalModel
from tmass_dist.pictures import sheet
from tmass_dist.training.engine import Engine
from tmass_dist.training.monitor import Monitor

QUERIES = 4
"""Texts that TensorBoard shows at each validation."""


def improves(scores: list[float], window: int) -> bool:
    """Is the mean of the last ``window`` scores above that of every earlier moment?"""
    means = [sum(part) / len(part) for end in range(1, len(scores) + 1) if (part := scores[max(0, end - window) : end])]
    return len(means) == 1 or means[-1] > max(means[:-1])


class Validator:
    """A model of its own, which takes the weights (or their running mean) whole, whatever the ZeRO stage.

    Args:
        model: a copy of the model that is trained, before ZeRO took it.
        selection: the split that chooses.
        tokenize: texts to token ids.
        config: the run.
        device: where to encode.
    """

    def __init__(
        self, model: RetrievalModel, selection: Index, tokenize: Any, config: Config, device: torch.device
    ) -> None:
        self.model, self.selection, self.tokenize = model.eval().requires_grad_(False), selection, tokenize
        self.config, self.device = config, device
        self.directory = Path(config.run_dir) / "checkpoints"
        self.history: list[dict[str, float]] = []
        self.found: dict[str, float] = {}
        """Metrics of the last validation."""

    def resume(self, step: int) -> None:
        """Forget what was seen after ``step``: it will be seen again."""
        path = self.directory / "validation.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        self.history = [point for point in known if point["step"] <= step]

    def validate(self, step: int, engine: Engine, monitor: Monitor, log: logging.Logger) -> None:
        """Score the selection split, and keep the weights if they are the best so far; every rank calls it."""
        from safetensors.torch import save_file

        parameters = dict(self.model.named_parameters())
        kind = "ema" if self.config.optim.ema else "weight"
        with torch.no_grad():
            for _, name, value in engine.state((kind,)):
                parameters[name].copy_(value)
        features = encode(self.model, self.selection, self.tokenize, self.config, self.device)
        if is_main():
            monitor.picture("validation/queries", self._queries(features), step)
        found = metrics(ranks_of(self.model.head, features, self.config).t2v_T)
        split, protocol = self.config.evaluation.selected_on, self.config.evaluation.protocol
        monitor.scalars({f"{split}/{protocol}/t2v_{name}": value for name, value in found.items()}, step)
        log.info("step %d: %s t2v R@1 %.1f (%s)", step, split, found["R@1"], protocol)
        self.history.append({"step": step, "R@1": found["R@1"]})
        self.found = {f"{split}_t2v_{name}": value for name, value in found.items()}
        if not is_main():
            return
        if improves([point["R@1"] for point in self.history], self.config.evaluation.window):
            weights = {name: tensor.cpu().contiguous() for name, tensor in self.model.state_dict().items()}
            aside = self.directory / "best.safetensors.tmp"
            save_file(weights, aside)
            os.replace(aside, self.directory / "best.safetensors")
            write_json(self.directory / "best.json", {"step": step, "selected_on": split, "R@1": found["R@1"]})
        write_json(self.directory / "validation.json", self.history)

    def _queries(self, features: Features) -> Any:
        """The same few texts each time: their right video above the one that was found first."""
        scorer = Scorer(self.model.head, features, self.config)
        rows = []
        for number in np.linspace(0, len(features.owner_T) - 1, min(QUERIES, len(features.owner_T))).astype(int):
            start = int(number) // scorer.block * scorer.block
            with torch.inference_mode():
                score_V = scorer.score(start)[int(number) - start]
            truth, first = int(features.owner_T[number]), int(score_V.argmax())
            place = int((score_V >= score_V[truth]).sum())
            rows += [
                ([features.captions[number], f"right video, rank {place}"], self._frames(features.video_ids[truth])),
                (["found first", f"{float(score_V[first]):.3f}"], self._frames(features.video_ids[first])),
            ]
        return sheet(rows)

    def _frames(self, video_id: str) -> list[np.ndarray]:
        side, number = self.selection.image_size, min(6, self.config.model.num_frames)
        frames = np.empty((number, side, side, 3), np.uint8)
        read_into(frames, self.selection, self.selection.ids.index(video_id))
        return list(frames)
