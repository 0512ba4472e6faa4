"""What Equinox tests of its norms, in our words (patrick-kidger/equinox).

From tests/test_nn.py: state that is passed and returned, batches over nested axes, evaluation
before any training. Equinox weighs the OLD value by its momentum, and in its mode "ema" normalizes
by running averages in training, too, from the first batch's on; ours is its mode "batch".
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.func import functional_call, vmap

import truenorm
from conformance.cases import Case, need, need_close

SUITE = "Equinox"
TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def _values(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def _layer(channels: int = 5, **options: object) -> truenorm.BatchNorm:
    return truenorm.BatchNorm(channels, dtype=torch.float64, **options)  # type: ignore[arg-type]


State = dict[str, Tensor]


def _passed(layer: truenorm.BatchNorm, state: State, x: Tensor) -> tuple[Tensor, State]:
    """One forward with a state from outside; the output and the state after it."""
    held = {name: value.clone() for name, value in state.items()}
    out: Tensor = functional_call(layer, held, (x,))
    return out, held


def _state(layer: truenorm.BatchNorm) -> State:
    return {n: t.detach().clone() for n, t in layer.state_dict().items()}


def shapes_are_kept() -> None:
    layer, state = _layer(), _state(_layer())
    for shape in ((10, 5), (10, 5, 6), (10, 5, 7, 8)):
        out, state = _passed(layer, state, _values(*shape))
        need(out.shape == shape, f"shape {tuple(out.shape)}")
        need(state["running_mean"].shape == (5,) == state["running_var"].shape, "statistics")


def it_normalizes() -> None:
    x = torch.randn(10, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    right = (x - x.mean(0)) / torch.sqrt(x.var(0, correction=0) + 1e-5)
    need_close(_layer(affine=False)(x), right, "output", **TIGHT)


def the_state_given_is_the_state_used() -> None:
    """It is passed in and out; the layer's own stays as it was."""
    layer = _layer()
    own, first = _state(layer), _state(layer)
    _, second = _passed(layer, first, _values(10, 5))
    _, third = _passed(layer, second, 3 * _values(10, 5) + 10)
    need_close(_state(layer), own, "the layer's own state", rtol=0, atol=0)
    for name in ("running_mean", "running_var"):
        need(not torch.allclose(second[name], third[name]), f"{name} did not move")
    twin = copy.deepcopy(layer)
    twin(_values(10, 5))
    twin(3 * _values(10, 5) + 10)
    need_close(third, _state(twin), "the state of two forwards", **TIGHT)


def inference_moves_nothing() -> None:
    layer = _layer()
    layer(_values(10, 5))
    before = _state(layer)
    layer.eval()(4 * _values(10, 5) + 20)
    need_close(_state(layer), before, "state", rtol=0, atol=0)


def nested_batches() -> None:
    """A batch under ``vmap`` within another: each has statistics of its own."""
    layer, x = _layer(), _values(4, 10, 5)
    state = {n: t.expand(4, *t.shape).clone() for n, t in _state(layer).items()}

    def call(state: State, x: Tensor) -> tuple[Tensor, State]:
        out = functional_call(layer, state, (x,))
        return out, state

    outs, after = vmap(call)(state, x)
    for number in range(4):
        twin = _layer()
        need_close(outs[number], twin(x[number]), f"output {number}", **TIGHT)
        need_close(after["running_mean"][number], twin.running_mean, "statistics", **TIGHT)


def two_axes_are_one_batch() -> None:
    """Statistics over two batch axes are those over one of all."""
    x = _values(10, 5, 6)
    one = _layer(6)(x.reshape(50, 6))
    two = _layer(6)(x.movedim(-1, 1))
    need_close(two.movedim(1, -1).reshape(50, 6), one, "output", **TIGHT)


def it_is_differentiable() -> None:
    """The sum of a normalized batch is constant: its gradient is zero, of one value too."""
    x = _values(4, 5).requires_grad_()
    _layer()(x).sum().backward()
    need_close(x.grad, torch.zeros(4, 5).double(), "gradient", rtol=0, atol=1e-12)
    one = _values(1, 5).requires_grad_()
    _layer(min_count=2)(one).sum().backward()
    need(one.grad is not None and bool(torch.isfinite(one.grad).all()), "gradient of one value")


def evaluation_before_training_is_the_identity() -> None:
    """Issue 1010 of Equinox: with no step of training the input comes out."""
    x = _values(5, 3)
    need_close(_layer(3).eval()(x), x, "output", rtol=1e-5, atol=1e-5)


def layer_and_group_norm_are_their_formulas() -> None:
    x = _values(1, 4, 5, 6)
    flat = (x - x.mean()) / torch.sqrt(x.var(correction=0) + 1e-5)
    need_close(truenorm.LayerNorm([4, 5, 6], dtype=torch.float64)(x), flat, "layer norm", **TIGHT)
    need_close(truenorm.GroupNorm(1, 4, dtype=torch.float64)(x), flat, "one group", **TIGHT)
    halves = x.view(1, 2, -1)
    wanted = (halves - halves.mean(-1, True)) / torch.sqrt(
        halves.var(-1, correction=0)[..., None] + 1e-5
    )
    need_close(
        truenorm.GroupNorm(2, 4, dtype=torch.float64)(x), wanted.view(x.shape), "two", **TIGHT
    )


_CASES: dict[str, Callable[[], None]] = {
    "shapes": shapes_are_kept,
    "normalizes": it_normalizes,
    "state in and out": the_state_given_is_the_state_used,
    "inference": inference_moves_nothing,
    "nested batches": nested_batches,
    "two axes": two_axes_are_one_batch,
    "gradient": it_is_differentiable,
    "no training": evaluation_before_training_is_the_identity,
    "layer and group norm": layer_and_group_norm_are_their_formulas,
}


def cases() -> Iterator[Case]:
    """All of them."""
    for name, run in _CASES.items():
        yield Case(SUITE, "norms", name, "", run)
