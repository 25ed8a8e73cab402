"""Scores of changed inputs against those of the usual inputs: other owners, another order, fewer queries or videos."""

# Shapes: T texts, V videos, R calls.

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tmass_dist.audit.inputs import Caller, CallError, Inputs, is_number
from tmass_dist.audit.result import Check, Verdict
from tmass_dist.audit.statistics import difference_of_own, distance, gain, spread, tolerance

CALLS = 8
"""Calls whose mean stands for a function that draws fresh noise."""
LIMIT_T = 5.0
"""Standard errors by which the scores of own pairs must rise to count as a leak."""
LIMIT_T_AGAIN = 3.0
"""The same for the second measurement of a finding in noise."""
LIMIT_NOISE = 3.0
"""A noisy function's mean scores differ if they do by so many times what two means of equal calls do."""


@dataclass(frozen=True)
class _Change:
    """Changed inputs, and where each of their scores stands in the usual matrix."""

    shape: str
    inputs: Inputs
    rows_T: Tensor
    columns_V: Tensor

    def of_usual(self, scores: Tensor) -> Tensor:
        """The usual scores ``(..., T, V)`` in the places of the changed ones."""
        return scores[..., self.rows_T, :][..., self.columns_V]


@dataclass(frozen=True)
class _Difference:
    """Of changed scores from the usual ones."""

    counts: bool
    """It is more than rounding and noise."""
    spreads: float
    """The greatest one, in units of the scores' spread."""
    scores_RTV: Tensor


class Subject:
    """The audited function with the scores of its usual inputs; comparisons use means over calls if it is noisy."""

    def __init__(self, call: Caller, inputs: dict[str, Inputs]) -> None:
        self.call, self.inputs = call, inputs
        first = {shape: call(one, 0) for shape, one in inputs.items()}
        self.same_seed = max(distance(call(inputs[shape], 0), scores) for shape, scores in first.items())
        self.other_seed = max(distance(call(inputs[shape], 1), scores) for shape, scores in first.items())
        self.rounding = {shape: tolerance(scores) for shape, scores in first.items()}
        self.limit = dict(self.rounding)
        self.noisy = max(self.same_seed, self.other_seed) > min(self.limit.values())
        self.calls = CALLS if self.noisy else 1
        self.usual = {shape: self._scores(one, 0) for shape, one in inputs.items()}
        if self.noisy:
            again = {shape: self._scores(one, CALLS) for shape, one in inputs.items()}
            for shape, scores in again.items():
                noise = distance(scores.mean(0), self.usual[shape].mean(0))
                self.limit[shape] = max(self.limit[shape], LIMIT_NOISE * noise)
                self.usual[shape] = torch.cat([self.usual[shape], scores])

    def _scores(self, inputs: Inputs, first_seed: int) -> Tensor:
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

    def _difference(self, change: _Change) -> _Difference:
        """
        Raises:
            CallError: the function failed on the changed inputs.
        """
        scores_RTV = self._scores(change.inputs, 2 * CALLS)
        scores_TV, usual_TV = scores_RTV.mean(0), change.of_usual(self.usual[change.shape].mean(0))
        most, appears = distance(scores_TV, usual_TV), bool((is_number(scores_TV) != is_number(usual_TV)).any())
        counts = appears or most > self.limit[change.shape]
        if counts and not appears:
            before_TV, again_TV, after_TV = (scores.mean(0) for scores in self._in_turn(change))
            noise = max(self.rounding[change.shape], LIMIT_NOISE * distance(before_TV, again_TV))
            counts = distance(after_TV, again_TV) > noise
        return _Difference(counts, most / max(spread(usual_TV), 1e-30), scores_RTV)

    def _in_turn(self, change: _Change) -> list[Tensor]:
        """Scores ``(R, T, V)`` of usual inputs, of usual inputs once more, and of changed ones, called in turn.

        The second measurement of a finding. Noise that drifts from call to call, which no seed repeats, is as large
        between the first two as between the last two.
        """
        usual = self.inputs[change.shape]
        calls: list[list[Tensor]] = [[], [], []]
        for seed in range(3 * CALLS, 3 * (CALLS + self.calls), 3):
            calls[0].append(change.of_usual(self.call(usual, seed)))
            calls[1].append(change.of_usual(self.call(usual, seed + 1)))
            calls[2].append(self.call(change.inputs, seed + 2))
        return [torch.stack(scores) for scores in calls]

    def owners(self) -> Check:
        """Scores must stay when other captions belong to other videos."""
        worst, leaks, compared, refused = 0.0, False, 0, []
        for shape, inputs in self.inputs.items():
            for kind, owner_T in _other_owners(inputs.owner_T):
                change = _everywhere(shape, Inputs(inputs.text_TD, inputs.frames_VFD, owner_T))
                try:
                    found = self._difference(change)
                except CallError as error:
                    refused.append(f"{shape}, {kind}: {error}")
                    continue
                compared += 1
                leaks |= found.counts or (self.noisy and self._own_pairs_rise(change, found.scores_RTV))
                worst = max(worst, found.spreads)
        if not compared:
            meaning = f"the function raised for all other owners ({'; '.join(refused)})"
            return Check("owner-blindness", "skipped", None, "", meaning)
        meaning = "which caption belongs to which video was changed, and nothing else: " + (
            "scores changed, so they know the right answer" if leaks else "scores stayed"
        )
        if refused:
            meaning += f"; the function raised for some owners ({'; '.join(refused)})"
        return Check("owner-blindness", "leak" if leaks else "pass", worst, "greatest change, spreads", meaning)

    def _own_pairs_rise(self, change: _Change, scores_RTV: Tensor) -> bool:
        """Do scores of newly own pairs rise against those of formerly own ones, over calls with fresh noise?"""
        before_T, owner_T = self.inputs[change.shape].owner_T, change.inputs.owner_T
        moved = (owner_T != before_T).nonzero().flatten()

        def contrast(scores_RTV: Tensor) -> Tensor:
            return (scores_RTV[:, moved, owner_T[moved]] - scores_RTV[:, moved, before_T[moved]]).mean(1)

        if gain(contrast(self.usual[change.shape]), contrast(scores_RTV)) <= LIMIT_T:
            return False
        before_R, again_R, after_R = map(contrast, self._in_turn(change))
        return gain(again_R - before_R, after_R - again_R) > LIMIT_T_AGAIN

    def _own_pairs_lose(self, change: _Change, scores_RTV: Tensor) -> bool:
        """Do scores of own pairs fall against those of others when the texts leave their places?"""

        def lost(before_RTV: Tensor, after_RTV: Tensor) -> float:
            return difference_of_own(before_RTV.mean(0) - after_RTV.mean(0), change.inputs.owner_T)

        if lost(change.of_usual(self.usual[change.shape]), scores_RTV) <= LIMIT_T:
            return False
        return lost(*self._in_turn(change)[1:]) > LIMIT_T_AGAIN

    def order(self, what: str) -> Check:
        """Scores must follow a pair wherever it stands.

        If a pair's score depends on its place, the usual place of the right pairs may raise theirs. That is a leak,
        even where it is too small to be seen among random pairs.
        """
        worst, fails, leaks, refused = 0.0, False, False, []
        for shape, inputs in self.inputs.items():
            change = _reordered(shape, inputs, what)
            try:
                found = self._difference(change)
            except CallError as error:
                refused.append(f"{shape}: {error}")
                continue
            fails, worst = fails or found.counts, max(worst, found.spreads)
            if what == "texts" and (found.counts or self.noisy):
                leaks |= self._own_pairs_lose(change, found.scores_RTV)
        if len(refused) == len(self.inputs):
            return Check(f"order of {what}", "skipped", None, "", f"the function raised ({'; '.join(refused)})")
        effect = "follow their pair"
        if leaks:
            effect = "know the right video by the place of the text: own pairs lose, other pairs do not"
        elif fails:
            effect = "depend on the place; shuffle the inputs before you trust the result"
        verdict: Verdict = "leak" if leaks else "fail" if fails else "pass"
        meaning = f"{what} in another order, owners with them: scores {effect}"
        return Check(f"order of {what}", verdict, worst, "greatest change, spreads", meaning)

    def removal(self, what: Literal["queries", "videos"]) -> Check:
        """The score of a pair must stay when others leave."""
        worst, fails, compared = 0.0, False, 0
        for shape, inputs in self.inputs.items():
            change = _without_some(shape, inputs, what)
            if change is None:
                continue
            try:
                found = self._difference(change)
            except CallError:
                continue
            compared += 1
            fails, worst = fails or found.counts, max(worst, found.spreads)
        if not compared:
            return Check(f"other {what}", "skipped", None, "", f"it takes no input from which {what} can leave")
        left = "queries left" if what == "queries" else "videos left, with their captions"
        meaning = f"some {left}: the scores of the others " + (
            "changed. Transductive: to be reported as such, as DSL is" if fails else "stayed"
        )
        verdict: Verdict = "transductive" if fails else "pass"
        return Check(f"other {what}", verdict, worst, "greatest change, spreads", meaning)


def _everywhere(shape: str, inputs: Inputs) -> _Change:
    """Texts and videos in their usual places."""
    return _Change(shape, inputs, torch.arange(len(inputs.owner_T)), torch.arange(len(inputs.frames_VFD)))


def _other_owners(owner_T: Tensor) -> list[tuple[str, Tensor]]:
    """Other owners of the same captions: every video has a caption, and in the sorted kind they follow each other."""
    counts_V = owner_T.bincount()
    found = []
    if (counts_V != counts_V[0]).any():
        found.append(("sorted", torch.arange(len(counts_V)).repeat_interleave(counts_V.flip(0))))
    shuffled = torch.randperm(len(owner_T), generator=torch.Generator().manual_seed(5))
    return [*found, ("in any order", owner_T[shuffled])]


def _reordered(shape: str, inputs: Inputs, what: str) -> _Change:
    """``texts``, ``videos``, or the ``captions of a video`` in another order, with their owners."""
    if what == "videos":
        columns_V = torch.randperm(len(inputs.frames_VFD), generator=torch.Generator().manual_seed(3))
        owner_T = columns_V.argsort()[inputs.owner_T]
        rows_T = owner_T.argsort(stable=True)  # so that the captions of a video still follow each other
        changed = Inputs(inputs.text_TD[rows_T], inputs.frames_VFD[columns_V], owner_T[rows_T])
        return _Change(shape, changed, rows_T, columns_V)
    rows_T = torch.randperm(len(inputs.owner_T), generator=torch.Generator().manual_seed(4))
    if what != "texts":
        rows_T = rows_T[inputs.owner_T[rows_T].argsort(stable=True)]
    return _Change(shape, inputs.of_texts(rows_T), rows_T, torch.arange(len(inputs.frames_VFD)))


def _without_some(shape: str, inputs: Inputs, what: Literal["queries", "videos"]) -> _Change | None:
    """Every second video with its captions, or all queries but the first of each video; None where there are none."""
    if what == "videos":
        columns_V = torch.arange(0, len(inputs.frames_VFD), 2)
        changed, rows_T = inputs.of_videos(columns_V)
        return _Change(shape, changed, rows_T, columns_V)
    first_T = torch.ones(len(inputs.owner_T), dtype=torch.bool)
    first_T[1:] = inputs.owner_T.diff() != 0
    rows_T = first_T.nonzero().flatten()
    if len(rows_T) == len(first_T):
        return None
    return _Change(shape, inputs.of_texts(rows_T), rows_T, torch.arange(len(inputs.frames_VFD)))
