"""What the engine needs of DeepSpeed beyond its documentation: checked at the start, and restored after use."""

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import deepspeed
import pytest
import torch

from tmass_dist.errors import UserError
from tmass_dist.training import engine, zero
from tmass_dist.training.engine import _deepspeed
from tmass_dist.training.optim import TorchAdamW
from tmass_dist.training.zero import USED_ATTRIBUTES, USED_PARAMETER_ATTRIBUTES, Shards


@pytest.mark.parametrize(
    ("stage", "missing"), [(stage, name) for stage, names in USED_ATTRIBUTES.items() for name in names]
)
def test_an_optimiser_of_deepspeed_that_lacks_an_attribute_is_refused_in_one_line(stage: int, missing: str) -> None:
    present = SimpleNamespace(**{name: [] for name in USED_ATTRIBUTES[stage] if name != missing})
    with pytest.raises(UserError) as error:
        Shards(SimpleNamespace(optimizer=present), {}, cast(Any, None), stage)
    version = deepspeed.__version__
    line = f"DeepSpeed {version} has no {missing} at ZeRO stage {stage}; install a version that pyproject.toml allows"
    assert str(error.value) == line


@pytest.mark.parametrize(
    ("stage", "missing"), [(stage, name) for stage, names in USED_PARAMETER_ATTRIBUTES.items() for name in names]
)
def test_a_parameter_that_lacks_an_attribute_is_refused_in_one_line(stage: int, missing: str) -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    for name in USED_PARAMETER_ATTRIBUTES[stage]:
        if name != missing:
            setattr(parameter, name, None)
    attributes = {name: [] for name in USED_ATTRIBUTES[stage]} | {"_lazy_init_hp_params_optimizer_state": lambda: None}
    with pytest.raises(UserError, match=f"has no {missing} at ZeRO stage {stage}; install"):
        present = SimpleNamespace(optimizer=SimpleNamespace(**attributes))
        Shards(present, {"weight": parameter}, TorchAdamW([parameter], lr=1.0), stage)


def test_every_attribute_that_the_code_uses_is_checked() -> None:
    used, of_parameters = set(), set()
    for module in (zero, engine):
        for node in ast.walk(ast.parse(Path(module.__file__ or "").read_text())):
            if not isinstance(node, ast.Attribute):
                continue
            owner = ast.unparse(node.value)
            if owner in ("self.zero", "zero"):
                used.add(node.attr)
            elif owner == "parameter" and (node.attr.startswith("ds_") or node.attr == "_hp_mapping"):
                of_parameters.add(node.attr)
    assert used == {name for names in USED_ATTRIBUTES.values() for name in names}
    assert of_parameters | {"ds_shape"} == {name for names in USED_PARAMETER_ATTRIBUTES.values() for name in names}


class _Stream:
    def __init__(self) -> None:
        self.waited_for: list[Any] = []

    def wait_stream(self, other: Any) -> None:
        self.waited_for.append(other)


def _shards(stage: int, overlap_comm: bool) -> Shards:
    shards = object.__new__(Shards)
    shards.stage, shards.zero = stage, SimpleNamespace(overlap_comm=overlap_comm, reduction_stream="reductions")
    return shards


def test_overlapped_reductions_are_waited_for_by_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a backward pass DeepSpeed's ``synchronize`` orders streams; after it, also a failed one, it is its own."""
    _deepspeed()
    from deepspeed.accelerator import get_accelerator

    accelerator, stream = get_accelerator(), _Stream()
    own = accelerator.synchronize
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    with pytest.raises(RuntimeError, match="backward"), _shards(1, True).waiting_on_the_device():
        accelerator.synchronize()
        accelerator.synchronize(0)
        raise RuntimeError("backward")
    assert stream.waited_for == ["reductions", "reductions"]
    assert accelerator.synchronize == own
    for stage, overlap in ((0, True), (1, False), (3, True)):
        with _shards(stage, overlap).waiting_on_the_device():
            assert accelerator.synchronize == own


def test_deepspeed_waits_at_the_end_of_a_backward_pass_by_the_function_that_is_replaced() -> None:
    """If DeepSpeed waits by another name, the replacement has no effect: then this fails."""
    import inspect

    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    source = inspect.getsource(DeepSpeedZeroOptimizer.independent_gradient_partition_epilogue)
    assert source.count("synchronize(") == 1 and "get_accelerator().synchronize()" in source
