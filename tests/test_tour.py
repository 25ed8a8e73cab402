"""The notebook of docs/: executed on a small run, and committed with outputs that fit."""

import re
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.conftest import ROOT, run
from tests.test_evaluate_run import make_run

NOTEBOOK = ROOT / "docs" / "tour.ipynb"


def _outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def test_the_tour_runs_from_its_first_cell_to_its_last(
    data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nbclient import NotebookClient

    directory = make_run(data, tmp_path / "run")
    done = run("-m", "tmass_dist.evaluate", "--run", str(directory))
    assert done.returncode == 0, done.stderr
    test = Path(next(override.partition("=")[2] for override in data if override.startswith("data.test=")))
    monkeypatch.setenv("TMASS_RUN", str(directory))
    monkeypatch.setenv("TMASS_VIDEOS", str(test.parent / "v" / "videos"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    shutil.copy(NOTEBOOK, tmp_path)
    notebook = nbformat.read(tmp_path / NOTEBOOK.name, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    # It raises if a cell fails.
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = _outputs(notebook)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    text = "".join(output.get("text", "") for output in outputs)
    assert "14 videos, 96 dimensions" in text and "mean correlation over 14 texts" in text
    assert len(re.findall(r"^\d\.\d{3}  test", text, re.MULTILINE)) == 5


def test_the_committed_outputs_are_complete_small_and_of_no_machine() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert NOTEBOOK.stat().st_size < 400_000
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(output.output_type != "error" and output.get("name") != "stderr" for output in _outputs(notebook))
    assert sum("image/png" in output.get("data", {}) for output in _outputs(notebook)) == 4
    assert not re.search(r"/(home|root|work|tmp)/", NOTEBOOK.read_text(encoding="utf-8"))
