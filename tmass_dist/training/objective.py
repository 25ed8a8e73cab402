"""Model and loss in one forward: gather the texts, pool your own videos, gather the scalars.

Traffic a step is 3 N D + 2 N^2 numbers; frame features, F times larger, never move.
"""

# Shapes: B pairs of this rank, N of the world, A anchors, F frames, H W pixels, L tokens, D embedding width.

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tmass_dist.config import Config, OptimConfig, StochasticConfig
from tmass_dist.distributed import all_gather_rows
from tmass_dist.errors import UserError
from tmass_dist.models.head import RetrievalHead
from tmass_dist.models.pooling import DropoutKeys, PooledPairs
from tmass_dist.models.stochastic import frame_cosines
from tmass_dist.models.tmass import RetrievalModel, build_model
from tmass_dist.phase_timer import PHASE_TIMER
from tmass_dist.training.losses import symmetric_info_nce, temperature


class Losses(NamedTuple):
    """What one step yields; ``total`` is the one to differentiate, the rest is detached.

    A tuple, because ZeRO-3 finds the tensors of a forward in tuples alone.
    """

    total: Tensor
    stochastic: Tensor
    support: Tensor
    divergence: Tensor
    radius_B: Tensor
    """Mean radius of each own pair, in units of the text embedding; zeros where there is no mass."""
    positive: Tensor
    """Mean cosine of the pairs."""
    hardest: Tensor
    """Mean cosine of each text's most similar wrong video."""
    temperature: Tensor
    """What the cosines are multiplied by."""


def global_losses(
    head: RetrievalHead,
    text_BD: Tensor,
    frames_BFD: Tensor,
    noise_BD: Tensor | None,
    logit_scale: Tensor,
    stochastic: StochasticConfig,
    *,
    pooled_by: Literal["text", "sample"] = "text",
    dropout_keys: DropoutKeys | None = None,
    memory_mb: float | None = None,
) -> Losses:
    """The loss of the whole global batch, from this rank's rows; every rank returns the same number.

    Args:
        head: pooling and mass.
        text_BD, frames_BFD: this rank's raw embeddings; row ``i`` of one belongs to row ``i`` of the other.
        noise_BD: ``eps`` of the own texts, or ``(B, K, D)`` for K samples of each; None trains on the texts
            themselves.
        logit_scale: log of the temperature, shape [1]; limited to ln 100 in the forward.
        stochastic: weights of the terms, and how samples and radii enter the loss.
        pooled_by: the attention query, the text or its (first) sample.
        dropout_keys: one of each own video; training needs them where the pooling has dropout.
        memory_mb: about what the pooling of the own videos by all N texts may take; beyond it videos are pooled
            a few at a time, and once more for the backward pass. None sets no limit.

    Source: Wang et al., CVPR 2024, arXiv:2403.17998.
    """
    sampled_BKD = radius_BD = noise_BKD = None
    if head.mass is not None and noise_BD is not None:
        noise_BKD = noise_BD if noise_BD.dim() == 3 else noise_BD[:, None]
        radius_BD = head.mass.radius(text_BD, frames_BFD)
        sampled_BKD = head.mass.sample(text_BD[:, None], radius_BD[:, None], noise_BKD)
    asking_BD = sampled_BKD[:, 0] if pooled_by == "sample" and sampled_BKD is not None else text_BD
    pooling = _Pooling(head, all_gather_rows(asking_BD), frames_BFD, dropout_keys, memory_mb)
    of_pairs = None
    if stochastic.training_radius == "pair" and noise_BKD is not None:
        of_pairs = _PairSamples(head, all_gather_rows(text_BD), all_gather_rows(noise_BKD), frames_BFD)
    anchors = [text_BD] if sampled_BKD is None else list(sampled_BKD.unbind(1)) if of_pairs is None else []
    num_trials = len(anchors) if of_pairs is None else of_pairs.num_trials
    if head.mass is not None and radius_BD is not None and stochastic.support_weight:
        pooled_mean_BD = pooling.map(lambda pairs, _: pairs.mean_VD)
        anchors.append(head.mass.support(text_BD, radius_BD, pooled_mean_BD))
    anchor_AND = None
    if anchors:
        anchor_AND = torch.stack([all_gather_rows(anchor_BD) for anchor_BD in anchors])

    def columns(pairs: PooledPairs, rows: slice) -> Tensor:
        cosines_BAN = [] if of_pairs is None else [of_pairs.cosines(pairs.materialise(), rows)]
        if anchor_AND is not None:
            cosines_BAN.append(pairs.cosines(anchor_AND))
        return torch.cat(cosines_BAN, dim=1)

    similarity_ANN = all_gather_rows(pooling.map(columns)).permute(1, 2, 0)
    if stochastic.trials == "best":
        sampled = symmetric_info_nce(similarity_ANN[:num_trials].amax(dim=0), logit_scale)
    else:
        sampled = torch.stack([symmetric_info_nce(x, logit_scale) for x in similarity_ANN[:num_trials]]).mean()
    total = sampled
    support = divergence = torch.zeros_like(total.detach())
    if len(similarity_ANN) > num_trials:
        support = symmetric_info_nce(similarity_ANN[num_trials], logit_scale)
        total = total + stochastic.support_weight * support
    if head.mass is not None and radius_BD is not None and stochastic.kl_weight:
        divergence = all_gather_rows(head.mass.divergence(text_BD, radius_BD)).mean()
        total = total + stochastic.kl_weight * divergence
    with torch.no_grad():
        positive_N = similarity_ANN[0].diagonal()
        wrong_NN = similarity_ANN[0].detach().clone().fill_diagonal_(-2.0)
    return Losses(
        total=total,
        stochastic=sampled.detach(),
        support=support.detach(),
        divergence=divergence.detach(),
        radius_B=text_BD.new_zeros(len(text_BD)) if radius_BD is None else radius_BD.detach().mean(dim=-1),
        positive=positive_N.detach().mean(),
        hardest=wrong_NN.amax(dim=1).mean(),
        temperature=temperature(logit_scale.detach()),
    )


class _Pooling:
    """Own videos as all texts see them: held whole, or made again, a few videos at a time, whenever they are used."""

    _LIVE = 8
    """Tensors of ``(b, N, D)`` that one tile's forward and backward hold at once."""

    def __init__(
        self,
        head: RetrievalHead,
        asking_ND: Tensor,
        frames_BFD: Tensor,
        dropout_keys: DropoutKeys | None,
        memory_mb: float | None,
    ) -> None:
        self.head, self.asking_ND, self.frames_BFD, self.keys = head, asking_ND, frames_BFD, dropout_keys
        a_video_mb = asking_ND.numel() * asking_ND.element_size() * self._LIVE / 2**20
        self.tile = len(frames_BFD) if memory_mb is None else max(1, int(memory_mb / a_video_mb))
        self.whole: PooledPairs | None = None
        if self.tile >= len(frames_BFD):
            self.whole = head.pooling.pool_pairs(asking_ND, frames_BFD, dropout_keys)

    def map(self, use: Callable[[PooledPairs, slice], Tensor]) -> Tensor:
        """``use`` of the videos as seen and of which own videos they are; ``use`` must treat every video alone."""
        if self.whole is not None:
            return use(self.whole, slice(None))
        starts = range(0, len(self.frames_BFD), self.tile)
        return torch.cat([self._again(slice(start, start + self.tile), use) for start in starts])

    def _again(self, rows: slice, use: Callable[[PooledPairs, slice], Tensor]) -> Tensor:
        keys = self.keys[rows] if self.keys is not None else None

        def run(asking_ND: Tensor, frames_bFD: Tensor) -> Tensor:
            return use(self.head.pooling.pool_pairs(asking_ND, frames_bFD, keys), rows)

        return checkpoint(run, self.asking_ND, self.frames_BFD[rows], use_reentrant=False)  # pyright: ignore


class _PairSamples:
    """Samples whose radius is that of each pair, as evaluation draws them: ``t_i + R_ij eps_i``."""

    def __init__(self, head: RetrievalHead, text_ND: Tensor, noise_NKD: Tensor, frames_BFD: Tensor) -> None:
        assert head.mass is not None
        self.mass, self.text_ND, self.noise_NKD, self.frames_BFD = head.mass, text_ND, noise_NKD, frames_BFD
        self.num_trials = noise_NKD.shape[1]

    def cosines(self, pooled_BND: Tensor, rows: slice) -> Tensor:
        """``(b, K, N)``: the cosines of each pair's samples with its pooled video."""
        cosine_BNF = frame_cosines(self.text_ND, F.normalize(self.frames_BFD[rows], dim=-1))
        text_BND = self.text_ND.expand_as(pooled_BND)
        radius_BND = self.mass.radius_of(cosine_BNF, text_BND)
        samples = (self.mass.sample(text_BND, radius_BND, noise_ND) for noise_ND in self.noise_NKD.unbind(1))
        return torch.stack([F.cosine_similarity(sample, pooled_BND, dim=-1) for sample in samples], dim=1)


class Objective(RetrievalModel):
    """Towers and head with their loss, in one forward, as ZeRO needs it; parameter names are those of ``model``."""

    def __init__(self, model: RetrievalModel, config: Config) -> None:
        super().__init__(model.towers, model.head)
        self.stochastic = config.stochastic
        self.pooled_by: Literal["text", "sample"] = config.model.pooled_by
        self.memory_mb, self.bf16 = config.engine.head_memory_mb, config.engine.bf16

    def encode(self, pixels_BFHWC: Tensor, tokens_BL: Tensor) -> tuple[Tensor, Tensor]:
        """``text_BD`` and ``frames_BFD``, float32 whatever the towers run in."""
        PHASE_TIMER.switch("encode")
        # Autocast leaves the weights, their gradients and the optimiser in float32.
        with torch.autocast(tokens_BL.device.type, torch.bfloat16, enabled=self.bf16):
            text_BD, frames_BFD = self.towers.encode_text(tokens_BL), self.towers.encode_frames(pixels_BFHWC)
        return text_BD.float(), frames_BFD.float()

    def losses(
        self, text_BD: Tensor, frames_BFD: Tensor, noise_BD: Tensor | None, dropout_keys: DropoutKeys | None
    ) -> Losses:
        """See :func:`global_losses`."""
        PHASE_TIMER.switch("head")
        embeddings = [x for x in (text_BD, frames_BFD) if x.requires_grad]
        if embeddings:  # their gradients end the head's part of the backward pass
            torch.autograd.graph.register_multi_grad_hook(embeddings, lambda _: PHASE_TIMER.switch("encode"))
        # The loss is float32 whatever the towers run in: a softmax over many negatives loses digits in bf16.
        with torch.autocast(text_BD.device.type, enabled=False):
            return global_losses(
                self.head,
                text_BD,
                frames_BFD,
                noise_BD,
                self.towers.logit_scale.float(),
                self.stochastic,
                pooled_by=self.pooled_by,
                dropout_keys=dropout_keys,
                memory_mb=self.memory_mb,
            )

    def forward(self, part: Literal["whole", "encode", "losses"], *inputs: Any) -> Any:
        """All of a step, or one half of it; ZeRO-3 lends its weights only inside the forward."""
        if part == "encode":
            return self.encode(*inputs)
        if part == "losses":
            return self.losses(*inputs)
        pixels_BFHWC, tokens_BL, noise_BD, dropout_keys = inputs
        return self.losses(*self.encode(pixels_BFHWC, tokens_BL), noise_BD, dropout_keys)


def build_objective(config: Config) -> Objective:
    """The model of ``config`` with its loss; what the loss does not see, or the config freezes, takes no gradient.

    Raises:
        UserError: ``optim.frozen`` names a parameter that does not exist.
    """
    model = build_model(config.model)
    if config.stochastic.training == "mean" and model.head.mass is not None:
        model.head.mass.requires_grad_(False)  # the loss does not see it
    names = [name for name, _ in model.named_parameters()]
    for prefix in config.optim.frozen:
        if not any(name.startswith(prefix) for name in names):
            raise UserError(f"optim.frozen names {prefix!r}, and no parameter begins so; the first is {names[0]}")
    for name, parameter in model.named_parameters():
        if name.startswith(tuple(config.optim.frozen)):
            parameter.requires_grad_(False)
    return Objective(model, config)


def parameter_groups(model: Objective, config: OptimConfig) -> list[dict[str, Any]]:
    """The towers at ``clip_lr``, the head at ``lr``; names serve TensorBoard."""

    def trainable(module: nn.Module) -> list[nn.Parameter]:
        return [parameter for parameter in module.parameters() if parameter.requires_grad]

    groups = [
        {"name": "towers", "params": trainable(model.towers), "lr": config.clip_lr},
        {"name": "head", "params": trainable(model.head), "lr": config.lr},
    ]
    return [group for group in groups if group["params"]]
