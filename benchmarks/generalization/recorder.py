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
    ) -> None:
        self._model = model
        self._head = model.get_submodule(head)
        self._every, self._evaluate_every = every, evaluate_every
        self._others = dict(zip(others, ("site_first", "site_last"), strict=False))
        self._alpha_at = {round(i * (steps - 1) / (ALPHAS - 1)) // every * every for i in range(ALPHAS)}
        self._monitor = logalign.watch(model, layers=["unembedding", *others], every=every, spectra_every=every)
        self._handle = self._head.register_forward_hook(self._keep)
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
        self, step: int, logits: Tensor, targets: Tensor, losses: Tensor, *, lr: float, epoch: float, evaluate: Evaluate
    ) -> None:
        """Record a step whose per-sample training losses are `losses`."""
        self._recent.append(float(losses.detach().mean()))
        if not self.is_monitored:
            self._monitor.step()
            return
        started = time.perf_counter()
        row = self._rivals(step, logits.detach(), losses.detach())
        self.seconds["rivals"] += time.perf_counter() - started
        started = time.perf_counter()
        readings = self._monitor.step(loss=self._recent[-1], lr=lr, epoch=epoch)
        self.seconds["monitor"] += time.perf_counter() - started
        assert readings is not None
        main = readings.main
        row |= {"step": step, "epoch": epoch, "lr": lr, "loss": self._recent[-1], "train_loss": fmean(self._recent)}
        row |= {name: _number(getattr(main, name)) for name in (*WATCHED, *SPECTRAL)}
        row |= {f"energy_{name}": _number(value) for name, value in (main.energies or {}).items()}
        row |= {"n": main.n, "m": main.m, "tokens": main.tokens, "tokens_seen": main.tokens_seen}
        for name, column in self._others.items():
            row[f"{column}_lar"] = _number(readings[name].lar)
            row[f"{column}_lar_token_centered"] = _number(readings[name].lar_token_centered)
        self._recent.clear()
        row["train_acc"] = float((logits.detach().argmax(-1) == targets).float().mean())
        if step % self._evaluate_every == 0:
            found = dict(evaluate())
            held_out = np.asarray(found.pop("losses"), dtype=np.float64)
            self._losses.append(held_out)
            self._loss_steps.append(step)
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
    def _rivals(self, step: int, logits: Tensor, losses: Tensor) -> dict[str, float]:
        assert self._seen is not None
        weight = self._head.weight.detach()
        inputs = self._seen[0].reshape(-1, weight.shape[1])
        singular = torch.linalg.eigvalsh(weight.double().T @ weight.double()).clamp(min=0).sqrt()
        directions = torch.linalg.eigvalsh(inputs.double().T @ inputs.double()).clamp(min=0).sqrt()
        gradients = [p.grad for p in self._model.parameters() if p.grad is not None]
        trained = [p for p in self._model.parameters() if p.requires_grad]
        log_p = logits.reshape(-1, logits.shape[-1]).float().log_softmax(-1)
        row = {
            "stable_rank": float((singular**2).sum() / singular.max() ** 2),
            "entropy_rank": _exp_entropy(singular),
            "rankme": _exp_entropy(directions),
            "weight_norm": math.sqrt(sum(float(p.square().sum()) for p in trained)),
            "gradient_norm": math.sqrt(sum(float(g.square().sum()) for g in gradients)),
            "prediction_entropy": float(-(log_p.exp() * log_p).sum(-1).mean()),
            "loss_spread": float(losses.std()),
        }
        if self._rare is not None and self._targets is not None:
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


def truth(steps: Sequence[int], losses: Sequence[np.ndarray[Any, Any]]) -> dict[str, float]:
    """The lowest point of the smoothed held-out loss, and how far the end lies above it, with its standard error.

    Smoothed by a centered moving mean of 5 evaluations. The standard error is that of the mean difference between end
    and lowest point, over the held-out units.
    """
    curve = np.stack(losses)  # [evaluations, S]
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
    }


def _exp_entropy(singular: Tensor) -> float:
    share = singular / singular.sum()
    share = share[share > 0]
    return float(torch.exp(-(share * share.log()).sum()))


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
