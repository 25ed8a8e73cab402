"""All settings of a run, and which of them may change when it is resumed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from tmass_dist.config.model import DataConfig, ModelConfig, StochasticConfig
from tmass_dist.config.ranges import require
from tmass_dist.config.training import EngineConfig, EvaluationConfig, LogConfig, OptimConfig


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run."""

    run_dir: str = "runs/default"
    """Directory for everything that the run writes. Running again with the same directory resumes."""
    init_from: str | None = None
    """Trained model whose towers and head the training starts from: a run, an export, or a whole model's weights
    (``.safetensors``). A part of the head that is of another kind or frame number starts fresh. ``model.pretrained``
    then states only how pixels are normalised. A checkpoint in ``run_dir`` takes precedence."""
    seed: int = 0
    """Seed of the data order, the noise, augmentation, dropout and the initial weights."""
    epochs: int = 5
    """Passes over all (video, caption) pairs."""
    max_steps: int | None = None
    """If set, the number of steps, in place of ``epochs``; the learning-rate schedule ends there."""
    eval_every: int = 100
    """Steps between validations. A checkpoint is saved after each."""
    evals_per_epoch: int | None = None
    """If set, validations per epoch, in place of ``eval_every``. The authors use 10."""
    eval_at_start: bool = False
    """Also validate before the first step, for the curves only: the checkpoint is selected among the later validations.
    """
    patience: int | None = None
    """Early stopping: end the training when so many validations in a row have brought no new best; null: never. The
    learning-rate schedule is still that of all steps."""
    log_every: int = 10
    """Steps between entries of ``metrics.jsonl``, TensorBoard and the log."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    stochastic: StochasticConfig = field(default_factory=StochasticConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        for key in ("epochs", "eval_every", "log_every"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "at least 1")
        require(
            self.evals_per_epoch is None or self.evals_per_epoch >= 1,
            "evals_per_epoch",
            self.evals_per_epoch,
            "at least 1, or null",
        )
        require(self.patience is None or self.patience >= 1, "patience", self.patience, "at least 1, or null")
        if self.optim.lora_rank is not None:
            stage, reason = (
                self.engine.zero_stage,
                "with optim.lora_rank use 0, 1 or 2; the adapters are too small to share",
            )
            require(stage < 3, "engine.zero_stage", stage, reason)
            require(not self.engine.compile, "engine.compile", True, "it does not work with optim.lora_rank")
        by_sample = self.model.pooled_by == "sample"
        mean_only = self.stochastic.training == "mean" or not self.model.draws_samples
        require(
            not (by_sample and mean_only), "model.pooled_by", "sample", "training draws no samples with these settings"
        )
        if self.model.mass_score != "samples":
            for key, default in (("training", "sampled"), ("samples", 1), ("training_radius", "own")):
                value = getattr(self.stochastic, key)
                reason = f"with model.mass_score={self.model.mass_score} nothing is sampled"
                require(value == default, f"stochastic.{key}", value, reason)
        published = self.evaluation.protocol == "published_code"
        reason = f"it pools videos with their own captions, and model.pooling={self.model.pooling} does not pool"
        require(not (self.model.by_token and published), "evaluation.protocol", "published_code", reason)
        exact = by_sample or not self.model.draws_samples or published
        require(
            self.evaluation.precision == "float32" or not exact,
            "evaluation.precision",
            self.evaluation.precision,
            "published_code, model.pooled_by=sample and systems that draw no samples support float32 only",
        )
        # Random numbers are keyed by 31 bits of it.
        require(0 <= self.seed < 2**31, "seed", self.seed, f"from 0 to {2**31 - 1}")
        require(self.max_steps is None or self.max_steps >= 1, "max_steps", self.max_steps, "at least 1, or null")
        downloads = any("://" in part.path for part in self.data.train_parts)
        waits = not downloads or self.data.retry_s < self.engine.timeout_s
        reason = "it must be below engine.timeout_s, or a slow download is taken for a rank that hangs"
        require(waits, "data.retry_s", self.data.retry_s, reason)


# Settings that may change when a run is resumed: they do not change its result.
_FREE_KEYS = (
    {"run_dir", "data.num_workers", "data.eval_batch_size", "data.max_bad", "log_every", "eval_at_start"}
    | {f"data.{key}" for key in ("cache", "cache_gb", "retry_s")}
    | {f"engine.{key}" for key in ("zero_stage", "micro_batch", "head_memory_mb", "checkpoint_activations", "compile")}
    | {f"engine.{key}" for key in ("nonfinite", "timeout_s", "keep", "peak_tflops", "save_every", "profile_steps")}
    | {f"evaluation.{key}" for key in ("baselines", "feature_precision", "thumbnails", "videos")}
    | {"log.to", "log.project"}
)


def differing_keys(one: Config, other: Config) -> list[str]:
    """Settings in which two runs differ, except those that do not change the result; for an error message."""
    a, b = flat(asdict(one)), flat(asdict(other))
    return [
        f"{key}: saved {a.get(key)!r}, given {b.get(key)!r}"
        for key in a
        if a[key] != b.get(key) and key not in _FREE_KEYS
    ]


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one dictionary with dotted keys."""
    settings: dict[str, Any] = {}
    for key, value in tree.items():
        settings |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return settings
