"""Model and loss in one forward pass: gather the texts, pool the own videos, reduce the rows of the similarities.

With the default system a step gathers 3 N D numbers and reduces 5 N (docs/scale.md). Frame features, F times larger
than texts, are never exchanged.
"""

# Shapes: B pairs of this rank, N of the world, A anchors, F frames, H W pixels, L tokens, D embedding width.

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tmass_dist.config import Config, StochasticConfig
from tmass_dist.distributed import all_gather_rows
from tmass_dist.errors import UserError
from tmass_dist.models.adapters import add_adapters
from tmass_dist.models.head import RetrievalHead
from tmass_dist.models.pair_products import DropoutKeys
from tmass_dist.models.tmass import RetrievalModel, build_model
from tmass_dist.phase_timer import PHASE_TIMER
from tmass_dist.precision import tower_precision, use_tf32
from tmass_dist.training.columns import PAIR_TENSORS, OwnColumns
from tmass_dist.training.frozen_frames import FrozenFrames
from tmass_dist.training.losses import column_info_nce, mean_over_ranks, similarity_metrics, temperature


class Losses(NamedTuple):
    """The result of a step; ``total`` is differentiated, the rest is detached.

    A tuple, because ZeRO-3 finds the tensors of a forward pass only in tuples.
    """

    total: Tensor
    stochastic: Tensor
    support: Tensor
    divergence: Tensor
    radius_B: Tensor
    """Mean radius of each own pair, in units of the text embedding; zeros without a mass."""
    positive: Tensor
    """Mean cosine of the pairs."""
    hardest: Tensor
    """Mean cosine of each text's most similar wrong video."""
    temperature: Tensor
    """Factor of the cosines."""
    pair_loss_B: Tensor
    """Each own pair's part of ``total``, without the divergence: the mean over the pairs of all ranks is that."""


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
            themselves, or on their whole mass if ``head`` scores it in closed form.
        logit_scale: log of the temperature, shape [1]; limited to ln 100 in the forward.
        stochastic: weights of the terms, and how samples and radii enter the loss.
        pooled_by: the attention query, the text or its (first) sample.
        dropout_keys: one of each own video; training needs them where the pooling has dropout.
        memory_mb: about what the pooling of the own videos by all N texts may take; beyond it videos are pooled
            a few at a time, and once more for the backward pass. None sets no limit.

    Source: Wang et al., CVPR 2024, arXiv:2403.17998.
    """
    mass, noise_BKD, radius_BD = head.mass, None, None
    anchors_BD = [text_BD]
    closed_form = mass is not None and not head.draws_samples
    if mass is not None and closed_form:
        radius_BD = mass.radius(text_BD, frames_BFD)
    elif mass is not None and noise_BD is not None:
        noise_BKD = noise_BD if noise_BD.dim() == 3 else noise_BD[:, None]
        radius_BD = mass.radius(text_BD, frames_BFD)
        anchors_BD = list(mass.sample(text_BD[:, None], radius_BD[:, None], noise_BKD).unbind(1))
    num_trials = len(anchors_BD)
    query_BD = anchors_BD[0] if pooled_by == "sample" else text_BD
    query_ND = all_gather_rows(query_BD)

    def gathered(local: Tensor) -> Tensor:
        return query_ND if local is query_BD else all_gather_rows(local)

    per_pair = stochastic.training_radius == "pair" and noise_BKD is not None
    copies = PAIR_TENSORS + (4 * num_trials + 6 if per_pair else 0)
    columns = OwnColumns(head, query_ND, frames_BFD, dropout_keys, memory_mb, copies=copies)
    cosines_BAN = []
    if mass is not None and closed_form:
        cosines_BAN.append(columns.closed_form_cosines(mass, query_ND))
        anchors_BD = []
    elif per_pair and mass is not None and noise_BKD is not None:
        cosines_BAN.append(columns.sample_cosines(mass, gathered(text_BD), all_gather_rows(noise_BKD)))
        anchors_BD = []
    if mass is not None and radius_BD is not None and stochastic.support_weight:
        anchors_BD.append(mass.support(text_BD, radius_BD, columns.pooled_mean()))
    if anchors_BD:
        cosines_BAN.append(columns.cosines([gathered(anchor_BD) for anchor_BD in anchors_BD]))
    similarity_ABN = torch.cat(cosines_BAN, dim=1).transpose(0, 1)

    trial_KBN, support_BN = similarity_ABN[:num_trials], similarity_ABN[num_trials:]
    scored_SBN = trial_KBN.amax(dim=0, keepdim=True) if stochastic.trials == "best" else trial_KBN
    loss_S, pair_loss_SB = column_info_nce(torch.cat([scored_SBN, support_BN]), logit_scale)
    sampled = loss_S[: len(scored_SBN)].mean()
    total, pair_loss_B = sampled, pair_loss_SB[: len(scored_SBN)].mean(dim=0)
    support = divergence = torch.zeros_like(total.detach())
    if len(support_BN):
        support = loss_S[-1]
        total = total + stochastic.support_weight * support
        pair_loss_B = pair_loss_B + stochastic.support_weight * pair_loss_SB[-1]
    if mass is not None and radius_BD is not None and stochastic.kl_weight:
        divergence = mean_over_ranks(mass.divergence(text_BD, radius_BD))
        total = total + stochastic.kl_weight * divergence
    positive, hardest = similarity_metrics(trial_KBN[0].detach())
    return Losses(
        total=total,
        stochastic=sampled.detach(),
        support=support.detach(),
        divergence=divergence.detach(),
        radius_B=text_BD.new_zeros(len(text_BD)) if radius_BD is None else radius_BD.detach().mean(dim=-1),
        positive=positive,
        hardest=hardest,
        temperature=temperature(logit_scale.detach()),
        pair_loss_B=pair_loss_B,
    )


class Objective(RetrievalModel):
    """Towers and head with their loss, in one forward, as ZeRO needs it; parameter names are those of ``model``."""

    def __init__(self, model: RetrievalModel, config: Config) -> None:
        super().__init__(model.towers, model.head)
        self.stochastic = config.stochastic
        self.pooled_by: Literal["text", "sample"] = config.model.pooled_by
        self.memory_mb, self.engine_config = config.engine.head_memory_mb, config.engine
        is_frozen = not any(parameter.requires_grad for parameter in model.towers.clip.visual.parameters())
        # ZeRO-3 needs every rank in every forward pass of the tower. On a GPU the bytes would have to be copied back.
        self.frozen_frames = FrozenFrames() if is_frozen and config.engine.zero_stage < 3 else None

    def encode(self, pixels_BFHWC: Tensor, tokens_BL: Tensor) -> tuple[Tensor, Tensor]:
        """``text_BD`` and ``frames_BFD``, float32 also if the towers run in bfloat16."""
        PHASE_TIMER.switch("encode")
        with tower_precision(self.engine_config, tokens_BL.device):
            text_BD = self.towers.encode_text(tokens_BL)
            if self.frozen_frames is not None and pixels_BFHWC.device.type == "cpu":
                frames_BFD = self.frozen_frames.encode(self.towers, pixels_BFHWC)
            else:
                frames_BFD = self.towers.encode_frames(pixels_BFHWC)
        return text_BD.float(), frames_BFD.float()

    def losses(
        self, text_BD: Tensor, frames_BFD: Tensor, noise_BD: Tensor | None, dropout_keys: DropoutKeys | None
    ) -> Losses:
        """See :func:`global_losses`."""
        PHASE_TIMER.switch("head")
        embeddings = [x for x in (text_BD, frames_BFD) if x.requires_grad]
        if embeddings:
            # Autograd runs first what was recorded last, so the head's backward pass is over when it comes to the first
            # embedding. The text embedding was recorded first, so it comes after the whole image tower.
            torch.autograd.graph.register_multi_grad_hook(embeddings, self._begin_towers_backward, mode="any")
        # The loss is float32 also if the towers run in bfloat16: a softmax over many negatives needs the precision.
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

    def _begin_towers_backward(self, _: Tensor) -> None:
        PHASE_TIMER.switch("encode")
        use_tf32(self.engine_config.tf32)  # the engine turns it off after the backward pass

    def forward(self, part: Literal["whole", "encode", "losses"], *inputs: Any) -> Any:
        """A whole step or one half of it; ZeRO-3 gathers its weights only inside a forward pass."""
        if part == "encode":
            return self.encode(*inputs)
        if part == "losses":
            return self.losses(*inputs)
        pixels_BFHWC, tokens_BL, noise_BD, dropout_keys = inputs
        return self.losses(*self.encode(pixels_BFHWC, tokens_BL), noise_BD, dropout_keys)


def build_objective(
    config: Config, *, without_weights: bool = False, fill: Callable[[RetrievalModel], None] | None = None
) -> Objective:
    """The model of ``config`` with its loss.

    Parameters that do not affect the loss, or that the config freezes, need no gradient.

    Args:
        config: of the run.
        without_weights: leave the towers random.
        fill: called with towers and head before adapters are added.

    Raises:
        UserError: ``optim.frozen`` names a parameter that does not exist, or adapters cannot be added.
    """
    model = build_model(config.model, without_weights=without_weights)
    if fill is not None:
        fill(model)
    rank = config.optim.lora_rank
    if rank is not None:
        add_adapters(model, rank, config.optim.lora_alpha or 2 * rank)
    if config.stochastic.training == "mean" and model.head.mass is not None:
        model.head.mass.requires_grad_(False)  # it does not affect the loss
    names = [name for name, _ in model.named_parameters()]
    for prefix in config.optim.frozen:
        if not any(name.startswith(prefix) for name in names):
            raise UserError(f"optim.frozen names {prefix!r}, and no parameter begins so; the first is {names[0]}")
    for name, parameter in model.named_parameters():
        if name.startswith(tuple(config.optim.frozen)):
            parameter.requires_grad_(False)
    return Objective(model, config)
