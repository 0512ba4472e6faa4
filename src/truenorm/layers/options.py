"""What BatchNorm has beyond torch's."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from truenorm.errors import InputError, choose
from truenorm.layers.functional import ACTIVATIONS
from truenorm.layers.ranks import Ranks, ranks_of
from truenorm.layers.renorm import Renorm

Commit = Literal["forward", "step"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What :class:`BatchNorm` has beyond torch's; each field is an argument of its constructor.

    Raises:
        InputError: a value outside its range.
    """

    ghost: int | None = None
    sync: Ranks | Any = None  # given True, or a process group, it becomes Ranks
    renorm: Renorm | None = None
    frozen: bool = False
    act: str | None = None
    min_count: int | None = None
    commit: Commit = "forward"

    def __post_init__(self) -> None:
        for name, least in (("ghost", 1), ("min_count", 2)):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value >= least):
                raise InputError(
                    f"{name} must be an integer of at least {least} or None, got {value!r}."
                )
        if not isinstance(self.sync, Ranks):
            object.__setattr__(self, "sync", ranks_of(self.sync))
        if self.renorm is not None and not isinstance(self.renorm, Renorm):
            raise InputError(f"renorm must be truenorm.Renorm(...) or None, got {self.renorm!r}.")
        if not isinstance(self.frozen, bool):
            raise InputError(f"frozen must be True or False, got {self.frozen!r}.")
        if self.act is not None:
            choose("act", self.act, tuple(ACTIVATIONS))
        choose("commit", self.commit, get_args(Commit))
        object.__setattr__(self, "commit", str(self.commit))  # a layer's own is more than that

    def set(self) -> dict[str, Any]:
        """Those that differ from their default."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: v for name, v in values.items() if v != getattr(Options, name)}

    def ghost_sizes(self, examples: int, positions: int) -> list[int] | None:
        """Examples of each group; None for one group of all.

        The last takes what is left, or, if that is one value, it joins the group before: alone it
        has no variance.

        Args:
            examples: those of the batch.
            positions: those of its last example.
        """
        size = self.ghost
        if size is None or examples <= size:
            return None
        sizes = [min(size, examples - start) for start in range(0, examples, size)]
        if sizes[-1] * positions == 1:
            sizes[-2:] = [sizes[-2] + 1]
        return sizes
