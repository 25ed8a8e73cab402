"""The model card of an export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from tmass_dist.config import Config

TEMPLATE = """---
{metadata}
---

# {name}

T-MASS (Wang et al., "Text Is MASS", CVPR 2024, arXiv:2403.17998) for text-video retrieval: {architecture} towers,
{num_frames} frames per video, radius `{radius}`. Trained with tmass-dist{steps}, global batch {batch_size}, on
{data}{started}. {selection}

## Results

{results}

A score is comparable only with scores of the same protocol, M, selection split and post-processing.

## Use

`pip install tmass-dist`, then:

```python
from pathlib import Path

from tmass_dist import TMass

model = TMass.from_pretrained("{name}")
texts = ["a dog jumps into a lake", "two people row a boat"]
paths = sorted(Path("videos").glob("*.mp4"))

videos = model.encode_videos(paths)  # frame embeddings (videos, {num_frames}, {width})
similarity = model.similarity(texts, videos)  # (texts, videos), {samples}
for text, row in zip(texts, similarity):
    print(text, "->", paths[int(row.argmax())])
```

`model.encode_text(texts)` gives text embeddings, and `model.similarity(texts, videos, num_trials=0)` scores without
samples. To search many videos: `tmass index {name} --videos videos --out gallery`, then `tmass search gallery "a dog"`
or `tmass serve gallery`.
"""


def model_card(name: str, config: Config, trained: dict[str, Any], metadata: ModelCardData) -> ModelCard:
    """The card of a model.

    Args:
        name: directory or repository of the model, used in the example.
        config: settings of its training run.
        trained: ``step``, ``selected_on``, ``data`` and ``results`` (a markdown table with its protocol), where known.
        metadata: for the YAML header that the Hub reads.
    """
    model = config.model
    sampled = model.draws_samples
    text = TEMPLATE.format(
        metadata=metadata.to_yaml().strip(),
        name=name,
        architecture=Path(model.architecture).name,
        num_frames=model.num_frames,
        radius=model.radius,
        steps=f" for {trained['step']} steps" if "step" in trained else "",
        batch_size=config.data.batch_size,
        data=_describe_data(trained.get("data", "unknown data")),
        started=f", starting from `{'/'.join(Path(config.init_from).parts[-2:])}`" if config.init_from else "",
        selection=(
            f"The checkpoint was selected on the `{trained['selected_on']}` split."
            if "selected_on" in trained
            else "What selected the checkpoint is not known."
        ),
        results=trained.get("results", "Not evaluated yet.").strip(),
        width=trained.get("width", "width"),
        samples=f"the best of {config.stochastic.num_trials} samples per text" if sampled else "without samples",
    )
    return ModelCard(text, ignore_metadata_errors=True)


def _describe_data(data: str | list[dict[str, Any]]) -> str:
    """The training data: the end of each split's path, with its weight in a mixture. A string is from older exports."""
    parts = [{"path": data, "weight": 1}] if isinstance(data, str) else data
    names = [f"`{'/'.join(Path(part['path']).parts[-2:])}`" for part in parts]
    weighted = any(part["weight"] != 1 for part in parts)
    return " and ".join(f"{name} (weight {part['weight']})" if weighted else name for name, part in zip(names, parts))
