"""Extra captions: written by a tiny random LLaVA of the real class, used by the loader if the config names them."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.conftest import run
from tmass_dist.config import DataConfig
from tmass_dist.data.index import load_index
from tmass_dist.data.loader import TrainLoader
from tmass_dist.data.samples import read_sample
from tmass_dist.models.backbone import WordTokenizer
from tmass_dist.models.library import usable_torchvision


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model and a processor as LLaVA's are kept."""
    pytest.importorskip("transformers", reason="the captioner needs pip install -e '.[captions]'")
    usable_torchvision()
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    out = tmp_path_factory.mktemp("llava")
    words = ["<unk>", "<pad>", "<s>", "</s>", "<image>", *(f"word{k}" for k in range(40))]
    words += ["USER", "ASSISTANT", ":", "Describe", "what", "happens", "in", "this", "picture", "one", "sentence", "."]
    base = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="<unk>"))
    base.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=base, **special, extra_special_tokens={"image_token": "<image>"}
    )
    tokenizer.chat_template = (
        "{% for m in messages %}USER : {% for c in m['content'] %}{% if c['type'] == 'image' %}<image> "
        "{% else %}{{ c['text'] }}{% endif %}{% endfor %} ASSISTANT :{% endfor %}"
    )
    pictures = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = LlavaProcessor(
        pictures, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    processor.chat_template = tokenizer.chat_template
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=32, patch_size=8, **sizes),
        text_config=LlamaConfig(vocab_size=len(words), max_position_embeddings=256, **sizes),
        image_token_index=words.index("<image>"),
        vision_feature_layer=-2,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 3, 1
    model.save_pretrained(out)
    processor.save_pretrained(out)
    return out


def _split(data: list[str], tmp_path: Path) -> Path:
    source = next(o for o in data if o.startswith("data.val=")).removeprefix("data.val=")
    shutil.copytree(source, tmp_path / "split")
    return tmp_path / "split"


def _describe(split: Path, llava: Path, *more: str) -> str:
    done = run("shards/caption_videos.py", str(split), "--model", str(llava), "--max-tokens", "6", *more)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_videos_are_described_resumed_and_shared_out_alike(data: list[str], llava: Path, tmp_path: Path) -> None:
    split = _split(data, tmp_path)
    index = load_index(split)
    assert f"{len(index)} videos" in _describe(split, llava)
    whole = (split / "captions.jsonl").read_bytes()
    entries = [json.loads(line) for line in whole.splitlines()]
    assert [entry["id"] for entry in entries] == index.ids
    assert all(1 <= len(entry["captions"]) <= 4 and entry["source"] == str(llava) for entry in entries)
    # Killed in the middle of a line.
    (split / "captions.jsonl").write_bytes(whole[: len(whole) // 2])
    _describe(split, llava)
    assert (split / "captions.jsonl").read_bytes() == whole
    # The tasks of an array.
    (split / "captions.jsonl").unlink()
    _describe(split, llava, "--part", "1/2")
    done = run("shards/caption_videos.py", str(split), "--merge")
    assert done.returncode == 2 and "not described yet" in done.stderr
    _describe(split, llava, "--part", "0/2")
    assert run("shards/caption_videos.py", str(split), "--merge").returncode == 0
    assert (split / "captions.jsonl").read_bytes() == whole


def test_a_job_array_describes_and_merges(data: list[str], llava: Path, tmp_path: Path) -> None:
    split = _split(data, tmp_path)
    submit = ["launch/submit.py", "--cluster", "local", "--job", "captions", "--config", "demo.yaml", *data]
    done = run(*submit, "--run-dir", str(tmp_path / "run"))
    assert done.returncode == 2 and "--job captions needs --describe" in done.stderr
    describe = f"{split} --model {llava} --max-tokens 6"
    done = run(*submit, "--run-dir", str(tmp_path / "run"), "--tasks", "2", "--describe", describe)
    assert done.returncode == 0, done.stderr
    assert len((split / "captions.jsonl").read_text().splitlines()) == len(load_index(split))
    assert not list(split.glob("*.part-*"))


def test_training_uses_extra_captions(data: list[str], tmp_path: Path) -> None:
    split = _split(data, tmp_path)
    index = load_index(split)
    entries = [{"id": video, "captions": [f"of {video}", "more"], "source": "x"} for video in index.ids[:5]]
    (split / "captions.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    more = index.with_captions("captions.jsonl")
    assert more.num_captions.sum() == index.num_captions.sum() + 10
    assert read_sample(more, 2)[0]["captions"] == [*read_sample(index, 2)[0]["captions"], f"of {index.ids[2]}", "more"]
    config = DataConfig(batch_size=2, num_workers=0)
    loader = TrainLoader(more, config, rank=0, world_size=1, seed=0, tokenize=WordTokenizer(["a"], 8))
    stream = loader.batches(0)
    seen = [caption for _ in range(loader.steps_per_epoch) for caption in next(stream).captions]
    packed = [caption for number in range(len(index)) for caption in read_sample(index, number)[0]["captions"]]
    assert sorted(seen) == sorted([*packed, *(caption for entry in entries for caption in entry["captions"])])
    train = next(o for o in data if o.startswith("data.val=")).replace("data.val=", "data.train=")
    command = ["-m", "tmass_dist.train", "--config", "demo.yaml", *data, train, f"run_dir={tmp_path / 'run'}"]
    done = run(*command, f"data.captions=[{split / 'captions.jsonl'}]", "max_steps=2", "eval_every=2")
    assert done.returncode == 0, done.stderr


def test_wrong_files_of_captions_are_one_line(data: list[str], tmp_path: Path) -> None:
    index = load_index(_split(data, tmp_path))
    with pytest.raises(ValueError, match=r"no file of captions nowhere\.jsonl"):
        index.with_captions("nowhere.jsonl")
    file = tmp_path / "c.jsonl"
    for content, message in (
        ("{", "line 1 is not a JSON object"),
        ('{"id": "x"}', "line 1 has no id .* with captions"),
        ('{"id": "stranger", "captions": ["a"]}', "has no caption for any video"),
    ):
        file.write_text(content + "\n")
        with pytest.raises(ValueError, match=message):
            index.with_captions(file)
    done = run("shards/caption_videos.py", str(tmp_path / "split"), "--model", str(tmp_path))
    assert done.returncode == 2 and "Traceback" not in done.stderr and "cannot be loaded" in done.stderr
