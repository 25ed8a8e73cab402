"""Write extra captions of packed videos by an image-text-to-text model, with the model's name as their source.

``python shards/caption_videos.py data/msrvtt/train`` writes ``data/msrvtt/train/captions.jsonl``; training uses it if
``data.captions=[captions.jsonl]`` is set. Needs ``pip install -e '.[captions]'``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tmass_dist.cli import program, run_command, share_of, write_text  # noqa: E402
from tmass_dist.data.index import Index, load_index  # noqa: E402
from tmass_dist.errors import UserError  # noqa: E402

MODEL = "llava-hf/llava-1.5-7b-hf"
PROMPT = "Describe what happens in this picture in one sentence."


class Captioner:
    """A model that describes a picture in one sentence.

    Args:
        name: an image-text-to-text model of transformers, or a directory that holds one.
        prompt: the question about each picture.
        max_tokens: longest answer.

    Raises:
        UserError: transformers is missing, or the model cannot be loaded.
    """

    def __init__(self, name: str, prompt: str, max_tokens: int) -> None:
        import torch

        from tmass_dist.models.library import usable_torchvision

        usable_torchvision()
        try:
            from transformers import AutoModelForImageTextToText, AutoProcessor
        except ImportError as error:
            raise UserError(f"captions need {error.name or 'transformers'}: pip install -e '.[captions]'") from error
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        kind = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        try:
            self.processor: Any = AutoProcessor.from_pretrained(name)
            model: Any = AutoModelForImageTextToText.from_pretrained(name, dtype=kind)
            self.model = model.to(self.device).eval()
        except (OSError, ValueError) as error:
            line = str(error).strip().splitlines()[0]
            raise UserError(f"the model {name} cannot be loaded: {line}; --model may name a local directory") from error
        self.max_tokens = max_tokens
        if self.processor.tokenizer.pad_token is None:
            self.processor.tokenizer.pad_token = self.processor.tokenizer.eos_token
        self.processor.tokenizer.padding_side = "left"
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        chat = [{"role": "user", "content": content}]
        self.text = self.processor.apply_chat_template(chat, add_generation_prompt=True)

    def __call__(self, pictures: list[Any]) -> list[str]:
        """Captions of PIL pictures, in order."""
        import torch

        inputs = self.processor(images=pictures, text=[self.text] * len(pictures), padding=True, return_tensors="pt")
        inputs = inputs.to(self.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        with torch.inference_mode():
            tokens = self.model.generate(**inputs, max_new_tokens=self.max_tokens, do_sample=False)
        answers = self.processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [" ".join(answer.split()) for answer in answers]


def _described(path: Path) -> tuple[set[str], int]:
    """Ids that are described, and the number of bytes of complete lines: a kill may leave half a line."""
    if not path.is_file():
        return set(), 0
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    return {json.loads(line)["id"] for line in content[:whole].split(b"\n") if line}, whole


def describe(
    index: Index, path: Path, captioner: Captioner, source: str, frames: int, batch: int, part: tuple[int, int]
) -> None:
    """Append a line (``id``, ``captions``, ``source``) to ``path`` for every video of a part that has none yet.

    Args:
        index: the packed split.
        path: of the file of captions.
        captioner: the model.
        source: the model's name.
        frames: pictures of each video that are described.
        batch: videos at a time.
        part: ``(i, n)``: every ``n``-th video from the ``i``-th.
    """
    import numpy as np
    from PIL import Image
    from tqdm import tqdm

    from tmass_dist.data.samples import read_into

    done, whole = _described(path)
    numbers = [n for n in range(part[0], len(index), part[1]) if index.id_of(n) not in done]
    side = index.image_size
    with path.open("ab") as file, tqdm(total=len(numbers), desc="describe", unit="video") as bar:
        file.truncate(whole)
        for start in range(0, len(numbers), batch):
            chosen = numbers[start : start + batch]
            pictures = np.empty((len(chosen), frames, side, side, 3), np.uint8)
            for row, number in enumerate(chosen):
                read_into(pictures[row], index, number)
            answers = captioner([Image.fromarray(picture) for video in pictures for picture in video])
            for row, number in enumerate(chosen):
                # Frames of one shot often get the same description.
                texts = list(dict.fromkeys(filter(None, answers[row * frames : (row + 1) * frames])))
                entry = {"id": index.id_of(number), "captions": texts, "source": source}
                file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
            file.flush()
            bar.update(len(chosen))


def merge(index: Index, path: Path, parts: list[Path]) -> None:
    """Put the parts of a job array together, in the order of the split.

    Raises:
        UserError: no part describes some videos.
    """
    lines: dict[str, str] = {}
    for file in parts:
        for line in file.read_text(encoding="utf-8").split("\n"):  # str.splitlines also splits at U+2028
            if line:
                lines[json.loads(line)["id"]] = line
    missing = [video for video in index.ids if video not in lines]
    if missing:
        raise UserError(f"{len(missing)} videos are not described yet: {', '.join(missing[:5])}")
    write_text(path, "".join(lines[video] + "\n" for video in index.ids))
    for file in parts:
        file.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(prog=program("python shards/caption_videos.py"), description=__doc__)
    parser.add_argument("directory", type=Path, help="a packed split")
    parser.add_argument("--model", default=MODEL, help=f"a model of transformers, or a directory ({MODEL})")
    parser.add_argument("--prompt", default=PROMPT, help=f"the question about each picture ({PROMPT})")
    parser.add_argument("--frames", type=int, default=4, help="pictures of each video that are described (4)")
    parser.add_argument("--batch-size", type=int, default=4, help="videos at a time (4)")
    parser.add_argument("--max-tokens", type=int, default=40, help="longest caption (40)")
    parser.add_argument("--name", default="captions.jsonl", help="file name in the split's directory (captions.jsonl)")
    parser.add_argument("--part", metavar="I/N", help="every N-th video from the I-th; --merge puts the parts together")
    parser.add_argument("--merge", action="store_true", help="put the parts of a job array together")
    arguments = parser.parse_args()
    for name in ("frames", "batch_size", "max_tokens"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    index = load_index(arguments.directory)
    path = arguments.directory / arguments.name
    if arguments.merge:
        merge(index, path, sorted(arguments.directory.glob(f"{arguments.name}.part-*")))
    else:
        part = (0, 1)
        if arguments.part:
            part = share_of(arguments.part, "--part")
            path = path.with_name(f"{path.name}.part-{part[0]:05d}")
        captioner = Captioner(arguments.model, arguments.prompt, arguments.max_tokens)
        describe(index, path, captioner, arguments.model, arguments.frames, arguments.batch_size, part)
    print(f"{path}: {len(_described(path)[0])} videos")


if __name__ == "__main__":
    run_command(main)
