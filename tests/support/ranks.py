"""What the processes of test_distributed run: batch norms whose batch is spread over gloo ranks.

``ranks.py FOLDER`` starts one process for each rank. Case after case, in worlds of four, three and
two ranks, each leaves FOLDER/WORLD-RANK.pt: what the cases gave on this rank, by their names.
"""

from __future__ import annotations

import multiprocessing
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import truenorm as tn

WORLDS = (4, 3, 2)
PATIENCE = timedelta(seconds=20)  # after which a rank that waits for another gives up
CHANNELS = 3


@dataclass(frozen=True)
class Case:
    """A batch of ``sum(counts)`` examples, spread over ``len(counts)`` ranks, some times.

    The mask is made of the valid ``"examples"``, ``"positions"`` or ``"values"``; ranks in
    ``blind`` have nothing valid, and ranks in ``open_eyed`` are given no mask. ``groups`` are the
    process groups that pool; () for all ranks.
    """

    counts: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    positions: tuple[int, ...] = (5,)
    masked: str = ""
    blind: tuple[int, ...] = ()
    open_eyed: tuple[int, ...] = ()
    groups: tuple[tuple[int, ...], ...] = ()
    steps: int = 3
    recomputed: bool = False
    dtype: torch.dtype = torch.float64

    @property
    def plain(self) -> bool:
        """Whether torch.nn has this layer."""
        return not self.masked and not set(self.options) - {"momentum", "affine"}


def renorm(**limits: float) -> dict[str, Any]:
    """An option; its schedule ends after one batch."""
    return {"renorm": tn.Renorm(**limits, start=0, rmax_at=0, dmax_at=0)}


CASES = {
    "equal counts": Case((3, 3)),
    "equal counts in four": Case((2, 2, 2, 2)),
    "unequal counts": Case((5, 1, 3)),
    "rows": Case((4, 3, 1), positions=()),
    "one value each": Case((1, 1), positions=()),
    "images": Case((2, 3), positions=(3, 4)),
    "volumes": Case((2, 1), positions=(2, 2, 3)),
    "no affine map": Case((2, 4), {"affine": False}),
    "cumulative average": Case((2, 4), {"momentum": None}),
    "an empty rank": Case((4, 0)),
    "an empty first rank": Case((0, 2, 3)),
    "two empty ranks": Case((0, 4, 0, 3)),
    "all ranks empty": Case((0, 0)),
    "mask": Case((4, 3), masked="positions"),
    "mask of examples": Case((4, 3, 2), masked="examples", positions=(2, 3)),
    "mask of values": Case((3, 4), masked="values"),
    "mask, one rank blind": Case((3, 2, 4), masked="positions", blind=(1,)),
    "mask of values, one rank blind": Case((3, 4), masked="values", blind=(0,)),
    "mask, all ranks blind": Case((3, 2), masked="positions", blind=(0, 1)),
    "mask and an empty rank": Case((0, 5, 2), masked="positions"),
    "mask on one rank only": Case((3, 4), masked="positions", open_eyed=(1,)),
    "ghosts over borders": Case((5, 4), {"ghost": 2}),
    "a last smaller ghost": Case((3, 4, 4), {"ghost": 4}),
    "a ghost over three ranks": Case((2, 1, 2, 3), {"ghost": 5}),
    "a last ghost of one value": Case((4, 3), {"ghost": 3}, positions=()),
    "ghosts and an empty rank": Case((3, 0, 4), {"ghost": 2}),
    "ghosts larger than the batch": Case((3, 2), {"ghost": 16}),
    "ghosts and mask": Case((5, 4), {"ghost": 2}, masked="positions"),
    "ghosts, mask, one rank blind": Case((3, 4, 2), {"ghost": 2}, masked="values", blind=(1,)),
    "renorm": Case((3, 5), renorm(rmax=1.1, dmax=0.2)),
    "renorm without limits": Case((3, 2, 1), renorm(rmax=100.0, dmax=100.0)),
    "renorm, ghosts and mask": Case(
        (5, 4), renorm(rmax=1.5, dmax=0.3) | {"ghost": 2}, masked="positions"
    ),
    "too few values": Case((1, 0, 2), {"min_count": 8}, positions=()),
    "a single value": Case((0, 1), {"min_count": 2}, positions=()),
    "few that suffice together": Case((1, 2, 1), {"min_count": 4}, positions=()),
    "few in the last ghost": Case((4, 5), {"min_count": 6, "ghost": 2}, positions=(3,)),
    "few in masked ghosts": Case((4, 5), {"min_count": 6, "ghost": 2}, masked="values"),
    "few and renorm": Case((2, 1), {"min_count": 8} | renorm(rmax=2.0, dmax=1.0), positions=(4,)),
    "few, cumulative": Case((2, 1), {"min_count": 8, "momentum": None}, positions=()),
    "commit": Case((3, 5), {"commit": "step"}, steps=2),
    "commit with a mask": Case((3, 2, 1), {"commit": "step"}, masked="positions", steps=2),
    "commit of ghosts": Case((3, 4), {"commit": "step", "ghost": 2}, steps=2),
    "commit with an empty rank": Case((0, 4), {"commit": "step"}, steps=2),
    "one rank apart": Case((3, 2, 4), groups=((0, 1), (2,))),
    "two groups, interleaved": Case((3, 2, 4, 3), {"ghost": 2}, groups=((0, 2), (1, 3))),
    "a group without the first rank": Case((3, 2, 4), {"ghost": 4}, groups=((1, 2), (0,))),
    "recomputed in the backward pass": Case((2, 4), recomputed=True),
    "recomputed ghosts": Case((3, 2), {"ghost": 2}, masked="positions", recomputed=True),
    "float32": Case((3, 4, 2), dtype=torch.float32),
    # Last: where ranks differ in the shape of what they sum, gloo aborts the process.
    "mask of values on one rank only": Case((3, 4), masked="values", open_eyed=(1,)),
}

LAYERS = {
    0: (nn.BatchNorm1d, tn.BatchNorm1d),
    1: (nn.BatchNorm1d, tn.BatchNorm1d),
    2: (nn.BatchNorm2d, tn.BatchNorm2d),
    3: (nn.BatchNorm3d, tn.BatchNorm3d),
}


def begun(layer: Any) -> Any:
    """``layer`` with parameters and statistics that are not the initial ones."""
    generator = torch.Generator().manual_seed(99)
    for name, values in sorted(layer.state_dict().items()):
        if name != "num_batches_tracked":
            values.copy_(torch.rand(CHANNELS, generator=generator, dtype=torch.float64) + 0.5)
    return layer


def layer_of(case: Case, *, ours: bool = True, **more: Any) -> Any:
    made = LAYERS[len(case.positions)][ours]
    return begun(made(CHANNELS, dtype=case.dtype, **case.options, **more))


def batches(case: Case, members: tuple[int, ...]) -> list[tuple[Any, ...]]:
    """For each step the input, the weights of the loss, and the mask, joined over ``members``."""
    generator = torch.Generator().manual_seed(sum(case.counts))
    n = sum(case.counts)
    shape = (n, CHANNELS, *case.positions)
    mask_shape = {"examples": (n,), "positions": (n, *case.positions), "values": shape}
    rows = [torch.full((count,), rank) for rank, count in enumerate(case.counts)]
    rank_of = torch.cat(rows)
    mine = torch.isin(rank_of, torch.tensor(members))
    made = []
    for _ in range(case.steps):
        x = torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 1
        weights = torch.randn(shape, generator=generator, dtype=torch.float64)
        mask = None
        if case.masked:
            mask = torch.rand(mask_shape[case.masked], generator=generator) > 0.3
            mask[torch.isin(rank_of, torch.tensor(case.blind, dtype=torch.int64))] = False
            mask[torch.isin(rank_of, torch.tensor(case.open_eyed, dtype=torch.int64))] = True
            mask = None if set(members) <= set(case.open_eyed) else mask[mine]
        made.append((x[mine].to(case.dtype), weights[mine].to(case.dtype), mask))
    return made


def observed(layer: Any, case: Case, members: tuple[int, ...]) -> dict[str, Any]:
    """What comes of training ``layer``: by quantity, a tensor for each step.

    The second order is the gradient of a weighted sum of the squares of the gradient.
    """
    call = partial(checkpoint, layer, use_reentrant=False) if case.recomputed else layer
    affine = [p for p in (layer.weight, layer.bias) if p is not None]
    seen: dict[str, Any] = {
        key: []
        for key in ("out", "grad", "grad affine", "second", "second affine", "mean", "var", "n")
    }

    def look() -> None:
        seen["mean"].append(layer.running_mean.clone())
        seen["var"].append(layer.running_var.clone())
        seen["n"].append(layer.num_batches_tracked.clone())

    for x, weights, mask in batches(case, members):
        x.requires_grad_()
        out = call(x) if mask is None else call(x, mask)
        first = torch.autograd.grad((out * weights).sum(), [x, *affine], create_graph=True)
        second = torch.autograd.grad(
            (first[0].square() * weights).sum(), [x, *affine], materialize_grads=True
        )
        seen["out"].append(out.detach())
        seen["grad"].append(first[0].detach())
        seen["grad affine"].append(torch.cat([g.detach() for g in first[1:]] or [x.new_zeros(0)]))
        seen["second"].append(second[0])
        seen["second affine"].append(torch.cat([*second[1:]] or [x.new_zeros(0)]))
        look()
    if "commit" in case.options:
        layer.commit()
        look()
    return seen


def on_this_rank(case: Case) -> dict[str, Any]:
    groups = [dist.new_group(list(members)) for members in case.groups]
    sync: Any = True
    for group, members in zip(groups, case.groups, strict=True):
        if dist.get_rank() in members:
            sync = group
    return observed(layer_of(case, sync=sync), case, (dist.get_rank(),))


# -- what is not a case ------------------------------------------------------------------------


def raised(work: Callable[[], object]) -> str:
    """The error of ``work``, as "Type: message"; "" without one."""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def one_value_in_all() -> dict[str, Any]:
    layer = begun(tn.BatchNorm1d(CHANNELS, sync=True, dtype=torch.float64))
    message = raised(lambda: layer(torch.zeros(int(dist.get_rank() == 0), CHANNELS).double()))
    return {"raised": message, "n": layer.num_batches_tracked.clone()}


def not_finite_on_one() -> dict[str, Any]:
    layer = begun(tn.BatchNorm1d(CHANNELS, sync=True, dtype=torch.float64))
    before = layer.running_mean.clone(), layer.running_var.clone()
    x = torch.ones(4, CHANNELS, dtype=torch.float64)
    x[0, 0] = float("inf") if dist.get_rank() == 1 else 0.0
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        layer(x)
    return {
        "kept": torch.equal(before[0], layer.running_mean)
        and torch.equal(before[1], layer.running_var),
        "skipped": layer.skipped_batches,
        "n": int(layer.num_batches_tracked),
    }


def far_from_zero() -> dict[str, Any]:
    """float32 values around 1e4 with a standard deviation of 0.1."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(50 + dist.get_rank(), CHANNELS, 100, generator=generator) * 0.1 + 1e4
    layer = tn.BatchNorm1d(CHANNELS, momentum=1.0, sync=True)
    return {
        "x": x,
        "out": layer(x).detach(),
        "mean": layer.running_mean.clone(),
        "var": layer.running_var.clone(),
    }


def evaluated_alone() -> dict[str, Any]:
    """Only the first rank computes: were it to wait for another, it would wait in vain."""
    outs = []
    if dist.get_rank() == 0:
        x = torch.linspace(-1, 1, 4 * CHANNELS, dtype=torch.float64).view(4, CHANNELS)
        x.requires_grad_()
        made = partial(tn.BatchNorm1d, CHANNELS, dtype=torch.float64, sync=True)
        for layer in (made().eval(), made(ghost=2, min_count=8).eval(), made(frozen=True)):
            out = begun(layer)(x)
            torch.autograd.grad(out.sum(), x)
            outs.append(out.detach())
    dist.barrier()
    return {"out": outs}


def evaluated_alone_in_data_parallel() -> dict[str, Any]:
    """As above, of a model without statistics: nothing of it is broadcast in a forward."""
    layers = nn.Linear(4, CHANNELS), tn.BatchNorm1d(CHANNELS, track_running_stats=False)
    model = DistributedDataParallel(nn.Sequential(*layers)).eval()
    done = dist.get_rank() != 0 or model(torch.randn(5, 4)).isfinite().all().item()
    dist.barrier()
    return {"done": done}


# Examples and positions on each of two ranks: the batch's last example has one value, or has not.
UNLIKE = {"one value is left": ((4, 5), (1, 1)), "more are left": ((4, 1), (1, 5))}


def unlike_positions() -> dict[str, Any]:
    """Ghosts of two examples, whose positions differ between the ranks."""
    given = {}
    for name, shares in UNLIKE.items():
        examples, positions = shares[dist.get_rank()]
        generator = torch.Generator().manual_seed(dist.get_rank())
        x = torch.randn(examples, CHANNELS, positions, generator=generator, dtype=torch.float64)
        layer = tn.BatchNorm1d(CHANNELS, ghost=2, sync=True, dtype=torch.float64)
        given[name] = {"x": x, "out": layer(x).detach(), "var": layer.running_var.clone()}
    return given


def outsider() -> dict[str, Any]:
    """A rank that holds the group of others normalizes by itself."""
    group = dist.new_group([0, 1])
    case = Case((3, 2, 4))
    layer = layer_of(case, sync=group)
    return observed(layer, case, (dist.get_rank(),))


def torchs_sync() -> dict[str, Any]:
    layer = nn.SyncBatchNorm(CHANNELS)
    return {"raised": raised(lambda: layer(torch.ones(4, CHANNELS)))}


DDP = Case((5, 0, 3), steps=5)


def net(norm: Callable[..., nn.Module], **options: Any) -> nn.Module:
    torch.manual_seed(0)
    layers = [
        nn.Conv1d(CHANNELS, 4, 2, bias=False),
        norm(4, **options),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 6),
        norm(6, **options),
        nn.ReLU(),
        nn.Linear(6, 2),
    ]
    return nn.Sequential(*layers).double()


def trained(model: nn.Module, members: tuple[int, ...], scale: float = 1) -> None:
    """Some steps down the mean loss of the joined batch, times ``scale``."""
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x, weights, _ in batches(DDP, members):
        labels = (weights.sum((1, 2)) > 0).long()
        loss = F.cross_entropy(model(x), labels, reduction="sum") / sum(DDP.counts)
        sgd.zero_grad()
        (loss * scale).backward()
        sgd.step()


def data_parallel() -> dict[str, Any]:
    model = net(tn.BatchNorm1d, sync=True)
    # DDP divides the sum of the ranks' gradients by their number.
    trained(DistributedDataParallel(model), (dist.get_rank(),), scale=dist.get_world_size())
    return dict(model.state_dict())


SPECIAL: dict[int, dict[str, Callable[[], dict[str, Any]]]] = {
    2: {
        "one value in all": one_value_in_all,
        "not finite on one": not_finite_on_one,
        "evaluated alone": evaluated_alone,
        "evaluated alone in data parallel": evaluated_alone_in_data_parallel,
        "unlike positions": unlike_positions,
        "torch's sync": torchs_sync,
    },
    3: {"outsider": outsider, "far from zero": far_from_zero, "data parallel": data_parallel},
    4: {},
}


def cases(world: int) -> dict[str, Callable[[], dict[str, Any]]]:
    named = {n: partial(on_this_rank, c) for n, c in CASES.items() if len(c.counts) == world}
    return SPECIAL[world] | named


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    for world in WORLDS:
        if rank >= world:
            break
        dist.init_process_group(
            "gloo",
            init_method=(folder / f"store-{world}").as_uri(),
            rank=rank,
            world_size=world,
            timeout=PATIENCE,
        )
        given: dict[str, Any] = {}
        for name, case in cases(world).items():
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    given[name] = case()
            except Exception:
                given[name] = traceback.format_exc()
                break
            finally:  # each time: a process that aborts keeps what it had
                torch.save(given, folder / f"{world}-{rank}.pt")
        dist.destroy_process_group()


def start(folder: Path) -> None:
    """Fork the ranks and wait for them; torch is imported once, before."""
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=main, args=(folder, rank)) for rank in range(max(WORLDS))]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


if __name__ == "__main__":
    start(Path(sys.argv[1]))
