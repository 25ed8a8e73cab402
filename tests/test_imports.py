"""The order of packages: imports go one way, and each wrapped library is imported only by the modules that wrap it."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {
    "torch.distributed": {"tmass_dist/distributed.py", "launch/simulation.py"},
    "deepspeed": {"tmass_dist/training/engine.py", "tmass_dist/training/zero.py"},
    "open_clip": {"tmass_dist/models/library.py"},
    "submitit": {"launch/cluster.py", "launch/job.py", "launch/local.py"},
    "torch.utils.tensorboard": {"tmass_dist/loggers/tensorboard.py"},
    "wandb": {"tmass_dist/loggers/trackers.py"},
    "trackio": {"tmass_dist/loggers/trackers.py"},
    "optuna": {"launch/tune.py"},
    "pebble": {"shards/pack_pool.py"},
    "webdataset": {"shards/shard_writer.py"},
    "peft": {"tmass_dist/models/adapters.py"},
    "mteb": {"tmass_dist/retrieval/mteb.py"},
    "datasets": {"tmass_dist/retrieval/mteb.py"},
    "usearch": {"tmass_dist/evaluation/search.py"},
    "starlette": {"tmass_dist/web/app.py", "tmass_dist/serve.py"},
    "uvicorn": {"tmass_dist/serve.py"},
    "omegaconf": {"tmass_dist/config/loading.py"},
    "jinja2": {"tmass_dist/pages.py", "launch/paper/page.py"},
}
"""The modules that may import a library."""

ORDER = (
    {"tmass_dist.errors"},
    {
        "tmass_dist.cli",
        "tmass_dist.config",
        "tmass_dist.noise",
        "tmass_dist.pages",
        "tmass_dist.pictures",
        "tmass_dist.phase_timer",
        "tmass_dist.network",
        "tmass_dist.score_labels",
        "tmass_dist.precision",
        "tmass_dist.revision",
    },
    {"tmass_dist.loggers"},
    {"tmass_dist.distributed"},
    {"tmass_dist.models"},
    {"tmass_dist.data"},
    {"tmass_dist.evaluation"},
    {"tmass_dist.retrieval"},
    {"tmass_dist.web"},
    {"tmass_dist.audit"},
    {"tmass_dist.training"},
    {
        "tmass_dist.train",
        "tmass_dist.evaluate",
        "tmass_dist.export",
        "tmass_dist.convert",
        "tmass_dist.settings",
        "tmass_dist.weights",
        "tmass_dist.doctor",
        "tmass_dist.index",
        "tmass_dist.search",
        "tmass_dist.serve",
    },
    {"tmass_dist.__main__"},
    {"shards"},
    {"launch"},
    {"launch.paper"},
    {"launch.reproduce", "launch.long_runs"},
)
"""Packages from the bottom up: each imports only itself and those before it."""

FILES = sorted(p for folder in ("tmass_dist", "launch", "shards") for p in (ROOT / folder).rglob("*.py"))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}


def _imported(path: Path) -> set[str]:
    """Every name that a file imports, also inside functions and for type checking only."""
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
    """Position in ``ORDER`` of a module, and its package: the longest prefix of its name that is listed.

    Raises:
        LookupError: none is listed.
    """
    prefix = module
    while prefix:
        for place, rooms in enumerate(ORDER):
            if prefix in rooms:
                return place, prefix
        prefix = prefix.rpartition(".")[0]
    raise LookupError(f"{module} is missing in ORDER")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_library_is_imported_only_by_its_modules(path: Path) -> None:
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
    graph = {module: _own_imports(module) - {"tmass_dist"} for module in MODULES if module != "tmass_dist"}
    while leaves := {module for module, imports in graph.items() if not imports}:
        graph = {module: imports - leaves for module, imports in graph.items() if module not in leaves}
    assert not graph, f"circular imports: {sorted(graph)}"


def test_the_picture_in_the_docs_has_this_order() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    [picture] = re.findall(r"```mermaid\n(.*?)```", text, flags=re.DOTALL)
    nodes = {name: set(label.split(", ")) for name, label in re.findall(r'(\w+)\["(.+?)"\]', picture)}
    arrows = re.findall(r"^ *(.* --> .*)$", picture, flags=re.MULTILINE)
    chain = list(dict.fromkeys(name for line in arrows for name in line.split(" --> ")))
    rooms = [{room.removeprefix("tmass_dist.") for room in place} for place in ORDER]
    assert [nodes[name] for name in chain] == rooms
