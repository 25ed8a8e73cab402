"""Every setting of a run, with its default and its meaning.

A YAML file of ``configs/`` holds the settings that differ from the defaults; ``key=value`` on the command line takes
precedence over both. ``tmass config`` prints this list.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from tmass_dist.errors import UserError

_HERE = Path(__file__).resolve()
CONFIG_DIR = next(path for path in (_HERE.parent / "configs", _HERE.parents[1] / "configs") if path.is_dir())
"""``configs/`` of the repository; an installed wheel has its own copy, ``tmass_dist/configs``."""


def _require(condition: bool, key: str, value: object, reason: str) -> None:
    if not condition:
        raise UserError(f"{key} is {value!r}: {reason}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The splits and how they are read."""

    train: str = "data/train"
    """Directory (or URL) of the training shards, written by ``shards/make_shards.py``."""
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

    def __post_init__(self) -> None:
        _require(self.batch_size >= 2, "data.batch_size", self.batch_size, "a contrastive loss needs at least 2 pairs")
        _require(0 <= self.max_bad <= 1, "data.max_bad", self.max_bad, "it is a share between 0 and 1")
        _require(self.num_workers >= 0, "data.num_workers", self.num_workers, "it cannot be negative")
        _require(self.eval_batch_size >= 1, "data.eval_batch_size", self.eval_batch_size, "at least 1")
        for key in ("lanes", "window"):
            value = getattr(self, key)
            _require(value is None or value >= 1, f"data.{key}", value, "at least 1")
        _require(self.cache_gb is None or self.cache_gb > 0, "data.cache_gb", self.cache_gb, "it must be positive")
        _require(self.retry_s >= 0, "data.retry_s", self.retry_s, "it cannot be negative")
        held_out = self.cache_gb is not None and self.val is None
        _require(not held_out, "data.cache_gb", self.cache_gb, "held-out videos lie in all shards; set data.val")
        needed = self.val is None and self.holdout < 1
        _require(not needed, "data.holdout", self.holdout, "data.val is null, so some training videos must be held out")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The towers and the text-conditioned head."""

    architecture: str = "ViT-B-32-quickgelu"
    """Name of an open_clip model, or a JSON file that describes the towers."""
    pretrained: str | None = "openai"
    """Tag of open_clip weights, a local weights file, or null for random weights."""
    num_frames: int = 12
    """Frames per video. The radius layer is built for this number."""
    pooling: Literal["xpool", "mean"] = "xpool"
    """``xpool``: text-conditioned attention over the frames; ``mean``: mean of the frames, independent of the text."""
    num_heads: int = 1
    """Number of attention heads of the pooling."""
    dropout: float = 0.3
    """Dropout probability in the pooling. The paper uses 0.4 on DiDeMo."""
    radius: Literal["none", "exp_linear", "exp_mean", "linear", "scaled_exp_mean", "variational"] = "exp_linear"
    """How the radius of the text mass is computed from the cosines of text and frames. ``none``: no text mass, which is
    X-Pool. ``variational``: from the text alone, regularised by ``stochastic.kl_weight``."""
    radius_start: Literal["rising", "falling"] = "rising"
    """Initial weights of ``exp_linear``: the radius rises with the cosine, as the authors' does, or falls."""
    pooled_by: Literal["text", "sample"] = "text"
    """Attention query of the pooling: the text embedding, or its sample (ablation of the supplementary, worse)."""

    def __post_init__(self) -> None:
        _require(self.num_frames >= 1, "model.num_frames", self.num_frames, "a video needs at least one frame")
        _require(0 <= self.dropout < 1, "model.dropout", self.dropout, "it must be in [0, 1)")
        _require(self.num_heads >= 1, "model.num_heads", self.num_heads, "at least 1")
        learnt = self.radius == "exp_linear" or self.radius_start == "rising"
        _require(
            learnt,
            "model.radius_start",
            self.radius_start,
            f"it applies to exp_linear, not to model.radius={self.radius}",
        )


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
        _require(self.num_trials >= 1, "stochastic.num_trials", self.num_trials, "a pair needs at least one sample")
        _require(self.samples >= 1, "stochastic.samples", self.samples, "at least 1")
        fits = self.trials == "mean" or self.samples > 1
        _require(fits, "stochastic.trials", self.trials, "it needs stochastic.samples of 2 or more")
        _require(self.prior_std > 0, "stochastic.prior_std", self.prior_std, "it must be positive")
        for key in ("support_weight", "kl_weight"):
            _require(getattr(self, key) >= 0, f"stochastic.{key}", getattr(self, key), "it cannot be negative")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, and a cosine learning-rate schedule with linear warm-up."""

    kind: Literal["authors", "torch"] = "authors"
    """``authors``: eps is added before the bias correction, as in the published code; ``torch``: torch.optim.AdamW."""
    clip_lr: float = 1e-6
    """Peak learning rate of the pretrained towers."""
    lr: float = 3e-5
    """Peak learning rate of the head. The authors use 3e-5 on MSR-VTT and 1e-5 elsewhere."""
    weight_decay: float = 0.2
    """Decoupled weight decay, applied to every parameter."""
    warmup: float = 0.1
    """Share of all steps used for the warm-up."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights. If above 0, the average is validated and saved."""
    frozen: tuple[str, ...] = ()
    """Prefixes of parameter names that are not trained, such as ``towers.clip.visual``."""

    def __post_init__(self) -> None:
        _require(self.lr >= 0 and self.clip_lr >= 0, "optim.lr", (self.lr, self.clip_lr), "it cannot be negative")
        _require(0 <= self.warmup < 1, "optim.warmup", self.warmup, "it is a share of all steps, in [0, 1)")
        _require(self.max_grad_norm > 0, "optim.max_grad_norm", self.max_grad_norm, "it must be positive")
        _require(0 <= self.ema < 1, "optim.ema", self.ema, "it must be in [0, 1)")


LOGGERS = ("tensorboard", "wandb", "trackio")
"""Choices of ``log.to``."""
MAX_PROFILED_STEPS = 100
"""Longest range of ``engine.profile_steps``."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """DeepSpeed and the hardware."""

    zero_stage: int = 1
    """What the ranks share out (ZeRO): 0 nothing, 1 the optimiser, 2 also the gradients, 3 also the weights."""
    bf16: bool | str = "auto"
    """Run the towers in bfloat16, in training and evaluation: true, false, or auto, which means on GPUs that have it.
    Weights, gradients, optimiser, head and loss stay float32."""
    tf32: bool = False
    """Let the GPU use TF32 for float32 products in the towers; everything else never uses it."""
    micro_batch: int | None = None
    """Pairs that a rank encodes at a time: the gradient of the whole batch in the memory of so many; null: all."""
    head_memory_mb: int | None = 2048
    """MB for pooling a rank's videos by the texts of all ranks; null: no limit. If it is too little, pairs are pooled
    in tiles, which are computed again in the backward pass."""
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
    save_every: int | None = None
    """Steps between checkpoints, in addition to the one at each validation; null: at validations only."""
    profile_steps: str | None = None
    """``100..110``: rank 0 records these steps with torch's profiler, to the directory ``profile`` of the run."""

    def __post_init__(self) -> None:
        self.profile_range()
        _require(self.zero_stage in (0, 1, 2, 3), "engine.zero_stage", self.zero_stage, "it is 0, 1, 2 or 3")
        _require(self.bf16 in (True, False, "auto"), "engine.bf16", self.bf16, "it is true, false or auto")
        for key in ("micro_batch", "head_memory_mb", "timeout_s", "keep", "save_every"):
            value = getattr(self, key)
            _require(value is None or value >= 1, f"engine.{key}", value, "at least 1")
        _require(self.peak_tflops is None or self.peak_tflops > 0, "engine.peak_tflops", self.peak_tflops, "above 0")

    def profile_range(self) -> tuple[int, int] | None:
        """First and last step of ``profile_steps``; None if nothing is profiled.

        Raises:
            UserError: it is not of the form ``FIRST..LAST``, is empty, or is too long to be viewed.
        """
        if self.profile_steps is None:
            return None
        match = re.fullmatch(r"(\d+)\.\.(\d+)", self.profile_steps)
        form = "write FIRST..LAST, two steps counted from 1, as 100..110"
        _require(match is not None, "engine.profile_steps", self.profile_steps, form)
        assert match is not None
        first, last = int(match[1]), int(match[2])
        _require(1 <= first <= last, "engine.profile_steps", self.profile_steps, form)
        too_long = f"at most {MAX_PROFILED_STEPS} steps; a longer trace is too large to view"
        _require(last - first < MAX_PROFILED_STEPS, "engine.profile_steps", self.profile_steps, too_long)
        return first, last


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How scores are computed, and how the checkpoint is selected."""

    protocol: Literal["query_conditioned", "published_code"] = "query_conditioned"
    """``published_code`` pools each video with its own caption, which leaks the answer; use it only to compare with
    published numbers."""
    selected_on: Literal["val", "test"] = "val"
    """Split whose text-to-video R@1 selects the checkpoint. Every result states it."""
    window: int = 1
    """Number of consecutive validations averaged to select the checkpoint. The authors average 5."""
    post_processing: Literal["none", "dsl", "qbnorm"] = "none"
    """``dsl`` normalises by all test queries, ``qbnorm`` by a bank of training queries."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the products with the samples. ``bfloat16`` is faster; its error is in docs/performance.md."""
    feature_precision: Literal["float32", "float16"] = "float32"
    """Precision of stored features. ``float16`` halves the store; every result states it."""
    baselines: Literal["auto", "none", "features", "all"] = "auto"
    """Rows of the tables to compare with. ``features``: mean pooling, best frame and query scoring of the same
    features; ``all``: also the scores before training; ``auto``: as ``all``, but nothing that needs a download, and
    nothing for more than 250 million pairs."""

    def __post_init__(self) -> None:
        _require(self.window >= 1, "evaluation.window", self.window, "at least 1")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Where the curves of a run go, in addition to ``metrics.jsonl`` in its directory."""

    to: tuple[str, ...] = ("tensorboard",)
    """Any of ``tensorboard``, ``wandb`` and ``trackio``. The last two are optional packages (``pip install
    'tmass-dist[wandb]'``)."""
    project: str = "tmass-dist"
    """Name of the project in wandb and trackio. The run is named after its directory."""

    def __post_init__(self) -> None:
        for name in self.to:
            _require(name in LOGGERS, "log.to", name, f"the loggers are {', '.join(LOGGERS)}")
        _require(len(set(self.to)) == len(self.to), "log.to", list(self.to), "each logger once")
        _require(bool(self.project), "log.project", self.project, "it cannot be empty")


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run."""

    run_dir: str = "runs/default"
    """Directory for everything that the run writes. Running again with the same directory resumes."""
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
            _require(getattr(self, key) >= 1, key, getattr(self, key), "at least 1")
        _require(
            self.evals_per_epoch is None or self.evals_per_epoch >= 1,
            "evals_per_epoch",
            self.evals_per_epoch,
            "at least 1, or null",
        )
        by_sample = self.model.pooled_by == "sample"
        mean_only = self.stochastic.training == "mean" or self.model.radius == "none"
        _require(
            not (by_sample and mean_only), "model.pooled_by", "sample", "training draws no samples with these settings"
        )
        exact = by_sample or self.model.radius == "none" or self.evaluation.protocol == "published_code"
        _require(
            self.evaluation.precision == "float32" or not exact,
            "evaluation.precision",
            self.evaluation.precision,
            "published_code, model.pooled_by=sample and model.radius=none support float32 only",
        )
        _require(self.max_steps is None or self.max_steps >= 1, "max_steps", self.max_steps, "at least 1, or null")
        waits = "://" not in str(self.data.train) or self.data.retry_s < self.engine.timeout_s
        reason = "it must be below engine.timeout_s, or a slow download is taken for a rank that hangs"
        _require(waits, "data.retry_s", self.data.retry_s, reason)


def find_config(name: str) -> Path:
    """Path of a config file: ``name`` as a path, else a file of ``configs/``.

    Raises:
        UserError: there is no such file; the message lists those of ``configs/``.
    """
    for path in (Path(name), CONFIG_DIR / name):
        if path.is_file():
            return path
    pages = ", ".join(sorted(page.name for page in CONFIG_DIR.glob("*.yaml")))
    raise UserError(f"no config file {name!r}, neither here nor in configs/, which has {pages}")


def load_config(name: str, overrides: list[str] | None = None, *, allow_env: bool = True) -> Config:
    """The defaults, changed by a config file, then by dotted overrides (``optim.lr=1e-5``).

    Args:
        name: a path, or the name of a file of ``configs/``.
        overrides: ``key=value`` each.
        allow_env: whether ``${...}`` may call a resolver such as ``oc.env``. False for files that others wrote: they
            could read environment variables of this machine.

    Raises:
        UserError: an unknown key (the nearest one is named), a value of the wrong type, or one out of range.
    """
    from omegaconf import OmegaConf
    from yaml import YAMLError

    try:
        page = OmegaConf.load(find_config(name))
    except YAMLError as error:
        raise UserError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise UserError(f"{name}: {error}") from error
    return make_config(page, overrides, name, allow_env=allow_env)


def make_config(
    settings: Any, overrides: list[str] | None = None, name: str = "the settings", *, allow_env: bool = True
) -> Config:
    """The defaults, changed by ``settings`` (nested dictionaries), then by dotted overrides; see :func:`load_config`.

    Raises:
        UserError: as :func:`load_config`; ``name`` says where the settings come from.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    for override in overrides or []:
        if "=" not in override or override.startswith("-"):
            raise UserError(f"{override!r} is not an override; write key=value, for example optim.lr=1e-5")
    if not allow_env:
        plain = settings if isinstance(settings, dict) else OmegaConf.to_container(settings, resolve=False)
        _refuse_resolvers(plain, name)
    try:
        changes = OmegaConf.merge(settings, OmegaConf.from_dotlist(overrides or []))
        _check_keys(OmegaConf.to_container(changes, resolve=True), Config)
        merged = OmegaConf.merge(OmegaConf.structured(Config), changes)
        return _require_config(OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise UserError(f"{name}: {str(error).splitlines()[0]}") from error
    except YAMLError as error:
        raise UserError(f"an override is not valid YAML: {' '.join(str(error).split())}") from error


def _refuse_resolvers(value: Any, name: str) -> None:
    """Raise an error if a string of the settings calls a resolver (``${oc.env:HOME}``); it never prints the value."""
    if isinstance(value, dict):
        for key, item in value.items():
            _refuse_resolvers(key, name)
            _refuse_resolvers(item, name)
    elif isinstance(value, list):
        for item in value:
            _refuse_resolvers(item, name)
    elif isinstance(value, str) and re.search(r"\$\{[^}]*:", value):
        raise UserError(
            f"{name} reads the environment of this machine ({value[:60]!r}); write the value there, or, if you trust "
            "the file, use a command that has --allow-env"
        )


def _require_config(value: object) -> Config:
    assert isinstance(value, Config)
    return value


def _check_keys(settings: Any, cls: type, prefix: str = "") -> None:
    """Raise an error that names the nearest key for an unknown one; OmegaConf's own message is longer and does not."""
    if not isinstance(settings, dict):
        raise UserError(f"{prefix.rstrip('.') or 'the config'} must be a mapping of keys to values")
    known = {f.name: f for f in fields(cls)}
    for key, value in settings.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"the keys are {', '.join(known)}"
            raise UserError(f"unknown config key {prefix}{key}; {hint}")
        factory = known[key].default_factory
        if isinstance(factory, type) and is_dataclass(factory):
            _check_keys(value, factory, f"{prefix}{key}.")


def to_yaml(config: Config) -> str:
    """All settings as YAML; :func:`load_config` reads it back."""
    import yaml

    # PyYAML writes 1e-06, which YAML 1.1 readers take for a string; with a dot (1.0e-06) they read a number.
    return re.sub(r"(?m)(: -?\d+)(e[-+]\d+)$", r"\1.0\2", yaml.safe_dump(asdict(config), sort_keys=False))


# Settings that may change when a run is resumed: they do not change its result.
_FREE_KEYS = (
    {"run_dir", "data.num_workers", "data.eval_batch_size", "data.max_bad", "log_every", "eval_at_start"}
    | {f"data.{key}" for key in ("cache", "cache_gb", "retry_s")}
    | {f"engine.{key}" for key in ("zero_stage", "micro_batch", "head_memory_mb", "checkpoint_activations", "compile")}
    | {f"engine.{key}" for key in ("nonfinite", "timeout_s", "keep", "peak_tflops", "save_every", "profile_steps")}
    | {"evaluation.baselines", "evaluation.feature_precision", "log.to", "log.project"}
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
