"""Values recorded with a reading: numbers and one-element tensors, moved to the host with the sums."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from logalign.errors import InputError
from logalign.runs.reading import FIELDS, finite


def check_values(given: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
    """Check values to record with a reading.

    Raises:
        InputError: If a value is not one number, or `extra` has a reserved name.
    """
    for name in extra:
        if name in FIELDS:
            raise InputError(f"step({name}=...): expected a name of your own, found one that readings use themselves")
    for name, value in {**given, **extra}.items():
        if isinstance(value, torch.Tensor):
            if value.numel() != 1:
                raise InputError(f"step({name}=...): expected one number, found a tensor of shape {tuple(value.shape)}")
        elif value is not None:
            try:
                float(value)
            except (TypeError, ValueError):
                raise InputError(f"step({name}=...): expected a number, found {value!r}") from None


def to_host(vectors: Mapping[str, Tensor], values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Move sums and numbers to the host, in one transfer per device with any."""
    tensors: dict[str, Tensor] = {f"site {name}": vector for name, vector in vectors.items()}
    numbers: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            tensors[f"value {name}"] = value.detach().reshape(1)
        elif value is not None:
            numbers[name] = finite(float(value))
    by_device: dict[torch.device, list[str]] = {}
    for name, tensor in tensors.items():
        by_device.setdefault(tensor.device, []).append(name)
    hosts: dict[str, Any] = {}
    for device, names in by_device.items():
        dtype = torch.float32 if device.type == "mps" else torch.float64
        flat = torch.cat([tensors[name].to(dtype) for name in names]).cpu().numpy()
        start = 0
        for name in names:
            hosts[name] = flat[start : start + tensors[name].numel()]
            start += tensors[name].numel()
    for name in values:
        if f"value {name}" in hosts:
            numbers[name] = finite(float(hosts[f"value {name}"][0]))
        numbers.setdefault(name, None)
    return {name: hosts[f"site {name}"] for name in vectors}, numbers
