"""``tmass doctor`` on this machine, on one that lacks things, and on one where things are broken."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tmass_dist import doctor


def examine(*options: str, **environment: str) -> tuple[int, list[str]]:
    ended = subprocess.run(
        [sys.executable, "-m", "tmass_dist.doctor", *options],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in ended.stderr
    return ended.returncode, ended.stdout.splitlines()


def test_a_machine_without_programs_has_notes_and_no_problem(tmp_path: Path) -> None:
    code, lines = examine("--json", PATH="", HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    findings = {finding["name"]: finding for finding in map(json.loads, lines)}
    assert code == 0
    assert list(findings) == ["python", "packages", "GPUs", "SLURM", "video", "disk", "shared memory", "weights"]
    assert findings["SLURM"] == {
        "name": "SLURM",
        "verdict": "note",
        "found": "no sbatch on the PATH",
        "remedy": "use --cluster local, or a login node",
    }
    assert findings["weights"]["verdict"] == "note"
    assert findings["weights"]["remedy"].startswith("HF_HUB_OFFLINE is set: run `tmass weights fetch ViT-B-32")
    assert findings["python"]["verdict"] == findings["packages"]["verdict"] == findings["video"]["verdict"] == "ok"


def test_a_slurm_that_does_not_answer_is_a_problem(tmp_path: Path) -> None:
    for name in ("sbatch", "sinfo"):
        program = tmp_path / name
        program.write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2\nexit 1\n")
        program.chmod(0o755)
    code, lines = examine(PATH=f"{tmp_path}{os.pathsep}/bin{os.pathsep}/usr/bin")
    assert code == 1
    [line] = [line for line in lines if line.startswith("problem")]
    assert line.split(maxsplit=2)[1:] == [
        "SLURM",
        "sinfo failed: Unable to contact slurm controller; ask the cluster's administrators",
    ]


def test_a_missing_package_and_a_check_that_fails_are_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "deepspeed" else version(name))

    def video_decoders() -> doctor.Finding:
        raise OSError("libavcodec.so:\n cannot open shared object file")

    monkeypatch.setattr(doctor, "CHECKS", (doctor.packages, video_decoders))
    missing, failed = doctor.examine()
    assert missing.verdict == "problem" and missing.found.startswith("deepspeed") and "(missing)" in missing.found
    assert failed == doctor.Finding(
        "video decoders",
        "problem",
        "OSError: libavcodec.so: cannot open shared object file",
        "see docs/troubleshooting.md",
    )
