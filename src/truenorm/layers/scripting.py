"""What torch.jit.script is told of these layers: they cannot be compiled, and what can be done."""

from __future__ import annotations

from typing import NoReturn

from truenorm.errors import InputError


class Unscriptable:
    """Base of layers whose forward is Python that TorchScript has no words for."""

    def __prepare_scriptable__(self) -> NoReturn:
        """Called by torch.jit.script, of each module before it compiles one.

        A layer of torch's could be given in its place, but torch would put it into the model that
        it was asked to script, which would then train without what this one brings.
        """
        raise InputError(
            f"torch.jit.script cannot compile {type(self).__name__}. Use torch.export.export, or "
            "script what truenorm.convert(copy.deepcopy(model), to='torch') makes of the model."
        )
