"""What test_nn.py and nn/test_lazy_modules.py of torch's repository ask of norms, in our words."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import truenorm
from conformance.cases import Case, need, need_close, refused

SUITE = "torch test_nn, lazy"
TIGHT = {"rtol": 1e-10, "atol": 1e-10}
DIMENSIONS = (1, 2, 3)
Classes = Callable[[str], type[nn.Module]]  # a class by its name in torch.nn


def _batch(dimensions: int, *, n: int = 4, channels: int = 3, side: int = 2) -> Tensor:
    shape = (n, channels, *(side,) * dimensions)
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# -- batch norm ----------------------------------------------------------------------------------


def one_value_is_refused(find: Classes, n: int) -> None:
    layer = find(f"BatchNorm{n}d")(10)
    for x in (torch.rand(1, 10, *(1,) * n), torch.rand(1, 10)[..., None][:, :, :1])[: 1 + (n == 1)]:
        refused(lambda x=x: layer(x), ValueError)
    layer.eval()(torch.rand(1, 10, *(1,) * n))


def a_mismatch_of_channels_is_refused(find: Classes, n: int) -> None:
    layer = find(f"BatchNorm{n}d")(4)
    for mode in (True, False):
        layer.train(mode)
        for channels in (3, 5):
            x = torch.rand(2, channels, *(3,) * n)
            refused(lambda x=x: layer(x), ValueError, RuntimeError)


def a_wrong_number_of_axes_is_refused(find: Classes, n: int) -> None:
    layer = find(f"BatchNorm{n}d")(3)
    for axes in range(1, 7):
        if axes - 2 != n and (axes, n) != (2, 1):
            refused(lambda axes=axes: layer(torch.rand(2, *(3,) * (axes - 1))), ValueError)


def another_momentum_none_is_the_mean_over_batches(find: Classes, n: int) -> None:
    layer = find(f"BatchNorm{n}d")(3, momentum=None).double()
    batches = [_batch(n) * f for f in (1.0, 2.0, 0.5)]
    for x in batches:
        layer(x)
    axes = [a for a in range(n + 2) if a != 1]
    mean = torch.stack([x.mean(axes) for x in batches]).mean(0)
    var = torch.stack([x.var(axes) for x in batches]).mean(0)
    need_close([layer.running_mean, layer.running_var], [mean, var], "statistics", **TIGHT)
    need(int(layer.num_batches_tracked) == 3, f"counted {layer.num_batches_tracked}")
    layer.reset_running_stats()
    need(int(layer.num_batches_tracked) == 0, "reset does not count from zero")


def statistics_set_to_none_are_the_batchs(find: Classes, n: int) -> None:
    """Whoever sets ``running_mean`` and ``running_var`` to None evaluates by the batch."""
    layer = find(f"BatchNorm{n}d")(3).double().eval()
    layer.running_mean = layer.running_var = None
    x = _batch(n)
    need_close(layer(x), F.batch_norm(x, None, None, training=True), "evaluation", **TIGHT)


def no_count_is_no_error(find: Classes, n: int) -> None:
    """``num_batches_tracked`` set to None: torch goes on without counting."""
    layer, twin = (find(f"BatchNorm{n}d")(3).double() for _ in range(2))
    layer.num_batches_tracked = None
    need_close(layer(_batch(n)), twin(_batch(n)), "output", **TIGHT)
    need_close(layer.running_mean, twin.running_mean, "running mean", **TIGHT)


def turned_off_tracking_leaves_statistics(find: Classes, n: int) -> None:
    layer = find(f"BatchNorm{n}d")(3).double()
    layer(_batch(n))
    before = copy.deepcopy(layer.state_dict())
    layer.track_running_stats = False
    layer(_batch(n) + 5)
    after = dict(layer.state_dict())
    # The count goes on in torch, the numbers do not move: they are what is asked about.
    for name in ("running_mean", "running_var"):
        need_close(after[name], before[name], name, rtol=0, atol=0)


def old_state_dicts_load(find: Classes, n: int) -> None:
    """Before torch 0.4.1 there was no count; version 1 of the metadata says so."""
    layer = find(f"BatchNorm{n}d")(3)
    layer.num_batches_tracked.fill_(7)
    old = copy.copy(layer.state_dict())
    del old["num_batches_tracked"]
    refused(lambda: layer.load_state_dict(old), RuntimeError)
    old._metadata[""]["version"] = 1
    layer.load_state_dict(old)
    need(int(layer.num_batches_tracked) in (0, 7), f"counts {layer.num_batches_tracked}")


def eval_does_not_move_statistics(find: Classes, n: int) -> None:
    layer = find(f"BatchNorm{n}d")(3).double()
    before = copy.deepcopy(layer.state_dict())
    layer.eval()(_batch(n))
    need_close(dict(layer.state_dict()), dict(before), "state", rtol=0, atol=0)


def half_input_is_taken_by_a_float_layer(find: Classes, n: int) -> None:
    """torch.batch_norm takes half precision with float parameters."""
    for dtype in (torch.bfloat16, torch.float16):
        layer, exact = find(f"BatchNorm{n}d")(3), find(f"BatchNorm{n}d")(3).double()
        x = _batch(n).to(dtype)
        for training in (True, False):
            out = layer.train(training)(x)
            wanted = exact.train(training)(x.double())
            need(out.dtype == dtype, f"gives {out.dtype}")
            need_close(out.double(), wanted, "output", rtol=2e-2, atol=2e-2)


def a_wider_input_is_treated_alike_in_both_modes(find: Classes, n: int) -> None:
    """float64 values into a float32 layer: taken in both modes, or refused in both."""
    layer, x = find(f"BatchNorm{n}d")(3), _batch(n)

    def works(training: bool) -> bool:
        try:
            layer.train(training)(x)
        except (RuntimeError, ValueError):
            return False
        return True

    need(works(True) == works(False), f"training {works(True)}, evaluation {works(False)}")


def a_row_batch_is_an_image_of_one_place(find: Classes, n: int) -> None:
    rows, image = (find("BatchNorm1d")(3).double(), find(f"BatchNorm{n}d")(3).double())
    x = _batch(0, n=5)
    wanted = rows(x)
    need_close(image(x.view(5, 3, *(1,) * n)).flatten(1), wanted, "output", **TIGHT)
    need_close(image.running_var, rows.running_var, "running variance", **TIGHT)


def momentum_is_the_weight_of_the_new_value(find: Classes, n: int) -> None:
    layer = find(f"BatchNorm{n}d")(3, momentum=0.25).double()
    x = _batch(n)
    layer(x)
    axes = [a for a in range(n + 2) if a != 1]
    need_close(layer.running_mean, 0.25 * x.mean(axes), "running mean", **TIGHT)
    need_close(layer.running_var, 0.75 + 0.25 * x.var(axes), "running variance", **TIGHT)


# -- the other norms -----------------------------------------------------------------------------


def instances_of_one_place_are_refused(find: Classes, n: int) -> None:
    """One value per instance has no variance; in channels-last memory as in any other."""
    layer = find(f"InstanceNorm{n}d")(3)
    x = torch.rand(2, 3, *(1,) * n)
    refused(lambda: layer(x), ValueError)
    if n == 2:
        refused(lambda: layer(x.contiguous(memory_format=torch.channels_last)), ValueError)
    tracking = find(f"InstanceNorm{n}d")(3, track_running_stats=True)
    tracking.eval()(x)


def far_from_zero_it_is_as_right_as_torchs(find: Classes, n: int) -> None:
    """Values around 1000 in channels-last memory: within twice torch's distance of the truth."""
    x = torch.randn(2, 8, *(16,) * n, generator=torch.Generator().manual_seed(2)) + 1000
    if n == 1:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    else:
        last = {2: torch.channels_last, 3: torch.channels_last_3d}
        x = x.contiguous(memory_format=last[n])
    wanted = nn.functional.instance_norm(x.double())
    error, torchs = (
        float((layer(x).double() - wanted).abs().max())
        for layer in (find(f"InstanceNorm{n}d")(8), getattr(nn, f"InstanceNorm{n}d")(8))
    )
    need(error <= max(2 * torchs, 1e-3), f"off by {error:.2g}, torch's by {torchs:.2g}")


def instances_track_the_mean_over_examples(find: Classes, n: int) -> None:
    layer = find(f"InstanceNorm{n}d")(3, momentum=1.0, track_running_stats=True).double()
    x = _batch(n, side=3)
    layer(x)
    axes = list(range(2, n + 2))
    wanted = [x.mean(axes).mean(0), x.var(axes).mean(0)]
    need_close([layer.running_mean, layer.running_var], wanted, "statistics", **TIGHT)


def groups_of_all_and_of_each_are_layer_and_instance_norm(find: Classes, n: int) -> None:
    x = _batch(n, channels=6, side=3)
    whole = find("GroupNorm")(1, 6).double()(x)
    need_close(whole, F.layer_norm(x, x.shape[1:]), "one group", **TIGHT)
    each = find("GroupNorm")(6, 6).double()(x)
    need_close(each, F.instance_norm(x), "a group for each channel", **TIGHT)


def groups_of_an_empty_batch_are_empty(find: Classes, n: int) -> None:
    x = torch.rand(0, 6, *(3,) * n, requires_grad=True)
    for layer in (find("GroupNorm")(2, 6), find("LayerNorm")(x.shape[1:])):
        out = layer(x)
        out.sum().backward()
        need(out.shape == x.shape, f"shape {tuple(out.shape)}")
        need(all(not p.grad.any() for p in layer.parameters()), "gradients of nothing")


# -- lazy layers ---------------------------------------------------------------------------------


def lazy_becomes_the_layer(find: Classes, n: int) -> None:
    layer, wanted = find(f"LazyBatchNorm{n}d")().double(), find(f"BatchNorm{n}d")(3).double()
    need_close(layer(_batch(n)), wanted(_batch(n)), "output", **TIGHT)
    need(type(layer) is type(wanted), f"became {type(layer).__name__}")
    need(layer.num_features == 3, f"{layer.num_features} features")


def lazy_without_anything_works(find: Classes, n: int) -> None:
    layer = find(f"LazyBatchNorm{n}d")(affine=False, track_running_stats=False).double()
    plain = find(f"BatchNorm{n}d")(3, affine=False, track_running_stats=False).double()
    need_close(layer(_batch(n)), plain(_batch(n)), "output", **TIGHT)


def lazy_loads_a_known_state(find: Classes, n: int) -> None:
    known = find(f"BatchNorm{n}d")(3).double()
    known(_batch(n))
    layer = find(f"LazyBatchNorm{n}d")().double()
    layer.load_state_dict(known.state_dict())
    need_close(layer(_batch(n)), known(_batch(n)), "output", **TIGHT)


def lazy_is_pickled_before_it_is_known(find: Classes, n: int) -> None:
    layer = pickle.loads(pickle.dumps(find(f"LazyBatchNorm{n}d")()))
    need(layer.has_uninitialized_params(), "it is known before it saw anything")
    layer(_batch(n).float())
    need(layer.running_mean.shape == (3,), f"shape {tuple(layer.running_mean.shape)}")


def lazy_and_known_do_not_mix(find: Classes, n: int) -> None:
    """The state of a layer that knows nothing is no state for one that does."""
    unknown = find(f"LazyBatchNorm{n}d")()
    refused(lambda: find(f"BatchNorm{n}d")(3).load_state_dict(unknown.state_dict()), RuntimeError)


def lazy_refuses_other_axes(find: Classes, n: int) -> None:
    layer = find(f"LazyBatchNorm{n}d")()
    refused(lambda: layer(torch.rand(2, *(3,) * (n + 2))), ValueError)


Check = Callable[[Classes, int], None]
CHECKS: dict[str, dict[str, Check]] = {
    "BatchNorm": {
        "one value": one_value_is_refused,
        "channels": a_mismatch_of_channels_is_refused,
        "axes": a_wrong_number_of_axes_is_refused,
        "momentum None": another_momentum_none_is_the_mean_over_batches,
        "statistics None": statistics_set_to_none_are_the_batchs,
        "count None": no_count_is_no_error,
        "tracking turned off": turned_off_tracking_leaves_statistics,
        "state dict of version 1": old_state_dicts_load,
        "evaluation": eval_does_not_move_statistics,
        "half input": half_input_is_taken_by_a_float_layer,
        "wider input": a_wider_input_is_treated_alike_in_both_modes,
        "rows": a_row_batch_is_an_image_of_one_place,
        "momentum": momentum_is_the_weight_of_the_new_value,
    },
    "InstanceNorm": {
        "one place": instances_of_one_place_are_refused,
        "far from zero, channels last": far_from_zero_it_is_as_right_as_torchs,
        "tracking": instances_track_the_mean_over_examples,
    },
    "GroupNorm": {
        "one group, a group each": groups_of_all_and_of_each_are_layer_and_instance_norm,
        "empty batch": groups_of_an_empty_batch_are_empty,
    },
    "LazyBatchNorm": {
        "becomes the layer": lazy_becomes_the_layer,
        "no affine map, no statistics": lazy_without_anything_works,
        "known state": lazy_loads_a_known_state,
        "pickle": lazy_is_pickled_before_it_is_known,
        "unknown state": lazy_and_known_do_not_mix,
        "axes": lazy_refuses_other_axes,
    },
}


def cases() -> Iterator[Case]:
    """Every check in one, two and three dimensions."""
    for norm, checks in CHECKS.items():
        for name, check in checks.items():
            for n in DIMENSIONS:
                ours, theirs = (partial(check, partial(getattr, m), n) for m in (truenorm, nn))
                yield Case(SUITE, norm, name, f"{n}D", ours, theirs)
