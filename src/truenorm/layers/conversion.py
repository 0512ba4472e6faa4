"""Turn a model's normalizations into others, in place, and say what was done and what was not."""

from __future__ import annotations

import dataclasses
import fnmatch
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedBuffer
from torch.nn.utils import parametrize

from truenorm.calling.flow import Flow
from truenorm.errors import InputError, choose
from truenorm.layers import batch_norm as layers
from truenorm.layers import fusion, norms
from truenorm.layers.attributes import check_eps
from truenorm.layers.batch_norm import BatchNorm
from truenorm.layers.foreign import (
    AFTER,
    epsilon,
    frozen_statistics,
    fused,
    other_statistics,
    unlike,
)
from truenorm.layers.fused import Fused, Thawable, fused_class
from truenorm.layers.options import Options
from truenorm.layers.per_call import PerCall, count_calls, restart_calls
from truenorm.layers.ranks import Ranks
from truenorm.layers.renorm import Renorm
from truenorm.layers.running import STATISTICS

Target = Literal[
    "truenorm", "torch", "sync", "unsync", "frozen", "unfrozen", "ghost", "renorm", "batch",
    "group", "layer", "instance", "rms", "none", "per-call", "keras", "flax",
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


Outcome = Literal["changed", "already", "unasked", "refused"]


class ConversionWarning(UserWarning):
    """Layers were left although :func:`convert` was asked to change them, or there were none."""


@dataclass(frozen=True)
class ConvertedNorm:
    """What became of one layer.

    Attributes:
        layer: its dotted name, as in ``named_modules()``; "" is the model itself.
        before: its class and options.
        after: the same afterwards; equal to ``before`` where nothing changed.
        outcome: "changed"; "already": it was as asked; "unasked": not selected, or of a kind that
            the target says nothing about; "refused": it was asked, and could not be done.
        note: what could not be carried over, or why nothing changed.
    """

    layer: str
    before: str
    after: str
    outcome: Outcome
    note: str = ""

    @property
    def changed(self) -> bool:
        """Whether anything did."""
        return self.outcome == "changed"


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

    @property
    def refused(self) -> tuple[ConvertedNorm, ...]:
        """What was asked for and could not be done; part of :attr:`left`."""
        return tuple(row for row in self.rows if row.outcome == "refused")

    @property
    def shortfall(self) -> str:
        """What was asked for and is not so, in one sentence; "" if all is."""
        if not self.rows:
            return "the model has no normalization layer that is known"
        if all(row.note == _UNSELECTED for row in self.rows):
            return f"where selects none of the {len(self.rows)} normalization layers"
        kinds: dict[tuple[str, str], int] = {}
        for row in self.refused:
            kinds[row.before, row.note] = kinds.get((row.before, row.note), 0) + 1
        if not kinds:
            return ""
        listed = "; ".join(f"{n} {kind} ({why})" for (kind, why), n in kinds.items())
        counted = f"{len(self.refused)} of {len(self.rows)} normalization layers"
        return f"{counted} were left, though asked for: {listed}"

    def __str__(self) -> str:
        head = f"{len(self.changed)} of {len(self.rows)} normalization layers converted"
        already = sum(row.outcome == "already" for row in self.rows)
        head += f", {already} so already" if already else ""
        if self.shortfall:
            head = f"{self.shortfall}\n{head}"
        lines = [
            f"  {row.layer or '(model)'}: {row.before}"
            + (f" -> {row.after}" if row.changed else " left as it is")
            + (f"; {row.note}" if row.note else "")
            for row in self.rows
        ]
        return "\n".join([head, *lines])


_UNSELECTED = "not selected by where"


class _Unchanged(Exception):
    """A layer stays as it is; the text says why."""

    outcome: Outcome = "unasked"


class _Already(_Unchanged):
    """It is as asked."""

    outcome = "already"

    def __init__(self, why: str = "is so already") -> None:
        super().__init__(why)


class _Refused(_Unchanged):
    """What was asked cannot be done."""

    outcome = "refused"


def convert(model: nn.Module, *, to: Target, where: Where = None, **settings: Any) -> Conversion:
    """Convert the normalizations of ``model`` in place.

    Layers keep their identity where their state allows: the same module, parameters (so an
    optimizer stays valid), hooks, parametrizations, mode, dtype, device and ``requires_grad``.

    Args:
        model: any model.
        to: what to make of each layer.

            - "truenorm": of a torch.nn norm, TrueNorm's; settings are options of
              :class:`truenorm.BatchNorm`, which layers that are TrueNorm's already take, too.
              With ``fuse=True`` and ``example``, the arguments of one forward, a batch norm also
              takes in the activation behind it, and the residual that is added between the two.
              Activations without work become ``nn.Identity``; where that is not enough the block
              runs its own forward rewritten, under a class derived from its own. Keys of the state
              dict stay. Each is proved before, on what the block is given for ``example``: outputs,
              gradients and running statistics are the same both ways.
            - "torch": of a TrueNorm norm, torch.nn's, or the class of another package that it was.
            - "sync", "unsync": statistics pooled over ranks (setting ``group``), or not.
            - "frozen", "unfrozen": statistics and affine map fixed, or learning again.
            - "ghost": statistics of groups of ``ghost`` examples.
            - "renorm": batch renormalization; setting ``renorm``, by default ``Renorm()``.
            - "group": batch norm to group norm; setting ``groups``, a number or a function of
              the channels (default :func:`truenorm.layers.norms.groups_of`).
            - "layer", "instance", "rms", "none": batch norm to layer norm over channels and
              positions, instance norm, RMS norm or nothing; "batch": batch norms stay.
            - "per-call": a norm of its own for each call, where one is called several times in a
              forward; setting ``example``, the arguments of one forward.
            - "keras", "flax": the layers hold numbers written in that framework's convention,
              where momentum weighs the OLD value; put them into torch's. Settings ``momentum``
              and ``eps``, in that convention, are for all layers.

            Norms of other packages are taken by what they are, none is imported: batch and group
            norms that apply a dropout and an activation of their own afterwards (timm's
            ``BatchNormAct2d``, ``SyncBatchNormAct``, ``GroupNormAct``) go on applying them, and
            frozen batch norms (of torchvision, detectron2, timm, transformers) become
            TrueNorm's with ``frozen=True``. What their forward does is proved on random numbers
            first. Keys of the state dict stay, and "torch" gives the class back.
        where: which layers: a pattern for dotted names, which means what lies below it, too
            (``"encoder"``, ``"*.bn1"``), several of them, or a function of name and module.
        settings: as ``to`` tells.

    Returns:
        The model and the table of what was changed, what was not, and why.

    Raises:
        InputError: an unknown target or setting, or a setting outside its range; nothing has been
            changed then.

    Warns:
        ConversionWarning: layers that ``to`` and ``where`` ask for were left, with their classes
            and the reasons; or there was nothing to convert at all. What is so already is no cause.
    """
    done = converted(model, to=to, where=where, **settings)
    if done.shortfall:
        warnings.warn(f"to={to!r}: {done.shortfall}.", ConversionWarning, stacklevel=2)
    return done


def converted(model: nn.Module, *, to: Target, where: Where = None, **settings: Any) -> Conversion:
    """As :func:`convert`, but what was left is told by the result alone."""
    choose("target", to, get_args(Target))
    _check(to, settings)
    fuse, example = settings.pop("fuse", False), settings.get("example")
    if to == "truenorm":
        settings.pop("example", None)
    chosen = _selector(where)
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        known = isinstance(module, norms.NORMS) or frozen_statistics(module)
        if known or (to == "frozen" and other_statistics(module)):
            names.setdefault(module, []).append(name)
    flow = fusion.observe(model, example) if fuse else None  # before anything is changed
    change = _change(to, settings, model, names)
    rows = []
    for module, aliases in names.items():
        before = _described(module)
        try:
            if not any(chosen(name, module) for name in aliases):
                raise _Unchanged(_UNSELECTED)
            after, note = change(module)
        except _Unchanged as why:
            rows.append(ConvertedNorm(aliases[0], before, before, why.outcome, str(why)))
            continue
        shared = f"one layer, also {', '.join(aliases[1:])}" if aliases[1:] else ""
        note = "; ".join(part for part in (note, shared) if part)
        rows.append(ConvertedNorm(aliases[0], before, after, "changed", note))
    if flow is not None:
        rows = _fused(model, dict(zip(names, rows, strict=True)), flow, example)
    return Conversion(model, tuple(rows))


def _fused(
    model: nn.Module, rows: dict[nn.Module, ConvertedNorm], flow: Flow, example: Any
) -> list[ConvertedNorm]:
    """Let the selected batch norms take in what follows them; the rows say so."""
    norms = [
        layer
        for layer, row in rows.items()
        if row.outcome in ("changed", "already")
        and isinstance(layer, BatchNorm)
        and not isinstance(layer, Fused)
    ]
    for layer, told in fusion.fuse(model, norms, flow, example).items():
        row, after = rows[layer], _described(layer)
        note = "; ".join(part for part in (row.note if row.changed else "", told) if part)
        outcome: Outcome = "changed" if after != row.before else row.outcome
        rows[layer] = dataclasses.replace(row, after=after, outcome=outcome, note=note)
    return list(rows.values())


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
        "truenorm": options | {"fuse", "example"},
        "sync": {"group"},
        "ghost": {"ghost"},
        "renorm": {"renorm"},
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
    if to == "truenorm" and bool(settings.get("fuse")) is not ("example" in settings):
        raise InputError(
            "fuse=True needs the setting example, the arguments of one forward, by which it is "
            "proved; without fuse=True there is no use for one."
        )
    if "eps" in settings:
        check_eps(settings["eps"])
    if to not in _OTHER:
        given = {name: settings[name] for name in settings.keys() - {"fuse", "example"}}
        Options(**_options(to, given))


_KINDS = ("group", "layer", "instance", "rms", "none")  # that take a batch norm's place
_OTHER = ("torch", "batch", *_KINDS, "per-call", "keras", "flax")  # what is no change of options


def _options(to: Target, settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "sync": {"sync": settings.get("group", True)},
        "unsync": {"sync": None},
        "frozen": {"frozen": True},
        "unfrozen": {"frozen": False},
        "renorm": {"renorm": settings.get("renorm", Renorm())},
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
    if to == "batch":
        return _to_batch
    if to in _KINDS:
        return lambda layer: _to_kind(layer, to, settings.get("groups"))
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
        raise _Refused(
            f"{kind.__module__}.{kind.__qualname__} is a class of its own ({own}), which "
            "converting would drop"
        )


def _form_of(layer: nn.Module) -> type[nn.Module]:
    """The class of TrueNorm's that takes the place of ``layer``'s, or is it already."""
    kind = _kind(layer)
    if issubclass(kind, Fused) or kind in _TO_TORCH or kind is BatchNorm:
        return kind
    frozen = frozen_statistics(layer)
    if kind not in _TO_TRUENORM and (frozen or fused(layer)):
        why = unlike(layer)
        if why:
            raise _Refused(f"{kind.__module__}.{kind.__qualname__}: {why}")
        known = (_TO_TRUENORM[base] for base in kind.__mro__ if base in _TO_TRUENORM)
        ours = layers.BatchNorm2d if frozen else next(known)
        return fused_class(ours, kind)
    _refuse_subclass(layer, _TO_TRUENORM)
    return _TO_TRUENORM[kind]


_MOVES = "keeps running statistics that TrueNorm has no frozen form of"


def _options_of(layer: nn.Module) -> Options:
    """What a layer of torch's or another's has of TrueNorm's options."""
    if isinstance(layer, BatchNorm):
        return layer.options
    if isinstance(layer, nn.SyncBatchNorm):
        return Options(sync=Ranks(layer.process_group))
    return Options(frozen=frozen_statistics(layer))


def _to_truenorm(layer: nn.Module, given: dict[str, Any], *, only_options: bool) -> tuple[str, str]:
    frozen = frozen_statistics(layer)
    if given.get("frozen") and other_statistics(layer):
        raise _Refused(f"{_MOVES}: in training they move")
    if not (frozen or isinstance(layer, _BatchNorm)) and (only_options or given):
        raise _Unchanged("has no running statistics of a batch")
    if frozen and only_options and "frozen" not in given:
        raise _Unchanged("is frozen, and takes no statistics of a batch")
    present = _options_of(layer)
    options = dataclasses.replace(present, **given)
    if frozen and only_options and options == present:
        raise _Already("is frozen already")
    form = _form_of(layer)
    as_it_is = form is _kind(layer) or (only_options and not isinstance(layer, nn.SyncBatchNorm))
    if options == present and as_it_is:
        raise _Already
    was, eps = type(layer), epsilon(layer)
    try:
        if frozen:
            check_eps(eps)
        if form is not _kind(layer):
            _become(layer, form)
        if frozen and isinstance(layer, Thawable):
            layer.take_over(eps)
        if isinstance(layer, BatchNorm):
            layer.adopt(options)
    except InputError as why:
        _return(layer, was)
        raise _Refused(str(why).rstrip(".")) from None
    thawed = present.frozen and not options.frozen
    note = "weight and bias are new parameters: give them to the optimizer" if thawed else ""
    return _described(layer), note


def _return(layer: nn.Module, was: type[nn.Module]) -> None:
    """To the class it had before this conversion."""
    if type(layer) is was:
        return
    if isinstance(layer, Thawable):
        _strip(layer)
        layer.give_back(keep=False)
    layer.__class__ = was


_LOST = {
    "ghost": "training without it differs, evaluation does not",
    "renorm": "training without it differs, evaluation does not",
    "min_count": "smaller batches raise an error again",
    "commit": "statistics are written by each forward",
    "frozen": "eval() and requires_grad=False stand for it, and train() undoes that",
}


def _to_torch(layer: nn.Module) -> tuple[str, str]:
    kind = _kind(layer)
    if isinstance(layer, norms.RMSNorm):
        raise _Unchanged("torch.nn has no other form of it")
    if not isinstance(layer, (BatchNorm, Fused, *_TO_TORCH)):
        torchs = kind.__module__.startswith("torch.nn.")
        raise _Already if torchs else _Already("is not TrueNorm's")
    if not issubclass(kind, Fused):
        _refuse_subclass(layer, {*_TO_TORCH, BatchNorm})
    if not isinstance(layer, BatchNorm):
        if issubclass(kind, Fused) and not issubclass(kind.original, nn.GroupNorm):
            raise _Refused("torch.nn has no group norm that applies what this one does")
        _become(layer, kind.original if issubclass(kind, Fused) else _TO_TORCH[kind])
        return _described(layer), ""
    back, options = _torch_form(layer), layer.options
    lost = [f"drops {n}: {_LOST[n]}" for n in options.set() if n in _LOST]
    still = issubclass(back, _BatchNorm)  # else it is frozen by its class
    if still:
        layer.adopt(Options())
    narrow = layer._narrow
    _strip(layer)
    if isinstance(layer, Thawable):
        layer.give_back(keep=still)
    _narrow_statistics(layer, narrow)
    _become(layer, back)
    if isinstance(layer, nn.SyncBatchNorm):
        layer.process_group = options.sync.group
    if options.frozen and still:
        layer.training = False
        for parameter in layer.parameters(recurse=False):  # not those of an activation inside
            parameter.requires_grad_(False)
    return _described(layer), "; ".join(lost if still else [])


def _torch_form(layer: BatchNorm) -> type[nn.Module]:
    """The class that one of TrueNorm's batch norms had, or torch.nn's in its place."""
    kind, options = _kind(layer), layer.options
    plain = nn.SyncBatchNorm if options.sync else _TO_TORCH.get(kind)
    if issubclass(kind, Fused):
        original = kind.original
        if not issubclass(original, _BatchNorm):
            if options.frozen:
                return original
            if layer._applied():
                raise _Refused(
                    f"{original.__qualname__}, which it was, is frozen, and torch.nn has none with "
                    f"{layer._applied()}; convert to='frozen' first"
                )
            return plain or nn.BatchNorm2d
        pools = issubclass(original, nn.SyncBatchNorm)
        if pools != bool(options.sync):
            first = "sync" if pools else "unsync"
            raise _Refused(f"{original.__qualname__}, which it was, needs to={first!r} first")
        return original
    if options.act is not None:
        raise _Refused(f"torch.nn's has no activation, and {options.act} would be lost")
    if plain is None:
        raise _Refused("torch.nn has no batch norm for any number of axes; it is not sync")
    return plain


def _strip(layer: BatchNorm) -> None:
    """Remove what TrueNorm's batch norms have beyond torch's."""
    for name in layers.OWN:
        layer.__dict__.pop(name, None)


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


def _to_batch(layer: nn.Module) -> tuple[str, str]:
    if isinstance(layer, _BatchNorm):
        raise _Already("is one already")
    raise _Unchanged("is not a batch norm")


Groups = int | Callable[[int], int] | None
_INSTANCE = {2: norms.InstanceNorm2d, 3: norms.InstanceNorm3d}


def _to_kind(layer: nn.Module, to: str, groups: Groups) -> tuple[str, str]:
    """A batch norm becomes a norm of another kind, or nothing, in its place."""
    if not isinstance(layer, _BatchNorm):
        raise _Unchanged("is not a batch norm")
    form, options = _form_of(layer), _options_of(layer)
    if options.act is not None or options.frozen:
        what = f"activation {options.act}" if options.act else "frozen affine map"
        raise _Refused(f"{to} norm has no place for its {what}")
    if isinstance(layer.running_mean, UninitializedBuffer) or isinstance(
        layer.weight, nn.UninitializedParameter
    ):
        raise _Refused("is lazy; its channels are not known before its first forward")
    channels = layer.num_features
    number = _number(groups if to == "group" else 1, channels)
    axes = next((n for n, kind in _AXES.items() if isinstance(layer, kind)), None)
    if to == "instance" and axes not in _INSTANCE:
        raise _Refused("it may see vectors, of which instance norm leaves zeros")
    kept = {"instance": ("num_features", "momentum"), "none": ()}.get(to, ())
    for name in (*STATISTICS, "num_batches_tracked"):
        layer._buffers.pop(name, None)
    torchs = ("num_features", "momentum", "track_running_stats", "process_group")
    for name in (*torchs, *layers.OWN, "_added"):
        if name not in kept:
            layer.__dict__.pop(name, None)
    original = form.original if issubclass(form, Fused) else None
    if to == "none":
        return _to_nothing(layer)
    kinds: dict[str, type[nn.Module]] = {"rms": norms.RMSNorm}
    if to == "instance":
        assert axes is not None
        kinds["instance"] = _INSTANCE[axes]
        layer.track_running_stats = False
        layer._buffers.update(dict.fromkeys((*STATISTICS, "num_batches_tracked")))
    kind = kinds.get(to, norms.GroupNorm)
    _become(layer, fused_class(kind, original) if original else kind)
    lost = "running statistics and momentum have"
    if isinstance(layer, nn.GroupNorm):
        layer.num_groups, layer.num_channels = number, channels
    elif to == "rms":
        layer.num_channels = channels  # type: ignore[assignment]
        layer._parameters.pop("bias", None)
        lost = "bias, running statistics and momentum have"
    described = f"{_described(layer)}({number})" if kind is norms.GroupNorm else _described(layer)
    carried = "weight and eps" if to == "rms" else "weight, bias and eps"
    return (
        described,
        f"{carried} carried; {lost} no place in {to} norm, outputs differ: train it again or "
        "fine-tune",
    )


_AXES: dict[int, type[nn.Module]] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def _number(groups: Groups, channels: int) -> int:
    """How many groups the channels make."""
    number = (groups or norms.groups_of)(channels) if not isinstance(groups, int) else groups
    if not isinstance(number, int) or number < 1 or channels % number:
        raise _Refused(f"its {channels} channels do not divide into {number!r} groups")
    return number


def _to_nothing(layer: nn.Module) -> tuple[str, str]:
    """What applied a dropout and an activation afterwards goes on doing so."""
    after = [name for name in AFTER if layer._modules.get(name) is not None]
    layer._parameters.clear()
    layer._buffers.clear()
    for name in after:  # in their order
        layer._modules[name] = layer._modules.pop(name)
    _become(layer, nn.Sequential if after else nn.Identity)
    return _described(layer), "what it was has no place: train it again"


def _from_convention(layer: nn.Module, settings: dict[str, Any]) -> tuple[str, str]:
    if not isinstance(layer, _BatchNorm):
        raise _Unchanged("is not a batch norm")
    before = epsilon(layer)
    theirs, eps = settings.get("momentum", layer.momentum), settings.get("eps", before)
    if theirs is None:
        raise _Unchanged("its momentum is None, the cumulative average")
    if not 0 <= theirs <= 1:
        raise _Refused(f"momentum must lie in [0, 1], got {theirs!r}")
    if "momentum" not in settings and theirs <= 0.5:
        if eps == before:
            raise _Already(
                f"its momentum {theirs!r} reads as torch's already; give momentum= to set it"
            )
        mine = theirs
    else:
        mine = round(1 - theirs, 12)  # 1 - 0.99 is 0.01, not 0.010000000000000009
    note = f"momentum {layer.momentum!r} -> {mine!r}, eps {before!r} -> {eps!r}"
    if (mine, eps) == (layer.momentum, before):
        raise _Already
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

    What else keeps running variances of channels, as an instance norm can, is not.

    Frozen for good: neither ``train()`` nor ``requires_grad_`` nor an optimizer can change its
    statistics or its affine map, as with ``truenorm.BatchNorm2d(frozen=True)`` and with the frozen
    batch norms of torchvision, detectron2, timm and transformers.

    Raises:
        AssertionError: names every layer that could move, and why; or there is no batch norm.
    """
    found = {
        n: m
        for n, m in model.named_modules()
        if isinstance(m, _BatchNorm) or frozen_statistics(m) or other_statistics(m)
    }
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
    if frozen_statistics(layer):
        return ""
    if other_statistics(layer):
        return f"{type(layer).__name__}: {_MOVES}"
    if isinstance(layer, BatchNorm):
        return "" if layer.frozen else "frozen=False"
    moves = "train mode moves its statistics" if layer.training else "train() would thaw it"
    learns = any(p.requires_grad for p in layer.parameters(recurse=False))
    return f"{type(layer).__name__}: {moves}" + (", weight and bias learn" if learns else "")
