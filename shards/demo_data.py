"""Generate a data set: mp4 clips of several scenes, with captions that each describe one scene.

``python shards/demo_data.py --out DIR`` writes ``videos/*.mp4`` and ``manifest.jsonl``.
The same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tmass_dist.cli import program, run_command, writable_dir  # noqa: E402
from tmass_dist.errors import UserError  # noqa: E402

if TYPE_CHECKING:
    import numpy as np

SIDE = 64
NUM_FRAMES, FPS = 24, 12
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 230),
    "yellow": (230, 210, 50),
    "white": (240, 240, 240),
    "purple": (160, 60, 190),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
MOTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0), "shaking": (0, 0)}
TEXTURES = ("plain", "striped", "dotted", "checked")
# The towers are pretrained with the first word of each; the others occur in the videos' captions only.
SYNONYMS = {
    **{word: (word,) for word in (*COLOURS, *SHAPES, *TEXTURES)},
    "red": ("red", "crimson"),
    "green": ("green", "emerald"),
    "blue": ("blue", "azure"),
    "yellow": ("yellow", "golden"),
    "white": ("white", "pale"),
    "purple": ("purple", "violet"),
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle", "wedge"),
    "cross": ("cross", "plus"),
    "ring": ("ring", "hoop"),
    "left": ("moving left", "heading west"),
    "right": ("moving right", "heading east"),
    "up": ("moving up", "rising"),
    "down": ("moving down", "sinking"),
    "still": ("standing still", "resting"),
    "shaking": ("shaking", "trembling"),
    "striped": ("striped", "lined"),
    "dotted": ("dotted", "speckled"),
    "checked": ("checked", "tiled"),
    "plain": ("plain", "empty"),
}
VOCABULARY = sorted(
    {word for words in SYNONYMS.values() for phrase in words for word in phrase.split()} | {"a", "on", "ground"}
)


@dataclass(frozen=True)
class Scene:
    """One moving shape on one background; there are 720 different scenes."""

    colour: str
    shape: str
    motion: str
    texture: str


SCENES = [Scene(c, s, m, t) for c in COLOURS for s in SHAPES for m in MOTIONS for t in TEXTURES]


def caption(scene: Scene, rng: np.random.Generator, *, new_words: bool) -> str:
    """One sentence; with ``new_words`` each word may be a synonym that pretraining does not show."""

    def word(key: str) -> str:
        words = SYNONYMS[key]
        return words[int(rng.integers(len(words)))] if new_words else words[0]

    colour, shape, motion, texture = (word(k) for k in (scene.colour, scene.shape, scene.motion, scene.texture))
    if rng.integers(2):
        return f"a {colour} {shape} {motion} on a {texture} ground"
    return f"on a {texture} ground a {colour} {shape} {motion}"


def render(scene: Scene, num_frames: int, side: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 ``(num_frames, side, side, 3)``; a trail shows the motion in a single frame."""
    import numpy as np

    y, x = np.mgrid[0:side, 0:side] / side
    ground = np.full((side, side), 70.0)
    if scene.texture == "striped":
        ground += 40 * (np.floor(x * 8) % 2)
    elif scene.texture == "dotted":
        ground += 60 * (((x * 6) % 1 - 0.5) ** 2 + ((y * 6) % 1 - 0.5) ** 2 < 0.08)
    elif scene.texture == "checked":
        ground += 40 * ((np.floor(x * 6) + np.floor(y * 6)) % 2)
    colour, (dx, dy) = np.array(COLOURS[scene.colour], float), MOTIONS[scene.motion]
    radius = rng.uniform(0.2, 0.26)
    centre = rng.uniform(0.38, 0.62, size=2)

    def mask(cx: float, cy: float) -> np.ndarray:
        u, v = x - cx, y - cy
        distance = np.hypot(u, v)
        if scene.shape == "circle":
            return distance < radius
        if scene.shape == "square":
            return np.maximum(abs(u), abs(v)) < radius * 0.85
        if scene.shape == "triangle":
            return (v < radius * 0.8) & (v > 2 * abs(u) - radius)
        if scene.shape == "cross":
            return (np.minimum(abs(u), abs(v)) < radius * 0.33) & (np.maximum(abs(u), abs(v)) < radius)
        return (distance < radius) & (distance > radius * 0.6)

    frames = np.empty((num_frames, side, side, 3), np.uint8)
    for number in range(num_frames):
        travelled = 0.24 * (number / max(num_frames - 1, 1) - 0.5)
        cx, cy = centre[0] + dx * travelled, centre[1] + dy * travelled
        if scene.motion == "shaking":
            cx, cy = cx + rng.uniform(-0.03, 0.03), cy + rng.uniform(-0.03, 0.03)
        picture = np.repeat(ground[:, :, None], 3, axis=2)
        ghosts = [(k * 0.09 * dx, k * 0.09 * dy) for k in (3, 2, 1)]
        if scene.motion == "shaking":
            ghosts = [(-0.09, 0.0), (0.09, 0.0), (0.0, 0.09)]
        if scene.motion != "still":
            for strength, (gx, gy) in zip((0.25, 0.4, 0.55), ghosts):
                ghost = mask(cx - gx, cy - gy)
                picture[ghost] = (1 - strength) * picture[ghost] + strength * colour
        picture[mask(cx, cy)] = colour
        frames[number] = np.clip(picture + rng.normal(0, 8, picture.shape), 0, 255)
    return frames


def write_video(path: Path, frames: np.ndarray) -> None:
    """Write an mp4 at 12 frames a second, by one thread, so that the same frames give the same bytes."""
    import av

    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=FPS, options={"qscale": "3", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.bit_rate = 1_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def caption_of_two(scenes: list[Scene], rng: np.random.Generator) -> str:
    """A caption of two scenes, without their backgrounds; it fits the towers' context of 16 tokens."""

    def word(key: str) -> str:
        return SYNONYMS[key][int(rng.integers(len(SYNONYMS[key])))]

    return " ".join(f"a {word(s.colour)} {word(s.shape)} {word(s.motion)}" for s in scenes)


def _looks(number: int) -> tuple[str, str, str]:
    scene = SCENES[number]
    return scene.colour, scene.shape, scene.motion


def _choose_easy(size: int, train: bool, rng: np.random.Generator) -> list[tuple[list[int], list[list[int]]]]:
    """Scenes of each video, and those that each caption describes: three scenes, one of them in each caption.

    In a gallery, the described scenes are all different, and the other scenes are never described.
    """
    order = rng.permutation(len(SCENES))
    own, others = order[:size], order[size:]
    videos = []
    for number in range(size):
        if train:
            chosen = rng.choice(len(SCENES), 3, replace=False)
            described = [[int(scene)] for scene in chosen]
        else:
            described = [[int(own[number])]]
            chosen = rng.permutation([own[number], *rng.choice(others, 2, replace=False)])
        videos.append(([int(scene) for scene in chosen], described))
    return videos


def _choose_medium(size: int, train: bool, rng: np.random.Generator) -> list[tuple[list[int], list[list[int]]]]:
    """Three scenes a video, all different in a gallery, each described twice: six captions a video."""
    if train:
        return _choose_easy(size, train, rng)
    groups = rng.permutation(len(SCENES))[: 3 * size].reshape(size, 3).tolist()
    return [(scenes, [[scene] for scene in scenes for _ in range(2)]) for scenes in groups]


def _choose_hard(size: int, train: bool, rng: np.random.Generator) -> list[tuple[list[int], list[list[int]]]]:
    """Four scenes a video, two of them in each caption; in a gallery no other video has both."""
    videos: list[list[int]] = []
    videos_with: dict[tuple[str, str, str], set[int]] = {}

    def pairs_of(scenes: list[int]) -> list[list[int]]:
        return [[a, b] for k, a in enumerate(scenes) for b in scenes[k + 1 :] if _looks(a) != _looks(b)]

    while len(videos) < size:
        scenes = [int(scene) for scene in rng.choice(len(SCENES), 4, replace=False)]
        for scene in scenes:
            videos_with.setdefault(_looks(scene), set()).add(len(videos))
        videos.append(scenes)
    chosen = []
    for scenes in videos:
        pairs = pairs_of(scenes)
        if not train:
            pairs = [pair for pair in pairs if len(videos_with[_looks(pair[0])] & videos_with[_looks(pair[1])]) == 1]
        order = rng.permutation(len(pairs))[: 3 if train else 1]
        chosen.append((scenes, [pairs[k] for k in order]))
    # A video without a pair of scenes of its own has no caption and is left out.
    return [video for video in chosen if video[1]]


def generate(out: Path, sizes: dict[str, int], seed: int, difficulty: str = "easy") -> None:
    """Write the clips, the manifest, ``captioner.jsonl`` and ``moments.jsonl``.

    The third has captions of the training videos as a captioning model would write them. The last says, for each
    caption of the manifest, when the scenes that it describes are shown (seconds).

    In ``val`` and ``test`` each caption fits one video of the gallery only.

    Args:
        out: the directory.
        sizes: videos of ``train``, ``val`` and ``test``.
        seed: of all random choices.
        difficulty: ``easy``: three scenes, a caption describes one with its background; ``medium``: the same, with six
            captions a video in ``val`` and ``test``; ``hard``: four scenes, a caption describes two.

    Raises:
        UserError: more videos of a gallery than there are different scenes.
    """
    import numpy as np
    from tqdm import tqdm

    most = {"easy": len(SCENES) // 2, "medium": len(SCENES) // 3, "hard": 10**6}[difficulty]
    for split in ("val", "test"):
        if sizes[split] > most:
            raise UserError(f"--{split} is {sizes[split]}; at most {most} videos have different scenes")
    choose = {"easy": _choose_easy, "medium": _choose_medium, "hard": _choose_hard}[difficulty]
    writable_dir(out / "videos")
    rows, captioner_rows, moments = [], [], []
    with tqdm(total=sum(sizes.values()), desc="videos", unit="video") as bar:
        for split_number, (split, size) in enumerate(sizes.items()):
            rng = np.random.default_rng((seed, split_number))
            for number, (scenes, described_scenes) in enumerate(choose(size, split == "train", rng)):
                room = np.arange(1, NUM_FRAMES // 4)
                cuts = np.sort(rng.choice(room, len(scenes) - 1, replace=False)) * 4
                lengths = np.diff([0, *cuts, NUM_FRAMES])
                video_id = f"{split}{number:05d}"
                frames = [render(SCENES[s], int(n), SIDE, rng) for s, n in zip(scenes, lengths)]
                write_video(out / "videos" / f"{video_id}.mp4", np.concatenate(frames))
                if difficulty != "hard":
                    captions = [caption(SCENES[s], rng, new_words=True) for (s,) in described_scenes]
                else:
                    captions = [caption_of_two([SCENES[s] for s in pair], rng) for pair in described_scenes]
                rows.append({"id": video_id, "path": f"videos/{video_id}.mp4", "captions": captions, "split": split})
                edges = [0, *np.cumsum(lengths).tolist()]
                shown = {s: [a / FPS, b / FPS] for s, (a, b) in zip(scenes, pairwise(edges))}
                moments.append({"id": video_id, "moments": [[shown[s] for s in some] for some in described_scenes]})
                if split == "train":
                    words = [caption(SCENES[s], rng, new_words=True) for s in scenes]
                    captioner_rows.append({"id": video_id, "captions": words, "source": "the generator"})
                bar.update()
    for name, content in (("manifest.jsonl", rows), ("captioner.jsonl", captioner_rows), ("moments.jsonl", moments)):
        (out / name).write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog=program("python shards/demo_data.py"), description=__doc__)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--train", type=int, default=1000, help="training videos")
    parser.add_argument("--val", type=int, default=100, help="validation videos")
    parser.add_argument("--test", type=int, default=200, help="test videos; a few are left out if --difficulty is hard")
    parser.add_argument("--difficulty", choices=("easy", "medium", "hard"), default="easy")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sizes = {s: getattr(arguments, s) for s in ("train", "val", "test")}
    generate(arguments.out, sizes, arguments.seed, arguments.difficulty)


if __name__ == "__main__":
    run_command(main)
