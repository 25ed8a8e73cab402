"""One optimisation step by DeepSpeed, with the same result at every ZeRO stage."""

# Shapes: B pairs of this rank, F frames, H W pixels, C colours, L tokens, D embedding width.

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tmass_dist.config import Config
from tmass_dist.distributed import all_reduce_sum, is_initialised, join_alone, own_device, world_size
from tmass_dist.models.pair_products import DropoutKeys
from tmass_dist.models.tmass import RetrievalModel
from tmass_dist.precision import use_tf32
from tmass_dist.training.groups import parameter_groups
from tmass_dist.training.objective import Losses, Objective
from tmass_dist.training.optim import AuthorsAdamW, TorchAdamW
from tmass_dist.training.sharded import allocate, shape_of, shard
from tmass_dist.training.zero import Shards

REDUCE_BUCKET = 500_000_000
"""Most gradients that are reduced at a time, DeepSpeed's default."""


def _deepspeed() -> Any:
    # On CPU ranks DeepSpeed would otherwise search for an accelerator and compile a shared-memory
    # extension that training does not need (38 s at the first start).
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    logger.addFilter(_is_worth_reading)
    return deepspeed


def _is_worth_reading(record: logging.LogRecord) -> bool:
    """Leaves out the warning of an untested optimiser: ours is tested at every stage (tests/test_engine.py)."""
    return "untested optimizer" not in record.getMessage()


class Engine:
    """The objective under ZeRO (``engine.zero_stage``) with its optimiser.

    Every rank calls ``backward``, then ``step``. If the loss or the gradients of any rank are not finite, ``step``
    changes nothing on any rank; :meth:`last_step_was_finite` tells, and by then the GPU may be busy with the next
    backward pass.
    """

    def __init__(self, model: Objective, config: Config) -> None:
        local = config.data.batch_size // world_size()
        self.micro = min(config.engine.micro_batch or local, local)
        self.num_micro = -(-local // self.micro)
        self.max_grad_norm, self.tf32 = config.optim.max_grad_norm, config.engine.tf32
        groups: Any = parameter_groups(model, config.optim)
        kind = AuthorsAdamW if config.optim.kind == "authors" else TorchAdamW
        self.optimizer = kind(groups, lr=config.optim.lr, weight_decay=config.optim.weight_decay)
        self.optimizer.ema = config.optim.ema
        self.base_lrs = {group["name"]: group["lr"] for group in groups}
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.model = model
        self.shape_only = shape_of(model)
        """The model on ``meta``: for counting, and for whole weights at stage 3."""
        self.stage = config.engine.zero_stage
        self.device = own_device() if self.stage == 3 else next(model.parameters()).device
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
        options = {
            "train_micro_batch_size_per_gpu": local,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,  # the optimiser clips
            "zero_optimization": _zero_options(self.stage, sum(p.numel() for p in self.named.values())),
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
            "timers": {"throughput": {"enabled": False}},  # it would wait for the GPU twice a step
        }
        if self.stage == 3:
            shard(model, self.device, deepspeed, options)
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=self.optimizer, config=options)
        if self.stage == 0 and world_size() == 1:
            # DeepSpeed would copy all gradients into one buffer and back, to exchange them with no other rank.
            self._engine.enable_backward_allreduce = False
        self.shards = Shards(self._engine, self.named, self.optimizer, self.stage)
        self.optimizer.set_num_updates(0)
        self._loss_check = torch.zeros((), device=self.device)
        # Squared norms of the groups, then whether the update was skipped; on the CPU when the event has passed.
        self._verdict = torch.zeros(len(groups) + 1, dtype=torch.float32)
        if torch.cuda.is_available():
            self._verdict = self._verdict.pin_memory()
        self._skip_is_counted = True
        self._verdict_copied: Any = torch.cuda.Event() if torch.cuda.is_available() else None

    def backward(
        self, pixels_BFHWC: Tensor, tokens_BL: Tensor, noise_BD: Tensor | None, dropout_keys: DropoutKeys | None
    ) -> Losses:
        """The global loss and this rank's gradients.

        With ``engine.micro_batch`` the pairs are encoded in micro-batches without a graph. The loss and the gradients
        of the embeddings are computed from all of them. Each micro-batch is then encoded again and differentiated. The
        result is the gradient of the whole batch in the memory of one micro-batch (Gao et al., 2021, arXiv:2101.06983).
        """
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
                use_tf32(self.tf32)  # this backward pass is that of the towers alone
                product = (text_bD * text_grad_bD).sum() + (frames_bFD * frames_grad_bFD).sum()
                self._differentiate(product, last=number + 1 == self.num_micro)
        self._loss_check = losses.total.detach() * 0  # NaN if the loss is not finite, else 0
        return losses

    def _differentiate(self, loss: Tensor, *, last: bool = True) -> None:
        # DeepSpeed is told of one accumulation step, because it divides by their number at some stages only.
        self._engine.set_gradient_accumulation_boundary(last)
        with self.shards.waiting_on_the_device():
            self._engine.backward(loss)
        use_tf32(False)
        if not last:
            self._engine.step()  # ends this backward pass; only the last one updates

    def step(self, factor: float, *, discard: bool = False) -> None:
        """Update the weights with ``factor`` times the peak rates, and clear the gradients; waits for no GPU.

        Args:
            factor: of the learning-rate schedule, 0 to 1.
            discard: clear the gradients without an update.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = self.base_lrs[group["name"]] * factor
        squares_G = self._squared_norms()
        norm = squares_G.sum().sqrt()
        skipped = (~norm.isfinite()).float() if not discard else torch.ones_like(norm)
        self.optimizer.grad_divisor = ((norm + 1e-6) / self.max_grad_norm).clamp(min=1.0)
        self.optimizer.found_inf = skipped
        if not discard:
            self.optimizer.num_updates += 1
            self._skip_is_counted = False
            self._verdict.copy_(torch.cat([squares_G, skipped[None]]), non_blocking=True)
            if self._verdict_copied is not None:
                self._verdict_copied.record()
        # ZeRO-3's first backward pass of a step overwrites the gradients of the parameters it reaches. A parameter that
        # only a later pass reaches would add to the gradient of the step before.
        zero = self._engine.optimizer
        stale = [g for piece in zero.averaged_gradients.values() for g in piece or []] if self.stage == 3 else []
        self._engine.step()
        for gradient in stale:
            gradient.zero_()

    def _squared_norms(self) -> Tensor:
        """Squared gradient norm of each parameter group over all ranks; NaN if the loss is not finite."""
        gradients = self.shards.gradients(list(self.base_lrs))
        norms = [torch.nn.utils.get_total_norm(parts) if parts else self._loss_check for parts in gradients.values()]
        squares_G = torch.stack([norm.to(self.device) for norm in norms]).float().square() + self._loss_check
        if self.stage:
            all_reduce_sum(squares_G)
        return squares_G

    def last_step_was_finite(self) -> bool:
        """Whether the last ``step`` updated the weights, which it does if all gradients are finite.

        It waits until the GPU has done that step, so call it when the next one has been started, but before the next
        ``step``: the optimiser's count of updates is corrected here if the step was skipped.
        """
        self._wait_for_verdict()
        if self._verdict[-1] == 0:
            return True
        self.optimizer.num_updates -= int(not self._skip_is_counted)
        self._skip_is_counted = True
        return False

    def group_norms(self) -> dict[str, float]:
        """Gradient norm of each parameter group and of all (``total``), before clipping, of the last ``step``."""
        self._wait_for_verdict()
        squares_G = self._verdict[:-1].double()
        return dict(zip(self.base_lrs, squares_G.sqrt().tolist())) | {"total": squares_G.sum().sqrt().item()}

    def _wait_for_verdict(self) -> None:
        if self._verdict_copied is not None:
            self._verdict_copied.synchronize()

    def nonfinite_gradients(self, *inputs: Any) -> list[str]:
        """Repeat a backward pass and name the parameters whose gradient on this rank is not finite.

        The gradients are discarded. Every rank calls it, with the inputs of :meth:`backward`.
        """
        flags = {name: torch.zeros((), device=self.device) for name in self.named}

        def check(name: str, gradient: Tensor) -> None:
            flags[name] += (~gradient.detach().isfinite()).any()

        hooks = [p.register_hook(partial(check, name)) for name, p in self.named.items()]
        self.backward(*inputs)
        for hook in hooks:
            hook.remove()
        self.step(0.0, discard=True)
        return [name for name, flag in flags.items() if flag > 0]

    @property
    def state_keys(self) -> tuple[str, ...]:
        """The tensors of each parameter: weight, the optimiser's moments, running mean."""
        return ("weight", "exp_avg", "exp_avg_sq", *(("ema",) if self.optimizer.ema else ()))

    def state(self, keys: tuple[str, ...] | None = None) -> Iterator[tuple[str, str, Tensor]]:
        """Yield ``(key, name, whole float32 tensor)``; this is collective: every rank must iterate to the end."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        for key in keys or self.state_keys:
            for name, parameter in self.named.items():
                if key == "weight" and self.stage < 3:
                    value: Any = parameter.detach()  # float32, and the same on every rank
                elif key == "weight":
                    value = safe_get_full_fp32_param(parameter)
                elif self.stage == 0:
                    value = self.optimizer.state[parameter][key]
                else:
                    value = safe_get_full_optimizer_state(parameter, key)
                yield key, name, value

    @contextmanager
    def lent_model(self) -> Iterator[RetrievalModel]:
        """The model with whole weights on every rank, or with their running mean (``optim.ema``); no step meanwhile.

        At stages 0 to 2 it is the trained model itself. The mean takes the place of the weights, which are restored
        from the CPU (stage 0) or from the shards. At stage 3 it is a copy that exists in this context only. After an
        exception nothing is restored: that takes all ranks.
        """
        if self.stage == 3:
            yield self._whole_copy()
            return
        if not self.optimizer.ema:
            yield self.model
            return
        weights = [p.detach().to("cpu", copy=True) for p in self.named.values()] if self.stage == 0 else []
        with torch.no_grad():
            for _, name, value in self.state(("ema",)):
                self.named[name].copy_(value)
            yield self.model
            for parameter, weight in zip(self.named.values(), weights):
                parameter.copy_(weight)
        if self.stage:
            self.shards.restore_weights()

    @torch.no_grad()
    def _whole_copy(self) -> RetrievalModel:
        model = copy.deepcopy(self.shape_only)
        allocate(model, self.device)
        for buffer, own in zip(model.buffers(), self.model.buffers()):
            buffer.copy_(own)
        parameters = dict(model.named_parameters())
        for _, name, value in self.state(("ema" if self.optimizer.ema else "weight",)):
            parameters[name].copy_(value)
        for name, value in self.untrained_weights():
            parameters[name].copy_(value)
        return model

    def untrained_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield ``(name, whole tensor)`` of what is not trained; every rank must iterate to the end."""
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                with self.shards.whole(parameter):
                    yield name, parameter.detach()


def _zero_options(stage: int, num_trained: int) -> dict[str, Any]:
    options: dict[str, Any] = {"stage": stage, "overlap_comm": stage > 0 and torch.cuda.is_available()}
    # DeepSpeed allocates whole buffers of this many numbers, 1.9 GB by default. All gradients fit into a smaller one,
    # and are reduced in the same groups.
    options["reduce_bucket_size"] = min(REDUCE_BUCKET, num_trained)
    if stage in (1, 2):
        options["compute_grad_norm"] = False  # the engine computes it, for the update and the log
    return options
