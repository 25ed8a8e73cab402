"""The one door to submitit: resources become an executor, an sbatch text, or a job on this machine."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tmass_dist.errors import UserError

FINAL_ERROR = "final-error"
"""``final-error-JOB.txt`` beside the job's logs: starting again cannot help; a requeue asks for it."""

_TIME = re.compile(r"(\d+-)?\d+(:\d+){0,2}")


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a job asks of the cluster; the names are SLURM's."""

    cluster: Literal["slurm", "local"] = "slurm"
    nodes: int = 1
    min_nodes: int | None = None
    """Start with fewer nodes, down to so many, where not all are free."""
    gpus: int = 0
    """GPUs, and so tasks, of a node; 0 runs ``procs`` tasks on CPU."""
    procs: int = 2
    cpus: int = 1
    minutes: int = 24 * 60
    requeues: int = 3
    """How often the job may start again after a time limit, a preemption, a lost node or a killed rank."""
    save_before_s: int = 90
    """Seconds before the time limit at which the job is told to save."""
    flags: dict[str, str] = field(default_factory=dict)
    """partition, account, qos, constraint, exclude, mem, dependency: passed on where given."""

    def one_task(self) -> Resources:
        """For work that needs no other rank and no GPU."""
        return replace(self, nodes=1, min_nodes=None, gpus=0, procs=1)

    @property
    def tasks(self) -> int:
        return self.gpus or self.procs


def minutes_of(text: str) -> int:
    """Minutes of a SLURM time: ``90``, ``MM:SS``, ``HH:MM:SS``, ``D-HH``, ``D-HH:MM`` or ``D-HH:MM:SS``.

    Raises:
        UserError: another form, or no time at all.
    """
    if not _TIME.fullmatch(text):
        raise UserError(f"--time {text} is no time; write minutes, HH:MM:SS or D-HH:MM:SS")
    days, _, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if days:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, minutes, seconds = 0, parts[0], parts[1] if len(parts) == 2 else 0
    total = int(days or 0) * 24 * 60 + hours * 60 + minutes + (seconds > 0)
    if total < 1:
        raise UserError(f"--time {text} is less than a minute")
    return total


def num_gpus() -> int:
    """GPUs of this machine, without importing torch."""
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def local_executor(resources: Resources, folder: Path, root: Path) -> Any:
    """Runs the job's tasks as processes of this machine."""
    import submitit

    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")]))
    os.environ["OMP_NUM_THREADS"] = str(resources.cpus)
    executor = submitit.LocalExecutor(folder=folder)
    executor.update_parameters(
        nodes=1, tasks_per_node=resources.tasks, gpus_per_node=resources.gpus, timeout_min=resources.minutes
    )
    return executor


def slurm_executor(resources: Resources, folder: Path, root: Path, name: str) -> Any:
    """Submits with sbatch; ``root`` is the checkout that the job imports.

    The job goes on after whatever ended it: SLURM itself requeues a preempted job and one whose node died, and the
    lines after srun requeue one that stopped for its time limit or lost a rank, at most ``requeues`` times.
    """
    import submitit

    class Executor(submitit.SlurmExecutor):
        """Where there is no SLURM, the sbatch text can still be shown."""

        @classmethod
        def affinity(cls) -> int:
            return 1

    flags = dict(resources.flags)
    exports = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": str(resources.cpus)}
    extra: dict[str, Any] = {"requeue": True, "open-mode": "append"}
    if "dependency" in flags:
        extra["kill-on-invalid-dep"] = "yes"
    # srun of SLURM 22.05 and later does not inherit --cpus-per-task.
    srun = [f"--cpus-per-task={resources.cpus}", "--kill-on-bad-exit=1"]
    tasks: dict[str, Any] = {"ntasks_per_node": resources.tasks}
    if resources.min_nodes:
        # Told of its tasks, SLURM would never give more than the fewest nodes: room is asked for, and srun fills it.
        extra |= {"nodes": f"{resources.min_nodes}-{resources.nodes}", "mincpus": resources.tasks * resources.cpus}
        srun.append(f"--ntasks-per-node={resources.tasks}")
        tasks = {}
    executor = Executor(folder=folder)
    executor.update_parameters(
        job_name=name,
        time=resources.minutes,
        signal_delay_s=resources.save_before_s,
        nodes=resources.nodes,
        **tasks,
        cpus_per_task=resources.cpus,
        **({"gpus_per_node": resources.gpus} if resources.gpus else {}),
        srun_args=srun,
        setup=[
            *(f"export {key}={shlex.quote(value)}" for key, value in exports.items()),
            f"cd {shlex.quote(str(root))}",
        ],
        teardown=_requeue_lines(folder, resources.requeues),
        additional_parameters=extra,
        **flags,
    )
    return executor


def _requeue_lines(folder: Path, requeues: int) -> list[str]:
    at = shlex.quote(str(folder))
    return [
        "rc=$?",
        # A task of an array is a job of its own, with another name for its files.
        'id="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}"; id="${id:-$SLURM_JOB_ID}"',
        # A job that somebody cancelled is no longer RUNNING here; it stays cancelled.
        f'if [ $rc -ne 0 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {requeues} ] '
        f'&& [ ! -e {at}/{FINAL_ERROR}-"$id".txt ] '
        '&& [ "$(squeue -h -j "$SLURM_JOB_ID" -o %T)" = RUNNING ]; then',
        f'  rm -f {at}/"$id"_*_result.pkl',
        '  echo "exit code $rc: the job is queued again" && scontrol requeue "$SLURM_JOB_ID" && sleep 60',
        "fi",
        "exit $rc",
    ]


def sbatch_text(executor: Any) -> str:
    """What sbatch would be given."""
    return executor._make_submission_file_text(executor._submitit_command_str, "dry-run")


def submit(executor: Any, tasks: list[Any]) -> list[Any]:
    """Submit one job, or for several tasks one job array; returns submitit's job of each task.

    Raises:
        UserError: sbatch refuses; its own words, once.
    """
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    echoed = io.StringIO()  # submitit repeats sbatch's stderr on ours
    try:
        with contextlib.redirect_stderr(echoed):
            if len(tasks) == 1:
                return [executor.submit(tasks[0])]
            with executor.batch():
                return [executor.submit(task) for task in tasks]
    except (FailedJobError, FailedSubmissionError) as error:
        said = re.findall(r"sbatch: error: ([^\n\\]+)", echoed.getvalue()) or [" ".join(str(error).split())[-300:]]
        raise UserError(f"sbatch refused the job: {'; '.join(dict.fromkeys(said))}") from error


def require_slurm() -> None:
    """Raises: UserError: this machine cannot submit."""
    if shutil.which("sbatch") is None:
        raise UserError("no sbatch on this machine: submit from a SLURM login node, or use --cluster local")


def slurm_state(job_id: str) -> str:
    """The state that SLURM itself reports (never submitit's cache): PENDING, RUNNING, COMPLETED, FAILED, ...

    Of an array: that of a task that is alive, else of one that did not complete.
    """
    if shutil.which("squeue") is None:
        return "UNKNOWN"
    for command in (
        ["squeue", "--noheader", "--states=all", "--jobs", job_id, "--format=%T"],
        ["sacct", "--noheader", "-X", "--parsable2", "--jobs", job_id, "--format=State"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        states = [line.split()[0] for line in done.stdout.splitlines() if line.strip()]
        if done.returncode == 0 and states:
            alive = [state for state in states if state in _ALIVE]
            failed = [state for state in states if state != "COMPLETED"]
            return (alive or failed or states)[-1]
    return "UNKNOWN"


_ALIVE = {"PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "RESIZING"}


def is_alive(state: str) -> bool:
    return state in _ALIVE


def wait(job_id: str, poll_s: float = 2.0) -> str:
    """Wait for the end of a SLURM job by SLURM's own word; returns its last state."""
    unknown = 0
    while True:
        state = slurm_state(job_id)
        unknown = unknown + 1 if state == "UNKNOWN" else 0
        # A job that is requeued shows its old end for a moment.
        if not is_alive(state) and (unknown == 0 or unknown > 10):
            time.sleep(poll_s)
            if not is_alive(slurm_state(job_id)):
                return state
        time.sleep(poll_s)


def follow(job: Any, tasks: int) -> None:
    """Show rank 0's output of a local job as it comes, and end as the job ends.

    Raises:
        UserError: a rank failed; its log is named.
    """
    folder = job.paths.folder
    streams = {folder / f"{job.job_id}_0_log.out": sys.stdout, folder / f"{job.job_id}_0_log.err": sys.stderr}
    positions = dict.fromkeys(streams, 0)

    def pump() -> None:
        for path, stream in streams.items():
            if path.is_file():
                with path.open("rb") as log:
                    log.seek(positions[path])
                    new = log.read()
                positions[path] += len(new)
                text = new.decode("utf-8", "replace")
                stream.write("".join(line for line in text.splitlines(keepends=True) if "submitit" not in line))
                stream.flush()

    try:
        while not job.done():
            pump()
            time.sleep(0.2)
    except KeyboardInterrupt:
        job.cancel()
        raise
    pump()
    ranks = [job.task(number) for number in range(tasks)] if tasks > 1 else [job]
    for number, task in enumerate(ranks):
        if task.exception() is not None:
            raise UserError(f"rank {number} failed; its log is {folder}/{job.job_id}_{number}_log.err")
