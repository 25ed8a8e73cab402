"""Run the tests against a sample of mutants and print which of them no test noticed.

Each mutant is written into a copy of the repository. Its tests run in a process forked from this one, which has
imported the libraries; modules of the project are imported again. Results are appended mutant by mutant, so a run may
be stopped and started again.

Example:
    python -m tests.mutation --out build/mutants.jsonl
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.mutation.mutants import Mutant, sample

ROOT = Path(__file__).resolve().parents[2]
EQUIVALENT = Path(__file__).with_name("equivalent.json")
"""Mutants that behave as the original, with the reason of each."""
COPIED = ("tmass_dist", "tests", "shards", "launch", "configs", "benchmarks", "pyproject.toml", "README.md", "docs")
LIBRARIES = ("tests.preload", "pytest", "_pytest.assertion.rewrite", "hypothesis", "torch.utils.data", "webdataset")
LIBRARIES += ("simplejpeg", "fsspec", "safetensors.torch", "tqdm", "psutil", "jinja2")
CPU_LIMIT_S, MEMORY_LIMIT = 300, 8 * 2**30
"""For the tests of a stage; a mutant that exceeds a limit is killed."""

ORDER = "tests/test_loader.py::test_every_pair_once_and_no_video_twice_in_a_batch"
QUICK_LOSS = "tests/test_columns.py tests/test_objective.py -k 'not ranks_and_tiles'"
TWO_RANKS = "tests/test_objective.py -k 'ranks_and_tiles and 2'"
LOSS = "tests/test_objective.py tests/test_engine.py tests/test_placement.py"
QUICK_SCORES = "tests/test_null.py tests/test_scoring.py tests/test_blocks.py"
QUICK_RANKS = "tests/test_null.py tests/test_blocks.py tests/test_evaluation.py -k 'not test_evaluation or streamed'"
SCORES = "tests/test_evaluation.py tests/test_model.py tests/test_search.py tests/test_baselines.py"
STAGES: dict[str, list[str]] = {
    "tmass_dist/data/order.py": [f"tests/test_order.py {ORDER}", "tests/test_loader.py tests/test_streaming.py"],
    "tmass_dist/data/index.py": [
        "tests/test_index.py",
        "tests/test_loader.py tests/test_captions.py tests/test_remote.py",
    ],
    "tmass_dist/data/index_checks.py": ["tests/test_index.py", "tests/test_foreign_tars.py"],
    "tmass_dist/training/losses.py": [QUICK_LOSS, TWO_RANKS, LOSS],
    "tmass_dist/training/columns.py": [QUICK_LOSS, TWO_RANKS, LOSS],
    "tmass_dist/training/objective.py": [QUICK_LOSS, TWO_RANKS, LOSS],
    "tmass_dist/evaluation/ranking.py": [QUICK_RANKS, SCORES],
    "tmass_dist/evaluation/scoring.py": [QUICK_SCORES, SCORES],
    "tmass_dist/evaluation/blocks.py": ["tests/test_blocks.py", SCORES],
    "tmass_dist/training/checkpoint.py": [
        "tests/test_saving.py",
        "tests/test_checkpoint.py tests/test_run_directory.py",
    ],
}
"""Modules with their tests, quick ones first; later stages run for the mutants that survive the earlier ones."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300, help="mutants of the sample")
    parser.add_argument("--seed", type=int, default=21)
    parser.add_argument("--module", action="append", choices=STAGES, help="only these modules")
    parser.add_argument("--out", type=Path, default=Path("build/mutants.jsonl"), help="results, one line a mutant")
    parser.add_argument("--stages", type=int, default=3, help="sets of tests of each module, quick ones first")
    parser.add_argument("--again", action="store_true", help="run the surviving mutants again")
    arguments = parser.parse_args()
    mutants = sample(ROOT, list(STAGES), arguments.count, arguments.seed)
    mutants = [mutant for mutant in mutants if not arguments.module or mutant.module in arguments.module]
    equivalent: dict[str, str] = json.loads(EQUIVALENT.read_text(encoding="utf-8"))
    results = _read(arguments.out)
    if arguments.again:
        results = {key: result for key, result in results.items() if result["result"] != "survived"}
    pending = [m for m in mutants if m.id not in results and m.id not in equivalent]
    if pending:
        for name in LIBRARIES:
            importlib.import_module(name)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="mutants-") as tree:
            _copy(Path(tree))
            runner = _Runner(Path(tree))
            for number, mutant in enumerate(pending):
                stages = STAGES[mutant.module][: arguments.stages]
                result = _test(runner, mutant, stages, number)
                results[mutant.id] = result
                with arguments.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(result) + "\n")
                print(f"{number + 1}/{len(pending)} {result['result']}: {_words(mutant)}", flush=True)
    _report(mutants, results, equivalent)


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """Results so far; the last line may be incomplete, and later lines of a mutant replace earlier ones."""
    results = {}
    for line in path.read_text(encoding="utf-8").split("\n") if path.is_file() else ():
        if line.endswith("}"):
            result = json.loads(line)
            results[result["id"]] = result
    return results


def _copy(tree: Path) -> None:
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tree / name)


def _test(runner: _Runner, mutant: Mutant, stages: list[str], number: int) -> dict[str, Any]:
    for tests in stages:
        runner.check(tests)
    path, began = runner.tree / mutant.module, time.monotonic()
    original, outcome = path.read_text(encoding="utf-8"), ""
    try:
        path.write_text(mutant.source, encoding="utf-8")
        os.utime(path, (number + 1, number + 1))  # Python recognises a changed file by its time and size
        for tests in stages:
            if outcome := runner.run(tests, runner.limits_s[tests])[0]:
                break
    finally:
        path.write_text(original, encoding="utf-8")
        os.utime(path, (0, 0))
    facts = {"module": mutant.module, "line": mutant.line, "operator": mutant.operator, "after": mutant.after}
    result = {"result": "killed" if outcome else "survived", "by": outcome}
    return {"id": mutant.id} | result | {"seconds": round(time.monotonic() - began, 1)} | facts


class _Runner:
    """Runs tests on a copy of the repository, in forked processes."""

    def __init__(self, tree: Path) -> None:
        self.tree = tree
        self.limits_s: dict[str, float] = {}
        """Time limit of each set of tests, measured without a mutant."""

    def check(self, tests: str) -> None:
        """Run the tests once without a mutant, and end the program if one fails."""
        if tests in self.limits_s:
            return
        began = time.monotonic()
        failure, log = self.run(tests, 1800)
        if failure:
            sys.exit(f"{failure} without a mutant, in {tests}\n{log}")
        self.limits_s[tests] = 60 + 6 * (time.monotonic() - began)

    def run(self, tests: str, limit_s: float) -> tuple[str, str]:
        """The first test that failed, the limit that was exceeded, or "" if all passed; and the end of the log."""
        log = self.tree / "log"
        log.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            try:
                os._exit(_child(self.tree, shlex.split(tests), log))
            except BaseException:
                os._exit(99)
        deadline, code = time.monotonic() + limit_s, None
        while code is None and time.monotonic() < deadline:
            time.sleep(0.05)
            done, status = os.waitpid(child, os.WNOHANG)
            code = os.waitstatus_to_exitcode(status) if done else None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # also what a test has left behind
        if code is None:
            os.waitpid(child, 0)
            return "time limit", ""
        text = log.read_text(errors="replace") if log.is_file() else ""
        failed = [line.split(" - ")[0] for line in text.splitlines() if line.startswith(("FAILED ", "ERROR "))]
        return "" if code == 0 else failed[0] if failed else f"exit code {code}", text[-4000:]


def _child(tree: Path, tests: list[str], log: Path) -> int:
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT_S, CPU_LIMIT_S))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT, MEMORY_LIMIT))
    os.chdir(tree)
    for name in [*sys.modules]:
        if name.split(".")[0] in ("tests", "tmass_dist", "shards", "launch"):
            del sys.modules[name]
    sys.path[:] = [str(tree), *(path for path in sys.path if path not in ("", str(ROOT)))]
    importlib.invalidate_caches()
    os.environ["PYTHONPATH"] = str(tree)
    # It declares operators of torchvision once in a process, and this one inherited them.
    importlib.import_module("tmass_dist.models.library")._kept_libraries.append(None)
    import pytest

    if tests == ["tests/test_saving.py"]:  # its process computes nothing, so the ranks can be forked from it: quicker
        importlib.import_module("tests.forked").START_METHOD = "fork"  # type: ignore[attr-defined]

    options = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "-m", "not slow and not slurm"]
    return int(pytest.main([*options, f"--rootdir={tree}", f"--basetemp={tree}/tmp", *tests]))


def _words(mutant: Mutant) -> str:
    return f"{mutant.module}:{mutant.line} {mutant.operator.split('/')[-1]}: {mutant.after} [{mutant.id}]"


def _report(mutants: list[Mutant], results: dict[str, dict[str, Any]], equivalent: dict[str, str]) -> None:
    """Print the table of modules and the mutants that survived."""
    counts: dict[str, Counter[str]] = {module: Counter() for module in (*STAGES, "all")}
    survivors = []
    for mutant in mutants:
        kind = "equivalent" if mutant.id in equivalent else results[mutant.id]["result"]
        counts[mutant.module][kind] += 1
        counts["all"][kind] += 1
        if kind == "survived":
            survivors.append(mutant)
    print(f"{'module':40}  mutants  equivalent  killed  survived  share killed")
    for module, count in counts.items():
        tested = count["killed"] + count["survived"]
        share = f"{count['killed'] / tested:.1%}" if tested else "-"
        numbers = f"{count.total():7}  {count['equivalent']:10}  {count['killed']:6}  {count['survived']:8}"
        print(f"{module:40}  {numbers}  {share:>12}")
    for mutant in survivors:
        print(f"survived: {_words(mutant)}\n  was: {mutant.before}")


if __name__ == "__main__":
    main()
