"""Validation during training, and the selection of the best checkpoint."""

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
from tmass_dist.evaluation.baselines import choose_tau
from tmass_dist.evaluation.blocks import BlockScorer
from tmass_dist.evaluation.encode import encode, ranks_of
from tmass_dist.evaluation.features import Features
from tmass_dist.evaluation.ranking import metrics
from tmass_dist.models.tmass import RetrievalModel
from tmass_dist.pictures import sheet
from tmass_dist.training.engine import Engine
from tmass_dist.training.monitor import Monitor

QUERIES = 4
"""Number of texts whose results TensorBoard shows at each validation."""


def improves(scores: list[float], window: int) -> bool:
    """Whether the mean of the last ``window`` scores is above that mean at every earlier validation."""
    means = [sum(part) / len(part) for end in range(1, len(scores) + 1) if (part := scores[max(0, end - window) : end])]
    return len(means) == 1 or means[-1] > max(means[:-1])


class Validator:
    """Scores the selection split by a second model, which gets the gathered weights or their running mean.

    Args:
        model: a copy of the trained model, made before ZeRO sharded it.
        selection: the split that selects the checkpoint.
        tokenize: texts to token ids.
        config: of the run.
        device: on which to encode.
    """

    def __init__(
        self, model: RetrievalModel, selection: Index, tokenize: Any, config: Config, device: torch.device
    ) -> None:
        self.model, self.selection, self.tokenize = model.eval().requires_grad_(False), selection, tokenize
        self.config, self.device = config, device
        self.directory = Path(config.run_dir) / "checkpoints"
        self.history: list[dict[str, float]] = []
        self.last_metrics: dict[str, float] = {}

    def resume(self, step: int) -> None:
        """Load the history up to ``step``; later validations will be repeated."""
        path = self.directory / "validation.json"
        history = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        self.history = [point for point in history if point["step"] <= step]

    def validate(self, step: int, engine: Engine, monitor: Monitor, log: logging.Logger) -> None:
        """Score the selection split and keep the weights if they are the best so far; every rank calls it."""
        from safetensors.torch import save_file

        parameters = dict(self.model.named_parameters())
        kind = "ema" if self.config.optim.ema else "weight"
        with torch.no_grad():
            for _, name, value in engine.state((kind,)):
                parameters[name].copy_(value)
        features = encode(self.model, self.selection, self.tokenize, self.config, self.device)
        if is_main():
            monitor.image("validation/queries", self._queries(features), step)
        t2v = metrics(ranks_of(self.model.head, features, self.config).t2v_T)
        split, protocol = self.config.evaluation.selected_on, self.config.evaluation.protocol
        monitor.scalars({f"{split}/{protocol}/t2v_{name}": value for name, value in t2v.items()}, step)
        log.info("step %d: %s t2v R@1 %.1f (%s)", step, split, t2v["R@1"], protocol)
        self.history.append({"step": step, "R@1": t2v["R@1"]})
        self.last_metrics = {f"{split}_{protocol}_t2v_{name}": value for name, value in t2v.items()}
        if not is_main():
            return
        if improves([point["R@1"] for point in self.history], self.config.evaluation.window):
            weights = {name: tensor.cpu().contiguous() for name, tensor in self.model.state_dict().items()}
            temporary = self.directory / "best.safetensors.tmp"
            save_file(weights, temporary)
            os.replace(temporary, self.directory / "best.safetensors")
            write_json(self.directory / "best.json", self._selection(step, t2v["R@1"], features))
        write_json(self.directory / "validation.json", self.history)

    def _selection(self, step: int, recall: float, features: Features) -> dict[str, Any]:
        """What selected the checkpoint, and what else the selection split chooses; evaluations state it."""
        evaluation = self.config.evaluation
        sampled = self.config.model.radius != "none"
        return {
            "step": step,
            "selected_on": evaluation.selected_on,
            "R@1": recall,
            "protocol": evaluation.protocol,
            "post_processing": evaluation.post_processing,
            "num_trials": self.config.stochastic.num_trials if sampled else None,
            "query_scoring_tau": choose_tau(features),
        }

    def _queries(self, features: Features) -> Any:
        """The same few texts at each validation: the correct video, and below it the top-ranked one."""
        scorer = BlockScorer(self.model.head, features, self.config)
        rows = []
        num_texts = len(features.owner_T)
        for number in np.linspace(0, num_texts - 1, min(QUERIES, num_texts)).astype(int):
            with torch.inference_mode():
                score_V = scorer.scores_of(int(number))
            truth, top = int(features.owner_T[number]), int(score_V.argmax())
            rank = int((score_V >= score_V[truth]).sum())
            rows += [
                ([features.captions[number], f"correct video, rank {rank}"], self._frames(features.video_ids[truth])),
                (["ranked first", f"{float(score_V[top]):.3f}"], self._frames(features.video_ids[top])),
            ]
        return sheet(rows)

    def _frames(self, video_id: str) -> list[np.ndarray]:
        side, number = self.selection.image_size, min(6, self.config.model.num_frames)
        frames = np.empty((number, side, side, 3), np.uint8)
        read_into(frames, self.selection, self.selection.ids.index(video_id))
        return list(frames)
