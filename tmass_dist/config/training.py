"""Settings of the optimiser, the engine, the evaluation and the loggers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from tmass_dist.config.ranges import require


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
    layer_decay: float = 1.0
    """Factor of the towers' learning rate from one block to the one below it: ``clip_lr`` at the top, ``clip_lr *
    layer_decay`` in the last block, and so on down to the embeddings. 1: the same rate everywhere."""
    lora_rank: int | None = None
    """If set, the towers are frozen, and a LoRA adapter of this rank is trained in each block, at ``lr``, together with
    the head. Saved weights have the adapters added. It needs ``pip install 'tmass-dist[lora]'``."""
    lora_alpha: float | None = None
    """``lora_rank``: the adapters are scaled by ``lora_alpha / lora_rank``; null: twice the rank."""

    def __post_init__(self) -> None:
        require(self.lr >= 0 and self.clip_lr >= 0, "optim.lr", (self.lr, self.clip_lr), "it cannot be negative")
        require(0 <= self.warmup < 1, "optim.warmup", self.warmup, "it is a share of all steps, in [0, 1)")
        require(self.max_grad_norm > 0, "optim.max_grad_norm", self.max_grad_norm, "it must be positive")
        require(0 <= self.ema < 1, "optim.ema", self.ema, "it must be in [0, 1)")
        require(0 < self.layer_decay <= 1, "optim.layer_decay", self.layer_decay, "it must be in (0, 1]")
        require(self.lora_rank is None or self.lora_rank >= 1, "optim.lora_rank", self.lora_rank, "at least 1, or null")
        if self.lora_rank is None:
            require(self.lora_alpha is None, "optim.lora_alpha", self.lora_alpha, "it applies to optim.lora_rank")
            return
        require(self.lora_alpha is None or self.lora_alpha > 0, "optim.lora_alpha", self.lora_alpha, "above 0")
        frozen = "with optim.lora_rank the towers are frozen, and only their adapters are trained"
        require(self.layer_decay == 1, "optim.layer_decay", self.layer_decay, frozen)
        towers = [prefix for prefix in self.frozen if prefix.startswith("towers")]
        require(not towers, "optim.frozen", towers, frozen)


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
        require(self.zero_stage in (0, 1, 2, 3), "engine.zero_stage", self.zero_stage, "it is 0, 1, 2 or 3")
        require(self.bf16 in (True, False, "auto"), "engine.bf16", self.bf16, "it is true, false or auto")
        for key in ("micro_batch", "head_memory_mb", "timeout_s", "keep", "save_every"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"engine.{key}", value, "at least 1")
        require(self.peak_tflops is None or self.peak_tflops > 0, "engine.peak_tflops", self.peak_tflops, "above 0")

    def profile_range(self) -> tuple[int, int] | None:
        """First and last step of ``profile_steps``; None if nothing is profiled.

        Raises:
            UserError: it is not of the form ``FIRST..LAST``, is empty, or is too long to be viewed.
        """
        if self.profile_steps is None:
            return None
        match = re.fullmatch(r"(\d+)\.\.(\d+)", self.profile_steps)
        form = "write FIRST..LAST, two steps counted from 1, as 100..110"
        require(match is not None, "engine.profile_steps", self.profile_steps, form)
        assert match is not None
        first, last = int(match[1]), int(match[2])
        require(1 <= first <= last, "engine.profile_steps", self.profile_steps, form)
        too_long = f"at most {MAX_PROFILED_STEPS} steps; a longer trace is too large to view"
        require(last - first < MAX_PROFILED_STEPS, "engine.profile_steps", self.profile_steps, too_long)
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
    thumbnails: int = 4
    """Frames of each video in the report's list of queries; 0 for none. More than 2,000 videos get one each, more than
    20,000 none."""
    videos: str | None = None
    """Directory of the video files, as it was given to ``tmass pack --videos``: the report plays them. Without it, the
    report plays clips that are stored in the shards, up to 100 MB of them."""

    def __post_init__(self) -> None:
        require(self.window >= 1, "evaluation.window", self.window, "at least 1")
        require(0 <= self.thumbnails <= 12, "evaluation.thumbnails", self.thumbnails, "from 0 to 12")


LOGGERS = ("tensorboard", "wandb", "trackio")
"""Choices of ``log.to``."""


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
            require(name in LOGGERS, "log.to", name, f"the loggers are {', '.join(LOGGERS)}")
        require(len(set(self.to)) == len(self.to), "log.to", list(self.to), "each logger once")
        require(bool(self.project), "log.project", self.project, "it cannot be empty")
