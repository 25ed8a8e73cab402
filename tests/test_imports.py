"""The order of the rooms: imports run one way, and each outside library has one module that may call it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {
    "torch.distributed": {"tmass_dist/distributed.py"},
    "deepspeed": {"tmass_dist/training/engine.py"},
    "open_clip": {"tmass_dist/models/backbone.py"},
    "submitit": {"launch/cluster.py", "launch/job.py"},
    "torch.utils.tensorboard": {"tmass_dist/training/monitor.py"},
    "omegaconf": {"tmass_dist/config.py"},
    "jinja2": {"tmass_dist/pages.py", "launch/paper/page.py"},
}
"""The modules that may import a library."""

ORDER = (
    {
        "tmass_dist.errors",
        "tmass_dist.cli",
        "tmass_dist.config",
        "tmass_dist.noise",
        "tmass_dist.pages",
        "tmass_dist.pictures",
        "tmass_dist.phase_timer",
    },
    {"tmass_dist.distributed"},
    {"tmass_dist.models"},
    {"tmass_dist.data"},
    {"tmass_dist.evaluation"},
    {"tmass_dist.training"},
    {"tmass_dist.train", "tmass_dist.evaluate", "tmass_dist.export", "tmass_dist.convert"},
    {"shards"},
    {"launch"},
    {"launch.paper"},
    {"launch.reproduce"},
)
"""From the foundation up: a room imports itself and the rooms before it."""

FILES = sorted(p for folder in ("tmass_dist", "launch", "shards") for p in (ROOT / folder).rglob("*.py"))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}


def _imported(path: Path) -> set[str]:
    """Every name that a file imports, wherever in it, also only for type checking."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _own_imports(module: str) -> set[str]:
    """Modules of this project that ``module`` imports."""
    return {name for name in _imported(MODULES[module]) if name in MODULES and name != module}


def _place(module: str) -> tuple[int, str]:
    """Place in ``ORDER`` and room of a module: its longest prefix there.

    Raises:
        LookupError: the module is in no room.
    """
    prefix = module
    while prefix:
        for place, rooms in enumerate(ORDER):
            if prefix in rooms:
                return place, prefix
        prefix = prefix.rpartition(".")[0]
    raise LookupError(f"{module} is in no room of ORDER")


def _is_package_root(module: str) -> bool:
    return module == "tmass_dist"  # it imports nothing when it is imported


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_library_is_imported_by_its_modules_only(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    for imported in _imported(path):
        for library, modules in OUTSIDE.items():
            if imported == library or imported.startswith(library + "."):
                assert name in modules, f"{name} imports {imported}; only {modules} may"


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"tmass_dist"}))
def test_no_import_runs_back_up(module: str) -> None:
    place, room = _place(module)
    for imported in _own_imports(module) - {"tmass_dist"}:
        there, other = _place(imported)
        assert other == room or there < place or (there == place and room == module), f"{module} imports {imported}"


def test_there_is_no_circle() -> None:
    graph = {module: _own_imports(module) for module in MODULES}
    while leaves := {module for module, imports in graph.items() if not imports}:
        graph = {module: imports - leaves for module, imports in graph.items() if module not in leaves}
    assert not graph, f"these modules import each other: {sorted(graph)}"
