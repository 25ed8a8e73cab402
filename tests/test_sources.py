"""The data sets' own annotation files, as published, and the files of users, with all their mistakes."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from shards.sources import read_rows
from tests.conftest import ROOT
from tmass_dist.errors import UserError

SHARED = ROOT.parent / "shared"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _msrvtt(directory: Path) -> None:
    _write(directory / "MSRVTT_train.9k.csv", "video_id\nvideo0\nvideo1\n")
    _write(directory / "MSRVTT_train.7k.csv", "video_id\nvideo1\n")
    _write(directory / "MSRVTT_JSFUSION_test.csv", 'key,vid_key,video_id,sentence\nret0,msr9,video9,"a man, sings"\n')
    sentences = [{"caption": f"c{i % 3}", "video_id": f"video{i // 4}", "sen_id": i} for i in range(8)]
    _write(directory / "MSRVTT_data.json", json.dumps({"sentences": sentences, "videos": []}))


def _others(directory: Path) -> None:
    clip = "1012_Unbreakable_00.05.16.065-00.05.21.941"
    lines = [f'"{clip}\t1\t2\t1\t2\tHe "runs.', f"{clip}\t1\t2\t1\t2\tHe stops.", "a_b_00.01\t1\t2\t1\t2\tA dog."]
    _write(directory / "LSMDC16_annos_training.csv", "\n".join(lines) + "\n")
    _write(
        directory / "didemo_train_label.csv",
        "success,video_path,starts,ends,text,formatted_data\n"
        'True,/home/x/1@N04_2.3_ab.m4v,tensor([[0]]),tensor([[31]]),"one\ntwo",/x.pth\n'
        "True,/home/x/2@N04_5_cd,tensor([0]),tensor([31]),three,/y.pth\n",
    )
    raw = [{"videoID": "-5xGs_000055_000065", "enCap": ["a", "b"], "chCap": ["c"]}]
    _write(directory / "vatex_training_v1.0.json", json.dumps(raw))
    _write(directory / "train_list.txt", "-5xGs_000055_000065\n")
    header = "id,subject,scene,quality,relevance,verified,script,objects,descriptions,actions,length\n"
    rows = 'AB1,x,Kitchen,6,7,Yes,"A person, cooks",pan;pot,A man cooks.;He eats.,c092 11.90 21.20;c147 0.00 12.60,30\n'
    rows += "CD2,x,Room,6,7,Yes,She sleeps,bed,A nap.,,12\n"
    _write(directory / "Charades_v1_train.csv", header + rows)


def test_each_data_set_is_read_as_published(tmp_path: Path) -> None:
    _msrvtt(tmp_path)
    _others(tmp_path)
    videos = tmp_path / "videos"
    for name in ("2@N04_5_cd.mov", "video0.webm"):
        _write(videos / name, "")
    rows, counts = read_rows("msrvtt", tmp_path, videos, "train")
    assert [row["captions"] for row in rows] == [["c0", "c1", "c2", "c0"], ["c1", "c2", "c0", "c1"]]
    assert rows[0]["path"] == "video0.webm" and "2 videos, 8 captions (published: 9000 videos)" in counts
    assert [row["id"] for row in read_rows("msrvtt", tmp_path, videos, "train-7k")[0]] == ["video1"]
    rows, _ = read_rows("lsmdc", tmp_path, videos, "train")
    assert rows[0]["id"] == "1012_Unbreakable_00.05.16.065-00.05.21.941"
    assert rows[0]["captions"] == ['He "runs.', "He stops."]
    assert rows[0]["path"] == f"1012_Unbreakable/{rows[0]['id']}.avi"
    rows, _ = read_rows("didemo", tmp_path, videos, "train")
    assert [(r["id"], r["path"], r["captions"], r["end"]) for r in rows] == [
        ("1@N04_2.3_ab", "1@N04_2.3_ab.m4v", ["one two"], 31.0),
        ("2@N04_5_cd", "2@N04_5_cd.mov", ["three"], 31.0),
    ]
    rows, _ = read_rows("vatex", tmp_path, videos, "train")
    assert [(r["id"], r["captions"]) for r in rows] == [("-5xGs_000055_000065", ["a", "b"])]
    rows, _ = read_rows("charades", tmp_path, videos, "train")
    assert rows[0]["captions"] == ["A man cooks. He eats."] and rows[0]["actions"][0] == ["c092", 11.9, 21.2]
    assert rows[1]["actions"] == [] and rows[1]["script"] == "She sleeps"


@pytest.mark.parametrize(
    ("source", "name", "content", "message"),
    [
        ("msrvtt", "MSRVTT_train.9k.csv", "video\nvideo0\n", "lacks the column video_id"),
        ("msrvtt", "MSRVTT_train.9k.csv", "video_id\nvideo77\n", "no caption of 1 videos.*video77"),
        ("lsmdc", "LSMDC16_annos_training.csv", "a\tb\n", "line 1 has 2 fields and not 6"),
        ("didemo", "didemo_train_label.csv", "video_path,starts,ends,text\n/a.mp4,none,,t\n", "a.mp4 has no window"),
        ("vatex", "train_list.txt", "abc\n", "no caption of 1 videos of train_list.txt: abc"),
        ("charades", "Charades_v1_train.csv", "id\nA\n", "lacks the column"),
        ("charades", "Charades_v1_train.csv", "id,script,descriptions,actions\n", "has a header and no rows"),
        ("charades", "Charades_v1_train.csv", "id,script,descriptions,actions\nA,s,d,c1 2\n", "the action 'c1 2'"),
        ("didemo", "didemo_train_label.csv", "video_path,starts,ends,text\n/a.mp4,1,2,a cat, asleep\n", "has 5 cells"),
        ("didemo", "didemo_train_label.csv", "video_path,starts,ends,text\n/a.mp4,1.2.3,9,t\n", "no number of seconds"),
        ("msrvtt", "MSRVTT_data.json", "[]", "does not hold a list"),
        ("msrvtt", "MSRVTT_data.json", '{"sentences": [{"video_id": 3}]}', "entry 1 has no video_id and caption"),
        ("msrvtt", "MSRVTT_data.json", "{", "is not JSON"),
        ("vatex", "vatex_training_v1.0.json", "[[]]", "entry 1 has no videoID"),
        ("vatex", "vatex_training_v1.0.json", '{"v": 3}', "enCap of v is not a list"),
    ],
)
def test_a_wrong_annotation_file_is_named(tmp_path: Path, source: str, name: str, content: str, message: str) -> None:
    _msrvtt(tmp_path)
    _others(tmp_path)
    _write(tmp_path / name, content)
    with pytest.raises(UserError, match=message):
        read_rows(source, tmp_path, tmp_path, "train")
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=r"no .* in "):
        read_rows(source, tmp_path, tmp_path, "train")
    with pytest.raises(UserError, match="has no split 'dev'"):
        read_rows(source, tmp_path, tmp_path, "dev")


OWN_FILES = {  # file, content, message
    "comma": ("captions.csv", "file,caption\nv.mp4,a cat jumps, then sleeps\n", "line 2 has 3 cells .* double quotes"),
    "comma and split": ("captions.csv", "file,caption,split\nv.mp4,a cat, asleep,train\n", "line 2 has 4 cells"),
    "too few cells": ("captions.csv", "file,caption,split\nv.mp4,a cat,train\nw.mp4,a\n", "line 3 has 2 cells"),
    "quote open to the end": ("captions.csv", 'file,caption\nv.mp4,"a cat\nw.mp4,a dog\n', "line 2: .*quote"),
    "quote closed by the next": ("captions.csv", 'file,caption\nv.mp4,"a cat\nw.mp4,"a dog"\n', "line 2: .*quote"),
    "quote closed by the next row": ("captions.csv", 'file,caption\nv.mp4,"a cat\nw.mp4,a dog"\n', "line 2: a quote"),
    "header only": ("captions.csv", "file,caption\n", "has a header and no rows"),
    "empty table": ("captions.csv", "", "is empty"),
    "no caption": ("captions.csv", "file,caption\na.mp4,\n", "line 2 has no file or no caption"),
    "no file": ("captions.csv", "file,caption\n,a\n", "line 2 has no file or no caption"),
    "no column": ("captions.csv", "name,caption\na,b\n", "lacks the column file"),
    "NUL": ("captions.csv", "file,caption\na\0.mp4,b\n", "is not a path"),
    "start": ("captions.csv", "file,caption,start\na.mp4,b,soon\n", "line 2: start is 'soon'"),
    "endless start": ("captions.csv", "file,caption,start\na.mp4,b,nan\n", "start of 'a' is nan"),
    "end before start": ("captions.csv", "file,caption,start,end\na.mp4,b,5,2\n", "ends at 2.0 s, before it starts"),
    "not JSON": ("captions.jsonl", "{\n", "line 1 is not JSON"),
    "not an object": ("captions.jsonl", "[1]\n", "line 1 is not a JSON object"),
    "deep": ("captions.jsonl", "[" * 100_000 + "\n", "line 1 is not JSON"),
    "no lines": ("captions.jsonl", "\n", "has no lines"),
    "caption is a number": ("captions.jsonl", '{"file": "a.mp4", "caption": 3}\n', "'a' has no caption"),
    "half a character": ("captions.jsonl", '{"file": "a.mp4", "caption": "\\ud800"}\n', "'a' has no caption"),
    "only spaces": ("captions.jsonl", '{"file": "a.mp4", "caption": "  "}\n', "'a' has no caption"),
    "outside": ("captions.jsonl", '{"file": "../a.mp4", "caption": "b"}\n', "outside the directory"),
}


@pytest.mark.parametrize("mistake", OWN_FILES)
def test_a_mistake_in_your_own_file_is_named(tmp_path: Path, mistake: str) -> None:
    name, content, message = OWN_FILES[mistake]
    _write(tmp_path / name, content)
    with pytest.raises(UserError, match=message) as raised:
        read_rows("folder", None, tmp_path, "train")
    assert str(tmp_path) in str(raised.value)


def test_captions_may_have_commas_quotes_and_lines(tmp_path: Path) -> None:
    table = 'file,caption\nv.mp4,"a cat jumps, then sleeps"\nv.mp4,"a ""black"" cat"\nw.mp4,"two\nlines"\n'
    _write(tmp_path / "captions.csv", table)
    rows, _ = read_rows("folder", None, tmp_path, "train")
    assert [row["captions"] for row in rows] == [["a cat jumps, then sleeps", 'a "black" cat'], ["two\nlines"]]
    _write(tmp_path / "captions.jsonl", json.dumps({"file": "v.mp4", "caption": "a\u2028b"}, ensure_ascii=False))
    assert read_rows("folder", None, tmp_path, "train")[0][0]["captions"] == ["a\u2028b"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_accepted_in_every_file(tmp_path: Path, encoding: str) -> None:
    _msrvtt(tmp_path)
    _others(tmp_path)
    manifest = json.dumps({"id": "a", "path": "a.mp4", "captions": ["b"], "split": "train"}) + "\n"
    _write(tmp_path / "manifest.jsonl", manifest)
    _write(tmp_path / "texts" / "v.txt", "a caption\n")
    _write(tmp_path / "table" / "captions.csv", "file,caption\nv.mp4,a caption\n")
    _write(tmp_path / "lines" / "captions.jsonl", '{"file": "v.mp4", "caption": "a caption"}\n' * 2)
    directories = {name: tmp_path for name in ("msrvtt", "lsmdc", "didemo", "vatex", "charades")}

    def read() -> list[Any]:
        rows = [read_rows(name, directory, tmp_path, "train")[0] for name, directory in directories.items()]
        rows += [read_rows("manifest", tmp_path / "manifest.jsonl", tmp_path, "train")[0]]
        return rows + [read_rows("folder", None, tmp_path / name, "train")[0] for name in ("texts", "table", "lines")]

    _write(tmp_path / "texts" / "v.mp4", "")
    plain = read()
    for path in [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".mp4"]:
        path.write_bytes(path.read_text(encoding="utf-8").encode(encoding))
    assert read() == plain


def test_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "captions.csv").write_bytes("file,caption\na.mp4,café\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"captions\.csv line 2 is not in UTF-8"):
        read_rows("folder", None, tmp_path, "train")


@pytest.mark.parametrize("caption", ["a cat", None, {"a": 1}, ["a", 3], []])
def test_vatex_captions_must_be_a_list_of_texts(tmp_path: Path, caption: Any) -> None:
    """Of a string, each letter was taken for a caption."""
    _others(tmp_path)
    _write(tmp_path / "train_list.txt", "v\n")
    _write(tmp_path / "vatex_training_v1.0.json", json.dumps([{"videoID": "v", "enCap": caption}]))
    with pytest.raises(UserError, match=r"enCap of v is not a list|'v' has no caption"):
        read_rows("vatex", tmp_path, tmp_path, "train")


REAL = SHARED / "annotations"


@pytest.mark.skipif(not REAL.is_dir(), reason="the real annotation files lie only in ../shared/annotations")
def test_the_real_annotation_files(tmp_path: Path) -> None:
    for split, number in (("train", 8362), ("val", 1062), ("test", 1004)):
        rows, counts = read_rows("didemo", REAL / "DiDeMo", tmp_path, split)
        assert len(rows) == number and f"{number} videos" in counts and "published" in counts
        assert all((row["start"], row["end"]) == (0, 31) and "\n" not in row["captions"][0] for row in rows)
    rows, _ = read_rows("msrvtt", REAL / "MSRVTT", tmp_path, "test")
    assert len(rows) == 1000 and len({row["captions"][0] for row in rows}) == 995
    # The captions of MSR-VTT's training videos are not there: one for each listed id stands in.
    ids = [line for line in (REAL / "MSRVTT" / "MSRVTT_train.9k.csv").read_text().split()[1:]]
    shutil.copytree(REAL / "MSRVTT", tmp_path / "m")
    os.chmod(tmp_path / "m", 0o755)
    sentences = [{"video_id": i, "caption": "a"} for i in ids]
    (tmp_path / "m" / "MSRVTT_data.json").write_text(json.dumps({"sentences": sentences}))
    train, _ = read_rows("msrvtt", tmp_path / "m", tmp_path, "train")
    assert len(train) == 9000 and not {r["id"] for r in train} & {r["id"] for r in rows}
    (tmp_path / "v").mkdir()
    shutil.copy(REAL / "VATEX" / "vatex_raw_format_sample.json", tmp_path / "v" / "vatex_sample.json")
    (tmp_path / "v" / "test_list.txt").write_text("5-xGskbsBgI_000055_000065\n")
    assert len(read_rows("vatex", tmp_path / "v", tmp_path, "test")[0][0]["captions"]) == 10
