"""Validation during training, and the selection of the best checkpoint."""

# Shapes: T texts, V videos.

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tmass_dist.cli import read_json, replacing, write_json
from tmass_dist.config import Config
from tmass_dist.data.index import Index
from tmass_dist.data.samples import read_into
from tmass_dist.data.videos import num_batches
from tmass_dist.distributed import all_gather_objects, is_main, rank, world_size
from tmass_dist.evaluation.baselines import choose_tau
from tmass_dist.evaluation.blocks import BlockScorer
from tmass_dist.evaluation.encode import encode_batches, ranks_of
from tmass_dist.evaluation.features import Features, merge
from tmass_dist.evaluation.ranking import metrics
from tmass_dist.models.adapters import plain_weights
from tmass_dist.models.tmass import RetrievalModel
from tmass_dist.pictures import sheet
from tmass_dist.revision import revision
from tmass_dist.score_labels import label_words, score_prefix, score_tags, scoring_labels
from tmass_dist.training.engine import Engine
from tmass_dist.training.monitor import Monitor

QUERIES = 4
"""Number of texts whose results TensorBoard shows at each validation."""


def window_means(scores: list[float], window: int) -> list[float]:
    """For each score the mean of it and those before it, ``window`` scores in all (fewer at the beginning)."""
    return [sum(part) / len(part) for end in range(1, len(scores) + 1) if (part := scores[max(0, end - window) : end])]


def improves(scores: list[float], window: int) -> bool:
    """Whether the mean of the last ``window`` scores is above that mean at every earlier validation."""
    means = window_means(scores, window)
    return len(means) == 1 or means[-1] > max(means[:-1])


class _StopError(Exception):
    """This rank was asked to stop."""


class Validator:
    """Scores the selection split by the trained weights or their running mean.

    Args:
        selection: the split that selects the checkpoint.
        tokenize: texts to token ids.
        config: of the run.
        device: on which to encode.
        on_batch: called after each encoded batch; returns whether to stop.
    """

    def __init__(
        self,
        selection: Index,
        tokenize: Any,
        config: Config,
        device: torch.device,
        on_batch: Callable[[], bool],
    ) -> None:
        self.selection, self.tokenize = selection, tokenize
        self.config, self.device, self.on_batch = config, device, on_batch
        self.directory = Path(config.run_dir) / "checkpoints"
        self.history: list[dict[str, Any]] = []
        """Step, R@1 and labels of each validation but that of step 0."""
        self.last_metrics: dict[str, float] = {}
        """Of the last validation: text to video."""

    def resume(self, step: int) -> None:
        """Load the history up to ``step``; later validations will be repeated."""
        points = all_gather_objects(read_json(self.directory / "validation.json", list) if is_main() else None)[0]
        self.history = [point for point in points or [] if _is_point(point) and point["step"] <= step]

    def has_validated(self, step: int) -> bool:
        """Whether the history holds this step."""
        return any(point["step"] == step for point in self.history)

    def is_exhausted(self) -> bool:
        """Whether the last ``patience`` validations have brought no new best."""
        patience = self.config.patience
        means = window_means([point["R@1"] for point in self.history], self.config.evaluation.window)
        # The first of equal means is the best: `improves` needs a higher one.
        return patience is not None and len(means) - 1 - means.index(max(means)) >= patience if means else False

    def validate(self, step: int, engine: Engine, monitor: Monitor, log: logging.Logger) -> bool:
        """Score the selection split and keep the weights if they are the best so far; every rank calls it.

        At step 0 the scores are only logged: the untrained weights cannot be selected.

        Returns:
            False if ``on_batch`` of any rank asked to stop; the validation then counts as not done.
        """
        with engine.lent_model() as model:
            model.eval()
            is_complete = self._score(model, step, monitor, log)
            model.train()
        return is_complete

    def _score(self, model: RetrievalModel, step: int, monitor: Monitor, log: logging.Logger) -> bool:
        features = self._encode(model)
        if features is None:
            return False
        ranks = ranks_of(model.head, features, self.config)
        t2v, v2t = metrics(ranks.t2v_T), metrics(ranks.v2t_V)
        labels = {"selected_on": self.config.evaluation.selected_on, **scoring_labels(self.config, model.head.tau)}
        self._log(step, t2v, v2t, labels, monitor, log)
        if is_main():
            prefix = score_prefix(labels["selected_on"], {**labels, "selected_on": None})
            monitor.image(f"{prefix}/queries", self._queries(model, features), step)
        if step:
            self._record(step, t2v, labels, features, model)
        return True

    def _encode(self, model: RetrievalModel) -> Features | None:
        """The features of the whole split; None if a rank was asked to stop."""
        part = None
        try:
            own = range(num_batches(self.selection, self.config.data.eval_batch_size))[rank() :: world_size()]
            part = encode_batches(model, self.selection, self.tokenize, self.config, self.device, own, self._check_stop)
        except _StopError:
            pass
        parts = all_gather_objects(part)
        return None if any(part is None for part in parts) else merge(parts, self.selection.ids)

    def _check_stop(self) -> None:
        if self.on_batch():
            raise _StopError

    def _log(
        self,
        step: int,
        t2v: dict[str, float],
        v2t: dict[str, float],
        labels: dict[str, Any],
        monitor: Monitor,
        log: logging.Logger,
    ) -> None:
        split = labels["selected_on"]
        labels = {**labels, "selected_on": None}  # this validation selects: its weights are the present ones
        monitor.scalars(score_tags(split, labels, t2v=t2v, v2t=v2t), step)
        words = label_words(labels)
        log.info("step %d: %s R@1: t2v %.1f, v2t %.1f (%s)", step, split, t2v["R@1"], v2t["R@1"], ", ".join(words))
        self.last_metrics = t2v

    def _record(
        self, step: int, t2v: dict[str, float], labels: dict[str, Any], features: Features, model: RetrievalModel
    ) -> None:
        from safetensors.torch import save_file

        self.history.append({"step": step, "R@1": t2v["R@1"], **labels})
        if not is_main():
            return
        if improves([point["R@1"] for point in self.history], self.config.evaluation.window):
            weights = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in plain_weights(model).items()}
            with replacing(self.directory / "best.safetensors") as temporary:
                save_file(weights, temporary)
            # What selected the checkpoint, and what else the selection split chooses; evaluations state it.
            chosen = {"query_scoring_tau": choose_tau(features), "code": revision()}
            write_json(self.directory / "best.json", {"step": step, "R@1": t2v["R@1"], **labels, **chosen})
        write_json(self.directory / "validation.json", self.history)

    def _queries(self, model: RetrievalModel, features: Features) -> Any:
        """The same few texts at each validation: the correct video, and below it the top-ranked one."""
        scorer = BlockScorer(model.head, features, self.config)
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


def _is_point(point: Any) -> bool:
    return isinstance(point, dict) and isinstance(point.get("step"), int) and isinstance(point.get("R@1"), int | float)
