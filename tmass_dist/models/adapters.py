"""LoRA adapters on the towers (Hu et al., 2022, arXiv:2106.09685), by the library peft.

Every block of both towers gets an adapter for the query, key and value projection of its attention and one for each
of the two layers of its MLP.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from tmass_dist.errors import UserError
from tmass_dist.models.tmass import RetrievalModel

_LAYERS = ["c_fc", "c_proj"]
_PROJECTIONS = ["attn.in_proj_weight"]
_ADAPTER = "default"


def _peft() -> Any:
    from tmass_dist.models.library import usable_torchvision

    usable_torchvision()
    try:
        import peft
    except ModuleNotFoundError as error:
        raise UserError("optim.lora_rank needs peft: pip install 'tmass-dist[lora]'") from error
    return peft


def add_adapters(model: RetrievalModel, rank: int, alpha: float) -> None:
    """Freeze the towers of ``model`` and add an adapter of ``rank`` to each block; the head stays as it is.

    The added term is ``alpha / rank * B A``, and zero before training, because B is.

    Raises:
        UserError: peft is not installed, or the towers have other layers than open_clip's CLIP.
    """
    peft = _peft()
    layers = [name for name, _ in model.towers.clip.named_modules() if name.rpartition(".")[2] in _LAYERS]
    if not layers:
        raise UserError("optim.lora_rank needs towers with the blocks of open_clip's CLIP, such as ViT-B-32-quickgelu")
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=_LAYERS, target_parameters=_PROJECTIONS, bias="none"
    )
    peft.inject_adapter_in_model(config, model.towers.clip, adapter_name=_ADAPTER)
    for name, parameter in model.towers.named_parameters():
        parameter.requires_grad_(is_adapter(name))


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return re.search(r"\.lora_[AB]\.", name) is not None


def plain_weights(model: nn.Module) -> dict[str, Tensor]:
    """The ``state_dict`` of the model without adapters that computes the same: each adapter is added to its weight."""
    weights = {
        name.replace("base_layer.", ""): value for name, value in model.state_dict().items() if not is_adapter(name)
    }
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            target: Any = module
            leaf = getattr(target, "parameter_name", "weight")
            key = f"{name}.{leaf}".replace("base_layer.", "")
            weights[key] = weights[key] + target.get_delta_weight(_ADAPTER).to(weights[key])
    return weights
