"""What is recorded of a run: logalign's readings, every rival signal, and the truth, which is for scoring alone.

All signals of a reading are taken at the same forward, before the optimizer's step. Held-out samples never reach the
monitor. WeightWatcher's alpha is taken a few times a run only, for its cost.

Shapes: X [T, n] inputs of the head, W [m, n], Z [T, m] logits; held-out losses [S], one a held-out unit.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import logalign

SMOOTHING = 5  # evaluations in the moving mean of the held-out loss
ALPHAS = 8  # readings at which WeightWatcher is asked, evenly over the run
WATCHED = ("lar", "lar_vocab_centered", "lar_token_centered", "lar_centered")
SPECTRAL = ("weight_participation", "input_participation", "coherence")
REVISITS = ("drift", "drift_error", "gain", "gain_error", "revisited", "passes")

Evaluate = Callable[[], Mapping[str, Any]]


class Recorder:
    """Watches one training; call `step()` after backward and before the optimizer's step.

    Args:
        model: Trained, watched by `logalign.watch`.
        head: Name of its unembedding.
        steps: Of the training.
        every: Steps between readings.
        evaluate_every: Steps between evaluations on held-out samples, a multiple of `every`.
        others: Names of further layers to watch.
        classifies: Whether a softmax over classes follows the head.
        monitor: One that watches the model already, whose steps are another's to take.
    """

    def __init__(
        self,
        model: nn.Module,
        head: str,
        *,
        steps: int,
        every: int = 10,
        evaluate_every: int = 10,
        others: Sequence[str] = (),
        classifies: bool = True,
        monitor: logalign.Monitor | None = None,
    ) -> None:
        self._model = model
        self._head = model.get_submodule(head)
        self._every, self._evaluate_every = every, evaluate_every
        self._others = dict(zip(others, ("site_first", "site_last"), strict=False))
        self._alpha_at = {round(i * (steps - 1) / (ALPHAS - 1)) // every * every for i in range(ALPHAS)}
        self._classifies = classifies
        layers = ["unembedding", *others]
        self._monitor = monitor or logalign.watch(model, layers=layers, every=every, spectra_every=every)
        self._handle = self._head.register_forward_hook(self._keep)
        self.visits = _kept_visits(self._monitor)
        self._seen: tuple[Tensor, Tensor] | None = None
        self._recent: list[float] = []
        self.rows: list[dict[str, float]] = []
        self._losses: list[np.ndarray[Any, Any]] = []
        self._loss_steps: list[int] = []
        self.seconds = {"alpha": 0.0, "rivals": 0.0, "monitor": 0.0}
        self._rare: Tensor | None = None
        self._targets: Tensor | None = None

    @property
    def is_monitored(self) -> bool:
        """Whether the step under way is a reading."""
        return self._monitor.next_is_monitored

    def rare(self, targets: Tensor, is_rare: Tensor) -> None:
        """Say which targets are rare ones, so that LAR is taken over the tokens of each kind, too."""
        self._targets, self._rare = targets.reshape(-1), is_rare

    def step(
        self,
        step: int,
        logits: Tensor,
        targets: Tensor,
        losses: Tensor,
        *,
        lr: float,
        epoch: float,
        evaluate: Evaluate,
        scale: float = 1.0,
        give_losses: bool = False,
    ) -> None:
        """Record a step whose per-sample training losses are `losses`, and whose loss is `scale` times their mean.

        `give_losses` hands them to the monitor, as one would who trains with a loss that it does not know.
        """
        self._recent.append(scale * float(losses.detach().mean()))
        given = {"losses": losses.detach()} if give_losses else {}
        if not self.is_monitored:
            self._monitor.step(**given)
            return
        started = time.perf_counter()
        row = self.rivals(step, logits.detach(), losses.detach())
        self.seconds["rivals"] += time.perf_counter() - started
        if self._classifies:
            row["train_acc"] = float((logits.detach().argmax(-1) == targets).float().mean())
        started = time.perf_counter()
        readings = self._monitor.step(loss=self._recent[-1], lr=lr, epoch=epoch, **given)
        self.seconds["monitor"] += time.perf_counter() - started
        assert readings is not None
        row |= {"epoch": epoch, "lr": lr, "loss": self._recent[-1], "train_loss": fmean(self._recent)}
        self._recent.clear()
        self.keep(readings, row, evaluate if step % self._evaluate_every == 0 else None)

    def keep(self, readings: logalign.Readings, row: dict[str, float], evaluate: Evaluate | None) -> None:
        """Make a row of a reading, of what else is known of its step, and of an evaluation."""
        main = readings.main
        row |= {"step": readings.step}
        row |= {name: _number(getattr(main, name)) for name in (*WATCHED, *SPECTRAL, *REVISITS)}
        row |= {f"energy_{name}": _number(value) for name, value in (main.energies or {}).items()}
        row |= {name: _number(getattr(main, name)) for name in ("n", "m", "tokens", "tokens_seen")}
        for name, column in self._others.items():
            row[f"{column}_lar"] = _number(readings[name].lar)
            row[f"{column}_lar_token_centered"] = _number(readings[name].lar_token_centered)
        if evaluate is not None:
            found = dict(evaluate())
            held_out = np.asarray(found.pop("losses"), dtype=np.float64)
            self._losses.append(held_out)
            self._loss_steps.append(readings.step)
            row |= {"val_loss": float(held_out.mean()), **{name: float(value) for name, value in found.items()}}
        self.rows.append(row)

    def close(self) -> dict[str, Any]:
        """Take the hooks off; the truth of the run, and what the signals cost."""
        found = self._monitor.sites["unembedding"]["module"]
        assert self._model.get_submodule(found) is self._head, f"logalign measured {found}"
        self._monitor.close()
        self._handle.remove()
        return {"truth": truth(self._loss_steps, self._losses), "seconds": self.seconds, "readings": len(self.rows)}

    def _keep(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if self.is_monitored and module.training and torch.is_grad_enabled():
            self._seen = (args[0].detach(), output.detach())

    @torch.no_grad()
    def rivals(self, step: int, logits: Tensor | None, losses: Tensor | None) -> dict[str, float]:
        """The rivals' signals of the step under way, after its backward; without logits, of those that were seen."""
        assert self._seen is not None
        logits = self._seen[1] if logits is None else logits
        weight = self._head.weight.detach()
        inputs = self._seen[0].reshape(-1, weight.shape[1])
        if not all(bool(torch.isfinite(each).all()) for each in (weight, inputs, logits)):
            return {}  # it has diverged
        singular = torch.linalg.eigvalsh(weight.double().T @ weight.double()).clamp(min=0).sqrt()
        directions = torch.linalg.eigvalsh(inputs.double().T @ inputs.double()).clamp(min=0).sqrt()
        gradients = [p.grad for p in self._model.parameters() if p.grad is not None]
        trained = [p for p in self._model.parameters() if p.requires_grad]
        row = {
            "stable_rank": float((singular**2).sum() / singular.max() ** 2),
            "entropy_rank": _exp_entropy(singular),
            "rankme": _exp_entropy(directions),
            "weight_norm": math.sqrt(sum(float(p.square().sum()) for p in trained)),
            "gradient_norm": math.sqrt(sum(float(g.square().sum()) for g in gradients)),
        }
        if self._classifies:
            log_p = logits.reshape(-1, logits.shape[-1]).float().log_softmax(-1)
            row["prediction_entropy"] = float(-(log_p.exp() * log_p).sum(-1).mean())
        if losses is not None:
            row["loss_spread"] = float(losses.std())
        if self._rare is not None and self._targets is not None and losses is not None:
            rare = self._rare[self._targets]
            outputs = self._seen[1].reshape(-1, weight.shape[0])
            for name, mask in (("rare", rare), ("common", ~rare)):
                energies = logalign.Energies.of(weight, inputs, outputs=outputs, mask=mask)
                row |= {f"{name}_lar": energies.lar, f"{name}_lar_vocab_centered": energies.lar_vocab_centered}
                row[f"{name}_loss"] = float(losses.reshape(-1)[mask].mean()) if bool(mask.any()) else math.nan
        if step in self._alpha_at:
            started = time.perf_counter()
            row |= self._alpha()
            self.seconds["alpha"] += time.perf_counter() - started
        return row

    def _alpha(self) -> dict[str, float]:
        """WeightWatcher's alpha of the head, and its mean over all layers that it can fit."""
        logging.getLogger("weightwatcher").setLevel(logging.CRITICAL)
        import weightwatcher

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                details = weightwatcher.WeightWatcher(model=self._model).analyze()
            except Exception:  # it raises bare exceptions where no layer is large enough for its fit
                return {}
        alpha = details["alpha"].to_numpy(dtype=float)
        fitted = np.isfinite(alpha) & (alpha > 0)
        if not fitted.any():
            return {}
        name = next(name for name, module in self._model.named_modules() if module is self._head)
        of_head = alpha[fitted & (details["longname"] == name).to_numpy()]
        return {
            "alpha_mean": float(alpha[fitted].mean()),
            "alpha_head": float(of_head[0]) if of_head.size else math.nan,
        }


def _kept_visits(monitor: logalign.Monitor) -> list[tuple[float, int, float]]:
    """Step, sample and loss of every visit that the monitor takes from here on, so that other estimates of drift can be
    tried on them without training anew."""
    taken: list[tuple[float, int, float]] = []
    record = monitor._journal.samples
    add = record.add

    def keep(step: float, samples: Any, losses: Any) -> None:
        taken.extend((step, int(sample), float(loss)) for sample, loss in zip(samples, losses, strict=True))
        add(step, samples, losses)

    record.add = keep  # type: ignore[method-assign]
    return taken


def truth(steps: Sequence[int], losses: Sequence[np.ndarray[Any, Any]]) -> dict[str, float]:
    """The lowest point of the smoothed held-out loss, and how far the end lies above it, with its standard error.

    Smoothed by a centered moving mean of 5 evaluations. The standard error is that of the mean difference between end
    and lowest point, over the held-out units. Where the run diverged, all is of the evaluations before it.
    """
    finite = [bool(np.isfinite(each).all()) for each in losses]
    whole = finite.index(False) if False in finite else len(losses)
    diverged = {} if whole == len(losses) else {"diverged_step": int(steps[whole])}
    curve = np.stack(losses[:whole])  # [evaluations, S]
    half = SMOOTHING // 2
    smooth = np.stack([curve[max(0, i - half) : i + half + 1].mean(axis=0) for i in range(len(curve))])
    mean = smooth.mean(axis=1)
    lowest = int(mean.argmin())
    rise = smooth[-1] - smooth[lowest]
    return {
        "val_min": float(mean[lowest]),
        "val_min_step": int(steps[lowest]),
        "val_final": float(mean[-1]),
        "rise": float(rise.mean()),
        "rise_se": float(rise.std(ddof=1) / math.sqrt(rise.size)),
        "val_first": float(curve[0].mean()),
        **diverged,
    }


def _exp_entropy(singular: Tensor) -> float:
    share = singular / singular.sum()
    share = share[share > 0]
    return float(torch.exp(-(share * share.log()).sum()))


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
