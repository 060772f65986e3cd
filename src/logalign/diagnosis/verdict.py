"""Verdict: holds a run's outcome, since when it stands, its reason, the next action and the evidence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from logalign.common import markup
from logalign.diagnosis.outcome import ALARMS, OUTCOMES, PRECEDENCE, SHOWN, Outcome
from logalign.errors import InputError

Regime = Literal["grokking", "decline", "both", "loss", "unknown"]
Number = float | int | None

REGIMES: tuple[Regime, ...] = get_args(Regime)

KNOWN_LIMITS = (
    "published evidence is grokking and the pre-training of 3B-parameter language models (arXiv 2605.28975); for "
    "fine-tuning, LoRA, mixtures of experts and vision no threshold is proven",
    "optimizer slingshots and learning-rate cooldowns move LAR without any change in generalization",
)
"""Limits of every verdict."""


EARLIER_NAMED = 3
"""Earlier alarms that a headline names."""


@dataclass(frozen=True)
class Episode:
    """An outcome with its first and last step.

    Example:
        >>> print(Episode("overfitting", 50, 246))
        overfitting from step 50 to 246
    """

    outcome: Outcome
    first: int
    last: int

    def __str__(self) -> str:
        return f"{self.outcome} from step {self.first:,} to {self.last:,}"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The judgment of a run at one step.

    Attributes:
        outcome: "healthy", "approaching", "overfitting", "memorizing", "generalizing", "diverged" or "undecidable".
        regime: Logic that judged: "grokking" (the network interpolates its data), "decline" (LAR's fall), "both" where
            both judge and agree, "loss" for a log without LAR, "unknown" before there is anything to judge.
        step: Step of the last judged reading, None before the first.
        since_step: Step since which this outcome stands without a break, None before the first reading.
        evidence: Numbers by name, None where unknown.
        reason: Cause of the outcome, in one sentence.
        suggestion: Next action, in one sentence.
        basis: Evidence behind it, with the source of each threshold.
        limits: Possible causes of an error.
        sure: Number of such alarms in the benchmark that came in time, in one sentence. Empty where unknown.
        held_out: Movement of recorded held-out losses, in one sentence, where they contradict the outcome. Empty
            elsewhere. Nothing else in the verdict uses them.
        earlier: Ended alarms, the latest last.

    Raises:
        InputError: if outcome or regime has another name, or strict JSON cannot hold the evidence.

    Example:
        >>> verdict = Verdict(
        ...     outcome="healthy",
        ...     regime="decline",
        ...     step=120,
        ...     since_step=0,
        ...     evidence={"epoch": 0.4},
        ...     reason="no data has repeated so far.",
        ...     suggestion="Train on.",
        ... )
        >>> print(verdict)
        healthy (decline regime) at step 120, since step 0
        why: no data has repeated so far.
        do: Train on.
        evidence: epoch = 0.4
        >>> verdict.is_alarm, verdict.exit_status
        (False, 0)
    """

    outcome: Outcome
    regime: Regime
    step: int | None
    since_step: int | None
    reason: str
    suggestion: str
    evidence: Mapping[str, Number] = field(default_factory=dict)
    basis: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()
    held_out: str = ""
    sure: str = ""
    earlier: tuple[Episode, ...] = ()

    def __post_init__(self) -> None:
        if self.outcome not in OUTCOMES:
            raise InputError(f"outcome: expected one of {', '.join(OUTCOMES)}, found {self.outcome!r}")
        if self.regime not in REGIMES:
            raise InputError(f"regime: expected one of {', '.join(REGIMES)}, found {self.regime!r}")
        for name, value in self.evidence.items():
            if value is not None and not math.isfinite(value):
                raise InputError(f"evidence {name!r}: expected a finite number or None, found {value!r}")

    @property
    def is_alarm(self) -> bool:
        """True if it is overfitting, memorizing or diverged."""
        return self.outcome in ALARMS

    @property
    def exit_status(self) -> int:
        """Exit status of `logalign diagnose`: 0, 3 for an alarm, now or earlier, 4 for undecidable.

        A network that generalizes has memorized before. That is no longer an alarm.
        """
        ended = [each for each in self.earlier if self.outcome != "generalizing" or each.outcome == "overfitting"]
        return SHOWN["overfitting" if ended else self.outcome].exit_status

    def record(self) -> dict[str, Any]:
        """Return the verdict as a strict JSON object."""
        return {
            "outcome": self.outcome,
            "regime": self.regime,
            "step": self.step,
            "since_step": self.since_step,
            "is_alarm": self.is_alarm,
            "reason": self.reason,
            "suggestion": self.suggestion,
            "evidence": dict(self.evidence),
            "basis": list(self.basis),
            "limits": list(self.limits),
            "held_out": self.held_out or None,
            "sure": self.sure or None,
            "earlier": [asdict(each) for each in self.earlier],
        }

    def __str__(self) -> str:
        lines = [self.headline(), f"why: {self.reason}"]
        if self.sure:
            lines.append(f"how sure: {self.sure}")
        if self.held_out:
            lines.append(f"but: {self.held_out}")
        lines.append(f"do: {self.suggestion}")
        numbers = [f"{name} = {shown(value)}" for name, value in self.evidence.items() if value is not None]
        if numbers:
            lines.append(f"evidence: {', '.join(numbers)}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Return notebook HTML."""
        numbers = {name.replace("_", " "): shown(value) for name, value in self.evidence.items() if value is not None}
        return markup.card(
            self.headline(),
            markup.text("why:", self.reason),
            markup.text("how sure:", self.sure) if self.sure else "",
            markup.text("but:", self.held_out) if self.held_out else "",
            markup.text("what to do:", self.suggestion),
            markup.folded("evidence", markup.facts(numbers) if numbers else ""),
            markup.folded("rests on", markup.listed(self.basis)),
            markup.folded("limits", markup.listed(self.limits)),
            color=SHOWN[self.outcome].color,
        )

    def headline(self) -> str:
        """Put outcome, regime, steps in a line."""
        words: str = self.outcome
        if self.regime != "unknown":
            words += {"both": " (both regimes)", "loss": " (without LAR)"}.get(self.regime, f" ({self.regime} regime)")
        if self.step is not None:
            words += f" at step {self.step:,}"
        if self.since_step is not None:
            words += f", since step {self.since_step:,}"
        if self.earlier:
            words += f"; earlier {', '.join(map(str, self.earlier[-EARLIER_NAMED:]))}"
        return words


def no_verdict(step: int | None, error: Exception) -> Verdict:
    """Build the verdict for readings that cannot be judged: several models, or a fault of the detector."""
    if isinstance(error, InputError):
        reason = f"the readings cannot be judged together: {error}"
        suggestion = "Record one layer of one model in one run."
    else:
        reason = f"the detector failed ({type(error).__name__}: {error})."
        suggestion = "Diagnose the recorded run; where the error is no mistake of yours, please report it."
    return Verdict(
        outcome="undecidable", regime="unknown", step=step, since_step=step, reason=reason, suggestion=suggestion
    )


def shown(value: Number) -> str:
    """Format a number: four significant digits, whole numbers unchanged, a dash for None."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def combined(grokking: Verdict, decline: Verdict) -> Verdict:
    """Combine the verdicts of both regimes: the outcome first in `PRECEDENCE` wins, with the numbers of both.

    The reason names the other regime's outcome. Where both agree, the regime is "both" and the outcome stands since
    the earlier of the two steps.
    """
    first, second = sorted((grokking, decline), key=lambda verdict: PRECEDENCE.index(verdict.outcome))
    evidence = {**second.evidence, **first.evidence}
    basis, limits = _joined(first.basis, second.basis), _joined(first.limits, second.limits)
    if first.outcome == second.outcome:
        steps = [verdict.since_step for verdict in (first, second) if verdict.since_step is not None]
        return replace(
            first,
            regime="both",
            since_step=min(steps) if steps else None,
            reason=first.reason if first.reason == second.reason else f"{first.reason} And: {second.reason}",
            evidence=evidence,
            basis=basis,
            limits=limits,
        )
    other = f"The {second.regime} regime says {second.outcome}: {second.reason}"
    return replace(first, reason=f"{first.reason} {other}", evidence=evidence, basis=basis, limits=limits)


def _joined(first: tuple[str, ...], second: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*first, *second)))
