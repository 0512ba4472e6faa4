"""Turn a model's normalizations into others, in place, and say what was done and what was not."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedBuffer
from torch.nn.utils import parametrize

from truenorm.errors import InputError, choose
from truenorm.layers import batch_norm as layers
from truenorm.layers import norms
from truenorm.layers.batch_norm import BatchNorm
from truenorm.layers.options import Options
from truenorm.layers.per_call import PerCall, count_calls, restart_calls
from truenorm.layers.ranks import Ranks
from truenorm.layers.running import STATISTICS

Target = Literal[
    "truenorm", "torch", "sync", "unsync", "frozen", "unfrozen", "ghost", "group", "per-call",
    "keras", "flax",
]  # fmt: skip
Where = Callable[[str, nn.Module], bool] | str | Iterable[str] | None

_TO_TRUENORM: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: layers.BatchNorm1d,
    nn.BatchNorm2d: layers.BatchNorm2d,
    nn.BatchNorm3d: layers.BatchNorm3d,
    nn.SyncBatchNorm: layers.BatchNorm,
    nn.LazyBatchNorm1d: layers.LazyBatchNorm1d,
    nn.LazyBatchNorm2d: layers.LazyBatchNorm2d,
    nn.LazyBatchNorm3d: layers.LazyBatchNorm3d,
    nn.GroupNorm: norms.GroupNorm,
    nn.LayerNorm: norms.LayerNorm,
    nn.InstanceNorm1d: norms.InstanceNorm1d,
    nn.InstanceNorm2d: norms.InstanceNorm2d,
    nn.InstanceNorm3d: norms.InstanceNorm3d,
    nn.LazyInstanceNorm1d: norms.LazyInstanceNorm1d,
    nn.LazyInstanceNorm2d: norms.LazyInstanceNorm2d,
    nn.LazyInstanceNorm3d: norms.LazyInstanceNorm3d,
}
_TO_TORCH = {ours: torchs for torchs, ours in _TO_TRUENORM.items() if ours is not BatchNorm}


@dataclass(frozen=True)
class ConvertedNorm:
    """What became of one layer.

    Attributes:
        layer: its dotted name, as in ``named_modules()``; "" is the model itself.
        before: its class and options.
        after: the same afterwards; equal to ``before`` where nothing changed.
        changed: whether anything did.
        note: what could not be carried over, or why nothing changed.
    """

    layer: str
    before: str
    after: str
    changed: bool
    note: str = ""


@dataclass(frozen=True)
class Conversion:
    """The converted model, and a row for each normalization in it.

    Attributes:
        model: the model given, changed in place.
        rows: in the order of ``named_modules()``.
    """

    model: nn.Module
    rows: tuple[ConvertedNorm, ...]

    @property
    def changed(self) -> tuple[ConvertedNorm, ...]:
        """What was converted."""
        return tuple(row for row in self.rows if row.changed)

    @property
    def left(self) -> tuple[ConvertedNorm, ...]:
        """What was not, with the reason in ``note``."""
        return tuple(row for row in self.rows if not row.changed)

    def __str__(self) -> str:
        head = f"{len(self.changed)} of {len(self.rows)} normalization layers converted"
        lines = [
            f"  {row.layer or '(model)'}: {row.before}"
            + (f" -> {row.after}" if row.changed else " left as it is")
            + (f"; {row.note}" if row.note else "")
            for row in self.rows
        ]
        return "\n".join([head, *lines])


class _Unchanged(Exception):
    """A layer stays as it is; the text says why."""


def convert(model: nn.Module, *, to: Target, where: Where = None, **settings: Any) -> Conversion:
    """Convert the normalizations of ``model`` in place.

    Layers keep their identity where their state allows: the same module, parameters (so an
    optimizer stays valid), hooks, parametrizations, mode, dtype, device and ``requires_grad``.

    Args:
        model: any model.
        to: what to make of each layer.

            - "truenorm": of a torch.nn norm, TrueNorm's; settings are options of
              :class:`truenorm.BatchNorm`, which layers that are TrueNorm's already take, too.
            - "torch": of a TrueNorm norm, torch.nn's.
            - "sync", "unsync": statistics pooled over ranks (setting ``group``), or not.
            - "frozen", "unfrozen": statistics and affine map fixed, or learning again.
            - "ghost": statistics of groups of ``ghost`` examples.
            - "group": batch norm to group norm; setting ``groups``, a number or a function of
              the channels (default :func:`truenorm.layers.norms.groups_of`).
            - "per-call": a norm of its own for each call, where one is called several times in a
              forward; setting ``example``, the arguments of one forward.
            - "keras", "flax": the layers hold numbers written in that framework's convention,
              where momentum weighs the OLD value; put them into torch's. Settings ``momentum``
              and ``eps``, in that convention, are for all layers.
        where: which layers: a pattern for dotted names, which means what lies below it, too
            (``"encoder"``, ``"*.bn1"``), several of them, or a function of name and module.
        settings: as ``to`` tells.

    Returns:
        The model and the table of what was changed, what was not, and why.

    Raises:
        InputError: an unknown target or setting, or a setting outside its range; nothing has been
            changed then.
    """
    choose("target", to, get_args(Target))
    _check(to, settings)
    chosen = _selector(where)
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, norms.NORMS):
            names.setdefault(module, []).append(name)
    change = _change(to, settings, model, names)
    rows = []
    for module, aliases in names.items():
        before = _described(module)
        try:
            if not any(chosen(name, module) for name in aliases):
                raise _Unchanged("not selected by where")
            after, note = change(module)
        except _Unchanged as why:
            rows.append(ConvertedNorm(aliases[0], before, before, False, str(why)))
            continue
        shared = f"one layer, also {', '.join(aliases[1:])}" if aliases[1:] else ""
        note = "; ".join(part for part in (note, shared) if part)
        rows.append(ConvertedNorm(aliases[0], before, after, True, note))
    return Conversion(model, tuple(rows))


def _selector(where: Where) -> Callable[[str, nn.Module], bool]:
    if where is None:
        return lambda name, module: True
    if callable(where):
        return where
    patterns = [where] if isinstance(where, str) else list(where)
    patterns += [f"{pattern}.*" for pattern in patterns]
    return lambda name, module: any(fnmatch.fnmatchcase(name, p) for p in patterns)


_Change = Callable[[nn.Module], tuple[str, str]]  # what the layer is now, and a note


def _check(to: Target, settings: dict[str, Any]) -> None:
    """Raise InputError for a setting that ``to`` does not take, or one that it lacks."""
    options = {f.name for f in dataclasses.fields(Options)}
    allowed = {
        "truenorm": options,
        "sync": {"group"},
        "ghost": {"ghost"},
        "group": {"groups"},
        "per-call": {"example"},
        "keras": {"momentum", "eps"},
        "flax": {"momentum", "eps"},
    }.get(to, set())
    for name in settings:
        if name not in allowed:
            known = ", ".join(sorted(allowed)) or "none"
            raise InputError(f"unknown setting {name!r} of to={to!r}; it takes {known}.")
    if to == "ghost" and settings.get("ghost") is None:
        raise InputError("to='ghost' needs the setting ghost, the number of examples in a group.")
    if to == "per-call" and "example" not in settings:
        raise InputError("to='per-call' needs the setting example, the arguments of one forward.")
    if to not in _OTHER:
        Options(**_options(to, settings))


_OTHER = ("torch", "group", "per-call", "keras", "flax")  # what is not a change of options


def _options(to: Target, settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "sync": {"sync": settings.get("group", True)},
        "unsync": {"sync": None},
        "frozen": {"frozen": True},
        "unfrozen": {"frozen": False},
    }.get(to, settings)


def _change(
    to: Target, settings: dict[str, Any], model: nn.Module, names: dict[nn.Module, list[str]]
) -> _Change:
    """The change of one layer that ``to`` and ``settings`` ask for."""
    if to in ("keras", "flax"):
        return lambda layer: _from_convention(layer, settings)
    if to == "torch":
        return _to_torch
    if to == "per-call":
        calls = count_calls(model, list(names), settings["example"])
        return lambda layer: _to_per_call(model, layer, names[layer], calls[layer])
    if to == "group":
        return lambda layer: _to_group(layer, settings.get("groups"))
    given = _options(to, settings)
    return lambda layer: _to_truenorm(layer, given, only_options=to != "truenorm")


# -- one layer ----------------------------------------------------------------------------------


def _described(layer: nn.Module) -> str:
    """Class and options, without what every such layer has."""
    kind = _kind(layer)
    home = "torch.nn" if kind.__module__.startswith("torch.") else kind.__module__.split(".")[0]
    options = layer.options.set() if isinstance(layer, BatchNorm) else {}
    listed = ", ".join(f"{name}={value!r}" for name, value in options.items())
    return f"{home}.{kind.__name__}" + (f"({listed})" if listed else "")


def _kind(layer: nn.Module) -> type[nn.Module]:
    """Its class, under the one that a parametrization puts over it."""
    kind = type(layer)
    if parametrize.is_parametrized(layer):
        base: type[nn.Module] = kind.__bases__[0]
        return base
    return kind


def _become(layer: nn.Module, kind: type[nn.Module]) -> None:
    """Change the class of ``layer``, as torch's lazy layers do; all it holds stays."""
    over = type(layer)
    if parametrize.is_parametrized(layer):
        own = {k: v for k, v in vars(over).items() if k not in ("__dict__", "__weakref__")}
        kind = type(f"Parametrized{kind.__name__}", (kind,), own)
    layer.__class__ = kind


def _refuse_subclass(layer: nn.Module, known: Iterable[type[nn.Module]]) -> None:
    kind = _kind(layer)
    if kind not in known:
        if kind.__module__.startswith("torch.nn."):
            raise _Unchanged("TrueNorm has no other form of it")
        own = ", ".join(sorted(k for k, v in vars(kind).items() if callable(v))) or "its name"
        raise _Unchanged(
            f"{kind.__module__}.{kind.__qualname__} is a class of its own ({own}), which "
            "converting would drop"
        )


def _to_truenorm(layer: nn.Module, given: dict[str, Any], *, only_options: bool) -> tuple[str, str]:
    if not isinstance(layer, _BatchNorm) and (only_options or given):
        raise _Unchanged("has no running statistics of a batch")
    present = layer.options if isinstance(layer, BatchNorm) else Options()
    if isinstance(layer, nn.SyncBatchNorm):
        present = Options(sync=Ranks(layer.process_group))
    options = dataclasses.replace(present, **given)
    if isinstance(layer, BatchNorm) or _kind(layer) in _TO_TORCH:
        _refuse_subclass(layer, {*_TO_TORCH, BatchNorm})
        if options == present:
            raise _Unchanged("is so already")
    else:
        _refuse_subclass(layer, _TO_TRUENORM)
        if only_options and options == present and not isinstance(layer, nn.SyncBatchNorm):
            raise _Unchanged("is so already")
    was: type[nn.Module] = type(layer)
    thawed = present.frozen and not options.frozen
    if not isinstance(layer, BatchNorm):
        _become(layer, _TO_TRUENORM.get(_kind(layer), _kind(layer)))
    if isinstance(layer, BatchNorm):
        try:
            layer.adopt(options)
        except InputError as why:
            layer.__class__ = was  # type: ignore[assignment]
            raise _Unchanged(str(why).rstrip(".")) from None
    note = "weight and bias are new parameters: give them to the optimizer" if thawed else ""
    return _described(layer), note


_LOST = {
    "ghost": "training without it differs, evaluation does not",
    "renorm": "training without it differs, evaluation does not",
    "min_count": "smaller batches raise an error again",
    "commit": "statistics are written by each forward",
    "frozen": "eval() and requires_grad=False stand for it, and train() undoes that",
}


def _to_torch(layer: nn.Module) -> tuple[str, str]:
    known: dict[type[nn.Module], type[nn.Module]] = {**_TO_TORCH, BatchNorm: nn.SyncBatchNorm}
    if _kind(layer) in _TO_TRUENORM:
        raise _Unchanged("is so already")
    if isinstance(layer, (nn.RMSNorm, norms.RMSNorm)):
        raise _Unchanged("torch.nn has no other form of it")
    _refuse_subclass(layer, known)
    if not isinstance(layer, BatchNorm):
        _become(layer, known[_kind(layer)])
        return _described(layer), ""
    options = layer.options
    if options.act is not None:
        raise _Unchanged(f"torch.nn's has no activation, and {options.act} would be lost")
    kind = known[BatchNorm if options.sync else _kind(layer)]
    if kind is nn.SyncBatchNorm and not options.sync:
        raise _Unchanged("torch.nn has no batch norm for any number of axes; it is not sync")
    lost = [f"drops {n}: {_LOST[n]}" for n in options.set() if n in _LOST]
    group = options.sync.group if options.sync else None
    layer.adopt(Options())
    _narrow_statistics(layer, layer._narrow)
    for name in layers.OWN:
        layer.__dict__.pop(name, None)
    _become(layer, kind)
    if isinstance(layer, nn.SyncBatchNorm):
        layer.process_group = group
    if options.frozen:
        layer.eval().requires_grad_(False)
    return _described(layer), "; ".join(lost)


def _narrow_statistics(layer: _BatchNorm, dtype: torch.dtype | None) -> None:
    """Torch keeps statistics in the dtype of the weight, and its kernels insist on it."""
    if layer.weight is not None:
        dtype = layer.weight.dtype
    for name in STATISTICS:
        statistic = layer._buffers[name]
        if statistic is None or isinstance(statistic, UninitializedBuffer):
            continue
        if dtype is not None and dtype.itemsize < 4:
            layer._buffers[name] = statistic.to(dtype)


def _to_group(layer: nn.Module, groups: int | Callable[[int], int] | None) -> tuple[str, str]:
    if not isinstance(layer, _BatchNorm):
        raise _Unchanged("is not a batch norm")
    _refuse_subclass(layer, {*_TO_TRUENORM, *_TO_TORCH, BatchNorm})
    options = layer.options if isinstance(layer, BatchNorm) else Options()
    if options.act is not None or options.frozen:
        what = f"activation {options.act}" if options.act else "frozen affine map"
        raise _Unchanged(f"group norm has no place for its {what}")
    if isinstance(layer.running_mean, UninitializedBuffer) or isinstance(
        layer.weight, nn.UninitializedParameter
    ):
        raise _Unchanged("is lazy; its channels are not known before its first forward")
    channels = layer.num_features
    number = (groups or norms.groups_of)(channels) if not isinstance(groups, int) else groups
    if not isinstance(number, int) or number < 1 or channels % number:
        raise _Unchanged(f"its {channels} channels do not divide into {number!r} groups")
    for name in (*STATISTICS, "num_batches_tracked"):
        layer._buffers.pop(name, None)
    batchs = ("num_features", "momentum", "track_running_stats", "process_group")
    for name in (*batchs, *layers.OWN):
        layer.__dict__.pop(name, None)
    _become(layer, norms.GroupNorm)
    assert isinstance(layer, nn.GroupNorm)
    layer.num_groups, layer.num_channels = number, channels
    return (
        f"{_described(layer)}({number})",
        "weight, bias and eps carried; running statistics and momentum have no place in group "
        "norm, outputs differ: train it again or fine-tune",
    )


def _from_convention(layer: nn.Module, settings: dict[str, Any]) -> tuple[str, str]:
    if not isinstance(layer, _BatchNorm):
        raise _Unchanged("is not a batch norm")
    theirs, eps = settings.get("momentum", layer.momentum), settings.get("eps", layer.eps)
    if theirs is None:
        raise _Unchanged("its momentum is None, the cumulative average")
    if not 0 <= theirs <= 1:
        raise _Unchanged(f"momentum must lie in [0, 1], got {theirs!r}")
    if "momentum" not in settings and theirs <= 0.5:
        if eps == layer.eps:
            raise _Unchanged(
                f"its momentum {theirs!r} reads as torch's already; give momentum= to set it"
            )
        mine = theirs
    else:
        mine = round(1 - theirs, 12)  # 1 - 0.99 is 0.01, not 0.010000000000000009
    note = f"momentum {layer.momentum!r} -> {mine!r}, eps {layer.eps!r} -> {eps!r}"
    if (mine, eps) == (layer.momentum, layer.eps):
        raise _Unchanged("is so already")
    layer.momentum, layer.eps = mine, eps
    return _described(layer), note


# -- a norm for each call -------------------------------------------------------------------------


def _to_per_call(
    model: nn.Module, layer: nn.Module, aliases: list[str], calls: int
) -> tuple[str, str]:
    if calls < 2:
        raise _Unchanged("is not called" if calls == 0 else "is called once")
    wrapped = PerCall(layer, calls)
    wrapped.training = layer.training
    for alias in aliases:
        parent, _, name = alias.rpartition(".")
        setattr(model.get_submodule(parent), name, wrapped)
    if restart_calls not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(restart_calls)
    return (
        f"PerCall({calls} x {_described(layer)})",
        f"each starts as a copy; in the state dict they are {aliases[0]}.norms.0 to .{calls - 1}",
    )


# -- what freezing is for -----------------------------------------------------------------------


def assert_frozen(model: nn.Module) -> None:
    """Raise AssertionError unless every batch norm of ``model`` is frozen for good.

    Frozen for good: neither ``train()`` nor ``requires_grad_`` nor an optimizer can change its
    statistics or its affine map, as with ``truenorm.BatchNorm2d(frozen=True)``.

    Raises:
        AssertionError: names every layer that could move, and why; or there is no batch norm.
    """
    found = {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm)}
    if not found:
        raise AssertionError("the model has no batch norm that could be frozen.")
    moving = [f"  {name or '(model)'}: {_why_moving(m)}" for name, m in found.items()]
    moving = [line for line in moving if not line.endswith(": ")]
    if moving:
        raise AssertionError(
            "batch norms that are not frozen (truenorm.convert(model, to='frozen') does it):\n"
            + "\n".join(moving)
        )


def _why_moving(layer: nn.Module) -> str:
    if isinstance(layer, BatchNorm):
        return "" if layer.frozen else "frozen=False"
    moves = "train mode moves its statistics" if layer.training else "train() would thaw it"
    learns = any(p.requires_grad for p in layer.parameters(recurse=False))
    return f"{type(layer).__name__}: {moves}" + (", weight and bias learn" if learns else "")
