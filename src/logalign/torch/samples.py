"""Losses of a few samples of each batch, measured in the forward that the hooks already see.

Method: each row of the batch is hashed, and the rows with the lowest hashes are measured. The hash also selects a few
tokens of each, so that a sample is measured on the same tokens at every visit. The losses need targets. The first
available source of these gives them:

    gradient    of the logits: a cross entropy's is lowest at the target, and zero where a token does not count. It
                gives the target, the mask, and whether the loss is a cross entropy of these logits. Labels among the
                forward's arguments must agree with it.
    labels      without a visible gradient: from the arguments of a fused loss or of a compiled model's forward
    inputs      shifted by one, if a compiled model hides the gradient, and checked against the loss given to `step()`
    the user    `step(losses=...)`, one for each row

The alternative, finding the targets among the loss function's arguments, would have to replace that function.

Nothing waits for the device. The hash and loss of each row stay there until the next reading transfers them.

Shapes: B rows of a batch, r of them measured, L tokens of a row, q of them measured, V logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.hooks import unserializable_hook

from logalign.samples.visits import hashes_of
from logalign.torch.kept import Kept
from logalign.torch.linear import Dense, LinearMap
from logalign.torch.masks import TARGETS, aligned
from logalign.torch.megatron import ColumnParallel
from logalign.torch.next_tokens import Agreement, following
from logalign.torch.row_losses import Chosen, logits_of, losses_by_gradient, losses_of
from logalign.torch.rows import HIGHEST, can_be_hashed, joined_hashes, mixed_up

TOKENS_PER_ROW = 8
SMALL_ROW = 8192
"""A row with at most this many logits uses all its tokens."""
SHARE_OF_TOKENS = 128
"""One of this many tokens of a forward is measured, or as many as have `SMALL` logits if that is more."""
SMALL = 131_072
MOST_ROWS = 1024
"""Most rows of a forward with kept hashes."""
MOST_FORWARDS = 10_000
"""Most forwards of one step with rows kept for the losses or ids given to `step()`."""


ADVICE = "pass step(losses=...), the loss of each row of the batch"
UNSEEN = f"no losses of single samples are seen; {ADVICE}"


class Batch(NamedTuple):
    """The rows of the current forward.

    Attributes:
        hashes: The rows' hashes [B].
        rows: Their tokens, or other model inputs, [B, ...].
        mask: Their attention mask.
        name: The labels' name among the forward's arguments.
        labels: The labels, or None.
        last: The number of last tokens with logits. 0 means all, -1 unknown.
    """

    hashes: Tensor
    rows: Tensor
    mask: Tensor | None
    name: str
    labels: Tensor | None
    last: int


class SampleTracker:
    """Measures the losses of tracked samples in training forwards.

    Args:
        is_on: Whether samples are tracked.
        ignore_index: The label that does not count.
        shifts: Whether the model shifts its labels by one.
        padding: The padding token, if known.
        main_call: Which call of the head in a forward counts, from 0 (default: the first).

    Attributes:
        is_on: Whether samples are still tracked.
        step: The current step.
        kept: Hashes and losses since the last reading.
        fault: The error that ended the tracking, or None.
        forwards: Number of forwards with known rows since the last reading.
    """

    def __init__(
        self,
        *,
        is_on: bool = False,
        ignore_index: int = -100,
        shifts: bool = False,
        padding: int | None = None,
        main_call: int | None = None,
    ) -> None:
        self.is_on = is_on
        self.step = 0
        self.kept = Kept()
        self.fault: str | None = None
        self.forwards = 0
        self._ignore_index = ignore_index
        self._shifts = shifts
        self._padding = padding
        self._agreement = Agreement()
        self._width: int | None = None  # V
        self._mark = 0  # where the visits of the current forward begin
        self._ticket: set[str] = set()  # empty once another candidate replaces this one
        self._unseen = 0  # successive readings without any
        self._any = False  # whether any loss of a sample was seen
        self._batch: Batch | None = None
        self._done = False  # whether the current forward has been measured
        self._share = 1.0  # tracked share of all samples
        self._gives_ids = self._gives_losses = self._given = False
        self._main_call, self._calls = main_call, 0
        self._of_step: list[tuple[Tensor, Tensor | None]] = []  # hashes [B] and losses [B] of each forward of the step

    def begin(
        self,
        rows: Sequence[Tensor],
        mask: Tensor | None,
        name: str = "",
        labels: Tensor | None = None,
        last: int = 0,
    ) -> None:
        """Begin a training forward of the model on these tensors. Tokens, if any, come first."""
        self._close()
        self._calls = 0
        if not self.is_on or not rows or not all(can_be_hashed(each) for each in rows):
            return
        with self._guarded():
            hashes = joined_hashes(rows, mask=mask, padding=self._padding)
            labels = None if labels is None else labels.detach()
            self._batch = Batch(hashes, rows[0].detach(), mask, name, labels, last)
            self.forwards += 1

    def _close(self) -> None:
        """Close the current forward, whose head may run after the forward itself."""
        batch, self._batch = self._batch, None
        if batch is not None and not self._done:
            self._of_step.append((batch.hashes, None))
        self._done = False
        if len(self._of_step) > MOST_FORWARDS:  # in a loop that never calls step()
            self._of_step = []

    def measure(
        self,
        outputs: Any,
        *,
        hidden: Tensor,
        mapped: Callable[[], LinearMap],
        targets: Tensor | None = None,
        compiled: bool = False,
        is_candidate: bool = False,
    ) -> None:
        """Measure the head's run on the rows of the current forward, in its first call by default.

        Args:
            outputs: Its logits [B, L, V], [B, V] or [B L, V], or None if they are never formed.
            hidden: Its inputs [..., n].
            mapped: Returns its weight, used without logits.
            targets: The loss's targets, one for each input, if known.
            compiled: Whether this is inside compiled code, where gradient hooks are not possible.
            is_candidate: Whether the head is still unknown. The last candidate counts.
        """
        batch = self._batch
        if not self.is_on or batch is None or (self._done and not is_candidate):
            return
        self._calls += 1
        if self._main_call is not None and not is_candidate and self._calls <= self._main_call:
            return
        if self._done:
            self._of_step.pop()
            self.kept.undo(self._mark)
            self._ticket.clear()
        if is_candidate:
            self._width = None
        self._done, self._mark, self._ticket = True, self.kept.mark(), {"counts"}
        self._of_step.append((batch.hashes, None))
        if self._gives_losses:
            return
        with self._guarded():
            logits = outputs.detach() if _is_plain(outputs) else None
            weight = mapped() if logits is None or self._width is None else None
            if weight is not None:
                self._width = weight.shape[0]
            shape = _shape_of(batch, (hidden if logits is None else logits).shape[:-1])
            width = self._width or 0
            # If vocabulary or features are split over ranks, no rank has a row's loss.
            spread = not _is_plain(hidden) or (weight is not None and not _is_plain(_tensor_of(weight)))
            if logits is not None:
                spread = logits.shape[-1] != width
            if shape is None or width < 2 or spread or (logits is None and outputs is not None):
                return
            known = self._targets(batch, targets, shape)
            by_gradient = logits is not None and not compiled and outputs.requires_grad
            if not by_gradient and targets is None:
                if known is None:
                    known = following(batch.rows, batch.mask, shape, ignored=self._ignore_index)
                    self._agreement.is_assumed |= known is not None
                self._agreement.is_asked = True
            self._agreement.is_asked |= width == 2
            if known is None and not by_gradient:
                return
            chosen = self._choose(batch, shape, known, width)
            picked = chosen.of(hidden.detach(), shape) if logits is None else chosen.of(logits, shape)
            if by_gradient:
                self._listen(outputs, picked, shape, chosen)
            else:
                if logits is None:
                    assert weight is not None
                    picked = logits_of(picked, weight)
                self._keep(chosen, losses_of(picked, chosen))

    def _targets(self, batch: Batch, targets: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
        """Targets [B, L], or None if unknown."""
        if targets is None:
            if batch.labels is None or batch.name not in TARGETS or batch.last < 0:
                return None
            targets = aligned(batch.name, batch.labels, batch.last, shifts=self._shifts, ignored=self._ignore_index)
        if targets.is_floating_point() or targets.numel() != shape[0] * shape[1]:
            return None
        return targets.detach().reshape(shape)

    def _choose(self, batch: Batch, shape: tuple[int, int], targets: Tensor | None, width: int) -> Chosen:
        """Choose the rows and their tokens with the lowest hashes, the same at every visit."""
        size, length = shape
        most = max(TOKENS_PER_ROW, SMALL_ROW // width)
        hashes, places = torch.topk(batch.hashes, self._rows_to_name(size), largest=False)
        places = places[: self._rows_to_look_at(size, length, width)]
        own = None if targets is None else targets[places]
        if own is not None:
            counts = own != self._ignore_index
        elif batch.mask is not None and batch.mask.shape == shape:
            counts = batch.mask[places] != 0
        else:
            counts = torch.ones((places.numel(), length), dtype=torch.bool, device=hashes.device)
        if length <= most:
            every = torch.arange(length, device=hashes.device).expand(places.numel(), length)
            return Chosen(places, hashes, every, counts, own)
        # Hash the index among the tokens that count, so that padding has no effect.
        keys = torch.where(counts, mixed_up(batch.hashes[places, None] ^ counts.cumsum(1)), HIGHEST)
        tokens = torch.topk(keys, most, dim=1, largest=False).indices
        return Chosen(places, hashes, tokens, counts.gather(1, tokens), None if own is None else own.gather(1, tokens))

    def _rows_to_name(self, size: int) -> int:
        """Return how many rows are tracked in nearly every batch of this size, lowest hashes first."""
        expected = size * self._share
        if self._gives_ids or self._share >= 1:
            return min(size, MOST_ROWS)
        return max(1, min(size, MOST_ROWS, math.ceil(expected + 3 * math.sqrt(expected))))

    def _rows_to_look_at(self, size: int, length: int, width: int) -> int:
        """Return how many of them are worth their cost. Visits of the others have no loss and no pair."""
        if self._gives_ids:
            return MOST_ROWS
        tokens = max(TOKENS_PER_ROW, size * length // SHARE_OF_TOKENS, SMALL // width)
        return max(1, tokens // min(length, max(TOKENS_PER_ROW, SMALL_ROW // width)))

    def _listen(self, logits: Tensor, picked: Tensor, shape: tuple[int, int], chosen: Chosen) -> None:
        """Take the losses once backward has the logits' gradient, which gives or confirms the targets."""
        place, total = len(self._of_step) - 1, torch.logsumexp(picked.float(), dim=-1)
        ticket = self._ticket

        def see(gradient: Tensor) -> None:
            if not self.is_on or not ticket:
                return
            with self._guarded():
                losses = losses_by_gradient(chosen.of(gradient.detach(), shape), picked, chosen, total)
                self._keep(chosen, losses, place)

        # Saving the logits drops this hook without a warning.
        logits.register_hook(unserializable_hook(see))  # type: ignore[no-untyped-call]

    def _keep(self, chosen: Chosen, losses: Tensor, place: int = -1) -> None:
        """Keep hash and loss of each chosen row, or all losses until the ids arrive if the user gives ids."""
        if not self._gives_ids:
            unknown = losses.new_full((chosen.hashes.numel() - losses.numel(),), math.nan)
            self.kept.add(self.step, chosen.hashes, torch.cat([losses, unknown]))
        elif -1 <= place < len(self._of_step) and self._of_step:
            hashes, _ = self._of_step[place]
            every = losses.new_full(hashes.shape, math.nan)
            every[chosen.places] = losses
            self._of_step[place] = hashes, every

    def give(self, losses: Any, ids: Any) -> str | None:
        """Take losses or ids of all rows of the step, in the order of its forwards, and return any error."""
        if not self.is_on:
            return None
        self._close()
        self._given = True
        try:
            return self._give(losses, ids)
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    def _give(self, losses: Any, ids: Any) -> str | None:
        rows = self._of_step
        hashes = torch.cat([each for each, _ in rows]) if ids is None and rows else _hashes_of(ids)
        known = None if losses is None else _losses_of(losses)
        for wrong in (hashes, known):
            if isinstance(wrong, str):
                return wrong
        was_told, self._gives_ids = self._gives_ids, self._gives_ids or ids is not None
        self._gives_losses = self._gives_losses or losses is not None
        measured = [each for _, each in rows if each is not None]
        # Some rows are unmeasured before the first ids, and later where their loss is not visible.
        if known is None and was_told and rows and len(measured) == len(rows):
            known = torch.cat(measured)
        if known is None:
            return None
        assert isinstance(hashes, Tensor)
        assert isinstance(known, Tensor)
        if hashes.numel() != known.numel():
            whose = "rows of the step's forwards" if ids is None else "samples"
            return f"expected one loss for each of the {hashes.numel()} {whose}, found {known.numel()}"
        with self._guarded():
            self.kept.add(self.step, hashes.to(known.device, non_blocking=True), known)
        return None

    def next_step(self, step: int) -> None:
        """End the step."""
        if self._gives_losses and not self._given:
            self._close()
            for hashes, _ in self._of_step:  # seen, with an unknown loss
                self.kept.add(self.step, hashes, torch.full(hashes.shape, math.nan, device=hashes.device))
        self.step = step
        self._batch, self._done, self._given = None, False, False
        if self._of_step:
            self._of_step = []

    def take(self, device: torch.device, *, first: int, count: int | None) -> Tensor:
        """Take what was kept since the last reading, or nothing after an internal error."""
        with self._guarded():
            return self.kept.take(device, first=first, count=count)
        # After an error nothing is kept.
        return self.kept.take(device, first=first, count=count)

    def check(self, losses: np.ndarray[Any, Any]) -> None:
        """Note the losses that were read, to compare them with those given to `step()`."""
        self._any |= bool(np.isfinite(losses).any())
        self._agreement.add(losses)

    def lacking(self, loss: float | None) -> str | None:
        """Describe what prevents losses of samples, or return None.

        Args:
            loss: Mean training loss since the last reading. If targets are the inputs shifted by one, the samples'
                losses must agree with it. Otherwise tracking stops.
        """
        if self.fault is not None:
            return f"samples are followed no more: {self.fault}"
        self._agreement.compare(loss)
        if self._agreement.refuted is not None:
            self.stop()
            return f"{self._agreement.refuted}; {ADVICE}"
        if not self.is_on:
            return None
        # The head may still be unknown in the very first forward.
        self._unseen = 0 if self._any else self._unseen + 1
        return UNSEEN if self._unseen > 1 else None

    def state(self) -> list[Any]:
        """Return the state for a checkpoint: what the user gives, and visits since the last reading."""
        return [self._gives_ids, self._gives_losses, self.kept.state(), self._unseen, self._any]

    def load(self, state: Sequence[Any]) -> None:
        """Restore what `state()` gave."""
        self._gives_ids, self._gives_losses = state[0], state[1]
        self._batch, self._of_step = None, []
        self.kept.load(state[2])
        self._unseen, self._any = state[3], state[4]

    def settle(self, *, threshold: int) -> None:
        """Apply a reading's threshold: samples with a higher hash are not tracked."""
        self._share = (threshold + 1) / (HIGHEST + 1)
        self.kept.threshold = threshold
        self.forwards = 0

    def stop(self) -> None:
        """Stop tracking."""
        self.is_on = False
        self._batch, self._of_step = None, []
        self.kept.clear()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Let an error here end the tracking and not the training."""
        try:
            with torch.no_grad():
                yield
        except Exception as error:
            self.fault = f"{type(error).__name__}: {error}"
            self.stop()


def _is_plain(outputs: Any) -> bool:
    return isinstance(outputs, Tensor) and type(outputs).__name__ != "DTensor"


def _tensor_of(weight: LinearMap) -> Any:
    """Return a map's weight at this rank, or None if it is a shard of the rows."""
    if isinstance(weight, Dense):
        return weight.weight
    return None if isinstance(weight, ColumnParallel) else torch.empty(0)


def _shape_of(batch: Batch, tokens: torch.Size) -> tuple[int, int] | None:
    """B and L of the logits, or None if they belong to other rows."""
    size = batch.hashes.shape[0]
    if not tokens or not tokens.numel():
        return None
    if tokens[0] == size:
        return size, tokens[1:].numel()
    if len(tokens) != 1 or batch.rows.ndim != 2 or batch.rows.is_floating_point():
        return None
    # Logits are flat, with or without each row's last token.
    length = batch.rows.shape[1]
    return next(((size, each) for each in (length, length - 1) if each and tokens[0] == size * each), None)


def _losses_of(losses: Any) -> Tensor | str:
    """Return the user's losses as a tensor [rows], or an error message."""
    try:
        found = losses.detach() if isinstance(losses, Tensor) else torch.as_tensor(np.asarray(losses, dtype=np.float64))
    except (TypeError, ValueError):
        return f"losses: expected one number for each row of the step's forwards, found {type(losses).__name__}"
    if found.ndim != 1 or found.is_complex():
        return f"losses: expected one number for each row of the step's forwards, found shape {tuple(found.shape)}"
    return found.float()


def _hashes_of(ids: Any) -> Tensor | str:
    """Return hashes of the user's ids [samples], or an error message."""
    if ids is None:
        return "losses: expected a forward of the watched model in this step, found none; pass samples= beside them"
    if isinstance(ids, Tensor) or (isinstance(ids, np.ndarray) and ids.dtype.kind in "iub"):
        found = torch.as_tensor(ids)
        if found.ndim != 1 or found.is_floating_point() or found.is_complex():
            return f"samples: expected whole numbers [samples], found {found.dtype} of shape {tuple(found.shape)}"
        return mixed_up(found)
    try:
        if isinstance(ids, str | bytes):
            raise TypeError
        listed = list(ids)
    except TypeError:
        return f"samples: expected an id for each row of the step's forwards, found {type(ids).__name__}"
    if all(isinstance(each, int) and abs(each) <= HIGHEST for each in listed):
        return mixed_up(torch.tensor(listed, dtype=torch.int64))
    return torch.tensor(hashes_of(listed), dtype=torch.int64)
