"""Attributes of a batch norm that check what they are set to, or do more than hold it."""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any

from truenorm.errors import InputError
from truenorm.layers.running import RunningStatistics


class Option:
    """One field of a layer's options, as an attribute of the layer."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, layer: Any, owner: type | None = None) -> Any:
        return self if layer is None else getattr(layer.options, self._name)

    def __set__(self, layer: Any, value: Any) -> None:
        layer.adopt(dataclasses.replace(layer.options, **{self._name: value}))


class CommitOption(Option):
    """The option ``commit``; called, what is read of it writes what is pending."""

    def __get__(self, layer: Any, owner: type | None = None) -> Any:
        return self if layer is None else _Commit(layer)


class _Commit(str):
    """The value of a layer's option ``commit``; called, it is :meth:`RunningStatistics.commit`."""

    _layer: RunningStatistics

    def __new__(cls, layer: Any) -> _Commit:
        value = super().__new__(cls, layer.options.commit)
        value._layer = layer
        return value

    def __call__(self) -> None:
        RunningStatistics.commit(self._layer)


class Epsilon:
    """What is added to the variance, checked when it is set, and not told of a fused layer.

    Whoever replaces a batch norm by another, or folds it, reads its eps: torch's
    convert_sync_batchnorm and fuse_conv_bn_eval, detectron2, apex, timm. None of them knows of an
    activation inside, which would be lost without a word. The value is in the layer's ``__dict__``
    under the same name, where :func:`truenorm.layers.foreign.epsilon` and torch's ``extra_repr``
    find it.
    """

    def __get__(self, layer: Any, owner: type | None = None) -> Any:
        if layer is None:
            return self
        own = layer.__dict__
        if "eps" not in own:
            raise AttributeError(f"{type(layer).__name__!r} object has no attribute 'eps'")
        applied = layer._applied() if "_options" in own else ""
        if applied:
            raise InputError(
                f"eps of this {type(layer).__name__} was asked for, but it applies {applied} after "
                "normalizing, which code that makes another layer of it by eps would lose. Use "
                "truenorm.convert(model, to='sync' or another target), or truenorm.fold(model, "
                "example) to fold it into a convolution."
            )
        return own["eps"]

    def __set__(self, layer: Any, value: float) -> None:
        check_eps(value)
        layer.__dict__["eps"] = value


def check_eps(value: Any) -> None:
    """Raise InputError for an eps that is no number above 0; torch refuses 0 in training, too."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not float(value) > 0:
        raise InputError(
            f"eps must be a number above 0, got {value!r}; the default is 1e-5. Without it a "
            "channel that is constant would be divided by 0."
        )
