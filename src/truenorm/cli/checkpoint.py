"""A checkpoint's tensors, and a carrier module that holds the norms found among them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from truenorm.errors import InputError
from truenorm.layers.batch_norm import BatchNorm

_FIELDS = ("running_mean", "running_var", "num_batches_tracked", "weight", "bias")
_BARE = nn.Module()


def tensors_of(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name; of several state dicts with the path to each."""
    content = _read(path)
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: holds {type(content).__name__}, not a dictionary of tensors.")
    found = dict(_state_dicts(content, ()))
    if not found:
        raise InputError(
            f"{path}: holds no running_mean and running_var, so no batch norm to examine."
        )
    if len(found) == 1:
        return next(iter(found.values()))
    return {f"{place}.{k}": v for place, state in found.items() for k, v in state.items()}


def _read(path: Path) -> Any:
    if not path.exists():
        raise InputError(f"{path}: no such file.")
    if not path.stat().st_size:
        raise InputError(f"{path}: is empty.")
    try:
        if path.suffix == ".safetensors":
            tensors = safetensors.torch.load_file(path)
            return {key: tensors[key] for key in sorted(tensors, key=_natural)}  # it keeps no order
        with warnings.catch_warnings():  # what they say of a file is said below
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever its unpickler met
        raise InputError(f"{path}: {_why_unread(path, error)}") from error


def _natural(name: str) -> list[tuple[int, str]]:
    """A key to sort names by in which 10 comes after 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _why_unread(path: Path, error: Exception) -> str:
    script = "TorchScript" in str(error)
    named = re.search(r"Unsupported (?:global: GLOBAL|class) (\S+)", str(error))
    if not script and named is None:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return f"is damaged, or no checkpoint ({reason})."
    if named is None:
        what, whole = "TorchScript", f"torch.jit.load('{path}').state_dict()"
    else:
        what = f"Python objects beside tensors ({named[1]})"
        whole = f"torch.load('{path}', weights_only=False)['state_dict']"
    return (
        f"holds {what}; reading such can run code, so it was not read. If you trust the file, save "
        f"its tensors alone and give that: torch.save({whole}, 'tensors.pt'); of a whole "
        "module it is .state_dict(). Or give package.module:factory, a function that loads it."
    )


def _state_dicts(
    content: Mapping[Any, Any] | list[Any] | tuple[Any, ...], place: tuple[str, ...]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every dictionary in ``content`` with running statistics, by where it is: a model, its EMA."""
    entries = list(content.items() if isinstance(content, Mapping) else enumerate(content))
    tensors = {str(k): v for k, v in entries if isinstance(v, Tensor)}
    if _norms_of(tensors):
        yield ".".join(place), _unwrapped(tensors)
    for key, value in entries:
        if isinstance(value, (Mapping, list, tuple)):
            yield from _state_dicts(value, (*place, str(key)))


def _norms_of(tensors: Mapping[str, Tensor]) -> list[str]:
    """Prefixes of the keys of batch norms; a scalar's running statistics are something else."""
    names = [k.removesuffix("running_var") for k in tensors if k.endswith("running_var")]
    return [
        n
        for n in names
        if (not n or n.endswith("."))
        and f"{n}running_mean" in tensors
        and tensors[f"{n}running_mean"].ndim == 1
        and tensors[f"{n}running_mean"].shape == tensors[f"{n}running_var"].shape
    ]


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as the bare model has them, without what torch.compile and DDP put before them."""
    names = [key.replace("_orig_mod.", "") for key in tensors]
    while all(name.startswith("module.") for name in names):
        names = [name.removeprefix("module.") for name in names]
    return dict(zip(names, tensors.values(), strict=True))


def carrier_of(tensors: dict[str, Tensor]) -> nn.Module:
    """A model that only holds: batch norms, and the other tensors in modules of their names.

    Those of floating point are taken for parameters; a checkpoint does not say. Sparse ones and
    those of one byte, which torch cannot compare, are left out.
    """
    names = _norms_of(tensors)
    root = _norm(tensors, "") if "" in names else nn.Module()
    for name in filter(None, names):
        *where, last = name.rstrip(".").split(".")
        _within(root, where)._modules[_free(last)] = _norm(tensors, name)
    taken = {f"{name}{field}" for name in names for field in _FIELDS}
    shared: dict[tuple[Any, ...], nn.Parameter] = {}
    for key, tensor in tensors.items():
        narrow = tensor.is_floating_point() and tensor.dtype.itemsize < 2
        if key in taken or narrow or tensor.layout != torch.strided:
            continue
        *where, last = key.split(".")
        module = _within(root, where)
        if tensor.is_floating_point() or tensor.is_complex():
            # Shared storage is one parameter under two names, as in the model.
            place = tensor.data_ptr() or id(tensor), tensor.shape, tensor.stride()
            parameter = shared.setdefault(place, nn.Parameter(tensor, requires_grad=False))
            module._parameters[last] = parameter
        else:
            module._buffers[last] = tensor
    return root.eval()


def _norm(tensors: dict[str, Tensor], name: str) -> nn.Module:
    """A batch norm with the tensors of ``name``."""
    mean = tensors[f"{name}running_mean"]
    learned = {}
    for key in ("weight", "bias"):
        tensor = tensors.get(f"{name}{key}")
        fits = tensor is not None and tensor.shape == mean.shape  # else it is another layer's
        learned[key] = nn.Parameter(tensor, requires_grad=False) if fits else None  # type: ignore[arg-type]
    # The momentum is not in a checkpoint; None keeps every judgement on it out.
    layer = BatchNorm(len(mean), momentum=None, affine=learned["weight"] is not None)
    layer._parameters.update(learned)
    counted = tensors.get(f"{name}num_batches_tracked")
    if counted is None or counted.numel() != 1:
        # Without a count nothing says that it was never updated, unless its values do.
        counted = torch.tensor(0)
    layer._buffers.update(
        running_mean=mean, running_var=tensors[f"{name}running_var"], num_batches_tracked=counted
    )
    return layer


def _within(root: nn.Module, path: list[str]) -> nn.Module:
    """The module at ``path`` under ``root``, made if it is missing."""
    for part in path:
        name = _free(part)
        child = root._modules.get(name)
        if child is None:
            child = root._modules[name] = nn.Module()
        root = child
    return root


def _free(name: str) -> str:
    """``name`` as a submodule may have it: no module's is that of a method, a dictionary's can."""
    return f"{name}_" if not name or hasattr(_BARE, name) else name
