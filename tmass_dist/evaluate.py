"""Evaluation: encode -> score -> rank -> report, sharded over the ranks.

``python -m tmass_dist.evaluate --run RUN`` evaluates the best checkpoint of a run on its test split.
"""

# Shapes: T texts, V videos, F frames, M trials, D embedding width.

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tmass_dist.cli import run_command
from tmass_dist.config import Config, load_config

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tmass_dist.data.index import Index
    from tmass_dist.objective import Objective

_TEXTS_AT_A_TIME = 256
"""Bounds the noise bank: 256 texts x 20 trials x 512 dimensions are 10 MB."""


@dataclass(frozen=True)
class Features:
    """Every text and video of a split, in the order of the index, on every rank."""

    text_TD: Tensor
    frames_VFD: Tensor
    owner_T: Tensor
    caption_ids: list[tuple[str, int]]


def encode(model: Objective, index: Index, tokenize: Any, config: Config, device: torch.device) -> Features:
    """Encode a split, each rank its own videos; the parts are put together in the order of the index.

    Raises:
        ValueError: a video came back from no rank; it is named.
    """
    import torch

    from tmass_dist.data.loader import iterate_videos
    from tmass_dist.data.transforms import resize_centre_crop
    from tmass_dist.distributed import gather_objects, rank, world_size

    frames_of: dict[str, Tensor] = {}
    texts_of: dict[str, list[tuple[int, Tensor]]] = {}
    batches = iterate_videos(
        index,
        rank=rank(),
        world_size=world_size(),
        batch_size=config.data.eval_batch_size,
        tokenize=tokenize,
        num_frames=config.model.num_frames,
    )
    with torch.inference_mode():
        for batch in batches:
            pixels = resize_centre_crop(batch.pixels_BFHWC.to(device), model.towers.image_size)
            frames_BFD = model.towers.encode_frames(pixels).float().cpu()
            frames_of.update(zip(batch.video_ids, frames_BFD))
            text_TD = model.towers.encode_text(batch.tokens_TL.to(device)).float().cpu()
            for (video_id, slot), text_D in zip(batch.caption_ids, text_TD):
                texts_of.setdefault(video_id, []).append((slot, text_D))
    for frames_part, texts_part in gather_objects((frames_of, texts_of)):
        frames_of |= frames_part
        texts_of |= texts_part
    ids = [video_id for video_id in dict.fromkeys(sample_id(sample) for sample in index.samples)]
    missing = [video_id for video_id in ids if video_id not in frames_of]
    if missing:
        raise ValueError(f"{len(missing)} videos were encoded by no rank: {', '.join(missing[:5])}")
    captions = [
        (number, video_id, *pair)
        for number, video_id in enumerate(ids)
        for pair in sorted(texts_of[video_id], key=_slot)
    ]
    return Features(
        text_TD=torch.stack([text_D for *_, text_D in captions]).clone(),
        frames_VFD=torch.stack([frames_of[video_id] for video_id in ids]).clone(),
        owner_T=torch.tensor([number for number, *_ in captions]),
        caption_ids=[(video_id, slot) for _, video_id, slot, _ in captions],
    )


def sample_id(sample: Any) -> str:
    return sample.id


def _slot(pair: tuple[int, Any]) -> int:
    return pair[0]


def similarities(head: Any, features: Features, config: Config) -> Tensor:
    """Score every text against every video; each rank takes every world-size-th block of texts.

    The noise of a text is keyed by (seed, video id, caption slot), so neither the blocks nor the ranks change it.
    """
    import torch

    from tmass_dist.distributed import gather_objects, rank, world_size
    from tmass_dist.evaluation.scoring import score
    from tmass_dist.noise import keyed_noise, text_key

    head = head.to("cpu").eval()
    num_trials, width = config.stochastic.num_trials, features.text_TD.shape[1]
    published = config.evaluation.protocol == "published_code"
    # The published protocol needs every video's own captions in one call; it is for parity on small sets.
    block = len(features.text_TD) if published else min(_TEXTS_AT_A_TIME, -(-len(features.text_TD) // world_size()))
    starts = list(range(0, len(features.text_TD), block))
    mine: dict[int, Tensor] = {}
    with torch.inference_mode():
        for start in starts[rank() :: world_size()]:
            rows = slice(start, start + block)
            noise_TMD = None
            if head.mass is not None:
                keys = torch.tensor([text_key("evaluation", *caption) for caption in features.caption_ids[rows]])
                noise_TMD = keyed_noise(
                    keys,
                    num_trials * width,
                    seed=config.seed,
                    prior=config.stochastic.prior,
                    std=config.stochastic.prior_std,
                ).view(-1, num_trials, width)
            mine[start] = score(
                head,
                features.text_TD[rows],
                features.frames_VFD,
                noise_TMD,
                protocol=config.evaluation.protocol,
                pooled_by=config.model.pooled_by,
                caption_owner_T=features.owner_T[rows],
            )
    blocks: dict[int, Tensor] = {}
    for part in gather_objects(mine):
        blocks |= part
    return torch.cat([blocks[start] for start in starts])


def measure(similarity_TV: Tensor, owner_T: Tensor, config: Config) -> dict[str, dict[str, float]]:
    """Recall and rank metrics of both directions, after the configured post-processing."""
    from tmass_dist.evaluation.ranking import dsl, metrics, rank_texts, rank_videos

    t2v = v2t = similarity_TV
    if config.evaluation.post_processing == "dsl":
        t2v, v2t = dsl(similarity_TV), dsl(similarity_TV.T).T
    return {"t2v": metrics(rank_texts(t2v, owner_T)), "v2t": metrics(rank_videos(v2t, owner_T))}


def chance(num_videos: int) -> dict[str, float]:
    """Metrics of a random order of ``num_videos`` videos with one right answer."""
    recall = {f"R@{k}": 100.0 * min(k, num_videos) / num_videos for k in (1, 5, 10)}
    return recall | {"MdR": (num_videos + 1) / 2, "MnR": (num_videos + 1) / 2}


def table(rows: dict[str, dict[str, float]], title: str) -> str:
    """A plain table: one row a system, R@K in percent."""
    columns = ("R@1", "R@5", "R@10", "MdR", "MnR")
    width = max(len(name) for name in rows)
    lines = [title, " " * width + "".join(f"{column:>8}" for column in columns)]
    lines += [f"{name:<{width}}" + "".join(f"{row[column]:8.1f}" for column in columns) for name, row in rows.items()]
    return "\n".join(lines)


def evaluate(config: Config, *, only: str | None = None) -> dict[str, Any]:
    """Evaluate the best checkpoint of ``config.run_dir`` on the test split beside the untrained model.

    Every rank calls it; rank 0 writes ``<run>/evaluation/metrics.json`` and prints the table.

    Args:
        config: the run.
        only: a weights file to evaluate in place of the run's best.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from tmass_dist.data.index import load_index
    from tmass_dist.distributed import is_main
    from tmass_dist.engine.checkpoint import write_json
    from tmass_dist.models.backbone import build_tokenizer, load_weights
    from tmass_dist.models.head import RetrievalHead
    from tmass_dist.models.pooling import MeanPool
    from tmass_dist.models.tmass import build_model

    weights = Path(only) if only else Path(config.run_dir) / "checkpoints" / "best.safetensors"
    if not weights.is_file():
        raise ValueError(f"no checkpoint {weights}; train first, or name one with --checkpoint")
    device = _device()
    index = load_index(config.data.test)
    tokenize = build_tokenizer(config.model.architecture)
    model = build_model(config).to(device).eval()
    mean_head = RetrievalHead(MeanPool(), None)

    def scored(head: Any, features: Features) -> dict[str, dict[str, float]]:
        return measure(similarities(head, features, config), features.owner_T, config)

    untrained = encode(model, index, tokenize, config, device)
    without_mean, without = scored(mean_head, untrained), scored(model.head, untrained)
    try:
        loaded = load_file(weights)
    except SafetensorError as error:
        raise ValueError(f"{weights} is torn, or not a file of weights: {error}") from error
    load_weights(model, loaded, str(weights))
    trained = encode(model.to(device), index, tokenize, config, device)
    mean, best = scored(mean_head, trained), scored(model.head, trained)

    num_texts, num_videos = len(trained.text_TD), len(trained.frames_VFD)
    result: dict[str, Any] = {
        "protocol": config.evaluation.protocol,
        "num_texts": num_texts,
        "num_videos": num_videos,
        "num_trials": config.stochastic.num_trials if config.model.radius != "none" else None,
        "selected_on": config.evaluation.selected_on,
        "checkpoint": str(weights),
        "post_processing": config.evaluation.post_processing,
        **best,
        "before_training": without,
        "mean_pooling": {"before_training": without_mean, "same_towers": mean},
    }
    if is_main():
        directory = Path(config.run_dir) / "evaluation"
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / "metrics.json", result)
        label = (
            f"protocol {config.evaluation.protocol}, checkpoint selected on {config.evaluation.selected_on}, "
            f"post-processing {config.evaluation.post_processing}, {num_texts} texts x {num_videos} videos"
        )
        for direction, name in (("t2v", "text to video"), ("v2t", "video to text")):
            rows = {
                "chance": chance(num_videos),
                "mean pooling, before training": without_mean[direction],
                "zero-shot (untrained head)": without[direction],
                "mean pooling of the trained towers": mean[direction],
                "trained": best[direction],
            }
            print(table(rows, f"\n{name} ({label})"), flush=True)
    return result


def _device() -> torch.device:
    from tmass_dist.distributed import initialise

    return initialise()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tmass_dist.evaluate", description=__doc__)
    parser.add_argument("--run", required=True, help="run directory, as train wrote it")
    parser.add_argument("--checkpoint", help="weights (.safetensors) to evaluate; the run's best by default")
    parser.add_argument("overrides", nargs="*", help="dotted overrides, as evaluation.post_processing=dsl")
    arguments = parser.parse_intermixed_args()
    saved = Path(arguments.run) / "config.yaml"
    if not saved.is_file():
        raise ValueError(f"{arguments.run} is no run directory: it has no config.yaml")
    config = dataclasses.replace(load_config(str(saved), arguments.overrides), run_dir=arguments.run)
    evaluate(config, only=arguments.checkpoint)


if __name__ == "__main__":
    run_command(main)
