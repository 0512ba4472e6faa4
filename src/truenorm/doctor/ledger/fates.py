"""What became of each write: whether a step followed, and a gradient came."""

from __future__ import annotations

from torch import Tensor, nn

WAITING = 256  # forwards whose fate is open
UPSTREAM = 8  # operations between a model's input and the tensor that wants its gradient


def wants_gradient(given: Tensor) -> bool:
    """Whether ``given`` is made of a tensor that wants its gradient and is no parameter.

    So is what an attack feeds to a model. What a generator made comes from parameters.
    """
    if given.grad_fn is None:
        return not isinstance(given, nn.Parameter)
    nodes, wants = [given.grad_fn], False
    for _ in range(UPSTREAM):
        if not nodes:
            break
        node = nodes.pop(0)
        variable = getattr(node, "variable", None)
        if isinstance(variable, nn.Parameter):
            return False
        wants |= isinstance(variable, Tensor)
        nodes += [before for before, _ in node.next_functions if before is not None]
    return wants and not nodes
