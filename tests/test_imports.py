"""The dependency rule: who may import whom, and which file is the one door to which outside world."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOORS = {
    "torch.distributed": {"tmass_dist/distributed.py"},
    "deepspeed": {"tmass_dist/engine/zero.py"},
    "open_clip": {"tmass_dist/models/backbone.py"},
    "submitit": {"launch/cluster.py", "launch/job.py"},
    "torch.utils.tensorboard": {"tmass_dist/monitor.py"},
    "omegaconf": {"tmass_dist/config.py"},
}
FILES = sorted(p for folder in ("tmass_dist", "launch", "shards") for p in (ROOT / folder).rglob("*.py"))


def _imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_file_imports_only_what_it_may(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    for imported in _imported(path):
        if name.startswith("tmass_dist/"):
            assert imported.split(".")[0] not in ("launch", "shards"), f"{name} imports {imported}"
        for world, doors in DOORS.items():
            if imported == world or imported.startswith(world + "."):
                assert name in doors, f"{name} imports {imported}; its door is {doors}"
