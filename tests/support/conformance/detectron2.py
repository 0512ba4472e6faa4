"""What detectron2's norms are documented and tested to do, in our words (facebookresearch).

From detectron2/layers/batch_norm.py (FrozenBatchNorm2d, NaiveSyncBatchNorm, CycleBatchNormList),
tests/layers/test_blocks.py and the configurations that use them: frozen backbones, heads whose
batch may be empty on a rank, statistics of several domains under one affine map.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

import truenorm
from conformance.cases import Case, need, need_close
from conformance.gloo import Ranked
from conformance.pooled import need_pooled, parts_of

SUITE = "detectron2"
TIGHT = {"rtol": 1e-10, "atol": 1e-10}
CHANNELS = 4


def _trained(make: Callable[..., nn.Module] = nn.BatchNorm2d) -> nn.Module:
    """A layer with statistics and an affine map of its own."""
    layer = make(CHANNELS).double()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for held in (*layer.parameters(), *layer.buffers()):
            if held.is_floating_point():
                held.copy_(0.5 + torch.rand(held.shape, generator=generator))
    return layer


def _image() -> Tensor:
    return torch.randn(2, CHANNELS, 5, 5, generator=torch.Generator().manual_seed(1)).double()


def _frozen(layer: nn.Module) -> truenorm.BatchNorm:
    model = nn.Sequential(layer)
    made: truenorm.BatchNorm = truenorm.convert(model, to="frozen").model[0]
    return made


def frozen_is_the_affine_map_of_evaluation() -> None:
    layer = _trained()
    wanted = copy.deepcopy(layer).eval()(_image())
    frozen = _frozen(layer).train()
    need_close(frozen(_image()), wanted, "output in train mode", **TIGHT)


def frozen_has_no_parameters_and_never_moves() -> None:
    frozen = _frozen(_trained()).train()
    before = copy.deepcopy(frozen.state_dict())
    need(not list(frozen.parameters()), "it has parameters")
    x = _image().requires_grad_()
    frozen(x).square().sum().backward()
    need(x.grad is not None and bool(x.grad.abs().sum() > 0), "no gradient reaches the input")
    need_close(dict(frozen.state_dict()), dict(before), "state", rtol=0, atol=0)


def frozen_keeps_the_names_of_a_checkpoint() -> None:
    layer = _trained()
    state = copy.deepcopy(layer.state_dict())
    frozen = _frozen(layer)
    need(set(frozen.state_dict()) == set(state), f"keys {list(frozen.state_dict())}")
    frozen.load_state_dict(state)


def frozen_gives_the_dtype_of_its_input_under_autocast() -> None:
    frozen = _frozen(_trained().float())
    for grad in (False, True):
        x = _image().bfloat16().requires_grad_(grad)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = frozen(x)
        need(out.dtype == torch.bfloat16, f"gives {out.dtype}, gradient {grad}")


def sync_layers_are_frozen_too() -> None:
    made = _frozen(truenorm.BatchNorm2d(CHANNELS, sync=True).double())
    need(made.options.frozen and not list(made.parameters()), "it learns on")


def freezing_reaches_every_depth() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 4, 1), nn.Sequential(_trained(), nn.ModuleList([_trained()]))
    )
    truenorm.convert(model, to="frozen")
    truenorm.assert_frozen(model)


def domains_have_statistics_of_their_own() -> None:
    """CycleBatchNormList: a norm called for two domains in turn; here a norm for each call."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(CHANNELS)

        def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            return self.norm(a), self.norm(b)

    model, alone = Two().double(), [nn.BatchNorm2d(CHANNELS).double() for _ in range(2)]
    inputs = _image(), _image() * 3 + 5
    truenorm.convert(model, to="per-call", example=inputs)
    for _ in range(3):
        outs = model(*inputs)
        wanted = [layer(x) for layer, x in zip(alone, inputs, strict=True)]
        need_close(list(outs), wanted, "training", **TIGHT)
    outs = model.eval()(*inputs)
    wanted = [layer.eval()(x) for layer, x in zip(alone, inputs, strict=True)]
    need_close(list(outs), wanted, "evaluation", **TIGHT)


_ALONE: dict[str, Callable[[], None]] = {
    "affine map of evaluation": frozen_is_the_affine_map_of_evaluation,
    "no parameters, never moves": frozen_has_no_parameters_and_never_moves,
    "names of a checkpoint": frozen_keeps_the_names_of_a_checkpoint,
    "dtype under autocast": frozen_gives_the_dtype_of_its_input_under_autocast,
    "sync layers": sync_layers_are_frozen_too,
    "every depth": freezing_reaches_every_depth,
}


def cases() -> Iterator[Case]:
    """In one process."""
    for name, run in _ALONE.items():
        yield Case(SUITE, "frozen", name, "", run)
    yield Case(SUITE, "per call", "domains in turn", "", domains_have_statistics_of_their_own)


# -- over ranks ----------------------------------------------------------------------------------


def _layer() -> truenorm.BatchNorm:
    return truenorm.BatchNorm2d(CHANNELS, sync=True, dtype=torch.float64)


def uneven_batches() -> None:
    need_pooled(_layer(), parts_of([(5, CHANNELS, 3, 3), (1, CHANNELS, 3, 3)]), (0, 1))


def other_sizes_of_images() -> None:
    """ "N" weighs a rank by its examples; here, as on one rank, each value weighs the same."""
    need_pooled(_layer(), parts_of([(2, CHANNELS, 3, 3), (2, CHANNELS, 7, 5)]), (0, 1))


def an_empty_rank() -> None:
    need_pooled(_layer(), parts_of([(4, CHANNELS, 3, 3), (0, CHANNELS, 3, 3)]), (0, 1))


def an_empty_rank_of_three() -> None:
    shapes = [(0, CHANNELS, 3, 3), (2, CHANNELS, 3, 3), (3, CHANNELS, 3, 3)]
    need_pooled(_layer(), parts_of(shapes), (0, 1, 2))


def all_ranks_empty() -> None:
    """No update, and a gradient of zeros for whatever comes before."""
    layer = _layer()
    before = copy.deepcopy(layer.state_dict())
    x = torch.zeros(0, CHANNELS, 3, 3, dtype=torch.float64, requires_grad=True)
    layer(x).sum().backward()
    need(x.grad is not None and x.grad.shape == x.shape, "no gradient for the layers before")
    need_close(dict(layer.state_dict()), dict(before), "state", rtol=0, atol=0)


def ranks_weigh_the_same() -> None:
    """Its mode "": the mean of the ranks' means, whatever their sizes."""
    layer = truenorm.BatchNorm2d(CHANNELS, sync=True, momentum=1.0, dtype=torch.float64)
    parts = parts_of([(5, CHANNELS, 3, 3), (1, CHANNELS, 3, 3)])
    layer(parts[dist.get_rank()])
    wanted = torch.stack([p.mean((0, 2, 3)) for p in parts]).mean(0)
    need_close(layer.running_mean, wanted, "mean of the ranks' means", **TIGHT)


_RANKED: dict[str, tuple[int, Callable[[], None]]] = {
    "uneven batches": (2, uneven_batches),
    "other sizes of images": (2, other_sizes_of_images),
    "an empty rank": (2, an_empty_rank),
    "an empty first rank": (3, an_empty_rank_of_three),
    "all ranks empty": (2, all_ranks_empty),
    "ranks weigh the same": (2, ranks_weigh_the_same),
}


def ranked() -> list[Ranked]:
    """Over ranks."""
    return [Ranked(SUITE, "BatchNorm, sync", n, world, w) for n, (world, w) in _RANKED.items()]
