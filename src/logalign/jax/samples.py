"""Samples: the loss of each sample of a step, and which sample it is, on their way to the host.

Nothing here waits for the device between readings. Arrays are kept as they are, with their way to the host begun. Rows
are hashed on the device, so that only B losses and B hashes of each step are kept.

Shapes: B samples of a step.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from logalign.errors import InputError
from logalign.jax.rows import EMPTY, Hashes, id_hashes, joined, row_words
from logalign.samples.record import SampleRecord
from logalign.samples.visits import hashes_of

Losses = np.ndarray[Any, np.dtype[np.float64]]

MOST_STEPS = 64
"""Steps whose losses and hashes are kept until a reading is taken; those before go to the record as they arrive."""
LARGEST_LOSS = 1e30
"""A loss beyond it is as good as infinite."""
USAGE = "step(losses=per_sample, samples=ids)"
NOTHING_PASSED = f"no losses were passed: {USAGE}"


class StepVisits(NamedTuple):
    """The samples of one step, a pytree.

    Attributes:
        step: Which step.
        samples: Hashes [B] on the host; on the device, ids [B], or rows as two numbers each [B, 2].
        losses: Of each, [B].
    """

    step: int
    samples: jax.Array | Hashes
    losses: jax.Array | Losses

    @property
    def has_arrived(self) -> bool:
        """Whether reading it waits for nothing."""
        arrays: list[Any] = [array for array in self[1:] if isinstance(array, jax.Array)]
        return all(array.is_deleted() or array.is_ready() for array in arrays)  # jaxlib crashes on one that is deleted

    def read(self) -> tuple[Hashes, Losses]:
        """Hashes and losses on the host, without rows that are padding; a loss that is not finite is NaN.

        Raises:
            InputError: an array was donated or deleted in the meantime.
        """
        for name, array in zip(("samples", "losses"), self[1:], strict=True):
            _check_readable(name, array)
        samples, losses = (np.asarray(jax.device_get(array)) for array in self[1:])
        losses = losses.astype(np.float64)
        losses[~(np.abs(losses) < LARGEST_LOSS)] = np.nan
        if not isinstance(self.samples, jax.Array):
            return samples, losses
        if samples.ndim == 1:
            return id_hashes(samples), losses
        hashes = joined(samples)
        return hashes[hashes != EMPTY], losses[hashes != EMPTY]


class GivenSamples:
    """Takes the losses and samples that the user passes with each step.

    Attributes:
        lacking: What is missing for there to be visits, in words; None once there have been some.
    """

    def __init__(self) -> None:
        self.lacking: str | None = NOTHING_PASSED
        self._steps: deque[StepVisits] = deque()

    def give(self, step: int, losses: Any, samples: Any) -> None:
        """Keep the visits of a step, and begin their way to the host.

        Raises:
            InputError: what was passed cannot be used; nothing of the step is kept.
        """
        if losses is None and samples is None:
            return
        try:
            visits = _step_visits(step, losses, samples)
        except InputError as error:
            if self.lacking is not None:
                self.lacking = str(error)
            raise
        for array in visits[1:]:
            if isinstance(array, jax.Array):
                array.copy_to_host_async()
        self._steps.append(visits)
        self.lacking = None

    def cut(self) -> tuple[StepVisits, ...]:
        """The visits since the last call, and a clean slate."""
        steps = tuple(self._steps)
        self._steps.clear()
        return steps

    def overdue(self) -> list[StepVisits]:
        """The oldest visits where there are many, as far as they have arrived; they are kept no longer."""
        overdue = []
        while len(self._steps) > MOST_STEPS and self._steps[0].has_arrived:
            overdue.append(self._steps.popleft())
        return overdue


def add_visits(record: SampleRecord, visits: StepVisits) -> None:
    """Add the visits of a step to the record, those that it may track.

    Raises:
        InputError: an array was donated or deleted in the meantime; nothing is added.
    """
    if record.is_off:
        return
    hashes, losses = visits.read()
    tracked = hashes <= record.visits.threshold
    record.add(visits.step, hashes[tracked], losses[tracked].tolist())


def check_not_traced(**given: Any) -> None:
    """Refuse traced values.

    Raises:
        InputError: one is traced.
    """
    for name, value in given.items():
        values = value if isinstance(value, list | tuple) else (value,)
        if any(isinstance(each, jax.core.Tracer) for each in values):
            raise InputError(
                f"step({name}=...): expected values, found traced ones: step() is called inside jit, grad or scan; "
                "call it outside, with what the traced function returns"
            )


def _step_visits(step: int, losses: Any, samples: Any) -> StepVisits:
    if losses is None or samples is None:
        lacks, has = ("losses", "samples") if losses is None else ("samples", "losses")
        raise InputError(f"{lacks}: expected them beside {has}, found none; {USAGE}")
    of_losses, of_samples = _losses(losses), _samples(samples)
    if of_losses.shape[0] != of_samples.shape[0]:
        raise InputError(
            f"losses: expected one for each sample, found {of_losses.shape[0]} losses for {of_samples.shape[0]} samples"
        )
    return StepVisits(step, of_samples, of_losses)


def _losses(losses: Any) -> jax.Array | Losses:
    array = _array("losses", losses)
    numbers = jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)
    if array.ndim != 1 or not numbers:
        raise InputError(
            f"losses: expected one number for each sample, [B], found {array.dtype} of shape {array.shape}; pass the "
            "mean loss of each sample's tokens, with micro-batches joined"
        )
    _check_readable("losses", array)
    return array if isinstance(array, jax.Array) else array.astype(np.float64)


def _samples(samples: Any) -> jax.Array | Hashes:
    array = _array("samples", samples)
    is_whole = jnp.issubdtype(array.dtype, jnp.integer)
    _check_readable("samples", array)
    if array.ndim > 1:
        return np.zeros(array.shape[0], dtype=np.int64) if not array.size else row_words(array)
    if array.ndim == 1 and not array.size:
        return np.zeros(0, dtype=np.int64)
    if array.ndim == 1 and is_whole:
        return array if isinstance(array, jax.Array) else id_hashes(array)
    listed = list(samples) if array.ndim == 1 and not isinstance(samples, jax.Array) else []
    if not listed or not all(isinstance(each, str | int) and not isinstance(each, bool) for each in listed):
        raise InputError(
            "samples: expected whole numbers or text, [B], or the samples themselves, [B, ...], found "
            f"{array.dtype} of shape {array.shape}"
        )
    return np.array(hashes_of(listed), dtype=np.int64)


def _array(name: str, values: Any) -> Any:
    """A JAX array as it is, and anything else as NumPy sees it."""
    if isinstance(values, jax.Array):
        return values
    try:
        if isinstance(values, list | tuple) and any(isinstance(each, jax.Array) for each in values):
            return jnp.stack([jnp.asarray(each) for each in values])
        return np.asarray(values)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise InputError(f"{name}: expected an array, found {type(values).__name__} ({error})") from None


def _check_readable(name: str, array: Any) -> None:
    if not isinstance(array, jax.Array):
        return
    if array.is_deleted():
        raise InputError(f"{name}: expected an array that is there, found one that was donated or deleted")
    if not (array.is_fully_addressable or array.is_fully_replicated):
        raise InputError(
            f"{name}: expected the whole array in every process, found one that is spread over several; gather it with "
            "jax.experimental.multihost_utils.process_allgather"
        )
