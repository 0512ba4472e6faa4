"""Borrow a model and give it back: whatever the body does to it, and also if the body fails."""

from __future__ import annotations

import collections
import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy


class Randoms:
    """The random states that a loader or a model may draw from, as they are now.

    Args:
        loaders: whose own generators, and their samplers', belong to them, too.
    """

    def __init__(self, *loaders: Any) -> None:
        holders = [h for one in loaders for h in (one, getattr(one, "sampler", None))]
        found = [getattr(holder, "generator", None) for holder in holders]
        self._own = [(g, g.get_state()) for g in found if isinstance(g, torch.Generator)]
        self._torch = torch.get_rng_state()
        self._cuda: list[Tensor] = []
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            self._cuda = torch.cuda.get_rng_state_all()
        self._numpy = np.random.get_state()  # noqa: NPY002  the global one is what loaders use
        self._python = random.getstate()

    def rewind(self) -> None:
        """Set all of them to what they were."""
        for generator, state in self._own:
            generator.set_state(state)
        torch.set_rng_state(self._torch)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
        np.random.set_state(self._numpy)  # noqa: NPY002
        random.setstate(self._python)


class Loan:
    """What a model was when it was borrowed.

    Attributes:
        keep: modules whose buffers may stay as the body leaves them; none if it fails.
    """

    def __init__(self, model: nn.Module, *, parameters: bool) -> None:
        self.keep: set[nn.Module] = set()
        self._modules = [_Module(module) for module in model.modules()]
        self._tensors: dict[int, tuple[_Bits, set[nn.Module]]] = {}
        for module in model.modules():
            kept: set[nn.Module] = {module}
            for tensor in module._buffers.values():
                self._hold(tensor, kept)
            for tensor in module._parameters.values():
                self._hold(tensor, set(), bits=parameters)
            for value in vars(module).values():
                if isinstance(value, Tensor):
                    self._hold(value, set())

    def _hold(self, tensor: Tensor | None, of: set[nn.Module], *, bits: bool = True) -> None:
        if tensor is None:
            return
        if id(tensor) not in self._tensors:
            self._tensors[id(tensor)] = _Bits.of(tensor, bits=bits), set()
        self._tensors[id(tensor)][1].update(of)

    def give_back(self) -> None:
        """Set everything to what it was, but what is kept."""
        for module in self._modules:
            module.give_back()
        for bits, holders in self._tensors.values():
            if not holders & self.keep:
                bits.give_back()


_STORES = (dict, collections.OrderedDict, collections.defaultdict, list, set)


class _Module:
    """A module's own attributes: mode, hooks, members, and what a forward may add to them.

    Containers are looked into once: what lies deeper is the module's own affair.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module, self._class = module, type(module)
        self._watched = self._watching()
        self._attributes = dict(vars(module))
        self._stores = [
            (name, store, list(store.items() if isinstance(store, dict) else store))
            for name, store in self._attributes.items()
            if type(store) in _STORES
        ]

    def give_back(self) -> None:
        if type(self._module) is not self._class:  # a lazy one has become what it is to be
            self._module.__class__ = self._class
        own = vars(self._module)
        for name in own.keys() - self._attributes.keys():
            del own[name]
        for name, value in self._attributes.items():
            if own.get(name, own) is not value:
                own[name] = value
        stays, gone = self._watching() - self._watched, self._watched - self._watching()
        for name, store, saved in self._stores:
            wanted = saved
            if name.startswith("_forward") and (stays or gone):
                wanted = [entry for entry in saved if entry[0] not in gone]
                wanted += [entry for entry in store.items() if entry[0] in stays]
            _refill(store, wanted)

    def _watching(self) -> set[int]:
        """Numbers of a ledger's hooks: it minds its own, which come and go in a forward."""
        hooks = (self._module._forward_hooks, self._module._forward_pre_hooks)
        return {n for store in hooks for n, hook in store.items() if hasattr(hook, "watches")}


def _refill(store: Any, saved: list[Any]) -> None:
    """Put into a container what was saved of it, in place, if it holds anything else."""
    now = list(store.items() if isinstance(store, dict) else store)
    if isinstance(store, dict):
        same = len(now) == len(saved) and all(
            a == c and b is d for (a, b), (c, d) in zip(now, saved, strict=True)
        )
    else:
        same = len(now) == len(saved) and all(a is b for a, b in zip(now, saved, strict=True))
    if same:
        return
    store.clear()
    if isinstance(store, list):
        store.extend(saved)
    else:
        store.update(saved)


@dataclass
class _Bits:
    """A tensor, a copy of what it holds, and of its gradient."""

    tensor: Tensor
    kind: type
    bits: Tensor | None
    requires_grad: bool
    grad: _Bits | None

    @classmethod
    def of(cls, tensor: Tensor, *, bits: bool) -> _Bits:
        """Hold ``tensor``; without ``bits`` only what it is, not what is in it."""
        copies = bits and not is_lazy(tensor) and not tensor.is_meta
        copied = tensor.detach().clone() if copies else None
        grad = tensor.grad if tensor.is_leaf and not is_lazy(tensor) else None
        beside = None if grad is None else cls.of(grad, bits=bits)
        return cls(tensor, type(tensor), copied, tensor.requires_grad, beside)

    def give_back(self) -> None:
        tensor = self.tensor
        if type(tensor) is not self.kind:  # a lazy one was given its shape
            tensor.data = torch.empty(0)
            tensor.__class__ = self.kind
            return
        if tensor.is_leaf and tensor.requires_grad != self.requires_grad:
            tensor.requires_grad_(self.requires_grad)
        if self.bits is not None:
            self._write(self.bits)
        if tensor.is_leaf and not is_lazy(tensor):
            grad = None if self.grad is None else self.grad.tensor
            if tensor.grad is not grad:
                tensor.grad = grad
            if self.grad is not None:
                self.grad.give_back()

    def _write(self, bits: Tensor) -> None:
        tensor = self.tensor
        alike = (tensor.shape, tensor.dtype, tensor.device) == (bits.shape, bits.dtype, bits.device)
        if not alike:
            tensor.data = bits
        elif not _same_bits(tensor, bits):
            # .data: a backward that still waits holds the tensor, but does not look at it.
            tensor.data.copy_(bits)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if not torch.equal(a, b):  # or NaN is among them: then it does no harm to write them again
        return False
    return not a.is_floating_point() or torch.equal(a.signbit(), b.signbit())


@contextlib.contextmanager
def borrowed(
    model: nn.Module, randoms: Randoms | None = None, *, parameters: bool = True
) -> Iterator[Loan]:
    """Give ``model`` back as it was after the body, also if it fails.

    That is: every bit of parameters, buffers and gradients; ``requires_grad``; modes; hooks;
    members and attributes, also such as a forward adds; and the random states of torch, CUDA,
    numpy and Python.

    Args:
        model: any model.
        randoms: states to go back to; None for what they are now.
        parameters: False to hold no copy of parameters and gradients, where the body runs
            forwards alone.
    """
    randoms = randoms or Randoms()
    loan = Loan(model, parameters=parameters)
    try:
        yield loan
    except BaseException:
        loan.keep = set()
        raise
    finally:
        loan.give_back()
        randoms.rewind()


def to_eval(model: nn.Module) -> None:
    """Eval mode, module by module: a model's own ``eval()`` may do more than that."""
    for module in model.modules():
        module.training = False


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put ``model`` in eval mode for the body, and every module back in its own after it."""
    training = [m for m in model.modules() if m.training]
    to_eval(model)
    try:
        yield
    finally:
        for module in training:
            module.training = True


def unwrapped(model: nn.Module) -> nn.Module:
    """The module itself, under torch.compile, DataParallel and DistributedDataParallel.

    These would skip hooks, cut the batch or wait for other ranks.
    """
    while True:
        if isinstance(model, (DistributedDataParallel, DataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def eager(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Compiled parts run as they are written: a compiled one would not see new hooks."""
    if any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in model.modules()):
        stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
        return stance
    return contextlib.nullcontext()
