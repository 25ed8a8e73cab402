"""A stored split ready to be scored: features, head and settings of a feature store; needs no GPU, videos or CLIP."""

# Shapes: T texts, V videos, D embedding width.

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tmass_dist.config import Config, load_config
from tmass_dist.data.index import Index, load_index
from tmass_dist.errors import UserError
from tmass_dist.evaluation import ranking
from tmass_dist.evaluation.blocks import BlockFiles, BlockScorer
from tmass_dist.evaluation.features import HEAD, fingerprint, load_features, read_index, selection_of
from tmass_dist.evaluation.settings import SCORING_SETTINGS
from tmass_dist.models.head import RetrievalHead, build_head


class StoredSplit:
    """A feature store, opened with scoring settings.

    Args:
        store: its directory.
        overrides: of the settings that the store was encoded with.
        allow_env: whether those settings may read environment variables.

    Raises:
        UserError: the store is missing or damaged, or an override does not fit the encoded features.
    """

    def __init__(self, store: Path, overrides: list[str], *, allow_env: bool = False) -> None:
        self.store, self.index = store, read_index(store)
        encoded, self.config = self._configs(overrides, allow_env)
        for field in dataclasses.fields(encoded.model):
            value, wanted = getattr(encoded.model, field.name), getattr(self.config.model, field.name)
            if value != wanted and f"model.{field.name}" not in SCORING_SETTINGS:
                raise UserError(
                    f"model.{field.name} is {wanted!r} and {store} was encoded with {value!r}; encode again"
                )
        self.features = load_features(store)
        self.scorer = BlockScorer(self._head(), self.features, self.config)

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Errors of what is computed from the store name it."""
        try:
            yield
        except UserError as error:
            if str(self.store) in str(error):
                raise
            raise UserError(f"{self.store}: {error}") from error

    @property
    def num_videos(self) -> int:
        return len(self.features.video_ids)

    @property
    def query_scoring_tau(self) -> float | None:
        """The temperature of the query-scoring baseline that validation chose; None where it is not known."""
        tau = selection_of(self.index).get("query_scoring_tau")
        return float(tau) if isinstance(tau, int | float) and 0 < tau < float("inf") else None

    def block_files(self, out: Path) -> BlockFiles:
        """The blocks of scores below ``out/scores``; any change of what they depend on gives another directory."""
        key = fingerprint(
            self.index["fingerprint"],
            self.index["files"],
            self.config.seed,
            dataclasses.asdict(self.config.stochastic),
            self.config.evaluation.protocol,
            self.config.evaluation.precision,
            self.config.model.pooled_by,
        )
        return BlockFiles(out / "scores" / key, self.scorer, log=lambda text: print(text, file=sys.stderr))

    def bank(self, store: Path) -> ranking.Bank:
        """Training queries against this gallery, for qbnorm.

        Args:
            store: feature store of the queries, encoded by the same weights.

        Raises:
            UserError: the store is missing or damaged, or was encoded by other weights or settings.
        """
        bank_index = read_index(store)
        for key in ("weights_sha256", "precision", "encoding"):
            if bank_index.get(key) != self.index.get(key):
                raise UserError(
                    f"the bank {store} was encoded by {bank_index.get('checkpoint')} and {self.store} by "
                    f"{self.index['checkpoint']}: {key} differs; encode the bank with the same checkpoint"
                )
        queries = load_features(store)
        pairs = dataclasses.replace(
            self.features,
            text_TD=queries.text_TD,
            caption_ids=queries.caption_ids,
            captions=queries.captions,
            owner_T=queries.owner_T,
        )
        scorer = BlockScorer(self.scorer.head, pairs, self.config)
        return ranking.Bank(scorer.scores, self.num_videos)

    def shards(self) -> Index | None:
        """The split's shards, for the frames in the report; None where they are no longer there."""
        place = self.index.get("shards")
        if not isinstance(place, str):
            return None
        try:
            # A report does not wait for a server: it is complete without these frames.
            return load_index(place, self.config.data.cache, 0)
        except (ValueError, OSError):
            return None

    def _configs(self, overrides: list[str], allow_env: bool) -> tuple[Config, Config]:
        """The settings that the store was encoded with, and these with ``overrides``."""
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "config.yaml"
            path.write_text(self.index["config"], encoding="utf-8")
            try:
                return (
                    load_config(str(path), allow_env=allow_env),
                    load_config(str(path), overrides, allow_env=allow_env),
                )
            except UserError as error:
                message = str(error).replace(str(path), f"the config in {self.store / 'index.json'}")
                raise UserError(message) from error

    def _head(self) -> RetrievalHead:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        from tmass_dist.models.loading import load_weights

        head = build_head(self.config.model, self.features.frames_VFD.shape[2]).eval()
        path = self.store / HEAD
        try:
            load_weights(head, load_file(path), str(path))
        except SafetensorError as error:
            raise UserError(f"{path} is damaged ({error}); encode again") from error
        return head
