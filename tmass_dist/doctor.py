"""Say what works on this machine and what is missing: ``python -m tmass_dist.doctor [--json]``.

Each line is ``ok``, ``note`` (something is absent, and the demo works without it) or ``problem`` (something is required
and absent, or present and broken), with the remedy. The exit code is 1 if there is a problem.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from tmass_dist.cli import program, run_command

GB = 10**9
MIN_FREE_BYTES, MIN_SHARED_BYTES = 10 * GB, GB
DECODERS = ("h264", "hevc", "vp9", "av1", "mpeg4")
"""Codecs of the videos that the public data sets hold."""


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    name: str
    verdict: Literal["ok", "note", "problem"]
    found: str
    remedy: str = ""


def python() -> Finding:
    version = platform.python_version()
    required = importlib.metadata.metadata("tmass-dist")["Requires-Python"] or ""
    from packaging.specifiers import SpecifierSet

    if version in SpecifierSet(required):
        return Finding("python", "ok", f"{version}, {len(os.sched_getaffinity(0))} CPUs")
    return Finding("python", "problem", f"{version}, but tmass-dist needs {required}", "install another Python")


def packages() -> Finding:
    """The packages that tmass-dist requires, and the extras that are complete."""
    from packaging.requirements import Requirement

    extras = importlib.metadata.metadata("tmass-dist").get_all("Provides-Extra") or []
    requirements = [Requirement(line) for line in importlib.metadata.requires("tmass-dist") or []]

    def unmet(extra: str) -> list[str]:
        lines = []
        for one in requirements:
            is_own = one.marker is None or one.marker.evaluate({"extra": ""})
            if one.name != "tmass-dist" and (is_own if not extra else not is_own and _applies(one, extra)):
                installed = _version(one.name)
                if installed is None or not one.specifier.contains(installed, prereleases=True):
                    lines.append(f"{one.name}{one.specifier} ({installed or 'missing'})")
        return lines

    missing = unmet("")
    if missing:
        return Finding("packages", "problem", ", ".join(missing), "pip install tmass-dist")
    complete = [extra for extra in extras if not unmet(extra)]
    lacking = [extra for extra in extras if extra not in complete]
    found = f"all required ones; extras: {', '.join(complete) or 'none'}"
    if lacking:
        found += f"; without {', '.join(lacking)}"
    return Finding("packages", "ok", found)


def _applies(requirement: object, extra: str) -> bool:
    marker = getattr(requirement, "marker", None)
    return marker is not None and marker.evaluate({"extra": extra})


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def torch_and_gpus() -> Finding:
    import torch
    from torch.cuda import nccl

    build = f"torch {torch.__version__}"
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_properties(k) for k in range(torch.cuda.device_count())]
        names = ", ".join(f"{gpu.name} ({gpu.total_memory / GB:.0f} GB)" for gpu in gpus)
        nccl_version = ".".join(map(str, nccl.version()))
        precision = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16: engine.bf16 stays off"
        return Finding("GPUs", "ok", f"{build}, CUDA {torch.version.cuda}, NCCL {nccl_version}, {precision}: {names}")
    if Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi"):
        remedy = "install a build of torch for the driver's CUDA version; `nvidia-smi` shows it"
        if torch.version.cuda is not None:
            remedy = "check the driver with `nvidia-smi`, and CUDA_VISIBLE_DEVICES"
        return Finding("GPUs", "problem", f"{build} sees none of this machine's GPUs", remedy)
    return Finding("GPUs", "note", f"{build}; no GPU here", "the demo runs on CPUs; submit jobs for GPUs with --gpus")


def slurm() -> Finding:
    if not shutil.which("sbatch") or not shutil.which("sinfo"):
        return Finding("SLURM", "note", "no sbatch on the PATH", "use --cluster local, or a login node")
    answer = subprocess.run(
        ["sinfo", "--noheader", "--format=%P %a %D nodes %G"], capture_output=True, text=True, timeout=10, check=False
    )
    if answer.returncode:
        line = " ".join(answer.stderr.split())
        return Finding("SLURM", "problem", f"sinfo failed: {line}", "ask the cluster's administrators")
    return Finding("SLURM", "ok", "; ".join(answer.stdout.split("\n")).strip("; "))


def video_decoders() -> Finding:
    import av

    lacking = [name for name in DECODERS if name not in av.codecs_available]
    found = f"PyAV {av.__version__}, ffmpeg's libavcodec {'.'.join(map(str, av.library_versions['libavcodec']))}"
    if lacking:
        return Finding("video", "problem", f"{found}, without {', '.join(lacking)}", "pip install av: it has them all")
    return Finding("video", "ok", f"{found}: {', '.join(DECODERS)}")


def disk() -> Finding:
    here = Path.cwd()
    free = shutil.disk_usage(here).free
    if not os.access(here, os.W_OK):
        return Finding("disk", "note", f"{here} cannot be written", "run jobs where run directories can be written")
    found = f"{free / GB:.1f} GB free in {here}"
    if free < MIN_FREE_BYTES:
        return Finding("disk", "note", found, "checkpoints and shards need more; set run_dir to another file system")
    return Finding("disk", "ok", found)


def shared_memory() -> Finding:
    size = shutil.disk_usage("/dev/shm").total
    found = f"{size / GB:.1f} GB in /dev/shm"
    if size < MIN_SHARED_BYTES:
        return Finding("shared memory", "note", found, "in a container: --shm-size=8g; workers pass batches through it")
    return Finding("shared memory", "ok", found)


def weights() -> Finding:
    """The pretrained towers of msrvtt.yaml, the largest download of a first run."""
    from tmass_dist.config import load_config
    from tmass_dist.models import pretrained

    model = load_config("msrvtt.yaml").model
    found = f"{model.pretrained} of {model.architecture}"
    if model.pretrained is None or pretrained.cached_weights(model.architecture, model.pretrained):
        return Finding("weights", "ok", f"{found} in the cache")
    fetch = f"`tmass weights fetch {model.architecture} {model.pretrained}`"
    remedy = f"downloaded at the first start, or by {fetch}"
    if reason := pretrained.why_unreachable():
        remedy = f"{reason}: run {fetch} on a machine with internet, and set model.pretrained to its file"
    return Finding("weights", "note", f"{found} not in the cache", remedy)


CHECKS: tuple[Callable[[], Finding], ...] = (
    python,
    packages,
    torch_and_gpus,
    slurm,
    video_decoders,
    disk,
    shared_memory,
    weights,
)


def examine() -> list[Finding]:
    """Run every check; one that cannot run is a problem and says why."""
    findings = []
    for check in CHECKS:
        try:
            findings.append(check())
        except Exception as error:
            line = re.sub(r"\s+", " ", str(error)).strip() or "no message"
            name = check.__name__.replace("_", " ")
            findings.append(Finding(name, "problem", f"{type(error).__name__}: {line}", "see docs/troubleshooting.md"))
    return findings


def main() -> None:
    parser = argparse.ArgumentParser(prog=program("python -m tmass_dist.doctor"), description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object for each check")
    arguments = parser.parse_args()
    findings = examine()
    for finding in findings:
        if arguments.json:
            print(json.dumps(asdict(finding)))
        else:
            remedy = f"; {finding.remedy}" if finding.remedy else ""
            print(f"{finding.verdict:<8} {finding.name:<14} {finding.found}{remedy}")
    sys.exit(any(finding.verdict == "problem" for finding in findings))


if __name__ == "__main__":
    run_command(main)
