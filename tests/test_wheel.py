"""The wheel, installed beside the libraries of this environment and used from an empty folder."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.conftest import ROOT

SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "tmass_dist", "configs")


@pytest.fixture(scope="module")
def tmass(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tmass`` of a new virtual environment that has the wheel, and sees the libraries of the current one."""
    base = tmp_path_factory.mktemp("wheel")
    source = base / "source"
    source.mkdir()
    # A copy: setuptools writes build/ beside the sources. Only tracked files, as in a clean clone.
    tracked = subprocess.run(["git", "ls-files", *SOURCES], cwd=ROOT, capture_output=True, text=True)
    names = tracked.stdout.splitlines()
    assert names, tracked.stderr
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(base), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(base / "venv")], check=True)
    [wheel] = base.glob("*.whl")
    python = base / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", str(wheel)], check=True)
    site = next((base / "venv").glob("lib/*/site-packages"))
    # The libraries by a path after the wheel's own; an editable install of this project there comes later too.
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.with_name("tmass")


def _run(command: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([str(command), *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


def test_the_wheel_is_used_with_its_version_its_types_and_its_configs(tmass: Path, tmp_path: Path) -> None:
    assert _run(tmass, "--version", cwd=tmp_path).stdout.startswith("tmass-dist 0.")
    code = (
        "import tmass_dist, pathlib; from tmass_dist.config import load_config, find_config\n"
        "print(pathlib.Path(tmass_dist.__file__).with_name('py.typed').is_file())\n"
        "print(load_config('vatex.yaml').run_dir, find_config('vatex.yaml'))\n"
        "from tmass_dist.models.tmass import build_model\n"
        "print(build_model(load_config('demo.yaml').model).towers.embed_dim)\n"
        "folder = pathlib.Path(tmass_dist.__file__).parent\n"
        "assert (folder / 'templates/base.html').is_file() and (folder / 'web/static/index.html').is_file()"
    )
    done = _run(tmass.with_name("python"), "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    typed, config, width = done.stdout.splitlines()
    assert typed == "True" and width == "96"
    assert config.split()[0] == "runs/vatex" and Path(config.split()[1]).is_relative_to(tmass.parents[1])


def test_an_unknown_config_lists_those_of_the_wheel(tmass: Path, tmp_path: Path) -> None:
    done = _run(tmass, "train", "--config", "vatx.yaml", cwd=tmp_path)
    assert done.returncode == 2 and "vatex.yaml" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(("name", "script"), [("submit", "launch/submit.py"), ("pack", "shards/make_shards.py")])
def test_commands_of_the_repository_say_that_they_need_a_checkout(
    tmass: Path, tmp_path: Path, name: str, script: str
) -> None:
    done = _run(tmass, name, "--help", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == f"error: tmass {name} needs a checkout of the repository; run it there as python {script}\n"
