"""Where the runs, data and towers of one reproduction lie."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from launch.paper.systems import PUBLISHED_NOISE, SIZES, SYSTEMS, Size


@dataclass(frozen=True)
class Layout:
    """Where everything of one reproduction lies."""

    data: str
    size_name: str
    seeds: int
    steps: int | None
    out: Path

    @property
    def size(self) -> Size:
        """How much of everything."""
        return SIZES[self.size_name]

    @property
    def base(self) -> Path:
        """Directory of this data set's runs and page."""
        return self.out / f"{self.data}-{self.size_name}"

    def runs(self, system: str) -> list[Path]:
        """A system's run directories, one a seed."""
        return [self.base / system / f"seed-{seed}" for seed in range(self.seeds)]

    def towers(self, seed: int) -> Path:
        """Towers of the embedded benchmark that a seed starts from; seed 0 has the committed ones."""
        return self.base / f"towers-{seed if self.size.own_towers else 0}"

    def of(self, data: str) -> Layout:
        """The same of another data set, beside this one."""
        return replace(self, data=data)

    def overrides(self, system: str, seed: int) -> list[str]:
        """What a run differs in from its data set's page."""
        one = SYSTEMS[system]
        found = [f"seed={seed}", f"run_dir={self.base / system / f'seed-{seed}'}", f"data.batch_size={one.batch_size}"]
        if self.data == "demo":
            found += PUBLISHED_NOISE
            towers = self.towers(seed)
            found += [f"data.{split}={self.base / 'data' / split}" for split in ("train", "val", "test")]
            found += [f"model.architecture={towers / 'demo.json'}", f"model.pretrained={towers / 'demo.safetensors'}"]
        if self.steps is not None:
            steps = self.steps if one.as_many_steps else max(1, self.steps * 32 // one.batch_size)
            found += [f"max_steps={steps}", f"eval_every={max(1, steps // 6)}"]
        if one.captions:
            found.append(f"data.captions=[{self.captions()}]")
        return [*found, *one.overrides]

    def captions(self) -> Path:
        """What a captioner said of the training videos."""
        return self.base / "data" / "captioner.jsonl" if self.data == "demo" else Path("captions.jsonl")

    def missing_data(self) -> str | None:
        """Why this data set cannot be run here, if so."""
        from tmass_dist.config import load_config
        from tmass_dist.training.checks import load_splits

        if self.data == "demo":
            return None
        try:
            load_splits(load_config(f"{self.data}.yaml", []))
        except ValueError as error:
            return str(error)
        return None
