"""A trained model as one object that loads with one line, here or from the Hugging Face Hub."""

# Shapes: T texts, V videos, F frames, H W pixels, C colours, D embedding width.

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from torch import Tensor, nn

from tmass_dist.cli import replacing
from tmass_dist.config import Config, load_config, make_config
from tmass_dist.data.remote import sha256_of
from tmass_dist.errors import UserError
from tmass_dist.evaluation.blocks import TEXTS_PER_BLOCK, caption_noise
from tmass_dist.evaluation.features import fingerprint
from tmass_dist.evaluation.scoring import Gallery
from tmass_dist.models.backbone import (
    build_tokenizer,
    read_description,
    save_open_clip,
)
from tmass_dist.models.frame_pooling import FramePool
from tmass_dist.models.late_interaction import LateInteraction
from tmass_dist.models.loading import load_weights, read_weights
from tmass_dist.models.pooling import XPool
from tmass_dist.models.tmass import build_model
from tmass_dist.models.warm_start import EXPORTED_WEIGHTS, export_checksum, normalisation_of, read_export_config
from tmass_dist.retrieval.card import model_card
from tmass_dist.retrieval.hub import HUB_OPTIONS, HubModel, download, in_one_line
from tmass_dist.score_labels import scoring_labels


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress open_clip's warning that a new model has random weights: ours are loaded right after."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


class TMass(
    nn.Module,
    HubModel,
    library_name="tmass-dist",
    paper_url="https://arxiv.org/abs/2403.17998",
    tags=["text-video-retrieval", "video", "clip"],
):
    """Towers and head of a trained model, its tokenizer and its settings, in evaluation mode.

    ``TMass.from_pretrained(SOURCE)`` loads it. Parameter names begin with ``towers.`` and ``head.``, as in a run's
    ``best.safetensors``.

    Args:
        settings: of the training run, as nested dictionaries (see ``tmass_dist/config/``).
        towers: description of towers that open_clip does not know, or None.
        normalisation: mean and standard deviation of the pixels, ``{"mean": [...], "std": [...]}``; None: the towers'.
        trained: facts for the model card: ``step``, ``data``, ``results`` (a markdown table).

    Raises:
        UserError: settings that are not valid.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        towers: dict[str, Any] | None = None,
        normalisation: dict[str, list[float]] | None = None,
        trained: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.config: Config = make_config(settings, name="the model's config.json", allow_env=False)
        self.trained = trained or {}
        self.description = towers
        try:
            with _quiet():
                model = build_model(replace(self.config.model, pretrained=None), towers)
            self.towers, self.head = model.towers, model.head
            if normalisation:
                self.towers.mean_C.copy_(torch.tensor(normalisation["mean"]))
                self.towers.std_C.copy_(torch.tensor(normalisation["std"]))
            self.tokenize = build_tokenizer(towers or self.config.model.architecture)
        except UserError:
            raise
        except Exception as error:  # open_clip raises errors of many kinds for a description that is wrong
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"the model's config.json describes no model that can be built ({reason})") from error
        self.eval()

    @classmethod
    def of_run(cls, run: str | Path, checkpoint: str | Path | None = None, *, allow_env: bool = False) -> TMass:
        """The best checkpoint of a run directory, or another weights file of the same settings.

        Args:
            run: its directory.
            checkpoint: a weights file in place of the best.
            allow_env: whether the run's ``config.yaml`` may read environment variables of this machine.

        Raises:
            UserError: it is no run directory, has no best checkpoint yet, or the weights are damaged.
        """
        run = Path(run)
        weights = Path(checkpoint) if checkpoint else run / "checkpoints" / "best.safetensors"
        if not (run / "config.yaml").is_file():
            raise UserError(f"{run} is no run directory: it has no config.yaml")
        if not weights.is_file():
            raise UserError(f"{run} has no weights {weights}; train it first")
        config = load_config(str(run / "config.yaml"), allow_env=allow_env)
        trained: dict[str, Any] = {"data": [asdict(part) for part in config.data.train_parts]}
        best = {} if checkpoint else _read_json(run / "checkpoints" / "best.json")
        trained |= {key: best[key] for key in ("step", "selected_on") if key in best}
        # A table of other weights is not this model's.
        table = run / "evaluation" / "table.md"
        evaluated = _read_json(run / "evaluation" / "metrics.json").get("weights_sha256")
        if table.is_file() and evaluated == sha256_of(weights):
            trained["results"] = table.read_text(encoding="utf-8")
        return cls.of_weights(config, read_weights(weights), str(weights), trained)

    @classmethod
    def of_weights(
        cls, config: Config, weights: dict[str, Tensor], source: str, trained: dict[str, Any] | None = None
    ) -> TMass:
        """A model from its settings and weights.

        Raises:
            UserError: the weights do not fit the settings; the message names ``source``.
        """
        own = config.model.architecture.endswith(".json")
        towers = read_description(config.model.architecture) if own else None
        settings = json.loads(json.dumps(asdict(config)))
        # Weights of one architecture may have been pretrained with different normalisations.
        normalisation = normalisation_of(config) if config.model.pretrained else None
        model = cls(settings=settings, towers=towers, normalisation=normalisation, trained=trained)
        load_weights(model, weights, source)
        return model

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> TMass:
        """Load a model.

        Args:
            pretrained_model_name_or_path: an export (a directory that ``save_pretrained`` or ``tmass export`` wrote), a
                run directory, or ``organisation/name`` on the Hugging Face Hub.
            options: of ``huggingface_hub``: ``revision``, ``token``, ``cache_dir``, ``local_files_only``, ...

        Raises:
            UserError: there is no model, or its files are damaged.
        """
        source = Path(pretrained_model_name_or_path)
        if source.is_dir() and not (source / "config.json").is_file():
            if (source / "config.yaml").is_file():
                return cls.of_run(source)
            raise UserError(f"{source} holds no model: it has neither config.json (an export) nor config.yaml (a run)")
        name = str(pretrained_model_name_or_path)
        with in_one_line(name):
            # It checks weights and settings; the library would go on with damaged settings.
            read_export_config((source if source.is_dir() else download(name, options)) / "config.json")
            return super().from_pretrained(name, **options)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> TMass:
        hub = {name: options.pop(name) for name in HUB_OPTIONS if name in options}
        path = (Path(model_id) if Path(model_id).is_dir() else download(model_id, hub)) / EXPORTED_WEIGHTS
        model = cls(**options)
        load_weights(model, read_weights(path), str(path))
        return model

    def _save_pretrained(self, save_directory: Path) -> None:
        from safetensors.torch import save_file

        weights = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        with replacing(save_directory / EXPORTED_WEIGHTS) as temporary:
            save_file(weights, temporary)
        config = {
            "settings": json.loads(json.dumps(asdict(self.config))),
            "towers": self.description,
            "normalisation": {"mean": self.towers.mean_C.tolist(), "std": self.towers.std_C.tolist()},
            "trained": self.trained,
            "weights_sha256": sha256_of(save_directory / EXPORTED_WEIGHTS),
        }
        config["checksum"] = export_checksum(config)
        (save_directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        selection = {key: self.trained[key] for key in ("step", "selected_on") if key in self.trained}
        if selection:  # beside the weights, as in a run: `tmass evaluate` reads it
            selection = json.dumps(selection) + "\n"
            (save_directory / EXPORTED_WEIGHTS).with_suffix(".json").write_text(selection, encoding="utf-8")
        if self.description:  # for `tmass evaluate`, which reads settings that name a file
            (save_directory / "towers.json").write_text(json.dumps(self.description) + "\n", encoding="utf-8")

    def generate_model_card(self, name: str = "MODEL", **_: Any) -> ModelCard:
        """The card: what the model is, how it was selected, its results with their protocol, and how to use it."""
        return model_card(
            name, self.config, self.trained | {"width": self.embed_dim}, self._hub_mixin_info.model_card_data
        )

    def save_open_clip(self, directory: str | Path) -> None:
        """Write the towers for open_clip, which loads them as ``local-dir:DIRECTORY``."""
        save_open_clip(self.towers, self.description or self.config.model.architecture, Path(directory))

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @property
    def num_frames(self) -> int:
        """Frames of a video, F."""
        return self.config.model.num_frames

    @property
    def embed_dim(self) -> int:
        """Width of the embeddings, D."""
        return self.towers.embed_dim

    def fingerprint(self) -> str:
        """Of the weights: two models with the same fingerprint give the same embeddings."""
        digest = hashlib.sha256()
        for name, value in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return fingerprint(digest.hexdigest(), self.num_frames)

    @torch.inference_mode()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Embeddings ``(T, D)`` of texts, not normalised; with late interaction, D numbers for each token.

        Raises:
            UserError: no texts, or one string in place of a list.
        """
        if isinstance(texts, str) or not texts:
            raise UserError("encode_text needs a list of at least one text")
        parts = [
            self.towers.encode_text(self.tokenize(list(texts[start : start + 256])).to(self.device)).float()
            for start in range(0, len(texts), 256)
        ]
        return torch.cat(parts)

    @torch.inference_mode()
    def encode_frames(self, pixels_VFHWC: Tensor) -> Tensor:
        """Embeddings ``(V, F, D)`` of frames, uint8 RGB of any size, not normalised."""
        from tmass_dist.data.transforms import resize_centre_crop

        pixels_VFHWC = resize_centre_crop(pixels_VFHWC.to(self.device), self.towers.image_size)
        return self.towers.encode_frames(pixels_VFHWC).float()

    def encode_videos(self, videos: Sequence[str | Path] | str | Path, batch_size: int = 16) -> Tensor:
        """Embeddings ``(V, F, D)`` of videos, not normalised.

        Args:
            videos: paths of video files; or one directory of packed shards.
            batch_size: videos encoded at a time.

        Raises:
            UserError: no videos, or one that cannot be decoded; the message names it.
        """
        from tmass_dist.retrieval.videos import read_batches, sources_of

        parts = []
        for batch in read_batches(sources_of(videos), self.num_frames, self.towers.image_size, batch_size):
            if batch.failed:
                name, reason = batch.failed[0]
                raise UserError(f"{name} cannot be decoded: {reason}")
            parts.append(self.encode_frames(torch.from_numpy(batch.pixels_VFHWC)).to(self.device))
        if not parts:
            raise UserError("encode_videos needs at least one video")
        return torch.cat(parts)

    def similarity(
        self,
        texts: Sequence[str],
        videos: Tensor | Sequence[str | Path] | str | Path,
        *,
        num_trials: int | None = None,
        text_TD: Tensor | None = None,
    ) -> Tensor:
        """Exact similarities ``(T, V)``, as the evaluation computes them; higher is better.

        The noise of the samples is a function of the seed, the text and the trial, so the same call gives the same
        result, and a pair's score does not depend on the other texts and videos.

        Args:
            texts: the queries.
            videos: what ``encode_videos`` takes or returns.
            num_trials: samples per text; by default ``stochastic.num_trials``; 0 scores the text embedding itself.
            text_TD: the embeddings of ``texts``, if they are known already.

        Raises:
            UserError: no texts or videos, videos that cannot be decoded, a negative number of trials.
        """
        if num_trials is not None and num_trials < 0:
            raise UserError(f"num_trials is {num_trials}; at least 0")
        if num_trials is not None and not self.head.draws_samples and (num_trials or self.head.mass is not None):
            raise UserError(f"num_trials is {num_trials}: this model draws no samples")
        frames_VFD = videos if isinstance(videos, Tensor) else self.encode_videos(videos)
        text_TD = self.encode_text(texts) if text_TD is None else text_TD
        gallery = Gallery(self.head, frames_VFD.to(self.device).float())
        sampled = self.head.draws_samples and num_trials != 0
        rows = []
        for start in range(0, len(texts), TEXTS_PER_BLOCK):
            rows_in_block = slice(start, start + TEXTS_PER_BLOCK)
            some = list(texts[rows_in_block])
            noise = caption_noise(some, self.config, self.embed_dim, self.device, num_trials) if sampled else None
            rows.append(gallery.score(text_TD[rows_in_block], noise, pooled_by=self._pooled_by(sampled)))
        return torch.cat(rows)

    def labels(self) -> dict[str, Any]:
        """What the scores of :meth:`similarity` state, with the keys of :data:`tmass_dist.score_labels.LABELS`.

        It has one protocol, no post-processing and float32 arithmetic, whatever the run's evaluation was set to.
        """
        labels = scoring_labels(self.config, self.head.tau) | {
            "protocol": "query_conditioned",
            "post_processing": "none",
            "precision": "float32",
            "selected_on": self.trained.get("selected_on", "unknown"),
        }
        return {key: value for key, value in labels.items() if value is not None}

    def _pooled_by(self, sampled: bool) -> Any:
        return self.config.model.pooled_by if sampled else "text"

    @torch.inference_mode()
    def attention(self, text_TD: Tensor, frames_VFD: Tensor) -> Tensor:
        """Weights ``(V, T, F)`` that the pooling gives to each frame for each text, mean over heads; they sum to one.

        A head that ignores the text (``model.pooling=mean``) has none; then it is the softmax of the cosines of text
        and frames, at the towers' temperature. With ``xpool_best_frame`` it is the attention alone, without the added
        frame. With late interaction it is the share of the tokens that are closest to each frame.
        """
        pool, frames_VFD = self.head.pooling, frames_VFD.to(self.device).float()
        if isinstance(pool, XPool):
            weights_VHFT = pool.attention(pool.queries(text_TD), pool.keys(pool.norm_in(frames_VFD)))
            return weights_VHFT.mean(dim=1).transpose(1, 2)
        unit_VFD = nn.functional.normalize(frames_VFD, dim=-1)
        if isinstance(pool, FramePool | LateInteraction):
            return pool.weights(text_TD, unit_VFD)
        cosine_VTF = nn.functional.normalize(text_TD, dim=-1) @ unit_VFD.transpose(1, 2)
        return (cosine_VTF * self.towers.logit_scale.exp()).softmax(dim=-1)


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def read_export(directory: Path, overrides: list[str]) -> Config:
    """Settings of an export, to evaluate it as a run.

    Raises:
        UserError: it is no export, or its settings or the overrides are not valid.
    """
    path = directory / "config.json"
    settings = read_export_config(path)["settings"]
    config = make_config(settings, overrides, str(path), allow_env=False)
    towers = directory / "towers.json"
    if towers.is_file():
        config = replace(config, model=replace(config.model, architecture=str(towers.resolve())))
    return replace(config, run_dir=str(directory))
