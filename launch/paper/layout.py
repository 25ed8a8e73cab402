"""Paths and settings of the runs, data and towers of one reproduction."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from launch.paper.systems import PUBLISHED_NOISE, SIZES, SYSTEMS, Size


@dataclass(frozen=True)
class Layout:
    """Paths and settings of one reproduction."""

    data: str
    """Data set, one of ``systems.DATA``."""
    size_name: str
    """A key of ``systems.SIZES``."""
    seeds: int
    """Runs of each system, with seeds 0, 1, ..."""
    steps: int | None
    """Training steps at batch 32; None keeps those of the data set's page."""
    out: Path
    """Output directory of all data sets and sizes."""

    @property
    def size(self) -> Size:
        """Steps, videos and seeds."""
        return SIZES[self.size_name]

    @property
    def base(self) -> Path:
        """Directory of this data set's runs and page."""
        return self.out / f"{self.data}-{self.size_name}"

    def runs(self, system: str) -> list[Path]:
        """A system's run directories, one for each seed."""
        return [self.base / system / f"seed-{seed}" for seed in range(self.seeds)]

    def towers(self, system: str, seed: int) -> Path:
        """Weights of the embedded benchmark's pretrained towers of a system for a seed; ``.json`` describes them."""
        name = "demo-patch4" if SYSTEMS[system].finer_patches else "demo"
        return self.base / f"towers-{seed if self.size.own_towers else 0}" / f"{name}.safetensors"

    def for_data(self, data: str) -> Layout:
        """The layout of another data set in the same output directory."""
        return replace(self, data=data)

    def overrides(self, system: str, seed: int) -> list[str]:
        """Overrides of a run on its data set's page."""
        spec = SYSTEMS[system]
        run_dir = self.base / system / f"seed-{seed}"
        settings = [f"seed={seed}", f"run_dir={run_dir}", f"data.batch_size={spec.batch_size}"]
        if self.data == "demo":
            settings += PUBLISHED_NOISE
            towers = self.towers(system, seed)
            settings += [f"data.{split}={self.base / 'data' / split}" for split in ("train", "val", "test")]
            settings += [f"model.architecture={towers.with_suffix('.json')}", f"model.pretrained={towers}"]
        elif spec.finer_patches:
            settings.append("model.architecture=ViT-B-16-quickgelu")
        if self.steps is not None:
            steps = self.steps if spec.as_many_steps else max(1, self.steps * 32 // spec.batch_size)
            settings += [f"max_steps={steps}", f"eval_every={max(1, steps // 6)}"]
        if spec.captions:
            settings.append(f"data.captions=[{self.captions()}]")
        return [*settings, *spec.overrides]

    def captions(self) -> Path:
        """File of a captioner's captions for the training videos."""
        return self.base / "data" / "captioner.jsonl" if self.data == "demo" else Path("captions.jsonl")

    def missing_data(self) -> str | None:
        """Why this data set cannot be run on this machine; None if it can."""
        from tmass_dist.config import load_config
        from tmass_dist.training.checks import load_splits

        if self.data == "demo":
            return None
        try:
            load_splits(load_config(f"{self.data}.yaml", []))
        except ValueError as error:
            return str(error)
        return None
