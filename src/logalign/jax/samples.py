"""Samples: the loss and the identity of each sample of a step, with asynchronous copies to the host.

Nothing here waits for the device between readings. The module keeps arrays unchanged and starts their copy to the host.
The device hashes the rows, so each step keeps only B losses and B hashes.

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
"""Most steps that keep losses and hashes until a reading. Older steps go to the record as they arrive."""
LARGEST_LOSS = 1e30
"""A loss above it counts as infinite."""
USAGE = "step(losses=per_sample, samples=ids)"
NOTHING_PASSED = f"no losses were passed: {USAGE}"


class StepVisits(NamedTuple):
    """The samples of one step, a pytree.

    Attributes:
        step: Number of the step.
        samples: Hashes [B] on the host. On the device, ids [B], or two numbers for each row [B, 2].
        losses: Loss of each sample, [B].
    """

    step: int
    samples: jax.Array | Hashes
    losses: jax.Array | Losses

    @property
    def has_arrived(self) -> bool:
        """True if `read()` returns without waiting."""
        arrays: list[Any] = [array for array in self[1:] if isinstance(array, jax.Array)]
        return all(array.is_deleted() or array.is_ready() for array in arrays)  # jaxlib crashes on a deleted array

    def read(self) -> tuple[Hashes, Losses]:
        """Return hashes and losses on the host, without padding rows and with NaN for a loss that is not finite.

        Raises:
            InputError: an array has been donated or deleted.
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
    """Collects the losses and samples that the user passes with each step.

    Attributes:
        lacking: The missing requirement for visits, in words. None after the first visits.
    """

    def __init__(self) -> None:
        self.lacking: str | None = NOTHING_PASSED
        self._steps: deque[StepVisits] = deque()

    def give(self, step: int, losses: Any, samples: Any) -> None:
        """Keep the visits of a step and start their copy to the host.

        Raises:
            InputError: the arguments are not usable. The method keeps nothing of the step.
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
        """Return the visits since the last call and clear them."""
        steps = tuple(self._steps)
        self._steps.clear()
        return steps

    def overdue(self) -> list[StepVisits]:
        """Remove and return the oldest visits beyond `MOST_STEPS` that have arrived."""
        overdue = []
        while len(self._steps) > MOST_STEPS and self._steps[0].has_arrived:
            overdue.append(self._steps.popleft())
        return overdue


def add_visits(record: SampleRecord, visits: StepVisits) -> None:
    """Add those visits of a step to the record that it may track.

    Raises:
        InputError: an array has been donated or deleted. The function adds nothing.
    """
    if record.is_off:
        return
    hashes, losses = visits.read()
    tracked = hashes <= record.visits.threshold
    record.add(visits.step, hashes[tracked], losses[tracked].tolist())


def check_not_traced(**given: Any) -> None:
    """Refuse traced values.

    Raises:
        InputError: a value is traced.
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
    """Return a JAX array unchanged and convert anything else to NumPy."""
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
