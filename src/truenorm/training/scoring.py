"""evaluate(): the loss and accuracy of any model on any labelled data."""

from __future__ import annotations

from typing import Any

from torch import nn

from truenorm.calling.borrowing import Randoms
from truenorm.calling.call import Arguments, Call, Loss
from truenorm.data.batches import in_order
from truenorm.data.datasets import Dataset, Scaling, Splits
from truenorm.errors import InputError
from truenorm.training.evaluate import Scores, logits_of, score, scored
from truenorm.training.feed import batches_of, given


def evaluate(
    model: nn.Module,
    data: Any,
    *,
    loss: Loss | None = None,
    arguments: Arguments | None = None,
    batch_size: int = 256,
    scaling: Scaling | None = None,
) -> Scores:
    """Score ``model``, where it lies, in eval mode, on all of ``data``.

    Its modes and all random states are given back. Batches are understood as
    :func:`truenorm.fit` understands them.

    Args:
        model: any module.
        data: :class:`truenorm.Splits`, of which the test part is judged, or the validation part
            if there is none; one of their parts, with their ``scaling``; or, as it is, a torch
            Dataset, a DataLoader or another iterable of batches, or a pair (x, y) of arrays.
        loss: as in :func:`truenorm.fit`; by default what the model returns as its loss, or else
            cross entropy.
        arguments: as in :func:`truenorm.fit`.
        batch_size: of a torch Dataset and of arrays.
        scaling: of a :class:`truenorm.Dataset`.

    Returns:
        Mean loss and accuracy over the examples; the accuracy is NaN where it is no
        classification.

    Raises:
        InputError: data and model do not go together, or there are none.
    """
    device = Call(model).device
    if isinstance(data, Splits):
        data, scaling = (data.valid if data.test is None else data.test), data.scaling
    randoms = Randoms(data)
    try:
        if not isinstance(data, Dataset):
            batches = given(Call(model, arguments=arguments), batches_of(data, batch_size))
            return scored(model, batches, device, loss=loss)
        if scaling is None:
            raise InputError(
                f"{data.name}: a part does not say how its examples are scaled; give "
                "scaling=splits.scaling, or the Splits."
            )
        if loss is None:
            return score(logits_of(model, data, scaling, device), data)
        return scored(model, in_order(data, scaling, device), device, loss=loss)
    finally:
        randoms.rewind()
