"""How a batch of any shape becomes a call of a model, and what came out a loss and an accuracy."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from truenorm.calling.nested import moved, tensors_in
from truenorm.errors import InputError

Loss = Callable[[Any, Any], Any]  # of the model's output, as it is, and the target
Arguments = Callable[[Any], Any]  # of a batch: args tuple, kwargs dict, or (args, kwargs)

TARGETS = ("labels", "label", "target", "y")
OUTPUTS = ("logits", "out")
IGNORED = -100  # the target that F.cross_entropy leaves out
_P = inspect.Parameter


class Prepared(NamedTuple):
    """One batch, taken apart and on its device: ``model(*args, **kwargs)`` is the call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Any = None


class Call:
    """How to call one model on any batch.

    - A tensor is the one argument.
    - Of a tuple or list, as many leading elements are arguments as the model's forward requires
      (at least one); the next one is the target.
    - Of a mapping, what the forward has names for are keyword arguments, the rest is dropped; the
      target is ``labels``, ``label``, ``target`` or ``y``. Labels that the forward accepts are
      given to it, too.

    Args:
        model: any model.
        device: where the tensors of a batch go; None for where the model's first parameter or
            buffer is. The model stays where it is.
        arguments: makes of a batch the tuple of arguments, the dict of keyword arguments, or
            (tuple, dict). The target is then what a mapping has by one of the names above, or the
            last element of a tuple or list of two or more.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        device: torch.device | str | None = None,
        arguments: Arguments | None = None,
    ) -> None:
        self._model = model
        self.device = model_device(model) if device is None else torch.device(device)
        self._arguments = arguments
        self._required, self._names = _signature(model)

    def __call__(self, batch: Any) -> tuple[Any, Any]:
        """The model's output on ``batch``, as it is, and the target."""
        args, kwargs, target = self.prepare(batch)
        return self._model(*args, **kwargs), target

    def prepare(self, batch: Any) -> Prepared:
        """``batch`` as arguments and target, on the device.

        Raises:
            InputError: nothing in it can be an argument of the model.
        """
        if self._arguments is not None:
            args, kwargs = _as_arguments(self._arguments(batch))
            found = Prepared(args, kwargs, _target_beside(batch))
        else:
            found = self._by_kind(batch)
        args, kwargs, target = (moved(part, self.device) for part in found)
        return Prepared(args, kwargs, target)

    def _by_kind(self, batch: Any) -> Prepared:
        if isinstance(batch, Tensor):
            return Prepared((batch,), {})
        if isinstance(batch, Mapping):
            accepted = {k: v for k, v in batch.items() if self._names is None or k in self._names}
            if not accepted:
                raise InputError(
                    f"the model's forward takes {', '.join(self._names or ()) or 'nothing'}, and "
                    f"the batch has only {', '.join(map(str, batch)) or 'nothing'}; give "
                    "arguments=, a function of a batch that returns the model's arguments."
                )
            return Prepared((), accepted, _named_target(batch))
        if isinstance(batch, (tuple, list)) and batch:
            target = batch[self._required] if len(batch) > self._required else None
            return Prepared(tuple(batch[: self._required]), {}, target)
        raise InputError(
            f"a batch must be a tensor, a tuple, a list or a dict, got {type(batch).__name__}; "
            "give arguments=, a function of a batch that returns the model's arguments."
        )


def call_with(model: nn.Module, example: Any) -> Any:
    """The model's output for the arguments of one forward: a dict by name, a tensor, or several."""
    if isinstance(example, dict):
        return model(**example)
    return model(*((example,) if isinstance(example, Tensor) else example))


def model_device(model: nn.Module) -> torch.device:
    """Where the first parameter or buffer of ``model`` is; the CPU if it has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def _signature(model: nn.Module) -> tuple[int, tuple[str, ...] | None]:
    """How many positional arguments its forward requires, and its names; None if it takes all."""
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module  # whose arguments the wrapper passes on
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):  # some scripted modules
        return 1, None
    positional = (_P.POSITIONAL_ONLY, _P.POSITIONAL_OR_KEYWORD)
    required = sum(p.kind in positional and p.default is _P.empty for p in parameters)
    if any(p.kind is _P.VAR_KEYWORD for p in parameters):
        return max(1, required), None
    by_name = (_P.POSITIONAL_OR_KEYWORD, _P.KEYWORD_ONLY)
    return max(1, required), tuple(p.name for p in parameters if p.kind in by_name)


def _as_arguments(returned: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What ``arguments=`` returned, as (args, kwargs)."""
    if isinstance(returned, Mapping):
        return (), dict(returned)
    if not isinstance(returned, (tuple, list)):
        raise InputError(
            "arguments= must return a tuple of arguments, a dict of keyword arguments, or (tuple, "
            f"dict), got {type(returned).__name__}."
        )
    if (
        len(returned) == 2
        and isinstance(returned[0], (tuple, list))
        and isinstance(returned[1], Mapping)
    ):
        return tuple(returned[0]), dict(returned[1])
    return tuple(returned), {}


def _target_beside(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return _named_target(batch)
    return batch[-1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None


def _named_target(batch: Mapping[Any, Any]) -> Any:
    return next((batch[k] for k in TARGETS if k in batch and batch[k] is not None), None)


def entry(output: Any, name: str) -> Any:
    """What ``output`` has by ``name``, as a key or an attribute, or None; a tensor has nothing."""
    if isinstance(output, Mapping):
        return output.get(name)
    return getattr(output, name, None) if not isinstance(output, Tensor) else None


def output_of(output: Any) -> Tensor | None:
    """The tensor meant: itself, ``logits`` or ``out``, or the first tensor of a tuple or list."""
    if isinstance(output, Tensor):
        return output
    for name in OUTPUTS:
        found = entry(output, name)
        if isinstance(found, Tensor):
            return found
    if isinstance(output, (tuple, list)):
        return next(tensors_in(output), None)
    return None


def answers_of(output: Any, examples: int) -> Tensor | None:
    """The float tensor of ``output`` with an entry for each example, or None.

    What :func:`output_of` means goes first, then the first tensor that fits.
    """
    meant = output_of(output)
    for found in (*([] if meant is None else [meant]), *tensors_in(output)):
        if found.is_floating_point() and found.ndim and len(found) == examples:
            return found
    return None


def classifies(out: Tensor | None, target: Any) -> bool:
    """Whether ``out`` (N, K, *S) can be the logits of the integer ``target`` (N, *S)."""
    return (
        isinstance(target, Tensor)
        and out is not None
        and out.is_floating_point()
        and out.ndim >= 2
        and not target.is_floating_point()
        and not target.is_complex()
        and target.dtype != torch.bool
        and target.shape == (out.shape[0], *out.shape[2:])
    )


def loss_of(output: Any, target: Any, loss: Loss | None = None) -> float | None:
    """The mean loss of a batch, or None if nothing says how to measure it.

    In this order: ``loss(output, target)``, averaged if it is not a scalar; the ``loss`` that the
    output holds; cross entropy if the target is one of classes; mean squared error if it is of
    real numbers in the shape of the output.
    """
    own = entry(output, "loss") if loss is None else loss(output, target)
    if own is not None:
        return float(torch.as_tensor(own).detach().double().mean())
    out = output_of(output)
    if out is None or not isinstance(target, Tensor):
        return None
    wide = out.detach().to(torch.promote_types(out.dtype, torch.float32))
    if classifies(out, target):
        counted = target[target != IGNORED]
        if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < out.shape[1]:
            return None  # identities beside an embedding, say
        return F.cross_entropy(wide, target.long()).item()
    if target.is_floating_point() and out.is_floating_point() and out.shape == target.shape:
        return F.mse_loss(wide, target.to(wide.dtype)).item()
    return None


def accuracy_of(output: Any, target: Any) -> float | None:
    """The share of targets that have the largest logit, or None if it is no classification."""
    out = output_of(output)
    if out is None or not classifies(out, target):
        return None
    counted = target != IGNORED
    return (out.argmax(1) == target)[counted].double().mean().item() if counted.any() else None
