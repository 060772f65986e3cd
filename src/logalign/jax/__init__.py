"""JAX: `energies(weight, inputs)`, the sums that the log-alignment ratio is taken from, as a pure function.

They come out of a jitted step as one small pytree, which `logalign.integrations.jax.Recorder` makes readings of.
"""

from logalign.common.extras import load

load("jax", extra="jax", purpose="logalign.jax")

from logalign.jax.sums import Sums, energies  # noqa: E402

__all__ = ["Sums", "energies"]
