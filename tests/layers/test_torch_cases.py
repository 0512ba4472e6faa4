"""The cases by which PyTorch tests its own layers, and those of the ONNX standard.

Neither was written with this library in mind. PyTorch's are in its wheel (``module_db`` and
``op_db``), the standard's in the package ``onnx``.
"""

from __future__ import annotations

import copy
import itertools
import os
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import truenorm
from conformance.process import process_left_alone

BATCH = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")
OTHERS = ("GroupNorm", "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d", "LayerNorm")
# How far rounding may take two sums of the same numbers in another order.
TOLERANCE = {
    torch.float64: {"rtol": 1e-11, "atol": 1e-11},
    torch.float32: {"rtol": 2e-5, "atol": 2e-5},
    torch.float16: {"rtol": 4e-3, "atol": 4e-3},
    torch.bfloat16: {"rtol": 3e-2, "atol": 3e-2},
}
WHOLE = (torch.float32, torch.float64)
HALF = (torch.float16, torch.bfloat16)
STEPS = ((1, 0), (-0.5, 1), (0.3, 2))  # scale and shift of the input, one forward after another


# -- PyTorch's own cases -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def module_infos():
    """PyTorch's entry for each class of torch.nn, by its name."""
    with process_left_alone():
        from torch.testing._internal.common_modules import module_db
    return {info.module_cls.__name__: info for info in module_db}


@pytest.fixture(scope="module")
def batch_norm_samples():
    """PyTorch's samples of functional.batch_norm, by dtype."""
    with process_left_alone():
        from torch.testing._internal.common_methods_invocations import op_db

        op = next(op for op in op_db if op.name == "nn.functional.batch_norm")
        return {
            dtype: list(op.sample_inputs("cpu", dtype, requires_grad=True)) for dtype in TOLERANCE
        }


def cases_of(info, dtype, training):
    with process_left_alone():
        cases = info.module_inputs_func(
            info, device="cpu", dtype=dtype, requires_grad=True, training=training
        )
    assert cases
    return cases


def arguments(case):
    """What a case gives to the constructor, and its one input."""
    made = case.constructor_input
    (x,) = case.forward_input.args
    assert not case.forward_input.kwargs
    return made.args, made.kwargs, x.detach()


def twins(name, args, kwargs, dtype, generator):
    """torch's layer and ours, of the same arguments and with the same random state."""
    theirs = getattr(nn, name)(*args, **kwargs).to(dtype)
    with torch.no_grad():
        for held in itertools.chain(theirs.parameters(), theirs.buffers()):
            if held.is_floating_point():
                held.copy_(0.5 + torch.rand(held.shape, generator=generator))
    ours = getattr(truenorm, name)(*args, **kwargs).to(dtype)
    assert isinstance(ours, type(theirs))
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "examples last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "every second": lambda x: torch.stack([x, x + 1], -1)[..., 0],
}


def test_the_layouts_are_what_they_are_called():
    x = torch.arange(120.0).view(2, 3, 4, 5)
    laid = {name: lay(x) for name, lay in LAYOUTS.items()}
    assert all(torch.equal(x, other) for other in laid.values())
    assert [name for name, other in laid.items() if other.is_contiguous()] == ["contiguous"]
    assert laid["channels last"].is_contiguous(memory_format=torch.channels_last)


def run(layer, x, cotangent, **given):
    """The output of ``layer``, and the gradients of its input and parameters."""
    x = x.detach().requires_grad_()
    out = layer(x, **given)
    return [out.detach(), *torch.autograd.grad(out, [x, *layer.parameters()], cotangent)]


def assert_close(ours, theirs, dtype, what, **options):
    torch.testing.assert_close(
        ours, theirs, **TOLERANCE[dtype], **options, msg=lambda text: f"{what}: {text}"
    )


def can_be_masked(layer, x):
    """Instance norm takes a mask only without running statistics and with a batch axis."""
    instance = isinstance(layer, nn.modules.instancenorm._InstanceNorm)
    whole_batch = x.ndim == int(type(layer).__name__[-2]) + 2 if instance else True
    return whole_batch and not (instance and layer.track_running_stats)


def pairs(info, dtype, masked, generator):
    """torch's layer, ours and the case, for all cases in both modes that can have a mask."""
    for training in (True, False):
        for case in cases_of(info, dtype, training):
            args, kwargs, x = arguments(case)
            theirs, ours = twins(info.module_cls.__name__, args, kwargs, dtype, generator)
            if not masked or can_be_masked(ours, x):
                yield theirs.train(training), ours.train(training), case


def all_valid(x, masked):
    """The argument ``mask`` that hides nothing, if there is to be one."""
    return {"mask": torch.ones(x.shape, dtype=torch.bool)} if masked else {}


def assert_same_state(ours, theirs, dtype, what, *, empty=False):
    got, wanted = ours.state_dict(), theirs.state_dict()
    assert list(got) == list(wanted)
    if empty and "num_batches_tracked" in got:
        # torch counts a batch without examples; here a batch that says nothing is none.
        assert got.pop("num_batches_tracked") == 0
        del wanted["num_batches_tracked"]
    assert_close(got, wanted, dtype, f"state after {what}")


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "all valid"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", WHOLE, ids=str)
@pytest.mark.parametrize("name", [*BATCH, *OTHERS])
def test_our_layer_gives_the_numbers_of_torchs(
    name, dtype, *, layout, masked, module_infos, generator
):
    for theirs, ours, case in pairs(module_infos[name], dtype, masked, generator):
        *_, x = arguments(case)
        for step, (scale, shift) in enumerate(STEPS):
            what = f"{case.desc or 'default'}, training {ours.training}, forward {step}"
            batch = LAYOUTS[layout](x * scale + shift)
            cotangent = torch.randn(x.shape, dtype=dtype, generator=generator)
            out, *gradients = run(theirs, batch, cotangent)
            our_out, *our_gradients = run(ours, batch, cotangent, **all_valid(batch, masked))
            assert_close(our_out, out, dtype, f"output of {what}")
            assert_close(our_gradients, gradients, dtype, f"gradients of {what}")
            if isinstance(ours, truenorm.BatchNorm) and not masked and x.numel():
                assert our_out.stride() == out.stride(), what
            assert_same_state(ours, theirs, dtype, what, empty=not x.numel())


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "all valid"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", [*BATCH, *OTHERS])
def test_half_precision_is_as_near_to_float64_as_torchs_or_one_rounding(
    name, dtype, *, masked, module_infos, generator
):
    for theirs, ours, case in pairs(module_infos[name], dtype, masked, generator):
        *_, x = arguments(case)
        exact = copy.deepcopy(theirs).double()
        for step, (scale, shift) in enumerate(STEPS if x.numel() else ()):
            batch = x * scale + shift
            cotangent = torch.randn(x.shape, generator=generator).to(dtype)
            results = (
                run(exact, batch.double(), cotangent.double()) + list(exact.buffers()),
                run(theirs, batch, cotangent) + list(theirs.buffers()),
                run(ours, batch, cotangent, **all_valid(batch, masked)) + statistics(ours),
            )
            for number, (right, torchs, got) in enumerate(zip(*results, strict=True)):
                rounding = torch.finfo(dtype).eps * right.abs().max()
                error, torchs_error = ((a - right).abs().max() for a in (got, torchs))
                what = f"{case.desc}, training {ours.training}, forward {step}, result {number}"
                assert error <= max(rounding, torchs_error), what
            assert results[2][0].dtype == dtype


def statistics(layer):
    """The buffers of ``layer`` that a state dict has."""
    return [buffer for name, buffer in layer.named_buffers() if name in layer.state_dict()]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", BATCH)
def test_statistics_of_half_precision_batches_are_those_of_float32(
    name, dtype, module_infos, generator
):
    for case in cases_of(module_infos[name], dtype, training=True):
        args, kwargs, x = arguments(case)
        theirs, ours = twins(name, args, kwargs, dtype, generator)
        theirs.float()
        for scale in (1, -0.5, 0.25):
            theirs((x * scale).float())
            ours(x * scale)
        for statistic in ("running_mean", "running_var"):
            wanted = getattr(theirs, statistic)
            assert_close(getattr(ours, statistic), wanted, torch.float32, case.desc)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", [*BATCH, "GroupNorm"])  # the others have no such cases
def test_arguments_that_torch_refuses_are_refused(name, training, module_infos):
    info = module_infos[name]
    errors = info.module_error_inputs_func(
        info, device="cpu", dtype=torch.float64, requires_grad=False, training=training
    )
    assert errors
    for error in errors:
        made = error.module_error_input.constructor_input
        with pytest.raises(error.error_type, match=re.escape(_said_of(made))):
            getattr(truenorm, name)(*made.args, **made.kwargs)


def _said_of(made):
    """The words that must be in our message: the value, and for group norm torch's own text."""
    if "eps" in made.kwargs:
        return f"eps must be a number above 0, got {made.kwargs['eps']}"
    groups, channels = made.args
    return f"num_channels ({channels}) must be divisible by num_groups ({groups})"


def translated(sample, options):
    """A sample of functional.batch_norm as our layer in the state that the sample gives."""
    mean, var, weight, bias = sample.args
    x = sample.input
    layer = {2: truenorm.BatchNorm1d, 3: truenorm.BatchNorm1d, 4: truenorm.BatchNorm2d}[x.ndim](
        x.shape[1],
        options.get("eps", 1e-5),
        options.get("momentum", 0.1),
        affine=weight is not None,
        track_running_stats=mean is not None,
    ).to(x.dtype)
    state = {"weight": weight, "bias": bias, "running_mean": mean, "running_var": var}
    layer.load_state_dict({k: v for k, v in state.items() if v is not None}, strict=False)
    return layer.train(options.get("training", False))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "all valid"])
def test_our_layer_is_functional_batch_norm(
    masked, layout, dtype, *, batch_norm_samples, generator
):
    compared = 0
    for sample in batch_norm_samples[dtype]:
        if sample.input.ndim < 2:  # of shape (0,): torch's function takes it, no layer does
            assert sample.input.shape == (0,)
            with pytest.raises(ValueError, match=r"expected 2D or 3D input \(got 1D input\)"):
                nn.BatchNorm1d(0)(sample.input)
            with pytest.raises(ValueError, match=r"expected 2D or 3D input \(got 1D input\)"):
                truenorm.BatchNorm1d(0)(sample.input)
            continue
        options = dict(sample.kwargs)
        if not 0 <= options.get("momentum", 0.1) <= 1:
            with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\]"):
                translated(sample, options)
            options["momentum"] = 0.7  # the rest of the sample is as good as any
        batches = [LAYOUTS[layout](sample.input.detach() * a + b) for a, b in STEPS]
        compare_with_function(sample, options, batches, masked, generator)
        compared += 1
    assert compared >= 10


def compare_with_function(sample, options, batches, masked, generator):
    layer, dtype = translated(sample, options), sample.input.dtype
    mean, var, weight, bias = (a if a is None else a.detach().clone() for a in sample.args)
    given = [a.requires_grad_() for a in (weight, bias) if a is not None]
    for step, batch in enumerate(batches):
        what = f"{tuple(batch.shape)}, {options}, forward {step}"
        x = batch.detach().requires_grad_()
        cotangent = torch.randn(x.shape, generator=generator).to(dtype)
        out = F.batch_norm(x, mean, var, weight, bias, **options)
        wanted = [out.detach(), *torch.autograd.grad(out, [x, *given], cotangent)]
        got = run(layer, batch, cotangent, **all_valid(x, masked))
        assert_close(got, wanted, dtype, f"output and gradients of {what}")
        got = [a for a in (layer.running_mean, layer.running_var) if a is not None]
        wanted = [a for a in (mean, var) if a is not None]
        assert_close(got, wanted, dtype, f"statistics of {what}", check_dtype=dtype in WHOLE)


@pytest.mark.parametrize("dtype", WHOLE, ids=str)
def test_rms_norm_of_rows_is_torchs(dtype, module_infos, generator):
    """Ours has a weight per channel of (N, C, *S); torch's cases are rows of one axis of them."""
    for case in cases_of(module_infos["RMSNorm"], dtype, training=True):
        args, kwargs, x = arguments(case)
        theirs = nn.RMSNorm(*args, **kwargs).to(dtype)
        ours = truenorm.RMSNorm(int(np.prod(theirs.normalized_shape)), eps=theirs.eps).to(dtype)
        if theirs.weight is not None:
            with torch.no_grad():
                theirs.weight.copy_(torch.rand(theirs.weight.shape, generator=generator))
                ours.weight.copy_(theirs.weight.flatten())
        cotangent = torch.randn(x.shape, dtype=dtype, generator=generator)
        rows = (-1, ours.num_channels)
        wanted = run(theirs, x, cotangent)
        # Without a weight torch's has no gradient of one.
        got = run(ours, x.reshape(rows), cotangent.view(rows))[: len(wanted)]
        shaped = [a.view(b.shape) for a, b in zip(got, wanted, strict=True)]
        assert_close(shaped, wanted, dtype, case.desc)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "all valid"])
@pytest.mark.parametrize("training", [True, False])
def test_first_and_second_derivatives_are_those_of_finite_differences(training, masked, generator):
    layer = truenorm.BatchNorm2d(2).double().train(training)
    layer.running_mean.uniform_(-1, 1, generator=generator)
    layer.running_var.uniform_(0.5, 2, generator=generator)
    shapes = [(3, 2, 2, 2), (2,), (2,)]
    inputs = [
        torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes
    ]
    mask = {"mask": torch.ones(3, dtype=torch.bool)} if masked else {}

    def function(x, weight, bias):
        return functional_call(layer, {"weight": weight, "bias": bias}, (x,), mask)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


# -- The ONNX standard's cases -------------------------------------------------------------------
# Norms of the standard that are none of ours, and why.
NOT_OURS = {
    "LpNormalization": "divides by a vector's length; there are no statistics",
    "StringNormalizer": "is about text",
}


@pytest.fixture(scope="module")
def node_cases():
    """The standard's cases for single nodes, all of them, by name."""
    with process_left_alone(), warnings.catch_warnings():
        # Other nodes' cases overflow and divide by zero on purpose as they are built.
        warnings.filterwarnings("ignore", category=RuntimeWarning)
        from onnx.backend.test.loader import load_model_tests

        cases = load_model_tests(kind="node")
    return {case.name: case for case in cases}


def node_of(case, cases):
    """The one node that a case is about: an expanded case is the same node as its function."""
    nodes = cases.get(re.sub(r"_expanded(_ver\d+)?$", "", case.name), case).model.graph.node
    return nodes[0] if len(nodes) == 1 else None


def attributes_of(node):
    from onnx.helper import get_attribute_value

    return {a.name: get_attribute_value(a) for a in node.attribute}


def loaded(layer, **state):
    layer.load_state_dict(state, strict=False)
    assert all(torch.equal(layer.state_dict()[name], value) for name, value in state.items())
    return layer


def _rows(x, attributes):
    """The shape of what is normalized: from ``axis`` on."""
    return x.shape[attributes.get("axis", -1) % x.ndim :]


def _batch(inputs, attributes):
    x, weight, bias, mean, var = inputs
    training = bool(attributes.get("training_mode", 0))
    # ONNX's momentum is the weight of the OLD value.
    momentum = 1 - attributes.get("momentum", 0.9)
    cls = getattr(truenorm, f"BatchNorm{x.ndim - 2}d")
    layer = cls(x.shape[1], attributes.get("epsilon", 1e-5), momentum).to(x.dtype)
    state = {"weight": weight, "bias": bias, "running_mean": mean, "running_var": var}
    layer = loaded(layer, **state).train(training)
    out = layer(x)
    if not training:
        return [out]
    # ONNX tracks the BIASED variance, torch and we the unbiased one: n / (n - 1) times as much.
    count = x.numel() // x.shape[1]
    moved = layer.running_var - (1 - momentum) * var
    return [out, layer.running_mean, (1 - momentum) * var + moved * ((count - 1) / count)]


def _group(inputs, attributes):
    x, weight, bias = inputs
    eps = attributes.get("epsilon", 1e-5)
    layer = truenorm.GroupNorm(attributes["num_groups"], x.shape[1], eps).to(x.dtype)
    return _with_and_without_mask(loaded(layer, weight=weight, bias=bias), x)


def _instance(inputs, attributes):
    x, weight, bias = inputs
    cls = getattr(truenorm, f"InstanceNorm{x.ndim - 2}d")
    layer = cls(x.shape[1], attributes.get("epsilon", 1e-5), affine=True).to(x.dtype)
    return _with_and_without_mask(loaded(layer, weight=weight, bias=bias), x)


def _layer(inputs, attributes):
    x, weight, bias = inputs
    layer = truenorm.LayerNorm(_rows(x, attributes), attributes.get("epsilon", 1e-5)).to(x.dtype)
    return _with_and_without_mask(loaded(layer, weight=weight, bias=bias), x)


def _rms(inputs, attributes):
    x, weight = inputs
    # Ours has a weight per channel of (N, C, *S): so what is normalized becomes one axis.
    layer = truenorm.RMSNorm(_rows(x, attributes).numel(), eps=attributes.get("epsilon", 1e-5))
    layer = loaded(layer.to(x.dtype), weight=weight.flatten())
    rows = x.reshape(-1, layer.num_channels)
    return [out.view(x.shape) for out in _with_and_without_mask(layer, rows)]


def _mean_variance(inputs, attributes):
    (x,) = inputs
    assert attributes.get("axes", [0, 2, 3]) == [0, 2, 3]
    # The standard adds 1e-9 to the standard deviation instead; no channel is constant.
    return [truenorm.BatchNorm2d(x.shape[1], 1e-18, affine=False).to(x.dtype)(x)]


def _with_and_without_mask(layer, x):
    plain, masked = layer(x), layer(x, mask=torch.ones_like(x, dtype=torch.bool))
    torch.testing.assert_close(plain, masked, **TOLERANCE[x.dtype])
    return [masked]


NODES = {
    "BatchNormalization": _batch,
    "GroupNormalization": _group,
    "InstanceNormalization": _instance,
    "LayerNormalization": _layer,
    "MeanVarianceNormalization": _mean_variance,
    "RMSNormalization": _rms,
}


@pytest.fixture(scope="module")
def names_by_operator(node_cases):
    names = {}
    for case in node_cases.values():
        node = node_of(case, node_cases)
        if node is not None and node.op_type in {*NODES, *NOT_OURS}:
            names.setdefault(node.op_type, set()).add(case.name)
    return names


def test_every_norm_of_the_standard_is_run_or_is_none_of_ours(node_cases, names_by_operator):
    assert names_by_operator.keys() == {*NODES, *NOT_OURS}
    norms = {name for name in node_cases if re.search(r"norm|mvn", name)}
    assert norms == set().union(*names_by_operator.values())


@pytest.mark.parametrize("dtype", WHOLE, ids=str)
@pytest.mark.parametrize("operator", NODES)
def test_our_layer_is_the_standards_node(operator, dtype, node_cases, names_by_operator):
    for name in sorted(names_by_operator[operator]):
        case = node_cases[name]
        attributes = attributes_of(node_of(case, node_cases))
        assert case.data_sets
        for given, wanted in case.data_sets:
            outputs = NODES[operator]([torch.tensor(a, dtype=dtype) for a in given], attributes)
            # Layer norm's nodes also give the mean and the inverse deviation; no layer does.
            assert len(outputs) == len(wanted) or operator == "LayerNormalization"
            for ours, theirs in zip(outputs, wanted, strict=False):
                # The standard's numbers are float32, and its own tolerance is 1e-3.
                assert_close(ours.detach().float(), torch.tensor(theirs), torch.float32, name)


def test_our_layer_is_the_node_that_torch_exported_long_ago():
    import onnx
    from onnx.backend.test.loader import load_model_tests
    from onnx.numpy_helper import to_array

    names = set()
    for case in load_model_tests(kind="pytorch-converted"):
        if "Norm" not in case.name:
            continue
        names.add(case.name)
        graph = onnx.load(Path(case.model_dir) / "model.onnx").graph
        (node,) = graph.node
        held = {i.name: to_array(i) for i in graph.initializer}
        given, wanted = (
            to_array(onnx.load_tensor(Path(case.model_dir) / "test_data_set_0" / f"{which}_0.pb"))
            for which in ("input", "output")
        )
        inputs = [given, *(held[name] for name in node.input[1:])]
        (out,) = _batch([torch.tensor(a) for a in inputs], attributes_of(node))
        assert_close(out.detach(), torch.tensor(wanted), torch.float32, case.name)
    assert names == {
        "test_BatchNorm1d_3d_input_eval",
        "test_BatchNorm2d_eval",
        "test_BatchNorm2d_momentum_eval",
        "test_BatchNorm3d_eval",
        "test_BatchNorm3d_momentum_eval",
    }


def test_loading_the_cases_leaves_the_process_as_it_was(
    module_infos, batch_norm_samples, node_cases
):
    assert not torch.backends.flags_frozen()  # torch's test material forbids setting them
    assert torch.get_default_dtype() == torch.float32
    environment, numpys, torchs = dict(os.environ), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    with process_left_alone():
        os.environ["TRUENORM_ADDED"] = "1"
        np.random.seed(11)  # noqa: NPY002
        torch.backends.disable_global_flags()
    assert dict(os.environ) == environment
    assert np.array_equal(np.random.get_state()[1], numpys[1])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torchs)
    assert not torch.backends.flags_frozen()
