"""Does a score depend on earlier calls, as with a cache that outlives a call? Copies of the process tell.

An evaluation calls a function once, in a new process, while the audit calls it many times: what the first call leaves
behind could hide a leak from all later ones, or put one into them.
"""

# Shapes: T texts, V videos.

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tmass_dist.audit.inputs import Caller, CallError, Inputs
from tmass_dist.audit.result import Check, Verdict
from tmass_dist.audit.statistics import difference_of_own, distance, tolerance

NAME = "earlier calls"
TIMEOUT_S = 600
LIMIT_T = 5.0
"""Standard errors by which the scores of own pairs must rise against others to count as a leak."""
Scores = list[Tensor] | str
"""Of equal calls one after the other; or why there are none."""
CallCopy = Callable[[Inputs, int, int], Scores]
"""Call the function in a copy of a process: inputs, seed, number of equal calls."""


def call_in_copy(call: Caller, inputs: Inputs, seed: int, calls: int) -> Scores:
    """Call the function in a copy of this process as it is now."""
    if "fork" not in multiprocessing.get_all_start_methods():
        return "this system cannot copy a process"
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(call, inputs, seed, calls, sender))
    process.start()
    sender.close()
    try:
        answer = receiver.recv() if receiver.poll(TIMEOUT_S) else f"no answer within {TIMEOUT_S} s"
    except EOFError:
        answer = "the copy of the process died"
    process.kill()
    process.join()
    return answer if isinstance(answer, str) else [torch.from_numpy(scores) for scores in answer]


def _work(call: Caller, inputs: Inputs, seed: int, calls: int, sender: Any) -> None:
    torch.set_num_threads(1)  # threads do not survive the copying of a process
    try:
        sender.send([call(inputs, seed).numpy() for _ in range(calls)])
    except CallError as error:
        sender.send(str(error))


@contextmanager
def first_calls(call: Caller) -> Iterator[CallCopy]:
    """Calls in copies of this process as it is at the beginning of the block, in which each is the first one."""
    if "fork" not in multiprocessing.get_all_start_methods():
        yield lambda inputs, seed, calls: "this system cannot copy a process"
        return
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    holder = context.Process(target=_hold, args=(call, ours, theirs))
    holder.start()
    theirs.close()

    def first(inputs: Inputs, seed: int, calls: int) -> Scores:
        ours.send(([tensor.numpy() for tensor in (inputs.text_TD, inputs.frames_VFD, inputs.owner_T)], seed, calls))
        answer = ours.recv()
        return answer if isinstance(answer, str) else [torch.from_numpy(scores) for scores in answer]

    try:
        yield first
    finally:
        ours.close()
        holder.kill()
        holder.join()


def _hold(call: Caller, ours: Any, theirs: Any) -> None:
    """Keep the process as it is, and call the function in copies of it."""
    ours.close()
    try:
        while True:
            arrays, seed, calls = theirs.recv()
            found = call_in_copy(call, Inputs(*map(torch.from_numpy, arrays)), seed, calls)
            theirs.send(found if isinstance(found, str) else [scores.numpy() for scores in found])
    except EOFError:  # the audit has ended
        return


def compare_calls(call: Caller, inputs: dict[str, Inputs], first_call: CallCopy) -> Check:
    """Scores of a first call, of a second one, and of one after those that this process has made.

    Args:
        call: the function.
        inputs: by shape.
        first_call: of :func:`first_calls`.
    """
    worst, differs, leaks = 0.0, False, False
    for one in inputs.values():
        once, later = first_call(one, 0, 2), call_in_copy(call, one, 0, 2)
        if isinstance(once, str) or isinstance(later, str):
            return Check(NAME, "skipped", None, "", str(once if isinstance(once, str) else later))
        (first, second), (last, last_again) = once, later
        if distance(last, last_again) > tolerance(last):
            return Check(NAME, "note", None, "", "not to be told from noise that no seed repeats")
        for before, after in ((first, second), (last, first)):
            change = distance(before, after)
            differs |= change > tolerance(before)
            leaks |= change > tolerance(before) and difference_of_own(after - before, one.owner_T) > LIMIT_T
            worst = max(worst, change)
    verdict: Verdict = "leak" if leaks else "fail" if differs else "pass"
    effect = "scores stay"
    if differs:
        effect = "scores differ, so something outlives a call (a cache?)"
        effect += ", and own pairs gain by it" if leaks else "; the other checks saw calls that earlier ones changed"
    meaning = f"a first call in a new process, an equal second one, and one after many others: {effect}"
    return Check(NAME, verdict, worst, "greatest difference", meaning)
