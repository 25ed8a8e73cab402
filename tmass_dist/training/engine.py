"""The only module that calls DeepSpeed: an optimisation step with the same result at every ZeRO stage."""

# Shapes: B pairs of this rank, F frames, H W pixels, C colours, L tokens, D embedding width.

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tmass_dist.config import Config
from tmass_dist.distributed import all_reduce_sum, is_initialised, join_alone, rank, world_size
from tmass_dist.models.pooling import DropoutKeys
from tmass_dist.training.objective import Losses, Objective, parameter_groups
from tmass_dist.training.optim import AuthorsAdamW, TorchAdamW


def _deepspeed() -> Any:
    # On CPU ranks DeepSpeed would otherwise search for an accelerator and compile a shared-memory
    # extension that training does not need (38 s at the first start).
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import logging

    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed


class Engine:
    """The objective under ZeRO (``engine.zero_stage``) with its optimiser.

    Every rank calls ``backward``, then ``step``. Between the two, ``finite`` says whether this rank's loss and
    gradients are finite. If those of any rank are not, all ranks must call ``step(skip_update=True)``.
    """

    def __init__(self, model: Objective, config: Config) -> None:
        local = config.data.batch_size // world_size()
        self.micro = min(config.engine.micro_batch or local, local)
        self.num_micro = -(-local // self.micro)
        groups: Any = parameter_groups(model, config.optim)
        kind = AuthorsAdamW if config.optim.kind == "authors" else TorchAdamW
        self.optimizer = kind(groups, lr=config.optim.lr, weight_decay=config.optim.weight_decay)
        self.optimizer.ema = config.optim.ema
        self.base_lrs = {group["name"]: group["lr"] for group in groups}
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._bad = torch.zeros((), device=next(model.parameters()).device)
        for parameter in self.named.values():
            parameter.register_hook(self._watch)
        if config.engine.checkpoint_activations:
            model.towers.clip.set_grad_checkpointing(True)
        if config.engine.compile:
            model.towers.clip.visual.compile()
        if not is_initialised():
            join_alone()
        deepspeed = _deepspeed()
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False)
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed requires it
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=self.optimizer,
            config={
                "train_micro_batch_size_per_gpu": local,
                "gradient_accumulation_steps": 1,
                "gradient_clipping": config.optim.max_grad_norm,
                "zero_optimization": {"stage": config.engine.zero_stage},
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                "steps_per_print": 10**9,
            },
        )
        self.stage = config.engine.zero_stage
        self.optimizer.prepare(self._pieces())
        if self.stage in (1, 2):
            zero = self._engine.optimizer
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()

    def _pieces(self) -> list[Tensor]:
        """The tensors that the optimiser updates on this rank."""
        zero = self._engine.optimizer
        if self.stage == 3:
            return zero.fp32_partitioned_groups_flat
        return zero.single_partition_of_fp32_groups if self.stage else list(self.named.values())

    def _watch(self, gradient: Tensor) -> None:
        self._bad += gradient.detach().float().sum() * 0  # inf and nan times 0 are nan

    @property
    def finite(self) -> bool:
        """Whether the loss and all gradients of this rank's last ``backward`` are finite."""
        return not bool(self._bad.isnan())

    def backward(
        self, pixels_BFHWC: Tensor, tokens_BL: Tensor, noise_BD: Tensor | None, dropout_keys: DropoutKeys | None
    ) -> Losses:
        """The global loss and this rank's gradients.

        With ``engine.micro_batch`` the pairs are encoded in micro-batches without a graph. The loss and the gradients
        of the embeddings are computed from all of them. Each micro-batch is then encoded again and differentiated. The
        result is the gradient of the whole batch in the memory of one micro-batch (Gao et al., 2021, arXiv:2101.06983).
        """
        self._bad.zero_()
        if self.num_micro == 1:
            losses = self._engine("whole", pixels_BFHWC, tokens_BL, noise_BD, dropout_keys)
            self._differentiate(losses.total)
        else:
            micros = list(zip(pixels_BFHWC.split(self.micro), tokens_BL.split(self.micro)))
            with torch.no_grad():
                encoded = [self._engine("encode", *micro) for micro in micros]
            text_BD, frames_BFD = (torch.cat(part).requires_grad_() for part in zip(*encoded))
            losses = self._engine("losses", text_BD, frames_BFD, noise_BD, dropout_keys)
            self._differentiate(losses.total, last=False)
            assert text_BD.grad is not None and frames_BFD.grad is not None
            gradients = zip(text_BD.grad.split(self.micro), frames_BFD.grad.split(self.micro))
            for number, (micro, (text_grad_bD, frames_grad_bFD)) in enumerate(zip(micros, gradients)):
                text_bD, frames_bFD = self._engine("encode", *micro)
                along = (text_bD * text_grad_bD).sum() + (frames_bFD * frames_grad_bFD).sum()
                self._differentiate(along, last=number + 1 == self.num_micro)
        self._bad += losses.total.detach() * 0
        return losses

    def _differentiate(self, loss: Tensor, *, last: bool = True) -> None:
        # DeepSpeed is told of one accumulation step, because it divides by their number at some stages only.
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss)
        if not last:
            self._engine.step()  # ends this backward pass; only the last one updates

    def group_norms(self) -> dict[str, float]:
        """Gradient norm of each parameter group and of all (``total``), before clipping; after ``backward``."""
        names = list(self.base_lrs)
        squares = torch.zeros(len(names), dtype=torch.float64, device=self._bad.device)
        zero = self._engine.optimizer
        if self.stage == 0:
            for number, group in enumerate(self.optimizer.param_groups):
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        squares[number] += parameter.grad.double().square().sum()
        else:
            for piece, gradients in zero.averaged_gradients.items():
                number = zero.sub_group_to_group_id[piece] if self.stage == 3 else piece
                for gradient in gradients or []:
                    squares[number] += gradient.double().square().sum()
            all_reduce_sum(squares)
        norms = dict(zip(names, squares.sqrt().tolist()))
        return norms | {"total": squares.sum().sqrt().item()}

    def step(self, factor: float, *, skip_update: bool = False) -> None:
        """Update the weights with ``factor`` times the peak rates and clear the gradients.

        Args:
            factor: of the learning-rate schedule, 0 to 1.
            skip_update: leave the weights and the optimiser's state as they are.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = self.base_lrs[group["name"]] * factor
        self.optimizer.skip_update = skip_update
        zero = self._engine.optimizer
        # ZeRO-3's first backward pass of a step overwrites the gradients of the parameters it reaches. A parameter that
        # only a later pass reaches would add to the gradient of the step before.
        stale = [g for piece in zero.averaged_gradients.values() for g in piece or []] if self.stage == 3 else []
        self._engine.step()
        for gradient in stale:
            gradient.zero_()

    @property
    def state_keys(self) -> tuple[str, ...]:
        """The tensors of each parameter: weight, the optimiser's moments, running mean."""
        return ("weight", "exp_avg", "exp_avg_sq", *(("ema",) if self.optimizer.ema else ()))

    def state(self, keys: tuple[str, ...] | None = None) -> Iterator[tuple[str, str, Tensor]]:
        """Yield ``(key, name, whole float32 tensor)``; this is collective: every rank must iterate to the end."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        for key in keys or self.state_keys:
            for name, parameter in self.named.items():
                if self.stage == 0:
                    value: Any = parameter.detach() if key == "weight" else self.optimizer.state[parameter][key]
                elif key == "weight":
                    value = safe_get_full_fp32_param(parameter)
                else:
                    value = safe_get_full_optimizer_state(parameter, key)
                yield key, name, value

    def set_state(self, key: str, name: str, value: Tensor) -> None:
        """Load one whole tensor of :meth:`state`; a rank keeps the part that it owns."""
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        parameter = self.named[name]
        value = value.to(self._bad.device)
        if self.stage == 0:
            target = parameter.data if key == "weight" else self.optimizer.state[parameter][key]
            target.copy_(value)
        elif self.stage == 3:
            # Shards are padded to one length; DeepSpeed's own setter of whole tensors does not handle the padding.
            length: int = parameter.ds_tensor.numel()  # pyright: ignore[reportAttributeAccessIssue]
            padded = nn.functional.pad(value.flatten(), (0, length * world_size() - value.numel()))
            piece = padded.narrow(0, length * rank(), length)
            if key == "weight":
                safe_set_local_fp32_param(parameter, piece)
                parameter.ds_tensor.data.copy_(piece)  # pyright: ignore[reportAttributeAccessIssue]
            else:
                safe_set_local_optimizer_state(parameter, piece, key)
        elif key == "weight":
            safe_set_full_fp32_param(parameter, value)
            parameter.data.copy_(value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)

    def set_step(self, step: int) -> None:
        """Set the number of steps done, by which Adam corrects its moments."""
        for piece in self._pieces():
            self.optimizer.state[piece]["step"].fill_(step)
