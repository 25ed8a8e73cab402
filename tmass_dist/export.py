"""Export a run: ``python -m tmass_dist.export RUN OUT``; weights, config and a model card, usable without DeepSpeed.

In Python: ``from tmass_dist.export import load``, then ``model, tokenize = load("OUT")``, and ``model.towers`` and
``model.head`` are what :mod:`tmass_dist.evaluation.scoring` scores with.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tmass_dist.cli import program, run_command, writable_dir
from tmass_dist.config import load_config
from tmass_dist.errors import UserError

if TYPE_CHECKING:
    from tmass_dist.models.tmass import RetrievalModel

CARD = """# {name}

T-MASS (Wang et al., "Text Is MASS", CVPR 2024, arXiv:2403.17998) on {architecture}, {num_frames} frames, radius
`{radius}`, trained by tmass-dist for {step} steps with a global batch of {batch_size}.

{results}
## Use

    from tmass_dist.export import load
    from tmass_dist.evaluation.scoring import score
    model, tokenize = load("{name}")
    text, frames = model.towers.encode_text(tokenize(texts)), model.towers.encode_frames(pixels)
    similarity = score(model.head, text, frames, noise)

`pixels` are uint8 `(videos, {num_frames}, side, side, 3)`; `noise` is `(texts, trials, width)` (`tmass_dist.noise`), or
None for the mean text.
"""


def export(run: Path, out: Path) -> None:
    """Write ``model.safetensors``, ``config.yaml`` (and the tower description) and ``README.md`` into ``out``.

    Raises:
        UserError: ``run`` is no run directory, or has no best checkpoint yet.
    """
    weights = run / "checkpoints" / "best.safetensors"
    if not (run / "config.yaml").is_file() or not weights.is_file():
        raise UserError(f"{run} has no config.yaml with checkpoints/best.safetensors; train it first")
    config = load_config(str(run / "config.yaml"))
    best = json.loads((run / "checkpoints" / "best.json").read_text(encoding="utf-8"))
    metrics = run / "evaluation" / "metrics.json"
    table = run / "evaluation" / "table.md"
    results = table.read_text(encoding="utf-8") if metrics.is_file() and table.is_file() else "Not evaluated yet.\n"
    writable_dir(out)
    shutil.copyfile(weights, out / "model.safetensors")
    shutil.copyfile(run / "config.yaml", out / "config.yaml")
    if config.model.architecture.endswith(".json"):
        from tmass_dist.models.backbone import find_file

        shutil.copyfile(find_file(config.model.architecture), out / "towers.json")
    card = CARD.format(
        name=out.name,
        architecture=Path(config.model.architecture).name,
        num_frames=config.model.num_frames,
        radius=config.model.radius,
        step=best["step"],
        batch_size=config.data.batch_size,
        results=results,
    )
    (out / "README.md").write_text(card, encoding="utf-8")


def load(directory: str | Path) -> tuple[RetrievalModel, Any]:
    """The exported model, in evaluation mode on the CPU, and its tokenizer.

    Raises:
        UserError: the directory holds no export, or one that is torn.
    """
    from dataclasses import replace

    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from tmass_dist.models.backbone import build_tokenizer, load_weights
    from tmass_dist.models.tmass import build_model

    directory = Path(directory)
    config = load_config(str(directory / "config.yaml"))
    description = directory / "towers.json"
    architecture = str(description) if description.is_file() else config.model.architecture
    config = replace(config, model=replace(config.model, architecture=architecture, pretrained=None))
    model = build_model(config.model).eval()
    path = directory / "model.safetensors"
    try:
        load_weights(model, load_file(path), str(path))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is missing or torn: {error}") from error
    return model, build_tokenizer(architecture)


def main() -> None:
    parser = argparse.ArgumentParser(prog=program("python -m tmass_dist.export"), description=__doc__)
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("out", type=Path, help="where to write")
    arguments = parser.parse_args()
    export(arguments.run, arguments.out)
    print(f"exported: {arguments.out}")


if __name__ == "__main__":
    run_command(main)
