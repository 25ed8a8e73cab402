"""Settings of the data, the model and the text mass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from tmass_dist.config.parts import TrainPart, train_parts
from tmass_dist.config.ranges import require


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The splits and how they are read."""

    train: Any = "data/train"
    """Directory (or URL) of the training shards, written by ``shards/make_shards.py``. Or a mixture: a list of these,
    each a path or ``{path: ..., weight: ...}``. An epoch reads each pair of a split ``weight`` times (1)."""
    batch_from: Literal["mixed", "one"] = "mixed"
    """For a mixture. ``mixed``: a batch has pairs of all splits; ``one``: each batch has pairs of one split only."""
    val: str | None = "data/val"
    """Split on which the best checkpoint is selected; null: ``holdout`` training videos are used instead."""
    holdout: int = 0
    """If ``val`` is null: training videos held out to select the checkpoint, chosen by a hash of their ids."""
    captions: tuple[str, ...] = ()
    """Optional files of extra training captions, as written by ``shards/caption_videos.py``."""
    test: str = "data/test"
    """Split on which results are reported."""
    batch_size: int = 32
    """(video, caption) pairs of the global batch, summed over all ranks. All others of the batch serve as negatives."""
    num_workers: int = 2
    """Decoding processes per rank; 0: the training process decodes."""
    augment: bool = True
    """Apply a random crop (50 to 100 % of the area) and flip to each training video, the same to all its frames."""
    frames: Literal["uniform", "random"] = "uniform"
    """If more frames than ``model.num_frames`` were packed: train on the middle frame of each segment, or any."""
    max_bad: float = 0.01
    """Largest share of damaged training videos tolerated, each replaced by another video; 0 stops at the first."""
    order: Literal["global", "streaming"] | None = None
    """``global``: batches from a permutation of the whole split. ``streaming``: shard after shard, for splits that are
    larger than a node's disk. Null: the first start takes ``streaming`` for a URL, else ``global``, and records it."""
    lanes: int | None = None
    """``order=streaming``: parallel sequences of shards. It divides ``batch_size`` and is a multiple of the number of
    ranks. Null: the first start takes at least 8, if they fit, and records it."""
    window: int = 2
    """``order=streaming``: shards of each lane whose samples are mixed."""
    cache: str | None = None
    """Local directory in which shards downloaded from a URL (``https://``, ``s3://``) are kept."""
    cache_gb: float | None = None
    """``order=streaming``: largest size of the downloaded training shards on each node, gigabytes (10^9 bytes); null:
    no limit."""
    retry_s: float = 300
    """Seconds for which a download that fails is tried again; then the run ends as after a machine failure."""
    eval_batch_size: int = 16
    """Videos that each rank encodes at a time during evaluation."""

    @property
    def train_parts(self) -> tuple[TrainPart, ...]:
        """The training splits: several for a mixture."""
        return train_parts(self.train)

    def __post_init__(self) -> None:
        parts = self.train_parts
        # A list of one split is that split.
        is_plain = len(parts) == 1 and parts[0].weight == 1
        object.__setattr__(self, "train", parts[0].path if is_plain else parts)
        mixes = len(parts) > 1 or self.batch_from == "mixed"
        require(mixes, "data.batch_from", self.batch_from, "it applies to a data.train with several splits")
        require(self.batch_size >= 2, "data.batch_size", self.batch_size, "a contrastive loss needs at least 2 pairs")
        for key, most in (("batch_size", 2**20), ("eval_batch_size", 2**20), ("num_workers", 1024)):
            require(getattr(self, key) <= most, f"data.{key}", getattr(self, key), f"at most {most}")
        require(0 <= self.max_bad <= 1, "data.max_bad", self.max_bad, "it is a share between 0 and 1")
        require(self.num_workers >= 0, "data.num_workers", self.num_workers, "it cannot be negative")
        require(self.eval_batch_size >= 1, "data.eval_batch_size", self.eval_batch_size, "at least 1")
        for key in ("lanes", "window"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"data.{key}", value, "at least 1")
        require(self.cache_gb is None or self.cache_gb > 0, "data.cache_gb", self.cache_gb, "it must be positive")
        require(self.retry_s >= 0, "data.retry_s", self.retry_s, "it cannot be negative")
        held_out = self.cache_gb is not None and self.val is None
        require(not held_out, "data.cache_gb", self.cache_gb, "held-out videos lie in all shards; set data.val")
        needed = self.val is None and self.holdout < 1
        require(not needed, "data.holdout", self.holdout, "data.val is null, so some training videos must be held out")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The towers and the text-conditioned head."""

    architecture: str = "ViT-B-32-quickgelu"
    """Name of an open_clip model, or a JSON file that describes the towers."""
    pretrained: str | None = "openai"
    """Tag of open_clip weights, a local weights file, or null for random weights."""
    num_frames: int = 12
    """Frames per video. The radius layer is built for this number."""
    pooling: Literal[
        "xpool",
        "mean",
        "best_frame",
        "query_scored",
        "xpool_best_frame",
        "late_interaction",
        "weighted_interaction",
    ] = "xpool"
    """How the frames of a video become one vector. ``xpool``: attention layer with the text as the query; ``mean``:
    mean of the frames, independent of the text; ``best_frame``: the frame closest to the text; ``query_scored``: frames
    weighted by ``softmax(cosine / tau)`` with a learnt tau; ``xpool_best_frame``: ``xpool`` plus the closest frame,
    times a learnt weight; ``late_interaction``: no pooling, each token of the text is compared with its closest frame
    and the score is the mean over the tokens; ``weighted_interaction``: the mean has learnt weights."""
    num_heads: int = 1
    """Number of attention heads of ``xpool`` and ``xpool_best_frame``; the other poolings have none."""
    dropout: float = 0.3
    """Dropout probability in ``xpool`` and ``xpool_best_frame``; the other poolings have no dropout. The paper uses 0.4
    on DiDeMo."""
    radius: Literal["none", "exp_linear", "exp_mean", "linear", "scaled_exp_mean", "variational"] = "exp_linear"
    """How the radius of the text mass is computed from the cosines of text and frames. ``none``: no text mass, which is
    X-Pool. ``variational``: from the text alone, regularised by ``stochastic.kl_weight``."""
    radius_start: Literal["rising", "falling"] = "rising"
    """Initial weights of ``exp_linear``: the radius rises with the cosine, as the authors' does, or falls."""
    mass_score: Literal["samples", "expected", "temperature"] = "samples"
    """How the text mass enters a score, in training and evaluation. ``samples``: the cosine of a sample, the best of M
    at evaluation. The other two draw nothing and use the radius R of each pair: ``expected``: the expected cosine in
    closed form, the cosine divided by ``sqrt(1 + |R|^2 / |t|^2)``; ``temperature``: the cosine divided by the mean of
    R, which with ``radius=variational`` is a learnt temperature of each text."""
    pooled_by: Literal["text", "sample"] = "text"
    """Attention query of the pooling: the text embedding, or its sample (ablation of the supplementary, worse)."""

    def __post_init__(self) -> None:
        require(self.num_frames >= 1, "model.num_frames", self.num_frames, "a video needs at least one frame")
        require(0 <= self.dropout < 1, "model.dropout", self.dropout, "it must be in [0, 1)")
        require(self.num_heads >= 1, "model.num_heads", self.num_heads, "at least 1")
        attention = self.pooling in ("xpool", "xpool_best_frame")
        require(
            attention or self.num_heads == 1,
            "model.num_heads",
            self.num_heads,
            f"model.pooling={self.pooling} has no attention heads",
        )
        massless = not self.by_token or self.radius == "none"
        require(massless, "model.pooling", self.pooling, "its tokens have no text mass; set model.radius=none")
        without_mass = self.mass_score != "samples" and self.radius == "none"
        require(not without_mass, "model.mass_score", self.mass_score, "model.radius=none has no mass")
        signed = self.mass_score == "temperature" and self.radius in ("linear", "scaled_exp_mean")
        require(not signed, "model.mass_score", self.mass_score, f"model.radius={self.radius} may be negative")
        learnt = self.radius == "exp_linear" or self.radius_start == "rising"
        require(
            learnt,
            "model.radius_start",
            self.radius_start,
            f"it applies to exp_linear, not to model.radius={self.radius}",
        )

    @property
    def by_token(self) -> bool:
        """Whether texts are scored by their tokens, each with its own frame."""
        return self.pooling in ("late_interaction", "weighted_interaction")

    @property
    def draws_samples(self) -> bool:
        """Whether scores are those of samples of a text mass; otherwise M and the noise do not apply."""
        return self.radius != "none" and self.mass_score == "samples"


@dataclass(frozen=True, kw_only=True)
class StochasticConfig:
    """Sampling from the text mass."""

    prior: Literal["uniform", "normal"] = "uniform"
    """Distribution of the noise. ``uniform``: on [0, 1), as in the published code; ``normal``: with mean zero."""
    prior_std: float = 1.0
    """Standard deviation of the normal noise, in units of the radius. The authors use 3e-3 on LSMDC."""
    support_weight: float = 0.8
    """Weight of the support-text loss. The authors use 0.8 on MSR-VTT; 0 disables it."""
    training: Literal["sampled", "mean"] = "sampled"
    """``sampled``: the loss uses samples of the text mass; ``mean``: the text embedding itself, so that only evaluation
    draws samples."""
    samples: int = 1
    """Samples per text in a training step. The paper draws one."""
    trials: Literal["mean", "best"] = "mean"
    """With several samples: average their losses, or use the best sample of each pair, as evaluation does."""
    training_radius: Literal["own", "pair"] = "own"
    """``own``: one radius per text, that of its matching video, as in the paper; ``pair``: one radius per (text, video)
    pair, as in evaluation."""
    kl_weight: float = 0.0
    """Weight of the KL divergence of the text mass from N(0, I), mean over dimensions (supplementary, section 4)."""
    num_trials: int = 20
    """Samples per text at evaluation (the paper's M). The score of a pair is the cosine of its best sample."""

    def __post_init__(self) -> None:
        require(self.num_trials >= 1, "stochastic.num_trials", self.num_trials, "a pair needs at least one sample")
        require(self.samples >= 1, "stochastic.samples", self.samples, "at least 1")
        fits = self.trials == "mean" or self.samples > 1
        require(fits, "stochastic.trials", self.trials, "it needs stochastic.samples of 2 or more")
        require(self.prior_std > 0, "stochastic.prior_std", self.prior_std, "it must be positive")
        for key in ("support_weight", "kl_weight"):
            require(getattr(self, key) >= 0, f"stochastic.{key}", getattr(self, key), "it cannot be negative")
