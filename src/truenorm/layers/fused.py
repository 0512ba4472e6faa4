"""TrueNorm's norms in the place of another package's, with what that one applied afterwards.

timm's ``BatchNormAct2d`` is a batch norm with a dropout and an activation inside. Taken over, it is
a batch norm of TrueNorm's that goes on applying them: the same module, children and names in the
state dict. Its class is made for it, of TrueNorm's and with the name of the old one, which it
remembers for the way back.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from truenorm.errors import InputError
from truenorm.layers import functional
from truenorm.layers.batch_norm import BatchNorm
from truenorm.layers.foreign import AFTER
from truenorm.layers.options import Options

_COUNTER = "num_batches_tracked"
_NAMED = (_BatchNorm, nn.GroupNorm)  # one of these in the place of another keeps its name


class Fused(nn.Module):
    """What a norm that applies its children afterwards has beyond the norm: base of such classes.

    Attributes:
        ours: TrueNorm's class of the norm.
        original: the class that it was.
    """

    ours: ClassVar[type[nn.Module]]
    original: ClassVar[type[nn.Module]]

    def forward(
        self, input: Tensor, mask: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """Normalize, add ``residual`` (batch norm only), drop, activate.

        Arguments are those of the norm; with a mask, invalid values are zero in the output.
        """
        more = {} if residual is None else {"residual": residual}
        out: Tensor = super().forward(input, mask, **more)
        if not isinstance(input, Tensor):
            return out  # torch.fx traces this layer as one call, children included
        for name in AFTER:
            child = self._modules.get(name)
            if child is not None:
                out = child(out)
        return out if mask is None else torch.where(functional.valid(mask, input), out, 0)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """By the two classes: that of the layer itself has no place in any module."""
        return _blank, (self.ours, self.original), self.__getstate__()  # type: ignore[no-untyped-call]


class _FusedBatchNorm(Fused, BatchNorm):
    """A batch norm that was another package's."""

    @property
    def act(self) -> nn.Module | None:
        """The child of that name, over the option of :class:`truenorm.BatchNorm`."""
        return self._modules.get("act")

    def adopt(self, options: Options) -> None:
        """Take ``options``; see :meth:`truenorm.BatchNorm.adopt`."""
        if options.act is not None:
            raise InputError(
                f"act={options.act!r} is for a layer without an activation of its own; set the "
                "child act of this one."
            )
        super().adopt(options)

    def _applied(self) -> str:
        children = {name: self._modules.get(name) for name in AFTER}
        return " and ".join(
            name for name, m in children.items() if not isinstance(m, (nn.Identity, type(None)))
        )


class Thawable(_FusedBatchNorm):
    """A batch norm that was another package's frozen one.

    As long as it is frozen its state dict has the keys it had, and takes a counter of batches with
    or without them.
    """

    _added: tuple[str, ...]  # the attributes that the frozen norm did not have

    def take_over(self, eps: float) -> None:
        """Put beside a frozen norm's attributes what a batch norm has."""
        whole = {
            "num_features": len(self._buffers["running_mean"]),  # type: ignore[arg-type]
            "eps": eps,
            "momentum": 0.1,
            "affine": True,
            "track_running_stats": True,
        }
        added = {name: value for name, value in whole.items() if name not in vars(self)}
        vars(self).update(added)
        self._added = tuple(added)
        if _COUNTER not in self._buffers:
            mean = self._buffers["running_mean"]
            counter = torch.zeros((), dtype=torch.int64, device=mean.device)  # type: ignore[union-attr]
            self.register_buffer(_COUNTER, counter, persistent=False)
            self._added += (_COUNTER,)
        self._begin()
        self._options = Options(frozen=True)  # weight and bias are buffers already
        self.adopt(self._options)

    def give_back(self, *, keep: bool) -> None:
        """Remove what :meth:`take_over` added, unless ``keep``, for what is a batch norm still."""
        for name in () if keep else self._added:
            self.__dict__.pop(name, None)
            self._buffers.pop(name, None)
            self._non_persistent_buffers_set.discard(name)
        del self._added

    def adopt(self, options: Options) -> None:
        """Take ``options``; thawed, its counter of batches is saved as any batch norm's."""
        super().adopt(options)
        if not options.frozen:
            self._non_persistent_buffers_set.discard(_COUNTER)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any], *rest: Any
    ) -> None:
        if _COUNTER in self._non_persistent_buffers_set:
            state_dict.pop(prefix + _COUNTER, None)
            metadata = {**metadata, "version": self._version}  # torch adds a counter to older ones
        super()._load_from_state_dict(state_dict, prefix, metadata, *rest)


_made: dict[tuple[type[nn.Module], type[nn.Module]], type[Fused]] = {}


def fused_class(ours: type[nn.Module], original: type[nn.Module]) -> type[Fused]:
    """The class of a layer that is ``ours`` now and was ``original``; one for each pair."""
    if (ours, original) not in _made:
        _made[ours, original] = _make(ours, original)
    return _made[ours, original]


def _make(ours: type[nn.Module], original: type[nn.Module]) -> type[Fused]:
    frozen = not issubclass(original, _BatchNorm)
    base = (Thawable if frozen else _FusedBatchNorm) if issubclass(ours, BatchNorm) else Fused
    same = any(issubclass(ours, kind) and issubclass(original, kind) for kind in _NAMED)
    return type(
        original.__name__ if same else ours.__name__,
        (base, ours),
        {
            "__module__": __name__,
            "__doc__": f"{ours.__name__} with what {original.__qualname__} applied afterwards.",
            "ours": ours,
            "original": original,
        },
    )


def _blank(ours: type[nn.Module], original: type[nn.Module]) -> nn.Module:
    """A layer of that class without state; pickles hold the name of this function."""
    kind = fused_class(ours, original)
    return kind.__new__(kind)
