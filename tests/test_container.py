"""The recipes of the container: the lock fits pyproject.toml; their steps work in an empty environment."""

import importlib.metadata
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT

FOLDER = ROOT / "launch" / "container"
LOCK = FOLDER / "requirements.lock"


def _locked() -> dict[str, tuple[str, list[str]]]:
    """Version and checksums of each package."""
    packages: dict[str, tuple[str, list[str]]] = {}
    text = LOCK.read_text().replace("\\\n", " ")
    for line in text.splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            requirement, *hashes = line.split(" --hash=")
            name, _, version = requirement.strip().partition("==")
            packages[canonicalize_name(name)] = version.split(";")[0].strip(), [value.strip() for value in hashes]
    return packages


def _extras() -> set[str]:
    """The extras that ``make lock`` locks."""
    return set(re.findall(r"--extra (\w+)", (ROOT / "Makefile").read_text()))


def test_every_package_of_the_lock_has_a_version_and_checksums() -> None:
    packages = _locked()
    assert len(packages) > 80
    for name, (version, hashes) in packages.items():
        assert version and hashes, name
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", value) for value in hashes), name


def test_the_lock_fits_the_requirements() -> None:
    packages = _locked()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = list(project["dependencies"])
    assert _extras() <= project["optional-dependencies"].keys()
    for extra in _extras():
        lines += project["optional-dependencies"][extra]
    for requirement in map(Requirement, lines):
        if requirement.name != "tmass-dist":
            version = packages[canonicalize_name(requirement.name)][0]
            assert requirement.specifier.contains(version), f"{requirement}: locked {version}; run make lock"


def test_the_lock_holds_what_its_own_packages_need() -> None:
    """Of the packages that are installed here in the locked version, every requirement is locked and fits."""
    packages = _locked()
    compared = 0
    for name, (version, _) in packages.items():
        try:
            installed = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if installed.version != version:
            continue
        compared += 1
        for requirement in map(Requirement, installed.requires or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                needed = packages.get(canonicalize_name(requirement.name))
                assert needed is not None, f"{name} needs {requirement}"
                assert requirement.specifier.contains(needed[0], prereleases=True), f"{name} needs {requirement}"
    assert compared > 40


def _dockerfile() -> list[list[str]]:
    lines = (FOLDER / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.strip() and not line.startswith("#")]


def _definition() -> dict[str, list[str]]:
    """Lines of each section of the Apptainer definition; its header under ``""``."""
    sections: dict[str, list[str]] = {"": []}
    name = ""
    for line in (FOLDER / "tmass-dist.def").read_text().splitlines():
        if line.startswith("%"):
            name = line.removeprefix("%").strip()
            sections[name] = []
        elif line.strip() and not line.startswith("#"):
            sections[name].append(line.strip())
    return sections


def test_both_recipes_copy_the_same_files_which_exist() -> None:
    copied: set[tuple[str, str]] = set()
    for instruction, *words in _dockerfile():
        assert instruction in {"FROM", "COPY", "RUN", "ARG", "ENV", "WORKDIR", "CMD"}
        if instruction == "COPY":
            *sources, target = words
            assert len(sources) == 1 or target.endswith("/")
            copied |= {(source, target + Path(source).name if target.endswith("/") else target) for source in sources}
    assert copied == {tuple(line.split()) for line in _definition()["files"]}
    allowed = [line[1:] for line in (FOLDER / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"]
    for source, target in copied:
        assert (ROOT / source).exists() and target == f"/opt/tmass-dist/{source}"
        assert source.split("/")[0] in allowed
    for folder in allowed:  # what the package needs to be built is there
        assert (ROOT / folder).exists()
    for needed in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "tmass_dist", "configs"):
        assert (needed, f"/opt/tmass-dist/{needed}") in copied


def test_both_recipes_start_from_the_same_image_and_run_the_same_steps() -> None:
    sections, docker = _definition(), _dockerfile()
    header = yaml.safe_load("\n".join(sections[""]))
    assert header == {"Bootstrap": "docker", "From": next(words[1] for words in docker if words[0] == "FROM")}
    steps = re.compile(r"install\.sh (\w+)")
    in_docker = [step for words in docker if words[0] == "RUN" for step in steps.findall(" ".join(words))]
    assert in_docker == steps.findall("\n".join(sections["post"])) == ["system", "libraries", "package"]
    assert set(sections) == {"", "files", "post", "environment", "runscript", "test"}
    subprocess.run(["sh", "-n", FOLDER / "install.sh"], check=True)
    assert os.access(FOLDER / "install.sh", os.X_OK)


GPU_PACKAGES = re.compile(r"(torch|torchvision|triton|nvidia-[\w-]+|cuda-[\w-]+)==")
"""Gigabytes; this test takes them from the environment that it runs in."""


@pytest.mark.slow
def test_the_steps_of_the_recipes_give_a_working_environment(tmp_path: Path) -> None:
    """``install.sh`` in an empty environment, with the lock as it is but for torch, then the commands of the image."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if not name.startswith(("tests/", "docs/", "benchmarks/")):
            (tmp_path / "tmass-dist" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "tmass-dist" / name).write_bytes((ROOT / name).read_bytes())
    folder = tmp_path / "tmass-dist" / "launch" / "container"
    blocks = re.split(r"\n(?=[a-z])", LOCK.read_text())
    kept = [block for block in blocks if not GPU_PACKAGES.match(block)]
    assert len(blocks) - len(kept) > 10
    (folder / "requirements.lock").write_text("\n".join(kept))
    keep = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment = keep | {"VENV": str(tmp_path / "venv"), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    step = ["sh", str(folder / "install.sh")]
    done = subprocess.run([*step, "libraries"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    site = next((tmp_path / "venv").glob("lib/*/site-packages"))
    for package in ("torch", "torchvision"):
        found = importlib.metadata.distribution(package)
        for entry in {path.parts[0] for path in found.files or [] if path.parts[0] not in ("..", "bin")}:
            source = Path(str(found.locate_file(entry)))
            if source.exists() and not (site / entry).exists():
                (site / entry).symlink_to(source)
    done = subprocess.run([*step, "package"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    def tmass(*arguments: str) -> str:
        command = [str(tmp_path / "venv" / "bin" / "tmass"), *arguments]
        done = subprocess.run(command, env=keep, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    # Its exit code is that of the whole machine: here SLURM may be half installed.
    done = subprocess.run(
        [str(tmp_path / "venv" / "bin" / "tmass"), "doctor", "--json"], env=keep, cwd=tmp_path, capture_output=True
    )
    findings = {found["name"]: found for found in map(json.loads, done.stdout.splitlines())}
    assert [name for name, found in findings.items() if found["verdict"] == "problem" and name != "SLURM"] == []
    assert all(extra in findings["packages"]["found"] for extra in _extras())
    assert "--nodes" in tmass("submit", "--help")  # launch/ is found beside the package
    python = tmp_path / "venv" / "bin" / "python"
    # PyPI's torchvision beside a CPU build of torch needs the first line.
    code = "from tmass_dist.models.library import usable_torchvision as first; first()\n"
    code += (
        "import tmass_dist.training.loop, tmass_dist.retrieval.model, tmass_dist.web.app, s3fs, peft, optuna, usearch"
    )
    subprocess.run([str(python), "-c", code], env=keep, cwd=tmp_path, check=True)
