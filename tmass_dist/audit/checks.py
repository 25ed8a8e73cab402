"""The checks of the audit, each with a verdict, a number and how to read it."""

# Shapes: T texts, V videos, R calls.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tmass_dist.audit.comparisons import Subject
from tmass_dist.audit.earlier_calls import CallCopy, compare_calls, first_calls
from tmass_dist.audit.inputs import SHAPES, Caller, CallError, Inputs, Similarity, describe, draw
from tmass_dist.audit.result import Audit, Check, Verdict
from tmass_dist.audit.statistics import DEPTHS, SIGMA, Counts, above_chance, against_chance, sigmas
from tmass_dist.errors import UserError

NULL_SEEDS = 8
NULL_VIDEOS = {"square": 100, "texts != videos": 50, "ragged": 50}
VIDEOS = 24
"""Videos of all checks but the null."""
NullHits = dict[tuple[str, int], list[Counts]] | str
"""Of each direction and depth, for each seed; or why there are none."""
Ranks = Callable[[Any, Any], Any]
"""``ranks(similarity_TV, owner_T) -> (T,)``: rank from 1 of each text's video, as an evaluation counts it."""


def audit(
    similarity: Similarity,
    *,
    numpy: bool = False,
    ranks: Ranks | None = None,
    width: int = 64,
    frames: int = 8,
    seed: int = 0,
    name: str = "",
) -> Audit:
    """Check a similarity function on random inputs that hold no information but the owners.

    Args:
        similarity: ``(text_TD, frames_VFD, owner_T) -> (T, V)``, higher is closer. It gets CPU float32 tensors and
            int64 owners: for each text the number of its video; the captions of a video follow each other.
        numpy: give numpy arrays.
        ranks: the ranking of the same evaluation, whose treatment of ties is checked; see :data:`Ranks`.
        width: D of the embeddings, if the function is built for one.
        frames: of a video, likewise.
        seed: of the inputs.
        name: what the report calls the function.

    Raises:
        UserError: the function fails on every shape of inputs.
    """
    call = Caller(similarity, numpy)
    made = {shape: draw(shape, 1000 * seed + 2, VIDEOS, frames, width) for shape in SHAPES}
    with first_calls(call) as first_call:  # before any call is made in this process
        checks, noisy = _all_checks(call, made, first_call, seed, name)
    if ranks is not None:
        checks.append(_constant_ranks(ranks, numpy))
    if call.changes_inputs:
        checks.append(Check("inputs", "fail", None, "", "the function writes into its inputs; it got copies here"))
    return Audit(name or getattr(similarity, "__name__", "similarity"), noisy, tuple(checks))


def _all_checks(
    call: Caller, made: dict[str, Inputs], first_call: CallCopy, seed: int, name: str
) -> tuple[list[Check], bool]:
    """Every check of the similarity, and whether it is noisy.

    Raises:
        UserError: the function fails on every shape of inputs.
    """
    shapes, checks = _shapes(call, made)
    if not shapes:
        raise UserError(
            f"{name or 'the function'} works on no shape of inputs: {checks[0].meaning}; docs/audit.md says what it "
            "must take and return (--numpy, --width and --frames change what it gets)"
        )
    try:
        subject = Subject(call, {shape: made[shape] for shape in shapes})
    except CallError as error:
        raise UserError(f"{name or 'the function'} failed when it was called again: {error}") from error
    remembers = compare_calls(call, subject.inputs, first_call)
    # What remembers earlier calls is asked as an evaluation does, by a first call.
    null_call = first_call if remembers.verdict in ("leak", "fail") else None
    checks += [subject.repeated(), remembers]
    checks += _null({shape: _null_hits(call, null_call, made[shape], shape, seed) for shape in shapes})
    checks.append(subject.owners())
    checks += [subject.order(what) for what in ("texts", "videos", "captions of a video")]
    checks += [subject.removal("queries"), subject.removal("videos")]
    checks.append(_ties(subject))
    return checks, subject.noisy


def _shapes(call: Caller, made: dict[str, Inputs]) -> tuple[list[str], list[Check]]:
    """The shapes that the function takes, and what happens with each."""
    accepted, checks = [], []
    for shape, inputs in made.items():
        call.num_nan = 0
        size = f"{len(inputs.text_TD)} texts x {len(inputs.frames_VFD)} videos"
        try:
            call(inputs)
        except CallError as error:
            checks.append(Check(f"shape: {shape}", "fail", None, "", f"{size}: {error}"))
            continue
        accepted.append(shape)
        share = call.num_nan / (len(inputs.text_TD) * len(inputs.frames_VFD))
        verdict: Verdict = "fail" if call.num_nan else "pass"
        meaning = f"{size}: " + ("scores that are no numbers count as the lowest" if call.num_nan else "all numbers")
        checks.append(Check(f"shape: {shape}", verdict, share, "share of NaN", meaning))
    return accepted, checks


def _null_hits(call: Caller, first_call: CallCopy | None, like: Inputs, shape: str, seed: int) -> NullHits:
    """Hits among random texts and videos.

    Args:
        call: the function.
        first_call: the same as the first call of a process, where that makes a difference.
        like: inputs whose frames and width are right.
        shape: of the inputs.
        seed: of the audit.
    """
    by_test: dict[tuple[str, int], list[Counts]] = {}
    for number in range(NULL_SEEDS):
        inputs = draw(shape, 1000 * seed + 10 + number, NULL_VIDEOS[shape], *like.frames_VFD.shape[1:])
        try:
            scores = first_call(inputs, number, 1) if first_call is not None else [call(inputs, number)]
            if isinstance(scores, str):
                raise CallError(scores)
            [scores_TV] = scores
        except CallError as error:
            return f"the function failed with {NULL_VIDEOS[shape]} videos: {error}"
        for test, counts in against_chance(scores_TV, inputs.owner_T).items():
            by_test.setdefault(test, []).append(counts)
    return by_test


def _null(hits: dict[str, NullHits]) -> list[Check]:
    """Retrieval among random texts and videos, by shape; chance is all that an honest function reaches."""
    checks = []
    num_tests = len(hits) * len(DEPTHS) * 2
    for shape, by_test in hits.items():
        if isinstance(by_test, str):
            checks.append(Check(f"null: {shape}", "skipped", None, "", by_test))
            continue
        leaks = any(above_chance(counts, num_tests) for counts in by_test.values())
        found, chance = (
            {
                f"{direction} R@{depth}": 100 * sum(getattr(c, part) for c in counts) / sum(c.queries for c in counts)
                for (direction, depth), counts in by_test.items()
            }
            for part in ("found", "expected")
        )
        numbers = ", ".join(f"{test} {found[test]:.1f} (chance {chance[test]:.1f})" for test in found)
        meaning = f"random texts and videos, {NULL_SEEDS} seeds: {numbers}"
        most = max(map(sigmas, by_test.values()))
        checks.append(Check(f"null: {shape}", "leak" if leaks else "pass", most, "sigma above chance", meaning))
    return checks


def _ties(subject: Subject) -> Check:
    """What an evaluation gains that counts ties in its own favour."""
    gained, tied, queries = 0.0, 0, 0
    for shape, inputs in subject.inputs.items():
        scores_TV = subject.usual[shape][0]
        own_T1 = scores_TV.gather(1, inputs.owner_T[:, None])
        above_T, equal_T = (scores_TV > own_T1).sum(1), (scores_TV == own_T1).sum(1)
        gained += ((above_T == 0).double() - (above_T == 0) / equal_T).sum().item()
        tied += int((equal_T > 1).sum())
        queries += len(inputs.owner_T)
    share = 100 * tied / queries
    more = 100 * gained / queries
    meaning = f"{share:.0f} % of the right pairs tie with another; placing them first adds {more:.1f} R@1"
    if tied:
        meaning += ": rank ties at random or against yourself (--ranks checks how you rank)"
    return Check("ties", "fail" if gained / queries > 0.01 else "pass", share, "percent of right pairs tied", meaning)


def _constant_ranks(ranks: Ranks, numpy: bool) -> Check:
    """The ranks of a constant function, which knows nothing."""
    owner_T = torch.arange(VIDEOS).repeat_interleave(3)
    scores_TV = torch.zeros(len(owner_T), VIDEOS)
    arguments = [x.numpy() for x in (scores_TV, owner_T)] if numpy else [scores_TV, owner_T]
    try:
        found_T = torch.as_tensor(ranks(*arguments)).double().flatten()
    except (Exception, SystemExit) as error:
        raise UserError(f"--ranks failed on constant scores: {describe(error)}") from error
    if len(found_T) != len(owner_T) or (found_T < 1).any():
        raise UserError(f"--ranks must return {len(owner_T)} ranks from 1 up; it returned shape {tuple(found_T.shape)}")
    mean, chance = found_T.mean().item(), (VIDEOS + 1) / 2
    error = VIDEOS / (12 * len(owner_T)) ** 0.5
    first = mean < chance - SIGMA * error
    meaning = f"constant scores rank {mean:.1f} of {VIDEOS} on average, chance is {chance:.1f}: " + (
        "ties count in your own favour" if first else "ties give nothing away"
    )
    return Check("ties in the ranking", "leak" if first else "pass", mean, "mean rank of a constant function", meaning)
