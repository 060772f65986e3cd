"""Ranks: which ranks share a layer, the part of it each has, and how their sums combine.

Two kinds of ranks matter. *Token ranks* run the same layer on different tokens (data and context parallelism). The
model's wrapper or the user identifies them. *Shards* have different parts of the weight (tensor parallelism), and
DTensor's placements identify the parts. All other splits (sequence parallelism, sharded storage as in FSDP) are undone
by the end of a layer's forward.

Method: each rank adds its part to one vector, weighted by the number of ranks with the same part. One all-reduce over
all ranks of the layer gives the totals. The alternative is to reduce over one mesh axis after the other, like DTensor,
which takes one collective per axis. The vector's layout depends only on the sites, never on data, so a rank without a
valid token takes part like the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from logalign.errors import LogAlignError
from logalign.torch import megatron
from logalign.torch.distributed import (
    columns_of,
    is_dtensor,
    is_initialized,
    local_of,
    summed_over,
    whole_of,
    world_size,
)
from logalign.torch.linear import Dense, FirstRows, LinearMap
from logalign.torch.meter import SCALARS, Packed, Share
from logalign.torch.reduce import wide

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

SHARED = ("loss", "loss_mean")
"""Values of a step averaged over the token ranks. All others are recorded as on this rank."""
VISITS, LEAST_VISITS = 2048, 64
"""Sample visits in a reading from all ranks together, and the least per rank."""
Shape = tuple[int, int]


class Local(NamedTuple):
    """This rank's data of one call of a layer, and its part of the whole."""

    part: Share
    weight: LinearMap
    inputs: Tensor
    outputs: Tensor | None
    bias: Tensor | None


class Ranks:
    """The ranks that measure one model together, or a single process.

    Args:
        tokens: Global ranks with tokens of their own, including this one, in order.
        everyone: All ranks of the layer: token ranks times shards, in order.
        group: Their process group, or None for one process.

    Attributes:
        is_first: Whether this rank writes the run.
    """

    def __init__(
        self, tokens: Sequence[int] = (0,), everyone: Sequence[int] = (0,), group: ProcessGroup | None = None
    ) -> None:
        self.tokens, self.everyone = tuple(tokens), tuple(everyone)
        self.shards = len(self.everyone) // len(self.tokens)
        self._group = group
        self._agreed: dict[str, Shape] | None = None
        self._was_distributed = is_initialized()
        self.is_first = group is None or torch.distributed.get_rank() == self.everyone[0]

    @property
    def alone(self) -> bool:
        """Whether there is no other rank."""
        return self._group is None

    def describe(self) -> str:
        """Describe the ranks for the summary line."""
        words = []
        if len(self.tokens) > 1:
            words.append(f"{len(self.tokens)} ranks with tokens of their own")
        if self.shards > 1:
            words.append(f"{self.shards} shards of the layer")
        return " x ".join(words) or "this process alone"

    def check_still_alone(self) -> None:
        """Check that no process group came up since `watch()`.

        Raises:
            LogAlignError: If one of several ranks came up.
        """
        if self.alone and not self._was_distributed and world_size() > 1:
            raise LogAlignError(
                "expected the process group to be there when watch() was called, found one that came up since; call "
                "torch.distributed.init_process_group() first, wrap the model, then watch it"
            )

    def share(self, value: Any) -> Any:
        """Send the first rank's value to all. This object collective is too slow for a step."""
        if self.alone:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=self.everyone[0], group=self._group)
        return box[0]

    def whole(self, shape: Shape) -> Share:
        """The part of a rank that has a whole layer, like its shards."""
        share = 1 / self.shards
        return Share(
            shape=shape,
            of_weight=share,
            of_input=share,
            of_output=share,
            of_tokens=share,
            spread=not self.alone,
        )

    def locate(
        self,
        weight: LinearMap,
        inputs: Tensor,
        outputs: Tensor | None,
        *,
        name: str,
        softmax: bool,
        rows: int | None = None,
    ) -> Local:
        """Find this rank's data of a call of a layer, whose first `rows` rows count.

        Raises:
            LogAlignError: If the weight's layout over ranks is not supported.
        """
        tensor = _tensor_of(weight)
        if isinstance(weight, megatron.ColumnParallel):
            local = self._locate_rows(weight, inputs, outputs, name=name, softmax=softmax)
        elif self.alone and not is_dtensor(tensor):
            local = Local(Share(shape=weight.shape), weight, inputs, outputs, weight.bias)
        elif not is_dtensor(tensor):
            local = Local(self.whole(weight.shape), weight, whole_of(inputs), whole_of(outputs), weight.bias)
        else:
            local = self._locate_shard(weight, tensor, inputs, outputs, name=name, softmax=softmax)
        return local if rows is None else _without_padding(local, rows)

    def _locate_rows(
        self, weight: megatron.ColumnParallel, inputs: Tensor, outputs: Tensor | None, *, name: str, softmax: bool
    ) -> Local:
        self._check_shards(set(weight.ranks), name)
        own, share = weight.own, 1 / self.shards
        part = Share(
            shape=weight.shape,
            first_row=weight.first_row,
            of_input=share,
            of_tokens=share,
            spread=not self.alone,
            whole_row_sum=weight.whole_row_sum if softmax and self.shards > 1 else None,
        )
        return Local(part, own, inputs, columns_of(outputs, weight.first_row, own.shape[0], weight.shape[0]), own.bias)

    def _locate_shard(
        self, weight: LinearMap, tensor: Any, inputs: Tensor, outputs: Tensor | None, *, name: str, softmax: bool
    ) -> Local:
        mesh, (m, n), share = tensor.device_mesh, weight.shape, 1 / self.shards
        self._check_mesh(mesh, name)
        placement = tensor.placements[0]
        own = tensor.to_local().detach()
        bias = None if weight.bias is None else local_of(weight.bias)
        if placement.is_replicate():
            return Local(self.whole((m, n)), Dense(own, bias), whole_of(inputs), whole_of(outputs), bias)
        length = (m, n)[placement.dim]
        first = min(mesh.get_local_rank() * math.ceil(length / mesh.size()), length)
        if placement.is_shard(0):
            part = Share(
                shape=(m, n),
                first_row=first,
                of_input=share,
                of_tokens=share,
                spread=True,
                whole_row_sum=summed_over(mesh) if softmax else None,
            )
            found = columns_of(outputs, first, own.shape[0], m)
            return Local(part, Dense(own, bias), whole_of(inputs), found, bias)
        if placement.is_shard(1):
            part = Share(shape=(m, n), first_column=first, of_output=share, of_tokens=share, spread=True)
            if softmax:
                raise LogAlignError(
                    f"layer {name!r}: expected an unembedding whose rows are split over ranks, or not split, found one "
                    f"whose columns are ({tensor.placements}); in a list of layers it is measured as a hidden one"
                )
            found = columns_of(inputs, first, own.shape[1], n)
            assert found is not None
            return Local(part, Dense(own, bias), found, whole_of(outputs), bias)
        raise LogAlignError(
            f"layer {name!r}: expected a weight that is split by rows or columns or not at all, found placements "
            f"{tensor.placements}; call monitor.observe(weight, inputs) with whole tensors"
        )

    def _check_mesh(self, mesh: DeviceMesh, name: str) -> None:
        if mesh.ndim != 1:
            raise LogAlignError(
                f"layer {name!r}: expected a weight over a mesh of one axis when its forward runs, found {mesh}; "
                "call monitor.observe(weight, inputs) with whole tensors"
            )
        self._check_shards(set(mesh.mesh.flatten().tolist()), name)

    def _check_shards(self, ranks: set[int], name: str) -> None:
        both = ranks & set(self.tokens)
        if len(ranks) > 1 and len(both) > 1:
            raise LogAlignError(
                f"layer {name!r}: expected ranks with tokens of their own beside the {len(ranks)} that share its "
                f"weight, found ranks {sorted(both)} among both; pass watch(mesh=...) the data-parallel axes alone"
            )
        if len(ranks) != self.shards or not ranks <= set(self.everyone):
            raise LogAlignError(
                f"layer {name!r}: expected its weight over {self.shards} of the ranks {list(self.everyone)} that "
                f"measure together, found it over {sorted(ranks)}; parallelize the model before watch(), and pass "
                "watch(mesh=...) the mesh of its data-parallel axes"
            )

    def agree(self, sites: Mapping[str, Shape]) -> None:
        """Check once that all ranks measure the same layers, because `total()` does not.

        Raises:
            LogAlignError: If they differ (at every rank), or a layer is new.
        """
        if self.alone:
            return
        if self._agreed is None:
            every: list[Any] = [None] * len(self.everyone)
            torch.distributed.all_gather_object(every, dict(sites), group=self._group)
            for rank, theirs in zip(self.everyone, every, strict=True):
                if theirs != every[0]:
                    raise LogAlignError(
                        f"expected all ranks to measure the same layers, found {_words(every[0])} at rank "
                        f"{self.everyone[0]} and {_words(theirs)} at rank {rank}; pass watch() the same layers "
                        "everywhere, and let every rank run a forward before its first step()"
                    )
            self._agreed = dict(sites)
        new = [site for site in sites if self._agreed.get(site) != sites[site]]
        if new:
            raise LogAlignError(
                f"expected the layers that were measured in the first step, {_words(self._agreed)}, found "
                f"{_words({site: sites[site] for site in new})}, too; across ranks, observe() every site from the "
                "first step on"
            )

    @property
    def visits(self) -> int | None:
        """Number of sample visits per rank in a reading, or None for one process, which has no limit."""
        return None if self.alone else max(LEAST_VISITS, VISITS // len(self.everyone))

    def total(
        self, packed: Mapping[str, Packed], values: Mapping[str, Any], device: torch.device, visits: Tensor
    ) -> tuple[dict[str, Packed], dict[str, Any], Tensor]:
        """Combine sums, losses and sample visits of all ranks in one all-reduce of one vector.

        Call `agree()` before. Visits [self.visits, columns] are ordered by rank.
        """
        if self.alone:
            return dict(packed), dict(values), visits
        assert self._agreed is not None
        complete = {site: packed.get(site) or _nothing(shape, device) for site, shape in self._agreed.items()}
        shared = [torch.zeros(2, dtype=wide(device), device=device) for _ in SHARED]
        for pair, name in zip(shared, SHARED, strict=True):
            value = values.get(name)
            if value is not None:
                pair[0], pair[1] = value.detach().reshape(()) if isinstance(value, Tensor) else float(value), 1
        of_all = visits.new_zeros((len(self.everyone), *visits.shape))
        of_all[self.everyone.index(torch.distributed.get_rank())] = visits
        vector = torch.cat([*(each.vector for each in complete.values()), *shared, of_all.flatten()])
        torch.distributed.all_reduce(vector, group=self._group)
        sizes = [each.vector.numel() for each in complete.values()]
        *parts, last, met = torch.split(vector, [*sizes, 2 * len(SHARED), of_all.numel()])
        found = {site: replace(each, vector=part) for (site, each), part in zip(complete.items(), parts, strict=True)}
        means = {name: last[2 * i] / last[2 * i + 1] for i, name in enumerate(SHARED) if name in values}
        return found, {**values, **means}, met

    def total_grams(
        self, grams: Mapping[str, tuple[Tensor, Tensor] | None], device: torch.device
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Sum all ranks' Gram matrices, beside `total`, for a spectral reading: n x n numbers per site."""
        if self.alone:
            return {site: pair for site, pair in grams.items() if pair is not None}
        assert self._agreed is not None
        found = {}
        for site, (_, n) in self._agreed.items():
            pair = grams.get(site)
            both = torch.zeros(2, n, n, dtype=wide(device), device=device) if pair is None else torch.stack(pair)
            torch.distributed.all_reduce(both, group=self._group)
            found[site] = (both[0], both[1])
        return {site: pair for site, pair in found.items() if float(pair[0].trace()) > 0}


def _without_padding(local: Local, rows: int) -> Local:
    """Keep only the first rows of the whole weight."""
    part, (m, _) = local.part, local.weight.shape
    count = min(max(rows - part.first_row, 0), m)
    return Local(
        replace(part, shape=(rows, part.shape[1]), first_row=min(part.first_row, rows)),
        FirstRows(local.weight, count),
        local.inputs,
        None if local.outputs is None else local.outputs[..., :count],
        None if local.bias is None else local.bias[:count],
    )


def _nothing(shape: Shape, device: torch.device) -> Packed:
    """Zeros of a rank that did not run the layer."""
    m, n = shape
    return Packed(torch.zeros(len(SCALARS) + 2 * n + m, dtype=wide(device), device=device), n, m, 0.0, spread=True)


def _tensor_of(weight: LinearMap) -> Any:
    return weight.weight if isinstance(weight, Dense) else None


def _words(sites: Mapping[str, Shape]) -> str:
    return ", ".join(f"{site} {m} x {n}" for site, (m, n) in sites.items()) or "none"
