"""What the sections of the reproduction's page are made of: published and measured rows, from finished runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from launch.paper.measure import columns_over_seeds, gain_over_seeds, is_finished, mean_and_deviation, measure
from tmass_dist.evaluation.report import COLUMNS

if TYPE_CHECKING:
    from launch.paper.layout import Layout
    from launch.paper.radii import Radii

PUBLISHED = "published (published code, see protocol)"
TITLES = {
    "msrvtt": "MSR-VTT 1k-A",
    "lsmdc": "LSMDC",
    "didemo": "DiDeMo",
    "vatex": "VATEX",
    "charades": "Charades",
    "demo": "embedded benchmark",
}
"""Name of each data set on the page."""

SeedPairs = list[tuple[dict[str, Any], dict[str, Any]]]
"""Measurements of two systems, seed by seed."""


@dataclass(frozen=True)
class Row:
    """One row of a table.

    ``kind`` is how the page shows it: ``published`` by the paper; ``missing``, with the reason; measured under the
    ``query_conditioned`` protocol, which is the comparable one; or ``other``.
    """

    cells: list[str]
    kind: Literal["published", "missing", "query_conditioned", "other"] = "other"


@dataclass(frozen=True)
class Section:
    """A table, its pictures (caption and PNG), and a note that explains them."""

    title: str
    note: str
    columns: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    pictures: list[tuple[str, bytes]] = field(default_factory=list)


class Results:
    """The finished runs of one reproduction, and the paper's numbers.

    Args:
        layout: where the runs are.
        missing_data: why this data set cannot be run on this machine, or None.
    """

    def __init__(self, layout: Layout, missing_data: str | None) -> None:
        import yaml

        self.layout, self.missing_data = layout, missing_data
        path = Path(__file__).with_name("published.yaml")
        self.published: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))

    @property
    def data_title(self) -> str:
        """Name of the data set that is reproduced."""
        return TITLES[self.layout.data]

    def finished(self, system: str) -> list[Path]:
        """Run directories of the seeds that are trained and evaluated."""
        return [run for run in self.layout.runs(system) if is_finished(run)]

    def seed_pairs(self, first: str, second: str) -> SeedPairs:
        """Measurements of two systems for every seed that both have finished."""
        both = zip(self.layout.runs(first), self.layout.runs(second))
        return [(measure(one), measure(other)) for one, other in both if is_finished(one) and is_finished(other)]

    def published_row(self, label: str, values: list[float]) -> Row:
        """The paper's numbers."""
        return Row([label, PUBLISHED, *(f"{value:.1f}" for value in values)], "published")

    def measured_rows(self, label: str, system: str, data: str | None = None, **options: Any) -> list[Row]:
        """A row for each protocol, or one row that says why there is none.

        Args:
            label: first cell.
            system: a key of ``SYSTEMS``.
            data: another data set, reproduced into the same output directory; by default this one.
            options: of :func:`launch.paper.measure.columns_over_seeds`.
        """
        data = data or self.layout.data
        runs = [run for run in self.layout.for_data(data).runs(system) if is_finished(run)]
        rows: list[Row] = []
        for protocol in ("published_code", "query_conditioned") if runs else ():
            source = f"{TITLES[data]}, {protocol}, {count_seeds(runs)}"
            cells = [label, source, *columns_over_seeds(runs, protocol=protocol, **options)]
            rows.append(Row(cells, "query_conditioned" if protocol == "query_conditioned" else "other"))
        if rows:
            return rows
        reason = f"not measured here: --data {data}"
        if data == self.layout.data:
            untrained = f"not trained yet: {self.layout.runs(system)[0]}"
            reason = f"no data: {self.missing_data}" if self.missing_data else untrained
        return [Row([label, reason, *[""] * len(COLUMNS)], "missing")]

    @cached_property
    def radii(self) -> Radii | None:
        """Radii of the first finished seed of T-MASS, which Figure 2 and Figures 3 to 10 share."""
        from launch.paper.radii import Radii

        runs = self.finished("tmass")
        return Radii(runs[0]) if runs else None


def count_seeds(runs: list[Any]) -> str:
    """``1 seed`` or ``3 seeds``."""
    return f"{len(runs)} seed{'s' if len(runs) > 1 else ''}"


def gain_cells(pairs: SeedPairs) -> tuple[str, str]:
    """Gain in R@1 over the seeds, and its 95 % interval."""
    if not pairs:
        return "-", ""
    gains, low, high = gain_over_seeds(pairs)
    return mean_and_deviation(gains), f"{low:+.1f} to {high:+.1f}"
