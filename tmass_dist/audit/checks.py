"""The checks of the audit, each with a verdict, a number and how to read it."""

# Shapes: T texts, V videos, R calls.

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tmass_dist.audit.inputs import SHAPES, Caller, Inputs, Similarity, draw, is_number
from tmass_dist.audit.statistics import DEPTHS, SIGMA, Counts, above_chance, against_chance, gain, sigmas, tolerance
from tmass_dist.errors import UserError

Verdict = Literal["pass", "leak", "transductive", "fail", "note", "skipped"]
CALLS = 8
"""Calls whose mean stands for a function that draws fresh noise."""
NULL_SEEDS = 8
NULL_VIDEOS = {"square": 100, "texts != videos": 50, "ragged": 50}
VIDEOS = 24
"""Videos of all checks but the null."""
LIMIT_T = 5.0
"""Standard errors (Welch's t over 8 and 16 calls) by which a noisy function's scores must rise to count."""
LIMIT_NOISE = 3.0
"""A noisy function's mean scores differ if they do by so many times what two means of equal calls do."""


@dataclass(frozen=True)
class Check:
    """One line of the audit."""

    name: str
    verdict: Verdict
    value: float | None
    """The number that the verdict follows from; ``unit`` says what it is."""
    unit: str
    meaning: str


@dataclass(frozen=True)
class Audit:
    """What the audit of one function found."""

    function: str
    noisy: bool
    """Whether equal calls return different scores."""
    checks: tuple[Check, ...]

    @property
    def leak(self) -> bool:
        """Do the scores depend on which video is the right one?"""
        return any(check.verdict == "leak" for check in self.checks)

    @property
    def transductive(self) -> bool:
        """Does the score of a pair depend on the other queries or videos?"""
        return any(check.verdict == "transductive" for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """The content of ``audit.json``."""
        verdict = {"leak": self.leak, "transductive": self.transductive, "noisy": self.noisy}
        return {"function": self.function, **verdict, "checks": [asdict(check) for check in self.checks]}


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
    shapes, checks = _shapes(call, made)
    if not shapes:
        raise UserError(f"{name or 'the function'} works on no shape of inputs: {checks[0].meaning}")
    subject = _Subject(call, {shape: made[shape] for shape in shapes})
    checks.append(subject.repeated())
    checks += _null(call, shapes, 1000 * seed, frames, width)
    checks.append(subject.owners())
    checks += [subject.order(what) for what in ("texts", "videos", "captions of a video")]
    checks += [subject.removal("queries"), subject.removal("videos")]
    checks.append(_ties(subject))
    if ranks is not None:
        checks.append(_constant_ranks(ranks, numpy))
    if call.changes_inputs:
        checks.append(Check("inputs", "fail", None, "", "the function writes into its inputs; it got copies here"))
    return Audit(name or getattr(similarity, "__name__", "similarity"), subject.noisy, tuple(checks))


def _shapes(call: Caller, made: dict[str, Inputs]) -> tuple[list[str], list[Check]]:
    """The shapes that the function takes, and what happens with each."""
    accepted, checks = [], []
    for shape, inputs in made.items():
        call.num_nan = 0
        size = f"{len(inputs.text_TD)} texts x {len(inputs.frames_VFD)} videos"
        try:
            call(inputs)
        except Exception as error:
            # Whatever the function raises is its answer to this shape.
            said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
            checks.append(Check(f"shape: {shape}", "fail", None, "", f"{size}: {said}; left out of what follows"))
            continue
        accepted.append(shape)
        share = call.num_nan / (len(inputs.text_TD) * len(inputs.frames_VFD))
        verdict: Verdict = "fail" if call.num_nan else "pass"
        meaning = f"{size}: " + ("scores that are no numbers count as the lowest" if call.num_nan else "all numbers")
        checks.append(Check(f"shape: {shape}", verdict, share, "share of NaN", meaning))
    return accepted, checks


def _null(call: Caller, shapes: list[str], seed: int, frames: int, width: int) -> list[Check]:
    """Retrieval among random texts and videos, by shape; chance is all that an honest function reaches."""
    checks = []
    num_tests = len(shapes) * len(DEPTHS) * 2
    for shape in shapes:
        by_test: dict[tuple[str, int], list[Counts]] = {}
        for number in range(NULL_SEEDS):
            inputs = draw(shape, seed + 10 + number, NULL_VIDEOS[shape], frames, width)
            for test, counts in against_chance(call(inputs, number), inputs.owner_T).items():
                by_test.setdefault(test, []).append(counts)
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


class _Subject:
    """The audited function with the scores of its usual inputs; comparisons use means over calls if it is noisy."""

    def __init__(self, call: Caller, inputs: dict[str, Inputs]) -> None:
        self.call, self.inputs = call, inputs
        first = {shape: call(one, 0) for shape, one in inputs.items()}
        self.same_seed = max(_distance(call(inputs[shape], 0), scores) for shape, scores in first.items())
        self.other_seed = max(_distance(call(inputs[shape], 1), scores) for shape, scores in first.items())
        self.limit = {shape: tolerance(scores) for shape, scores in first.items()}
        self.noisy = max(self.same_seed, self.other_seed) > min(self.limit.values())
        self.calls = CALLS if self.noisy else 1
        self.usual = {shape: self.scores(one, 0) for shape, one in inputs.items()}
        if self.noisy:
            again = {shape: self.scores(one, CALLS) for shape, one in inputs.items()}
            for shape, scores in again.items():
                noise = _distance(scores.mean(0), self.usual[shape].mean(0))
                self.limit[shape] = max(self.limit[shape], LIMIT_NOISE * noise)
                self.usual[shape] = torch.cat([self.usual[shape], scores])

    def scores(self, inputs: Inputs, first_seed: int) -> Tensor:
        """``(R, T, V)``, one call or several."""
        return torch.stack([self.call(inputs, first_seed + number) for number in range(self.calls)])

    def repeated(self) -> Check:
        """How far equal calls differ."""
        meaning = "equal calls return equal scores"
        if self.noisy:
            meaning = (
                f"equal calls differ by up to {self.other_seed:.2g}, with one seed by {self.same_seed:.2g}: fresh "
                f"noise, which is no leak by itself; the other checks compare means over {CALLS} calls"
            )
        return Check("noise", "note", self.other_seed, "greatest difference of equal calls", meaning)

    def _compare(self, shape: str, usual_TV: Tensor, scores_RTV: Tensor) -> tuple[bool, float]:
        """Whether scores differ by more than rounding and noise, and by how much in units of their spread."""
        scores_TV = scores_RTV.mean(0)
        distance, appears = _distance(scores_TV, usual_TV), bool((is_number(scores_TV) != is_number(usual_TV)).any())
        spread = max(usual_TV[is_number(usual_TV)].std().item(), 1e-30)
        return appears or distance > self.limit[shape], distance / spread

    def owners(self) -> Check:
        """Scores must stay when other captions belong to other videos."""
        worst, leaks, refused = 0.0, False, []
        for shape, inputs in self.inputs.items():
            for kind, owner_T in _other_owners(inputs.owner_T):
                changed = Inputs(inputs.text_TD, inputs.frames_VFD, owner_T)
                try:
                    scores_RTV = self.scores(changed, 2 * CALLS)
                except Exception as error:
                    refused.append(f"{shape}, {kind}: {type(error).__name__}")
                    continue
                differs, by = self._compare(shape, self.usual[shape].mean(0), scores_RTV)
                if self.noisy:
                    differs |= self._own_pairs_rise(shape, owner_T, scores_RTV)
                leaks, worst = leaks or differs, max(worst, by)
        meaning = "which caption belongs to which video was changed, and nothing else: " + (
            "scores changed, so they know the right answer" if leaks else "scores stayed"
        )
        if refused:
            meaning += f"; the function raised for some owners ({'; '.join(refused)})"
        return Check("owner-blindness", "leak" if leaks else "pass", worst, "greatest change, spreads", meaning)

    def _own_pairs_rise(self, shape: str, owner_T: Tensor, scores_RTV: Tensor) -> bool:
        """Do scores of newly own pairs rise against those of formerly own ones, over calls with fresh noise?"""
        before_T = self.inputs[shape].owner_T
        moved = (owner_T != before_T).nonzero().flatten()
        contrast = (
            (scores[:, moved, owner_T[moved]] - scores[:, moved, before_T[moved]]).mean(1)
            for scores in (self.usual[shape], scores_RTV)
        )
        return gain(*contrast) > LIMIT_T

    def order(self, what: str) -> Check:
        """Scores must follow a pair wherever it stands."""
        worst, fails, refused = 0.0, False, []
        for shape, inputs in self.inputs.items():
            if what == "videos":
                columns_V = torch.randperm(len(inputs.frames_VFD), generator=torch.Generator().manual_seed(3))
                rows_T = torch.arange(len(inputs.owner_T))
                owner_T = columns_V.argsort()[inputs.owner_T]
                # Sorted, so that the captions of a video still follow each other.
                rows_T = owner_T.argsort(stable=True)
                changed = Inputs(inputs.text_TD[rows_T], inputs.frames_VFD[columns_V], owner_T[rows_T])
            else:
                columns_V = torch.arange(len(inputs.frames_VFD))
                rows_T = torch.randperm(len(inputs.owner_T), generator=torch.Generator().manual_seed(4))
                if what != "texts":
                    rows_T = rows_T[inputs.owner_T[rows_T].argsort(stable=True)]
                changed = inputs.of_texts(rows_T)
            try:
                scores_RTV = self.scores(changed, 2 * CALLS)
            except Exception as error:
                refused.append(f"{shape}: {type(error).__name__}")
                continue
            differs, by = self._compare(shape, self.usual[shape].mean(0)[rows_T][:, columns_V], scores_RTV)
            fails, worst = fails or differs, max(worst, by)
        if len(refused) == len(self.inputs):
            return Check(f"order of {what}", "skipped", None, "", f"the function raised ({'; '.join(refused)})")
        meaning = f"{what} in another order, owners with them: scores " + (
            "depend on the place; shuffle the inputs before you trust the result" if fails else "follow their pair"
        )
        return Check(f"order of {what}", "fail" if fails else "pass", worst, "greatest change, spreads", meaning)

    def removal(self, what: Literal["queries", "videos"]) -> Check:
        """The score of a pair must stay when others leave."""
        worst, fails, used = 0.0, False, 0
        for shape, inputs in self.inputs.items():
            if what == "videos":
                columns_V = torch.arange(0, len(inputs.frames_VFD), 2)
                changed, rows_T = inputs.of_videos(columns_V)
            else:
                columns_V = torch.arange(len(inputs.frames_VFD))
                first = torch.ones(len(inputs.owner_T), dtype=torch.bool)
                first[1:] = inputs.owner_T.diff() != 0
                rows_T = first.nonzero().flatten()  # the first caption of each video, so that every video keeps one
                if len(rows_T) == len(first):
                    continue
                changed = inputs.of_texts(rows_T)
            with contextlib.suppress(Exception):
                scores_RTV = self.scores(changed, 2 * CALLS)
                used += 1
                differs, by = self._compare(shape, self.usual[shape].mean(0)[rows_T][:, columns_V], scores_RTV)
                fails, worst = fails or differs, max(worst, by)
        if not used:
            return Check(f"other {what}", "skipped", None, "", f"it takes no input from which {what} can leave")
        left = "queries left" if what == "queries" else "videos left, with their captions"
        meaning = f"some {left}: the scores of the others " + (
            "changed. Transductive: to be reported as such, as DSL is" if fails else "stayed"
        )
        verdict: Verdict = "transductive" if fails else "pass"
        return Check(f"other {what}", verdict, worst, "greatest change, spreads", meaning)


def _distance(one: Tensor, other: Tensor) -> float:
    """Greatest difference of scores that are numbers in both."""
    both = is_number(one) & is_number(other)
    return (one - other)[both].abs().max().item() if both.any() else 0.0


def _other_owners(owner_T: Tensor) -> list[tuple[str, Tensor]]:
    """Other owners of the same captions: every video has a caption, and in the sorted kind they follow each other."""
    counts_V = owner_T.bincount()
    found = []
    if (counts_V != counts_V[0]).any():
        found.append(("sorted", torch.arange(len(counts_V)).repeat_interleave(counts_V.flip(0))))
    shuffled = torch.randperm(len(owner_T), generator=torch.Generator().manual_seed(5))
    return [*found, ("in any order", owner_T[shuffled])]


def _ties(subject: _Subject) -> Check:
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
    found_T = torch.as_tensor(ranks(*arguments)).double().flatten()
    if len(found_T) != len(owner_T) or (found_T < 1).any():
        raise UserError(f"--ranks must return {len(owner_T)} ranks from 1 up; it returned shape {tuple(found_T.shape)}")
    mean, chance = found_T.mean().item(), (VIDEOS + 1) / 2
    error = VIDEOS / (12 * len(owner_T)) ** 0.5
    first = mean < chance - SIGMA * error
    meaning = f"constant scores rank {mean:.1f} of {VIDEOS} on average, chance is {chance:.1f}: " + (
        "ties count in your own favour" if first else "ties give nothing away"
    )
    return Check("ties in the ranking", "leak" if first else "pass", mean, "mean rank of a constant function", meaning)
