"""Residual and activation within the kernels: torch's composition of them, in one."""

from __future__ import annotations

import io
import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import truenorm
from truenorm.kernels import build, fused, ops
from truenorm.layers.functional import ACTIVATIONS

pytestmark = pytest.mark.skipif(
    not ops.kernels().live, reason=f"no kernels: {ops.kernels().reason}"
)

LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6}


def composed(x, affine, running, *, training, act, residual):
    y = F.batch_norm(x, *running, *affine, training, 0.1, 1e-5)
    y = y if residual is None else y + residual
    return y if act == "none" else ACTIVATIONS[act](y)


def outcome(call, tensors, grad):
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    running = torch.zeros_like(tensors[1]), torch.ones_like(tensors[1])
    y = call(*leaves[:3], running, leaves[3])
    return y, *torch.autograd.grad(y, [t for t in leaves if t is not None], grad), *running


def test_the_names_are_those_of_the_layers_in_the_order_of_the_kernels():
    assert set(fused.ACTIVATIONS) == {"none", *ACTIVATIONS}
    listed = (build.SOURCES / "job.h").read_text().partition("enum class Act")[2]
    names = re.findall(r"\w+", listed.partition("{")[2].partition("}")[0])
    assert [*fused.ACTIVATIONS, "count"] == names


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("added", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("act", fused.ACTIVATIONS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_it_is_the_composition_and_so_are_its_gradients(dtype, act, added, layout, training):
    x, residual, grad = torch.randn(3, 6, 5, 12, 15, dtype=dtype)
    x = (x * 3 + 1).contiguous(memory_format=LAYOUTS[layout])
    weight, bias = torch.randn(2, 5, dtype=dtype)
    tensors = x, weight, bias, residual if added else None

    def ours(x, weight, bias, running, residual):
        momentum = 0.1 if training else None
        more = {"momentum": momentum, "act": act, "residual": residual}
        return fused.batch_norm_act(x, (weight, bias), running, 1e-5, **more)[0]

    def theirs(x, weight, bias, running, residual):
        return composed(x, (weight, bias), running, training=training, act=act, residual=residual)

    wide = [None if t is None else t.double() for t in tensors]
    wanted = outcome(theirs, wide, grad.double())
    # torch's hardsigmoid divides by 6 in float32, whatever the dtype
    tolerance = 1e-7 if act == "hardsigmoid" else 0
    for got, exact in zip(outcome(ours, tensors, grad), wanted, strict=True):
        limit = max(tolerance, TOLERANCES[dtype]) * (1 + exact.abs().max())
        assert (got - exact).abs().max() <= limit


@pytest.mark.parametrize("added", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("act", ["none", "relu", "leaky_relu", "silu", "gelu_tanh"])
def test_gradients_and_their_gradients_are_those_of_differences(act, added):
    x, residual = torch.randn(2, 3, 2, 3, 4, dtype=torch.float64)
    weight, bias = torch.randn(2, 2, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, weight, bias, *((residual,) if added else ()))]

    def call(x, weight, bias, residual=None):
        running = torch.zeros_like(weight), torch.ones_like(weight)
        more = {"momentum": 0.1, "act": act, "residual": residual}
        return fused.batch_norm_act(x, (weight, bias), running, 1e-5, **more)[0]

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


def test_neither_the_normalized_values_nor_those_before_the_activation_are_kept():
    layer = truenorm.BatchNorm2d(8, act="silu")
    x = torch.randn(16, 8, 20, 20, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    large = [t for t in kept if t.numel() >= x.numel()]
    assert [t.data_ptr() for t in large] == [x.data_ptr()]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("size", [6, 40], ids=["small", "large"])
@pytest.mark.parametrize("act", [None, "relu", "silu"])
def test_a_checkpoint_repeats_the_same_and_counts_once(act, size, reentrant):
    x = torch.randn(8, 4, size, size)
    layers = [truenorm.BatchNorm2d(4, act=act) for _ in range(2)]
    found = []
    for layer, repeats in zip(layers, (False, True), strict=True):
        leaf = x.clone().requires_grad_()
        y = checkpoint(layer, leaf, use_reentrant=reentrant) if repeats else layer(leaf)
        y.square().sum().backward()
        found.append((y.detach(), leaf.grad, layer.weight.grad))
    for plain, repeated in zip(*found, strict=True):
        assert torch.equal(plain, repeated)
    for name, value in layers[0].state_dict().items():
        assert torch.equal(value, layers[1].state_dict()[name]), name


def test_a_batch_that_is_not_finite_leaves_the_statistics_alone():
    layer = truenorm.BatchNorm2d(4, act="relu")
    x = torch.randn(8, 4, 40, 40)
    x[1, 2, 3, 4] = torch.nan
    with pytest.warns(UserWarning, match="non-finite"):
        layer(x, residual=x).sum()
    assert torch.equal(layer.running_mean, torch.zeros(4))
    assert layer.num_batches_tracked == 0
    assert layer.skipped_batches == 1


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # torch's own, of its first use
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("added", [False, True], ids=["alone", "residual"])
def test_what_changes_along_a_direction_is_the_derivative(training, added):
    layer = truenorm.BatchNorm2d(16, act="silu", dtype=torch.float64).train(training)
    x, residual, along = torch.randn(3, 8, 16, 20, 20, dtype=torch.float64)  # not small

    def run(x):
        return layer(x, residual=residual if added else None)

    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(run(forward_ad.make_dual(x, along))).tangent
    expected = (run(x + 1e-5 * along) - run(x - 1e-5 * along)) / 2e-5
    assert torch.allclose(tangent, expected, atol=1e-8)


@pytest.mark.filterwarnings("ignore:.torch.jit", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_traced_layer_can_be_written_and_read(training):
    layer = truenorm.BatchNorm2d(16, act="relu").train(training)
    x = torch.randn(8, 16, 20, 20)
    kept = io.BytesIO()
    torch.jit.save(torch.jit.trace(layer, x, check_trace=False), kept)
    kept.seek(0)
    assert torch.allclose(torch.jit.load(kept)(x), layer(x), atol=1e-6)


@pytest.mark.parametrize("added", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("frozen", [False, True], ids=["evaluation", "frozen"])
def test_by_the_running_statistics_it_is_the_composition(frozen, added):
    layer = truenorm.BatchNorm2d(5, act="elu")
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias, layer.running_mean):
            tensor.normal_()
        layer.running_var.uniform_(0.5, 2)
    layer.frozen = frozen
    layer.train(frozen)
    x, residual = torch.randn(2, 3, 5, 7, 7)
    running, affine = (layer.running_mean, layer.running_var), (layer.weight, layer.bias)
    given = residual if added else None
    expected = composed(x, affine, running, training=False, act="elu", residual=given)
    assert torch.allclose(layer(x, residual=given), expected, atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(layer(x, residual=given), expected, atol=1e-6)


MASKED = {
    "maps": ((4, 3, 5, 5), "contiguous"),
    "maps as rows": ((4, 3, 5, 5), "channels last"),
    "long maps": ((3, 2, 17, 20), "contiguous"),
    "rows": ((9, 4), None),
    "sequences": ((3, 4, 11), None),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("act", ["none", "relu", "silu"])
@pytest.mark.parametrize("case", MASKED)
def test_what_a_mask_hides_is_not_seen_and_the_rest_is_as_packed(case, act, training):
    shape, layout = MASKED[case]
    x, residual, grad = torch.randn(3, *shape, dtype=torch.float64)
    mask = torch.rand(shape[0], *shape[2:]) > 0.4
    mask.view(-1)[:2] = True
    mask.view(-1)[-1] = False
    shown = mask.unsqueeze(1).expand(shape)
    x = torch.where(shown, x * 3 + 100, torch.nan)
    residual = torch.where(shown, residual, torch.inf)
    if layout:
        x = x.contiguous(memory_format=LAYOUTS[layout])
    weight, bias = torch.randn(2, shape[1], dtype=torch.float64)
    momentum = 0.1 if training else None

    def ours(x, weight, bias, running, residual):
        more = {"momentum": momentum, "act": act, "residual": residual, "mask": mask}
        return fused.batch_norm_act(x, (weight, bias), running, 1e-5, **more)[0]

    def packed(values):
        return values.movedim(1, -1)[mask].clone()

    def theirs(x, weight, bias, running, residual):
        more = {"training": training, "act": act, "residual": residual}
        return composed(x, (weight, bias), running, **more)

    found = outcome(ours, (x, weight, bias, residual), grad)
    right = outcome(theirs, (packed(x), weight, bias, packed(residual)), packed(grad))
    whole = {0, 1, 4}  # output and the gradients of x and the residual
    for place, (one, other) in enumerate(zip(found, right, strict=True)):
        if place in whole:
            assert not one[~shown].any()
        mine = packed(one) if place in whole else one
        assert torch.allclose(mine, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("act", ["none", "relu", "tanh"])
def test_with_a_mask_gradients_and_their_gradients_are_those_of_differences(act):
    x, residual = torch.randn(2, 4, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(4, 3, 3) > 0.3

    def run(x, residual, weight, bias):
        running = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
        more = {"momentum": 0.1, "act": act, "residual": residual, "mask": mask}
        return fused.batch_norm_act(x, (weight, bias), running, 1e-5, **more)[0]

    assert torch.autograd.gradcheck(run, (x, residual, weight, bias))
    assert torch.autograd.gradgradcheck(run, (x, residual, weight, bias))


def test_moments_are_those_of_what_the_mask_shows():
    x = torch.randn(5, 3, 4, 6) * 2 + 1e4
    mask = torch.rand(5, 4, 6) > 0.5
    for values, given in (
        (x, None),
        (x, mask),
        (x.contiguous(memory_format=LAYOUTS["channels last"]), mask),
    ):
        mean, var = ops.moments(values, given)
        rows = x.double().movedim(1, -1)[torch.ones_like(mask) if given is None else mask]
        assert torch.allclose(mean, rows.mean(0), rtol=1e-12)
        assert torch.allclose(var, rows.var(0, correction=0), rtol=1e-6)
    assert not torch.cat(ops.moments(x, torch.zeros_like(mask))).any()


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("act", ["none", "relu", "leaky_relu", "silu"])
def test_any_choice_of_what_learns_gives_the_gradients_of_all(act, layout, masked):
    x, residual, grad = torch.randn(3, 4, 3, 14, 13)
    x = x.contiguous(memory_format=LAYOUTS[layout])
    mask = torch.rand(4, 14, 13) > 0.3 if masked else None
    given = x, residual, torch.rand(3) + 0.5, torch.randn(3)

    def gradients(learn):
        leaves = [t.clone().requires_grad_(one) for t, one in zip(given, learn, strict=True)]
        running = torch.zeros(3), torch.ones(3)
        y = fused.batch_norm_act(
            leaves[0], (leaves[2], leaves[3]), running, 1e-5,
            momentum=0.1, act=act, residual=leaves[1], mask=mask,
        )[0]  # fmt: skip
        y.backward(grad)
        return [leaf.grad for leaf in leaves]

    wanted = gradients((True,) * 4)
    for learn in itertools.product((False, True), repeat=4):
        if any(learn):
            for got, one, all_of_it in zip(gradients(learn), learn, wanted, strict=True):
                assert torch.allclose(got, all_of_it, rtol=1e-5, atol=1e-5) if one else got is None


@pytest.mark.parametrize("pattern", ["scattered", "padding", "examples"])
@pytest.mark.parametrize("act", ["none", "relu", "leaky_relu", "silu"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_what_a_mask_hides_is_never_looked_at(mean, dtype, layout, act, pattern):
    if mean and dtype == torch.bfloat16:
        mean = 30.0
    x, residual, grad = torch.randn(3, 7, 5, 29, 31)
    x = x + mean
    mask = {
        "scattered": torch.rand(7, 29, 31) > 0.4,
        "padding": (torch.arange(31) < 22).expand(7, 29, 31).contiguous(),
        "examples": (torch.arange(7) != 3).view(7, 1, 1).expand(7, 29, 31).contiguous(),
    }[pattern]
    shown = mask.unsqueeze(1)
    found = []
    for hidden in (0.0, torch.nan):  # nan in all that is given
        given = [
            torch.where(shown, t, hidden).to(dtype).contiguous(memory_format=LAYOUTS[layout])
            for t in (x, residual, grad)
        ]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        leaves = [t.requires_grad_() for t in (*given[:2], torch.rand(5).to(wide) * 0 + 1.3)]
        running = torch.zeros(5, dtype=wide), torch.ones(5, dtype=wide)
        y, moments, finite = fused.batch_norm_act(
            leaves[0], (leaves[2], None), running, 1e-5,
            momentum=0.1, act=act, residual=leaves[1], mask=mask,
        )  # fmt: skip
        assert finite
        found.append([y, moments, *torch.autograd.grad(y, leaves, given[2]), *running])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    y, (mean_of, var_of), dx = found[0][0], found[0][1][:, 0], found[0][2]
    rows = x.to(dtype).double().movedim(1, -1)[mask]
    assert torch.allclose(mean_of, rows.mean(0), rtol=1e-7, atol=1e-6)
    assert torch.allclose(var_of, rows.var(0, correction=0), rtol=1e-5)
    assert not y[~shown.expand_as(y)].any()
    assert not dx[~shown.expand_as(y)].any()


@pytest.mark.parametrize("shape", [(64, 16), (8, 4, 40, 40)], ids=str)
@pytest.mark.parametrize("options", [{}, {"act": "relu"}, {"frozen": True}], ids=str)
def test_an_evaluation_gives_the_same_bits_with_a_gradient_and_without(options, shape):
    layer = (truenorm.BatchNorm1d if len(shape) == 2 else truenorm.BatchNorm2d)(shape[1], **options)
    x = torch.randn(shape) * 3 + 1
    layer.running_mean.normal_()
    layer.eval()
    with torch.no_grad():
        alone = layer(x)
    assert torch.equal(layer(x.requires_grad_()), alone)


RISEN = truenorm.Renorm(rmax=1.5, dmax=0.5, start=0, rmax_at=1, dmax_at=1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("sizes", [(8,), (3, 3, 2), (1, 1, 6)], ids=str)
@pytest.mark.parametrize("limits", [(1.0, 0.0), (1.2, 0.1)], ids=str)
def test_each_group_is_a_batch_of_its_own(limits, sizes, masked, layout):
    x, grad = torch.randn(2, 8, 3, 5, 4) * 3 + 5
    x = x.contiguous(memory_format=LAYOUTS[layout])
    mask = torch.rand(8, 5, 4) > 0.3 if masked else None
    affine = torch.randn(2, 3).unbind()

    def run(x, grad, mask, groups=()):
        leaves = [t.clone().requires_grad_() for t in (x, *affine)]
        running = torch.full((3,), 4.0), torch.full((3,), 7.0)
        y, moments, _ = fused.batch_norm_act(
            leaves[0], tuple(leaves[1:]), running, 1e-5,
            momentum=0.0, act="elu", mask=mask, groups=groups, limits=limits,
        )  # fmt: skip
        return y, moments, *torch.autograd.grad(y, leaves, grad)

    joint = run(x, grad, mask, sizes)
    masks = [None] * len(sizes) if mask is None else mask.split(sizes)
    parts = [run(*part) for part in zip(x.split(sizes), grad.split(sizes), masks, strict=True)]
    y, moments, dx, *of_affine = zip(*parts, strict=True)
    assert torch.equal(joint[0], torch.cat(y))
    assert torch.equal(joint[1], torch.cat(moments, 1))
    assert len(joint[1]) == (2 if limits == (1.0, 0.0) else 4)
    assert torch.equal(joint[2], torch.cat(dx))
    for got, found in zip(joint[3:], of_affine, strict=True):
        assert torch.allclose(got, sum(found), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 3])
def test_groups_that_are_small_are_the_same_on_any_number_of_threads(threads):
    x = torch.randn(64, 16, 6, 6, requires_grad=True)
    layer = truenorm.BatchNorm2d(16, ghost=4)

    def run():
        y = layer(x)
        return y, *torch.autograd.grad(y.square().sum(), (x, layer.weight))

    usual = torch.get_num_threads()
    wanted = run()
    torch.set_num_threads(threads)
    try:
        found = run()
    finally:
        torch.set_num_threads(usual)
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("limits", [(1.0, 0.0), (1.01, 0.01)], ids=str)
def test_gradients_of_groups_and_their_gradients_are_those_of_differences(limits, masked):
    x = torch.randn(5, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(5, 2, 3) > 0.2 if masked else None
    running = torch.full((2,), 9.0), torch.full((2,), 0.01)  # so far that r and d are constant

    def run(x, weight, bias):
        return fused.batch_norm_act(
            x, (weight, bias), running, 1e-5,
            momentum=0.0, act="silu", mask=mask, groups=(2, 3), limits=limits,
        )[0]  # fmt: skip

    assert torch.autograd.gradcheck(run, (x, weight, bias))
    assert torch.autograd.gradgradcheck(run, (x, weight, bias))


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_gradients_of_moments_and_their_gradients_are_those_of_differences(masked):
    x = torch.randn(3, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, 2, 3) > 0.3 if masked else None
    count = x.numel() // 2 if mask is None else int(mask.sum())
    assert torch.autograd.gradcheck(lambda x: fused.moments(x, mask, count), (x,))
    assert torch.autograd.gradgradcheck(lambda x: fused.moments(x, mask, count), (x,))


def test_gradients_of_gradients_are_right_where_the_affine_map_depends_on_the_input():
    x = torch.randn(4, 2, 3, 3, dtype=torch.float64, requires_grad=True)

    def run(x):
        running = torch.zeros(2), torch.ones(2)
        affine = x.mean((0, 2, 3)) + 1, x.square().mean((0, 2, 3))
        return fused.batch_norm_act(x, affine, running, 1e-5, momentum=0.1, act="silu")[0]

    assert torch.autograd.gradcheck(run, (x,))
    assert torch.autograd.gradgradcheck(run, (x,))


def test_groups_must_make_up_the_batch():
    x, c = torch.randn(6, 2), torch.ones(2)
    for sizes in ((2, 3), (4, 4), (-1, 7)):
        with pytest.raises(RuntimeError, match="groups"):
            fused.batch_norm_act(x, (c, c), (c, c), 1e-5, momentum=0.1, groups=sizes)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"renorm": truenorm.Renorm()},
        {"renorm": RISEN, "ghost": 3},
        {"ghost": 3},
        {"ghost": 3, "momentum": None},
        {"ghost": 4, "momentum": 1.0},
        {"commit": "step"},
        {"commit": "step", "ghost": 3, "renorm": RISEN},
        {"min_count": 400},
        {"min_count": 400, "renorm": RISEN, "momentum": None},
    ],
    ids=str,
)
def test_a_layers_options_are_the_same_numbers_without_the_kernels(masked, options):
    x, mask = torch.randn(8, 3, 6, 6) * 3 + 5, torch.rand(8, 6, 6) > 0.3
    residual = torch.randn(8, 3, 6, 6)
    found = []
    for choice in ("auto", "torch"):
        layer = truenorm.BatchNorm2d(3, act="elu", **options)
        leaf = x.clone().requires_grad_()
        with ops.use(choice):
            for _ in range(3):
                y = layer(leaf, mask if masked else None, residual)
            y.square().sum().backward()
            layer.commit()
        found.append((y, leaf.grad, layer.weight.grad, layer.bias.grad, *layer.buffers()))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # torch's own, of its first use
@pytest.mark.parametrize("act", [None, "relu"])
def test_transforms_of_torch_func_reach_through_an_evaluation(act):
    layer = truenorm.BatchNorm2d(3, act=act).eval()
    x, weights = torch.randn(4, 3, 5, 5), torch.randn(2, 3)

    def run(weight):
        return functional_call(layer, {"weight": weight}, x).square().sum()

    each = torch.stack([torch.autograd.functional.jacobian(run, w) for w in weights])
    assert torch.allclose(vmap(grad(run))(weights), each, rtol=1e-4)
    assert torch.allclose(
        jvp(run, (weights[0],), (weights[1],))[1], each[0] @ weights[1], rtol=1e-4
    )


class Names(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.add(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


def test_who_watches_torchs_functions_sees_the_norm_and_its_activation():
    layer, x = truenorm.BatchNorm2d(16, act="relu").eval(), torch.randn(8, 16, 20, 20)
    with Names() as names:
        layer(x)
    assert "batch_norm" in names.seen
    assert "relu_" in names.seen
    with torch.device("cpu"):
        assert fused.serves()
