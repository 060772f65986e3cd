"""JAX: `energies(weight, inputs)`, a pure function that computes the sums behind the log-alignment ratio.

A jitted step returns them as one small pytree. `logalign.integrations.jax.Recorder` turns it into readings.
"""

from logalign.common.extras import load

load("jax", extra="jax", purpose="logalign.jax")

from logalign.jax.sums import Sums, energies  # noqa: E402

__all__ = ["Sums", "energies"]
