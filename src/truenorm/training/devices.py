"""Devices, threads and number formats of this machine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from truenorm.errors import InputError


def device_of(name: str) -> torch.device:
    """The device called ``name``; "auto" is cuda, mps or cpu, the first that is there.

    Raises:
        InputError: it is not there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {name!r} cannot be used here ({reason}); try cpu.") from error
    return device


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16 matrices faster than float32 ones."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", None)  # no public name as of 2.13
    return device.type == "cpu" and has_amx is not None and bool(has_amx())


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let the body run on ``count`` CPU threads, None for as many as now; give them back."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
