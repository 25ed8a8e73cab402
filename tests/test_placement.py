"""Every tensor is where it should be, and the host waits for the accelerator only where this file says so.

The accelerator is simulated (``tests/accelerator.py``); results on it must equal those on the CPU. Each test runs in a
process of its own, since torch must know the device before its first backward pass.
"""

# Shapes: T texts, V videos, M trials, D embedding width.

from __future__ import annotations

import importlib
import logging
import multiprocessing
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor

from launch.paper.systems import SYSTEMS
from tests.accelerator import PACKAGE, OnAccel, Wait, accelerator, register
from tests.forked import START_METHOD
from tests.planted import MISTAKES, functions_of, planted, reached
from tests.small_model import WIDTH, F, N, batch_of, config_of, perturb, small_objective

CPU = torch.device("cpu")


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)`` in a process of its own; what it raises is raised here."""
    context = multiprocessing.get_context(START_METHOD)
    # An executor, unlike multiprocessing.Pool, raises when its process dies.
    with ProcessPoolExecutor(1, context, initializer=register) as pool:
        return pool.submit(function, *arguments).result()


def on_host(value: Any) -> Any:
    """The numbers of tensors of either device."""
    return value.host if isinstance(value, OnAccel) else value


WAITING: dict[str, Callable[[Tensor, torch.device], Any]] = {
    "item": lambda x, _: x[0].item(),
    "tolist": lambda x, _: x.tolist(),
    "bool": lambda x, _: bool(x[0] > 0),
    "cpu": lambda x, _: x.cpu(),
    "nonzero": lambda x, _: x.nonzero(),
    "unique": lambda x, _: x.unique(),
    "mask": lambda x, _: x[x > 0],
    "equal": lambda x, _: torch.equal(x, x),
    "numbers to the accelerator": lambda x, device: torch.tensor([1.0, 2.0], device=device),
    "a copy to the accelerator": lambda x, device: torch.zeros(3).to(device),
}
QUIET: dict[str, Callable[[Tensor, torch.device], Any]] = {
    "a copy that the host leaves to itself": lambda x, device: torch.zeros(3).to(device, non_blocking=True),
    "indices": lambda x, _: x[torch.argsort(x)],
    "a number": lambda x, _: x + torch.tensor(2.0),
    "in place": lambda x, _: x[1:].mul_(2).sum(),
}
MIXING: dict[str, Callable[[Tensor, torch.device], Any]] = {
    "sum": lambda x, _: x + torch.zeros(3),
    "cat": lambda x, _: torch.cat([x, torch.zeros(1)]),
    "CPU indices": lambda x, _: x[torch.arange(2)],
    "out": lambda x, _: torch.mul(x, x, out=torch.zeros(3)),
}


def behaviour() -> dict[str, str]:
    """What the simulated accelerator says of each operation."""
    found = {}
    for name, operation in (WAITING | QUIET | MIXING).items():
        with accelerator() as (device, waits):
            x = torch.tensor([1.0, -1.0, 2.0], device=device)
            waits.clear()
            try:
                operation(x, device)
                found[name] = f"{waits.total()} waits"
            except RuntimeError as error:
                found[name] = "two devices" if "at least two devices" in str(error) else str(error)
    return found


def test_the_simulated_accelerator_counts_waits_and_refuses_two_devices() -> None:
    expected = {"1 waits": WAITING, "0 waits": QUIET, "two devices": MIXING}
    assert alone(behaviour) == {name: answer for answer, names in expected.items() for name in names}


STEPS = {
    **{name: system.overrides for name, system in SYSTEMS.items()},
    "mean pooling": ("model.pooling=mean",),
    "several heads": ("model.num_heads=2",),
    "one pair a tile": ("engine.head_memory_mb=1",),  # the least; `step` makes it small enough for several tiles
    "crop and flip": ("data.augment=true",),
    "recomputed activations": ("engine.checkpoint_activations=true",),
    "torch's optimiser": ("optim.kind=torch", "optim.ema=0.9"),
    "bfloat16": ("engine.bf16=true",),
}
"""Every system of the paper and what else changes a step, as overrides; one of several with the same overrides."""
STEPS = {name: more for name, more in STEPS.items() if name == next(n for n, m in STEPS.items() if m == more)}


BOUNDS = {"bfloat16": 5e-2, "torch's optimiser": 1e-3}
"""Relative errors beyond rounding in float32. bfloat16 rounds each of some ten results in a row by up to 0.4 %.
The first update of torch's AdamW is the sign of the gradient, whatever its size; at 1e-8 rounding decides it."""
Result = dict[str, list[Tensor]]
"""Tensors of a run by what they are; each kind is compared as a whole."""


def step(name: str, device: torch.device, begin: Callable[[], None]) -> Result:
    """One training step: what the loop prepares, forward, backward and update.

    ``begin`` is called when the model is on its device.
    """
    from tmass_dist.data.loader import Batch
    from tmass_dist.training.groups import parameter_groups
    from tmass_dist.training.optim import AuthorsAdamW, TorchAdamW
    from tmass_dist.training.step_inputs import step_inputs

    config = config_of(*STEPS[name])
    model = small_objective(config).to(device)
    if name == "one pair a tile":
        model.memory_mb = 0.1
    if config.engine.checkpoint_activations:
        model.towers.clip.set_grad_checkpointing(True)
    kind = AuthorsAdamW if config.optim.kind == "authors" else TorchAdamW
    optimizer = kind(parameter_groups(model, config.optim), lr=config.optim.lr)
    optimizer.ema = config.optim.ema
    optimizer.prepare([p for group in optimizer.param_groups for p in group["params"]])
    pixels, tokens, *_ = batch_of(0)
    if config.data.augment:
        pixels = pixels.repeat_interleave(2, dim=2)
    tokens = tokens[:, 2:].contiguous()  # shorter than the context, as most texts are
    batch = Batch(pixels, tokens, ["a"] * N, [f"video {n}" for n in range(N)], [0] * N, [0] * N, [])
    begin()
    losses = model("whole", *step_inputs(batch, 0, model, config, device))
    losses.total.backward()
    optimizer.step()
    weights = [p for p in model.parameters() if p.grad is not None]
    return {"losses": list(losses), "gradients": [p.grad for p in weights], "weights": [p.detach() for p in weights]}


def compare(function: Callable[..., Result], name: str, *arguments: Any) -> Counter[Wait]:
    """Run it on the CPU and on the accelerator: the results are equal to rounding; returns the host waits."""
    expected = function(name, *arguments, CPU, lambda: None)
    with accelerator() as (device, waits):
        found = function(name, *arguments, device, waits.clear)
        seen = Counter(waits)
    assert found.keys() == expected.keys()
    for kind, tensors in expected.items():
        one, other = (torch.cat([on_host(x).flatten().double() for x in part]) for part in (found[kind], tensors))
        error = ((one - other).norm() / other.norm()).item()
        bound = next((value for part, value in BOUNDS.items() if part in name), 1e-5)
        assert error < bound, f"{name}: {kind} differ by {error:.1e}"
    return seen


def steps(names: list[str]) -> dict[str, Counter[Wait]]:
    return {name: compare(step, name) for name in names}


def test_the_host_never_waits_in_a_training_step() -> None:
    assert alone(steps, list(STEPS)) == {name: Counter() for name in STEPS}


SCORINGS = {
    "T-MASS": {},
    "X-Pool": {"radius": "none"},
    "mean pooling": {"pooling": "mean"},
    "mean pooling without mass": {"pooling": "mean", "radius": "none"},
    "several heads": {"num_heads": 2},
    "exp_mean": {"radius": "exp_mean"},
    "linear": {"radius": "linear"},
    "scaled_exp_mean": {"radius": "scaled_exp_mean"},
    "variational": {"radius": "variational"},
}
"""Heads to score with, as settings of the model."""
OPTIONS: dict[str, dict[str, Any]] = {
    "query_conditioned": {},
    "published_code": {"protocol": "published_code"},
    "pooled by the sample": {"pooled_by": "sample"},
    "fresh noise": {},
    "no noise": {},
    "bfloat16": {"precision": torch.bfloat16},
    "in one call": {},
}
T, V, M = 10, 6, 3


def scoring(option: str, head_name: str, device: torch.device, begin: Callable[[], None]) -> Result:
    """Score a gallery in several tiles of texts and of videos."""
    from tmass_dist.config import ModelConfig
    from tmass_dist.evaluation.scoring import Gallery, score
    from tmass_dist.models.head import build_head

    torch.manual_seed(0)
    head = build_head(ModelConfig(num_frames=F, **SCORINGS[head_name]), WIDTH).eval()
    perturb(head)
    generator = torch.Generator().manual_seed(2)
    text_TD, frames_VFD, noise_TMD, pair_noise_VMTD = (
        torch.randn(shape, generator=generator).to(device)
        for shape in ((T, WIDTH), (V, F, WIDTH), (T, M, WIDTH), (V, M, T, WIDTH))
    )
    owner_T = torch.tensor([0, 0, 1, 2, 3, 3, 3, 4, 5, 5])
    head = head.to(device)
    begin()
    if option == "in one call":
        found = score(head, text_TD, frames_VFD, noise_TMD)
    else:
        noise = None if option in ("no noise", "fresh noise") else noise_TMD
        pair_noise = pair_noise_VMTD if option == "fresh noise" else None
        found = Gallery(head, frames_VFD, tile_videos=4).score(
            text_TD, noise, pair_noise_VMTD=pair_noise, caption_owner_T=owner_T, tile_texts=4, **OPTIONS[option]
        )
    return {"similarity": [found.nan_to_num(-2.0)]}


def pooling(kind: str, device: torch.device, begin: Callable[[], None]) -> Result:
    """Every video pooled for every text, as one tensor."""
    from tmass_dist.config import ModelConfig
    from tmass_dist.models.head import build_head

    head = build_head(ModelConfig(num_frames=F, pooling=kind), WIDTH).eval().to(device)
    generator = torch.Generator().manual_seed(2)
    text_TD, frames_VFD = (torch.randn(shape, generator=generator).to(device) for shape in ((T, WIDTH), (V, F, WIDTH)))
    begin()
    return {"pooled": [head.pooling(text_TD, frames_VFD).detach()]}


def tokens(_: str, device: torch.device, begin: Callable[[], None]) -> Result:
    """Late interaction: scores of texts by their tokens, and the frames that the tokens choose."""
    from tmass_dist.config import ModelConfig
    from tmass_dist.evaluation.scoring import score
    from tmass_dist.models.head import build_head

    head = build_head(ModelConfig(num_frames=F, pooling="weighted_interaction", radius="none"), WIDTH).eval().to(device)
    generator = torch.Generator().manual_seed(2)
    shapes = ((T, 3 * WIDTH), (V, F, WIDTH))
    text_TW, frames_VFD = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    begin()
    scores_TV = score(head, text_TW, frames_VFD)
    return {"scores": [scores_TV], "frames": [head.pooling.weights(text_TW, frames_VFD)]}


def scorings(pairs: list[tuple[str, str]]) -> dict[tuple[str, str], Counter[Wait]]:
    return {(option, head): compare(scoring, option, head) for option, head in pairs}


CHECKED = Counter({Wait("shape", "evaluation/scoring.py:_check"): 2, Wait("item", "evaluation/scoring.py:_check"): 2})
"""Features of texts and videos are checked once a call."""


CAPTIONS = Counter({Wait("to accel", "evaluation/scoring.py:_own_captions"): 2})
"""Which captions a video has, copied once a call."""


def test_scoring_waits_for_the_check_of_its_features_alone() -> None:
    pairs = [(option, head) for option in OPTIONS for head in SCORINGS]
    expected = {(o, head): CHECKED + CAPTIONS if o == "published_code" else CHECKED for o, head in pairs}
    assert alone(scorings, pairs) == expected


def on_device(device: torch.device) -> None:
    """Evaluate on ``device``, in tiles of a few texts and videos."""
    from tmass_dist.evaluation import blocks

    blocks.own_device = lambda: device
    blocks.TILE_SIZES[device.type] = (4, 4)


class Weights:
    """In place of the engine, whose DeepSpeed knows no simulated device: it lends a model."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @contextmanager
    def lent_model(self) -> Iterator[Any]:
        yield self.model


def validation(overrides: str, shards: str, device: torch.device, begin: Callable[[], None]) -> Result:
    """Validate the weights of a model on a split: encode, score, rank, keep the best."""
    from safetensors.torch import load_file

    from tmass_dist.data.index import load_index
    from tmass_dist.models.backbone import build_tokenizer
    from tmass_dist.training.monitor import Monitor
    from tmass_dist.training.validation import Validator

    with tempfile.TemporaryDirectory() as folder:
        config = config_of(*overrides.split(), f"run_dir={folder}", "data.num_workers=0", "stochastic.num_trials=3")
        Path(folder, "checkpoints").mkdir()
        model = small_objective(config).to(device)
        on_device(device)
        tokenize, log = build_tokenizer(config.model.architecture), logging.getLogger("placement")
        validator = Validator(load_index(shards), tokenize, config, device, lambda: False)
        monitor = Monitor(config, 0)
        begin()
        validator.validate(1, cast(Any, Weights(model)), monitor, log)
        monitor.close(complete=True)
        best = load_file(Path(folder, "checkpoints", "best.safetensors"))
        return {"metrics": [torch.tensor([*validator.last_metrics.values()])], "weights": [*best.values()]}


def retrieval(kind: str, shards: str, device: torch.device, begin: Callable[[], None]) -> Result:
    """Encode a split, search it in two stages, and score it as ``TMass`` does for its users."""
    from tmass_dist.data.index import load_index
    from tmass_dist.evaluation.blocks import BlockScorer
    from tmass_dist.evaluation.encode import encode
    from tmass_dist.evaluation.radii import radii_of
    from tmass_dist.evaluation.two_stage import search_ranks
    from tmass_dist.retrieval.model import TMass

    config = config_of(f"model.pooling={kind}", "data.num_workers=0", "stochastic.num_trials=3")
    weights = small_objective(config).state_dict()
    model = TMass.of_weights(config, weights, "small weights").to(device)
    on_device(device)
    begin()
    features = encode(model, load_index(shards), model.tokenize, config, device)  # pyright: ignore[reportArgumentType]
    scorer = BlockScorer(model.head, features, config)
    with torch.inference_mode():
        ranks = search_ranks(scorer, 5)
        radius_VD = radii_of(model.head.mass, features, 0)
    text_TD = model.encode_text(features.captions)
    similarity_TV = model.similarity(features.captions, features.frames_VFD)
    weights_VTF = model.attention(text_TD, features.frames_VFD)
    return {
        "features": [features.text_TD, features.frames_VFD, text_TD],
        "ranks": [ranks.float()],
        "scores": [*scorer.scores(), similarity_TV, weights_VTF, radius_VD],
    }


def evaluations(shards: str) -> dict[str, Counter[Wait]]:
    """Validation under each protocol, and everything that a user calls after training."""
    runs: list[tuple[Callable[..., Result], str]] = [
        (validation, ""),
        (validation, "evaluation.protocol=published_code"),
        (validation, "model.radius=none"),
        (validation, "stochastic.prior=uniform evaluation.precision=bfloat16"),
        (validation, "model.pooled_by=sample"),
        (retrieval, "xpool"),
        (retrieval, "mean"),
    ]
    return {f"{run.__name__} {name}": compare(run, name, shards) for run, name in runs}


WAITS_OF_EVALUATION = {
    Wait(kind, function)
    for function, kinds in {
        "evaluation/encode.py:encode_batches": ("to accel", "to host"),  # a batch's pixels and tokens; its embeddings
        "evaluation/blocks.py:gallery": ("to accel",),
        "evaluation/blocks.py:caption_noise": ("to accel",),
        "evaluation/blocks.py:_score": ("to accel", "to host"),  # a block's texts; its scores
        "evaluation/scoring.py:_check": ("shape", "item"),
        "evaluation/scoring.py:_own_captions": ("to accel",),
        "evaluation/radii.py:radii_of": ("to accel", "to host"),
        "training/validation.py:<dictcomp>": ("to host",),  # the weights that are kept as the best
        "retrieval/model.py:<listcomp>": ("to accel",),  # tokens
        "retrieval/model.py:similarity": ("to accel",),
        "retrieval/model.py:attention": ("to accel",),
    }.items()
    for kind in kinds
}
"""Where an evaluation waits: once for each batch, block or call, and nowhere within the model or the scoring."""


def test_evaluation_equals_the_cpu_and_waits_where_results_are_needed(data: list[str]) -> None:
    [shards] = [override.split("=")[1] for override in data if override.startswith("data.val=")]
    found = alone(evaluations, shards)
    assert set().union(*found.values()) == WAITS_OF_EVALUATION


MODULES = [
    *(f"tmass_dist.models.{path.stem}" for path in sorted((PACKAGE / "models").glob("[a-z]*.py"))),
    "tmass_dist.training.losses",
    "tmass_dist.training.objective",
    "tmass_dist.evaluation.scoring",
]
ON_THE_HOST = {"_own_captions"}
"""Functions whose tensors are never on the accelerator: a table of numbers."""
EXERCISES: list[tuple[Callable[..., Result], str, tuple[Any, ...]]] = [
    *((step, name, ()) for name in STEPS if name != "bfloat16"),
    *((scoring, option, (head,)) for option in OPTIONS for head in SCORINGS),
    (tokens, "", ()),
    *((pooling, kind, ()) for kind in ("xpool", "mean", "query_scored")),
]


HOOKS = {"Objective._begin_towers_backward"}
"""Hooks of several gradients. They use no tensor, and torch ends the process when one raises."""


def functions_to_plant() -> dict[str, tuple[Any, FunctionType]]:
    """Module and function of every function of ``MODULES`` that takes a tensor, by module and qualified name."""
    found = {}
    for name in MODULES:
        module = importlib.import_module(name)
        for function in functions_of(module).values():
            if function.__qualname__ in HOOKS:
                continue
            kinds = [str(kind) for key, kind in function.__annotations__.items() if key != "return"]
            # Weights by name come from a file, tokenizers give tokens: both are on the CPU.
            if any("Tensor" in kind and "dict[" not in kind and "Callable" not in kind for kind in kinds):
                found[f"{name}:{function.__qualname__}"] = (module, function)
    return found


def uncaught() -> list[str]:
    """Plant both mistakes in every function, one at a time; those that no exercise reports."""
    functions = functions_to_plant()
    exercise_of: dict[str, tuple[Any, Counter[Wait]]] = {}
    with ExitStack() as stack:
        for module, function in functions.values():
            stack.enter_context(planted(module, function, None))
        for exercise in EXERCISES:
            reached.clear()
            run, label, arguments = exercise
            with accelerator() as (device, waits):
                run(label, *arguments, device, lambda: (reached.clear(), waits.clear()))
                exercise_of = dict.fromkeys(reached, (exercise, Counter(waits))) | exercise_of
    missed = [f"{name} is not run" for name in functions if name not in exercise_of]
    for name, ((run, label, arguments), usual) in exercise_of.items():
        module, function = functions[name]
        place = f":{function.__name__}"
        for mistake in MISTAKES:
            with planted(module, function, mistake), accelerator() as (device, waits):
                try:
                    run(label, *arguments, device, waits.clear)
                    caught = any(where.endswith(place) for kind, where in waits - usual if kind == "item")
                except RuntimeError as error:
                    caught = "at least two devices" in str(error) and f"{place})" in str(error)
            if not caught:
                missed.append(f"{name}: {mistake}")
    return missed


def test_every_planted_mistake_is_caught() -> None:
    missed = alone(uncaught)
    assert {what.split(" is not run")[0].split(":")[1] for what in missed} == ON_THE_HOST, missed
