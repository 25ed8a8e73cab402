"""Every setting of a run: the dataclasses are the manual, a page holds what differs, an override has the last word."""

from __future__ import annotations

import difflib
import re
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from tmass_dist.errors import UserError

CONFIG_DIR = Path(__file__).resolve().parents[1] / "configs"


def _require(condition: bool, key: str, value: object, reason: str) -> None:
    if not condition:
        raise UserError(f"{key} is {value!r}: {reason}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the shards lie and how they are read."""

    train: str = "data/train"
    """Directory of training shards, as written by ``shards/make_shards.py``."""
    val: str | None = "data/val"
    """Directory of the split that chooses the checkpoint; null holds out ``holdout`` of the training videos."""
    holdout: int = 0
    """Training videos kept out of training to choose the checkpoint, where ``val`` is null; a fixed choice by id."""
    captions: tuple[str, ...] = ()
    """Files of further captions for training (``shards/caption_videos.py``), beside the packed ones."""
    test: str = "data/test"
    """Directory of the split that is reported."""
    batch_size: int = 32
    """Pairs in one global batch, over all ranks: the negatives of the loss."""
    num_workers: int = 2
    """Decoding processes of each rank; 0 decodes in the training process."""
    augment: bool = True
    """Train on a random crop (half to all of the area) and flip of each video, one for all its frames."""
    frames: Literal["uniform", "random"] = "uniform"
    """Which of more packed frames than ``model.num_frames`` training takes from each segment: its middle, or any."""
    max_bad: float = 0.01
    """Share of the training videos that may be damaged, each replaced by another; more end the run. 0: the first."""
    cache: str | None = None
    """A local directory that keeps the shards of a split given as a URL (``https://``, ``s3://``)."""
    eval_batch_size: int = 16
    """Videos encoded at a time by one rank during evaluation."""

    def __post_init__(self) -> None:
        _require(self.batch_size >= 2, "data.batch_size", self.batch_size, "a contrastive loss needs at least 2 pairs")
        _require(0 <= self.max_bad <= 1, "data.max_bad", self.max_bad, "it is a share, from 0 to 1")
        _require(self.num_workers >= 0, "data.num_workers", self.num_workers, "it cannot be negative")
        _require(self.eval_batch_size >= 1, "data.eval_batch_size", self.eval_batch_size, "at least 1")
        needed = self.val is None and self.holdout < 1
        _require(not needed, "data.holdout", self.holdout, "with data.val null it says how many videos to hold out")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The towers and the text-conditioned head."""

    architecture: str = "ViT-B-32-quickgelu"
    """An open_clip name, or a tower description (.json) of one's own."""
    pretrained: str | None = "openai"
    """An open_clip tag, a local weights file, or null for random weights."""
    num_frames: int = 12
    """Frames of a video; the radius is built for this number."""
    pooling: Literal["xpool", "mean"] = "xpool"
    """``xpool`` pools the frames upon the text; ``mean`` ignores it."""
    num_heads: int = 1
    """Attention heads of the pooling."""
    dropout: float = 0.3
    """Dropout inside the pooling; the paper uses 0.4 on DiDeMo."""
    radius: Literal["none", "exp_linear", "exp_mean", "linear", "scaled_exp_mean", "variational"] = "exp_linear"
    """How the mass's radius follows the cosines; ``none`` is X-Pool itself, without stochastic text; ``variational``
    is a function of the text alone, to be held by ``stochastic.kl_weight``."""
    radius_start: Literal["rising", "falling"] = "rising"
    """Whether an untrained ``exp_linear`` rises with the match, as the authors start it, or falls with it."""
    pooled_by: Literal["text", "sample"] = "text"
    """What asks the frames: the text, or its sample (the supplementary's worse alternative)."""

    def __post_init__(self) -> None:
        _require(self.num_frames >= 1, "model.num_frames", self.num_frames, "a video needs at least one frame")
        _require(0 <= self.dropout < 1, "model.dropout", self.dropout, "it must lie in [0, 1)")
        _require(self.num_heads >= 1, "model.num_heads", self.num_heads, "at least 1")
        learnt = self.radius == "exp_linear" or self.radius_start == "rising"
        _require(learnt, "model.radius_start", self.radius_start, f"model.radius={self.radius} has no start to choose")


@dataclass(frozen=True, kw_only=True)
class StochasticConfig:
    """The noise of the text mass."""

    prior: Literal["uniform", "normal"] = "uniform"
    """``uniform`` draws from [0, 1), as the published code does; ``normal`` is centred on zero."""
    prior_std: float = 1.0
    """Standard deviation of the normal prior, in radii. The authors use 3e-3 on LSMDC."""
    support_weight: float = 0.8
    """Weight of the support-text loss (0.8 on MSR-VTT; 0 switches it off)."""
    training: Literal["sampled", "mean"] = "sampled"
    """What the loss sees: a sample of the mass; ``mean`` trains on the text itself and samples at evaluation only."""
    samples: int = 1
    """Samples of each text in a training step; the paper draws one."""
    trials: Literal["mean", "best"] = "mean"
    """Of several samples: the mean of their losses, or the loss of each pair's closest one, as evaluation scores."""
    training_radius: Literal["own", "pair"] = "own"
    """``own`` meets every video with the radius of the text's own pair, as the paper trains; ``pair`` takes each
    pair's, as evaluation does."""
    kl_weight: float = 0.0
    """Weight of the divergence of the mass from N(0, I), mean over dimensions (supplementary, section 4)."""
    num_trials: int = 20
    """Samples of each text at evaluation; the closest one scores the pair (the paper's M)."""

    def __post_init__(self) -> None:
        _require(self.num_trials >= 1, "stochastic.num_trials", self.num_trials, "a pair needs at least one sample")
        _require(self.samples >= 1, "stochastic.samples", self.samples, "at least 1")
        fits = self.trials == "mean" or self.samples > 1
        _require(fits, "stochastic.trials", self.trials, "the best of one sample is no choice; set stochastic.samples")
        _require(self.prior_std > 0, "stochastic.prior_std", self.prior_std, "it must be positive")
        for key in ("support_weight", "kl_weight"):
            _require(getattr(self, key) >= 0, f"stochastic.{key}", getattr(self, key), "it cannot be negative")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with a warmed-up half cosine, stepped per batch."""

    kind: Literal["authors", "torch"] = "authors"
    """``authors`` adds eps before the bias correction, as the published optimiser; ``torch`` is torch.optim.AdamW."""
    clip_lr: float = 1e-6
    """Peak learning rate of the pretrained towers."""
    lr: float = 3e-5
    """Peak learning rate of the head (3e-5 on MSR-VTT, 1e-5 on the others)."""
    weight_decay: float = 0.2
    """Decoupled decay, on every parameter."""
    warmup: float = 0.1
    """Share of all steps spent warming up."""
    max_grad_norm: float = 1.0
    """Gradients are clipped at this global norm."""
    ema: float = 0.0
    """Decay of a running mean of the weights, which is validated and kept as the best in their place; 0: none."""
    frozen: tuple[str, ...] = ()
    """Parameters that stay as they are, by the beginning of their names, as ``towers.clip.visual``."""

    def __post_init__(self) -> None:
        _require(self.lr >= 0 and self.clip_lr >= 0, "optim.lr", (self.lr, self.clip_lr), "it cannot be negative")
        _require(0 <= self.warmup < 1, "optim.warmup", self.warmup, "it is a share of all steps, in [0, 1)")
        _require(self.max_grad_norm > 0, "optim.max_grad_norm", self.max_grad_norm, "it must be positive")
        _require(0 <= self.ema < 1, "optim.ema", self.ema, "it must lie in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """DeepSpeed and the hardware."""

    zero_stage: int = 1
    """What the ranks share out (ZeRO): 0 nothing, 1 the optimiser, 2 also the gradients, 3 also the weights."""
    bf16: bool = False
    """Run the towers in bfloat16; weights, gradients, head and loss stay float32."""
    micro_batch: int | None = None
    """Pairs that a rank encodes at a time: the gradient of the whole batch in the memory of so many; null: all."""
    head_memory_mb: int | None = None
    """About what the pooling of a rank's videos by all texts may take; null sets no limit."""
    checkpoint_activations: bool = False
    """Compute the towers' activations again in the backward pass: less memory for a third more work."""
    compile: bool = False
    """torch.compile the image tower."""
    peak_tflops: float | None = None
    """A GPU's bfloat16 peak, TFLOP/s, for ``speed/mfu``; null: known for common ones."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """When a loss or gradient is not a number, on any rank: no rank updates, and the run stops or goes on."""
    timeout_s: int = 600
    """Seconds without progress after which the ranks give up and say which of them is missing."""
    keep: int = 2
    """Complete checkpoints that stay."""

    def __post_init__(self) -> None:
        _require(self.zero_stage in (0, 1, 2, 3), "engine.zero_stage", self.zero_stage, "it is 0, 1, 2 or 3")
        for key in ("micro_batch", "head_memory_mb", "timeout_s", "keep"):
            value = getattr(self, key)
            _require(value is None or value >= 1, f"engine.{key}", value, "at least 1")
        _require(self.peak_tflops is None or self.peak_tflops > 0, "engine.peak_tflops", self.peak_tflops, "above 0")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is scored, and how the result is labelled."""

    protocol: Literal["query_conditioned", "published_code"] = "query_conditioned"
    """``published_code`` pools every video with its own caption, a leak; it exists for parity only."""
    selected_on: Literal["val", "test"] = "val"
    """Split whose t2v R@1 chooses the checkpoint; ``test`` is printed in every result."""
    window: int = 1
    """Validations averaged for the choice of the checkpoint; the authors average 5."""
    post_processing: Literal["none", "dsl", "qbnorm"] = "none"
    """``dsl`` looks at all queries at once, ``qbnorm`` at a bank of training queries (both transductive)."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """``bfloat16`` multiplies radii and samples in half the bits: faster, with scores some 1e-3 off, and labelled."""

    def __post_init__(self) -> None:
        _require(self.window >= 1, "evaluation.window", self.window, "at least 1")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run."""

    run_dir: str = "runs/default"
    """Everything a run writes; starting again with the same directory resumes."""
    seed: int = 0
    """Seed of the data order, the noise and the initial weights."""
    epochs: int = 5
    """Passes over the (video, caption) pairs."""
    max_steps: int | None = None
    """Stop after this many steps, whatever the epochs; the schedule ends there."""
    eval_every: int = 100
    """Steps between a validation, each followed by a checkpoint."""
    evals_per_epoch: int | None = None
    """Validations spread over each epoch, in place of ``eval_every``; the authors make 10."""
    log_every: int = 10
    """Steps between two points in TensorBoard and the log."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    stochastic: StochasticConfig = field(default_factory=StochasticConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        for key in ("epochs", "eval_every", "log_every"):
            _require(getattr(self, key) >= 1, key, getattr(self, key), "at least 1")
        _require(
            self.evals_per_epoch is None or self.evals_per_epoch >= 1,
            "evals_per_epoch",
            self.evals_per_epoch,
            "at least 1, or null",
        )
        by_sample = self.model.pooled_by == "sample"
        mean_only = self.stochastic.training == "mean" or self.model.radius == "none"
        _require(not (by_sample and mean_only), "model.pooled_by", "sample", "without sampled training there is none")
        exact = by_sample or self.model.radius == "none" or self.evaluation.protocol == "published_code"
        _require(
            self.evaluation.precision == "float32" or not exact,
            "evaluation.precision",
            self.evaluation.precision,
            "float32 for published_code, pooled_by sample and radius none: only samples of a text's own mass have it",
        )
        _require(self.max_steps is None or self.max_steps >= 1, "max_steps", self.max_steps, "at least 1, or null")


def find_config(name: str) -> Path:
    """The page as given, else in ``configs/``.

    Raises:
        UserError: there is no such page; the pages that exist are listed.
    """
    for path in (Path(name), CONFIG_DIR / name):
        if path.is_file():
            return path
    pages = ", ".join(sorted(page.name for page in CONFIG_DIR.glob("*.yaml")))
    raise UserError(f"No config {name!r}, neither here nor in configs/, which holds: {pages}")


def load_config(name: str, overrides: list[str] | None = None) -> Config:
    """Defaults, then the page, then dotted overrides (``optim.lr=1e-5``).

    Raises:
        UserError: in one line, for an unknown key (nearest name offered), a value of the wrong kind or out of range.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    for override in overrides or []:
        if "=" not in override or override.startswith("-"):
            raise UserError(f"{override!r} is not an override; write key=value, as in optim.lr=1e-5")
    try:
        given = OmegaConf.merge(OmegaConf.load(find_config(name)), OmegaConf.from_dotlist(overrides or []))
        _check_keys(OmegaConf.to_container(given, resolve=True), Config)
        merged = OmegaConf.merge(OmegaConf.structured(Config), given)
        return _require_config(OmegaConf.to_object(merged))
    except (OmegaConfBaseException, OSError) as error:
        raise UserError(f"{name}: {str(error).splitlines()[0]}") from error
    except YAMLError as error:
        raise UserError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from error


def _require_config(value: object) -> Config:
    assert isinstance(value, Config)
    return value


def _check_keys(given: Any, cls: type, prefix: str = "") -> None:
    """Name an unknown key with its nearest known one before OmegaConf says it in its own, longer words."""
    if not isinstance(given, dict):
        raise UserError(f"{prefix.rstrip('.') or 'the config'} must be a mapping of keys to values")
    known = {f.name: f for f in fields(cls)}
    for key, value in given.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(known)}"
            raise UserError(f"unknown config key {prefix}{key}; {hint}")
        factory = known[key].default_factory
        if isinstance(factory, type) and is_dataclass(factory):
            _check_keys(value, factory, f"{prefix}{key}.")


def to_yaml(config: Config) -> str:
    """The resolved page: enough to run again."""
    import yaml

    # PyYAML writes 1e-06, which YAML 1.1 readers take for a string: give it the dot that makes it a number.
    return re.sub(r"(?m)(: -?\d+)(e[-+]\d+)$", r"\1.0\2", yaml.safe_dump(asdict(config), sort_keys=False))


# What a second start may change and still be the same run.
_FREE_KEYS = (
    {"run_dir", "data.num_workers", "data.eval_batch_size", "data.max_bad", "data.cache", "log_every"}
    | {f"engine.{key}" for key in ("zero_stage", "micro_batch", "head_memory_mb", "checkpoint_activations", "compile")}
    | {f"engine.{key}" for key in ("nonfinite", "timeout_s", "keep", "peak_tflops")}
)


def differing_keys(one: Config, other: Config) -> list[str]:
    """Dotted keys in which two runs differ, but for those that do not change the result."""
    a, b = flat(asdict(one)), flat(asdict(other))
    return [
        f"{key}: saved {a.get(key)!r}, given {b.get(key)!r}"
        for key in a
        if a[key] != b.get(key) and key not in _FREE_KEYS
    ]


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of a tree of settings."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
