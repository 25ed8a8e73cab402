"""A model in the retrieval tasks of mteb, an independent benchmark: text to video, and video to text.

mteb ranks what a model's own search returns (its ``SearchProtocol``), so the scores are those of
:meth:`TMass.similarity`. Its tasks hold videos as files, which are decoded here as everywhere in this project.
"""

# Shapes: T texts, V videos, F frames, Q queries, C documents of the corpus, D embedding width.

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tmass_dist.errors import UserError
from tmass_dist.retrieval.model import TMass
from tmass_dist.retrieval.videos import Source, read_batches

if TYPE_CHECKING:
    from datasets import Dataset
    from mteb.models import ModelMeta

CATEGORIES = ("t2v", "v2t")
"""The directions that this model has; mteb names them so."""


class MtebModel:
    """A model for ``mteb.evaluate``.

    Args:
        model: the model.
        name: for mteb's results, ``organisation/name``.
        batch_size: videos encoded at a time.
    """

    def __init__(self, model: TMass, name: str = "tmass-dist/model", batch_size: int = 16) -> None:
        self.model, self.name, self.batch_size = model.eval(), name, batch_size
        self._ids: list[str] = []
        self._corpus: list[str] | Tensor = []
        """The corpus: texts, or frames ``(V, F, D)``."""

    @classmethod
    def from_pretrained(cls, model: str | Path, **options: Any) -> MtebModel:
        """Load a run, an export, or a model on the Hub; ``options`` are those of :meth:`TMass.from_pretrained`.

        Raises:
            UserError: there is no model, or its files are damaged.
        """
        path = Path(model)
        name = f"tmass-dist/{path.resolve().name}" if path.is_dir() else str(model)
        return cls(TMass.from_pretrained(model, **options), name)

    @property
    def mteb_model_meta(self) -> ModelMeta:
        """What mteb writes about the model into its results; ``experiment_kwargs`` are our labels of a score."""
        from mteb.models import ModelMeta

        return ModelMeta(
            loader=None,
            name=self.name,
            revision=self.model.fingerprint(),
            release_date=None,
            languages=None,
            n_parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            memory_usage_mb=None,
            max_tokens=None,
            embed_dim=self.model.embed_dim,
            license=None,
            open_weights=None,
            public_training_code=None,
            public_training_data=None,
            framework=["PyTorch"],
            similarity_fn_name=None,
            use_instructions=False,
            training_datasets=None,
            modalities=["text", "video"],
            experiment_kwargs=self.model.labels(),
        )

    def index(self, corpus: Dataset, *, task_metadata: Any, **_: Any) -> None:
        """Take the corpus of a task; videos are encoded here.

        Raises:
            UserError: the task needs more than texts and videos, or a video cannot be decoded.
        """
        if task_metadata.category not in CATEGORIES:
            raise UserError(
                f"mteb's task {task_metadata.name} is of category {task_metadata.category}; this model has "
                f"{' and '.join(CATEGORIES)}"
            )
        self._ids = list(corpus["id"])
        self._corpus = self._encode(corpus)

    def search(
        self, queries: Dataset, *, top_k: int, top_ranked: dict[str, list[str]] | None = None, **_: Any
    ) -> dict[str, dict[str, float]]:
        """Scores of the best documents for each query.

        Args:
            queries: with ``id`` and ``text`` or ``video``.
            top_k: number of documents of a query.
            top_ranked: the documents that a query may get, by its id; None: all.

        Raises:
            UserError: a video cannot be decoded.
        """
        asked, held = self._encode(queries), self._corpus
        if isinstance(held, Tensor):
            assert isinstance(asked, list), "index() refused other categories"
            score_QC = self.model.similarity(asked, held)
        else:
            assert isinstance(asked, Tensor), "index() refused other categories"
            score_QC = self.model.similarity(held, asked).T
        row_of = {document: row for row, document in enumerate(self._ids)}
        found = {}
        for query, score_C in zip(queries["id"], score_QC.cpu()):
            allowed = self._ids if top_ranked is None else top_ranked[query]
            rows = torch.tensor([row_of[document] for document in allowed])
            best = score_C[rows].topk(min(top_k, len(rows)))
            found[query] = {allowed[place]: score for place, score in zip(best.indices.tolist(), best.values.tolist())}
        return found

    def _encode(self, data: Dataset) -> list[str] | Tensor:
        """The texts of a data set, or frames ``(V, F, D)`` of its videos."""
        if "video" not in data.column_names:
            return list(data["text"])
        parts = []
        for sources in _videos_of(data, self.batch_size):
            for batch in read_batches(sources, self.model.num_frames, self.model.towers.image_size, self.batch_size):
                if batch.failed:
                    name, reason = batch.failed[0]
                    raise UserError(f"{name} cannot be decoded: {reason}")
                parts.append(self.model.encode_frames(torch.from_numpy(batch.pixels_VFHWC)))
        return torch.cat(parts)


def _videos_of(data: Dataset, batch_size: int) -> Iterator[list[Source]]:
    """The videos of a data set as files, or as their bytes where it holds those, some at a time.

    Raises:
        UserError: its column ``video`` holds no files.
    """
    import fsspec
    from datasets import Video

    if not isinstance(data.features["video"], Video):
        raise UserError(f"the column video is of type {data.features['video']}; wanted video files (datasets.Video)")
    files = data.cast_column("video", Video(decode=False))
    for start in range(0, len(files), batch_size):
        rows = files[start : start + batch_size]
        sources = []
        for name, video in zip(rows["id"], rows["video"]):
            path, content = video["path"] or "", video["bytes"]
            if content is None and "://" in path:
                filesystem, name_there = fsspec.url_to_fs(path)
                content = filesystem.cat_file(name_there)
            sources.append(Source(name, path, content=content))
        yield sources
