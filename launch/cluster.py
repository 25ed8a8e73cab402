"""Submission to SLURM through submitit: resources become an executor, the text for sbatch, and a job."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path
from typing import Any

from launch.failures import FINAL_ERROR, STOPPED
from launch.resources import Resources
from tmass_dist.errors import UserError


def slurm_executor(resources: Resources, folder: Path, root: Path, name: str) -> Any:
    """An executor that submits with sbatch.

    The job resumes whatever ended it: SLURM itself requeues a preempted job and one whose node died; the lines after
    srun requeue one that stopped for its time limit, lost a rank or failed, at most ``requeues`` times.

    Args:
        resources: what to ask for.
        folder: of the job's logs.
        root: the copy of the code that the job imports.
        name: of the job.
    """
    import submitit

    class Executor(submitit.SlurmExecutor):
        """Works without SLURM too, to show the text for sbatch."""

        @classmethod
        def affinity(cls) -> int:
            return 1

    flags = dict(resources.flags)
    exports = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": str(resources.cpus)}
    if resources.gpus:
        exports["TMASS_GPUS_PER_NODE"] = str(resources.gpus)
    extra: dict[str, Any] = {"requeue": True, "open-mode": "append"}
    if "dependency" in flags:
        extra["kill-on-invalid-dep"] = "yes"
    # srun of SLURM 22.05 and later does not inherit --cpus-per-task.
    srun = [f"--cpus-per-task={resources.cpus}", "--kill-on-bad-exit=1"]
    tasks: dict[str, Any] = {"ntasks_per_node": resources.tasks}
    if resources.min_nodes:
        # With a number of tasks, SLURM would always give the fewest nodes. So CPUs are asked for, and srun fills them.
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
        teardown=_requeue_lines(folder, resources),
        additional_parameters=extra,
        **flags,
    )
    return executor


def _requeue_lines(folder: Path, resources: Resources) -> list[str]:
    """Shell lines that run after srun and queue the job again if it has not finished."""
    logs = shlex.quote(str(folder))
    return [
        "rc=$?",
        # A task of an array is a job of its own, but its files are named after the array.
        'id="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}"; id="${id:-$SLURM_JOB_ID}"',
        "n=${SLURM_RESTART_COUNT:-0}",
        # A job that somebody cancelled is no longer RUNNING here, and stays cancelled.
        f'if [ $rc -ne 0 ] && [ "$n" -lt {resources.requeues} ] '
        f'&& [ ! -e {logs}/{FINAL_ERROR}-"$id".txt ] '
        '&& [ "$(squeue -h -j "$SLURM_JOB_ID" -o %T)" = RUNNING ]; then',
        f'  rm -f {logs}/"$id"_*_result.pkl',
        f"  pause=$(( {resources.requeue_pause_s} * 4 ** (n < 6 ? n : 6) )); [ $pause -le 900 ] || pause=900",
        f"  [ $rc -ne {STOPPED} ] || pause=0",
        '  echo "exit code $rc: the job is queued again, to start in $pause s or later"',
        # Requeueing sends SIGTERM to this script, which first has to set the start time.
        "  [ $pause -eq 0 ] || trap '' TERM",
        '  scontrol requeue "$SLURM_JOB_ID" && {',
        '    [ $pause -eq 0 ] && sleep 60 || scontrol update JobId="$SLURM_JOB_ID" StartTime="now+$pause"; }',
        "fi",
        "exit $rc",
    ]


def sbatch_text(executor: Any) -> str:
    """The script that sbatch would get."""
    return executor._make_submission_file_text(executor._submitit_command_str, "dry-run")


def submit(executor: Any, tasks: list[Any]) -> list[Any]:
    """Submit one job, or a job array for several tasks; returns submitit's job of each task.

    Raises:
        UserError: sbatch refuses, with its own message.
    """
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    captured = io.StringIO()  # submitit repeats sbatch's stderr on ours
    try:
        with contextlib.redirect_stderr(captured):
            if len(tasks) == 1:
                return [executor.submit(tasks[0])]
            with executor.batch():
                return [executor.submit(task) for task in tasks]
    except (FailedJobError, FailedSubmissionError) as error:
        messages = re.findall(r"sbatch: error: ([^\n\\]+)", captured.getvalue())
        messages = messages or [" ".join(str(error).split())[-300:]]
        raise UserError(f"sbatch refused the job: {'; '.join(dict.fromkeys(messages))}") from error
