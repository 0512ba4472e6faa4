"""Every rule of the doctor's checks as a truth: a model that has the fault, and its healthy kin."""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import foreign
import truenorm as tn
from patients import Activated
from truenorm.calling.borrowing import borrowed
from truenorm.doctor.checks.catalogue import CHECKS
from truenorm.doctor.codes import codes
from truenorm.doctor.facts import gather, observe

ERROR, WARNING, NOTE = ["error"], ["warning"], ["note"]


def found(code, model, data=None, **given):
    """The severities of the findings of one code."""
    return [f.severity for f in tn.examine(model, data, **given).of(code)]


def looked(code, model, data):
    """The same by that check alone: the others would speak to ranks that are not there."""
    (check,) = [check for check in CHECKS if check.code == code]
    facts = gather(model, data, optimizer=None, loss=None, device=None, arguments=None)
    with borrowed(model):
        observe(facts)
    return [f.severity for f in check.look(facts)]


def used(norm, mean=0.3, var=2.0, batches=1000):
    """``norm`` with the statistics, weight and bias of a trained one."""
    with torch.no_grad():
        if norm.affine:
            norm.weight.fill_(1.5)
            norm.bias.fill_(0.1)
        norm.running_mean.fill_(mean)
        norm.running_var.fill_(var)
        norm.num_batches_tracked.fill_(batches)
    return norm


def bn(channels=8, **options):
    return used(nn.BatchNorm1d(channels, **options))


def ours(channels=8, **options):
    return used(tn.BatchNorm1d(channels, **options))


def net(norm, *more, features=5, head=True):
    """linear, norm, relu, linear; in eval mode."""
    width = norm.num_features
    last = [nn.ReLU(), nn.Linear(width, 3)] if head else []
    return nn.Sequential(nn.Linear(features, width, bias=False), norm, *more, *last).eval()


def rows(*shape, count=6, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, **options) for _ in range(count)]


def freeze(norm):
    """Frozen as users do it: no gradient, eval mode."""
    norm.requires_grad_(False)
    return norm.eval()


class Forward(nn.Module):
    """Modules by name, and a forward."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.run(self, x)


@pytest.fixture
def two_ranks(monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda *_: 2)


# -- TN1xx ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("moved", ["running_mean", "running_var"])
@pytest.mark.parametrize("norm", [bn(), ours()])
def test_initial_statistics_are_an_error_in_a_trained_model_and_not_if_one_value_moved(norm, moved):
    last = copy.deepcopy(norm)
    last.reset_running_stats()
    model = nn.Sequential(bn(), last).eval()
    assert found("TN101", model) == ERROR
    getattr(last, moved)[3] += 1e-6
    assert found("TN101", model) == []


def test_a_layer_frozen_by_option_may_keep_initial_statistics():
    norm = ours(frozen=True)
    norm.running_mean.zero_()
    norm.running_var.fill_(1)
    assert found("TN101", nn.Sequential(bn(), norm).eval()) == []


def test_a_layer_with_initial_weight_and_bias_is_new_unless_it_counted_batches():
    new = nn.BatchNorm1d(8)
    model = nn.Sequential(bn(), new).eval()
    assert found("TN101", model) == NOTE
    new.num_batches_tracked.fill_(5)
    assert found("TN101", model) == ERROR


def test_what_the_optimizer_has_stepped_is_trained():
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8, affine=False)).eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    assert found("TN101", model, optimizer=optimizer) == NOTE
    model(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    assert found("TN101", model, optimizer=optimizer) == ERROR


def test_a_layer_that_is_not_called_need_not_be_updated():
    left = bn()
    left.reset_running_stats()
    model = Forward(lambda m, x: m.norm(x), norm=bn(), left=left).eval()
    assert found("TN101", model) == ERROR
    assert found("TN101", model, rows(16, 8)) == NOTE


@pytest.mark.parametrize(("momentum", "severity"), [(0.0, WARNING), (0.01, [])])
def test_a_momentum_of_0_is_a_warning(momentum, severity):
    assert found("TN101", bn(momentum=momentum).eval()) == severity
    assert found("TN101", ours(momentum=momentum, frozen=True)) == []


@pytest.mark.parametrize("field", ["running_mean", "running_var", "weight", "bias"])
@pytest.mark.parametrize(
    ("value", "severity"), [(float("nan"), ERROR), (float("inf"), ERROR), (1e30, [])]
)
def test_a_value_that_is_not_finite_is_an_error(field, value, severity):
    norm = bn().eval()
    getattr(norm, field).data[2] = value
    assert found("TN102", norm) == severity


@pytest.mark.parametrize(("least", "severity"), [(-1e-12, ERROR), (0.0, [])])
def test_a_negative_variance_is_an_error(least, severity):
    norm = bn().eval()
    norm.running_var[2] = least
    assert found("TN102", norm) == severity


@pytest.mark.parametrize(("momentum", "moving"), [(0.99, WARNING), (1.0, WARNING), (0.5, [])])
def test_a_momentum_above_a_half_is_a_warning_only_where_statistics_move(momentum, moving):
    model = net(bn(momentum=momentum))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    resting = NOTE if moving else []
    assert found("TN104", model) == resting
    assert found("TN104", model, optimizer=optimizer) == moving
    assert found("TN104", model.train()) == moving
    fixes = [f.fix is not None for f in tn.examine(model).of("TN104")]
    assert fixes == [momentum < 1] * bool(moving)


@pytest.mark.parametrize(
    ("batches", "var", "severity"),
    [
        (10, 2.0, WARNING),  # initial values weigh 0.90
        (10, 0.5, NOTE),  # and cannot: a variance below their share was never 1
        (40, 2.0, NOTE),  # 0.67
        (80, 2.0, []),  # 0.45
        (0, 2.0, []),
    ],
)
def test_initial_values_that_weigh_most_are_told_by_their_share(batches, var, severity):
    assert found("TN104", used(nn.BatchNorm1d(8, momentum=0.01), 0.3, var, batches)) == severity
    assert found("TN104", used(nn.BatchNorm1d(8, momentum=None), 0.3, var, batches)) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_statistics_are_a_warning_only_where_they_move(dtype):
    model = net(bn())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert found("TN105", model.train()) == []
    assert found("TN105", model.to(dtype)) == WARNING
    assert found("TN105", model.eval()) == NOTE
    assert found("TN105", model, optimizer=optimizer) == WARNING
    freeze(model.train()[1])
    assert found("TN105", model) == NOTE


@pytest.mark.parametrize(("field", "limit"), [("running_var", 1e-7), ("weight", 1.5e-4)])
@pytest.mark.parametrize(
    ("channels", "dead", "severity"),
    [(1, 1, WARNING), (8, 1, NOTE), (8, 2, WARNING), (30, 2, NOTE), (30, 3, WARNING)],
)
def test_dead_channels_are_a_warning_from_two_and_a_tenth_on(
    field, limit, channels, dead, severity
):
    norm = bn(channels)
    model = net(norm)
    model.insert(0, bn(5).eval())  # the first may be one of the data
    getattr(norm, field).data[:dead] = 1.1 * limit
    assert found("TN106", model) == []
    getattr(norm, field).data[:dead] = 0.9 * limit
    alone = field == "weight" and channels == 1  # compared with the largest, which is itself
    assert found("TN106", model) == ([] if alone else severity)


@pytest.mark.parametrize(("gamma", "severity"), [(0.9e-4, WARNING), (1.1e-4, [])])
def test_gammas_that_are_all_tiny_are_gone(gamma, severity):
    model = net(bn())
    nn.init.constant_(model[1].weight, gamma)
    assert found("TN106", model) == severity


def test_a_gamma_of_0_is_gone_unless_it_starts_a_residual_branch():
    norm = bn(5)
    nn.init.zeros_(norm.weight)
    nn.init.zeros_(norm.bias)
    parts = {"inner": nn.Linear(5, 5), "norm": norm, "head": nn.Linear(5, 3)}
    straight = Forward(lambda m, x: m.head(m.norm(m.inner(x))), **parts).eval()
    branch = Forward(lambda m, x: m.head(x + m.norm(m.inner(x))), **parts).eval()
    assert found("TN106", straight, rows(16, 5)) == WARNING
    assert found("TN106", branch, rows(16, 5)) == []
    assert found("TN106", straight) == []  # without data nobody knows


@pytest.mark.parametrize(("field", "value"), [("flat", 0.0), ("exploded", 1.1e7)])
def test_channels_of_the_data_themselves_are_worth_a_note(field, value):
    raw, inner = nn.Sequential(bn(5), nn.Linear(5, 3)).eval(), net(bn())
    raw[0].running_var[:3] = inner[1].running_var[:3] = value
    assert found("TN106", raw, rows(16, 5)) == NOTE
    assert found("TN106", raw) == NOTE  # the first may be one of the data
    assert found("TN106", inner, rows(16, 5)) == WARNING
    assert tn.examine(raw).of("TN106")[0].evidence["largest running_var"] == max(value, 2.0)


@pytest.mark.parametrize(("var", "severity"), [(1.1e7, WARNING), (0.9e7, [])])
def test_one_exploded_channel_is_a_warning(var, severity):
    model = net(bn())
    model.insert(0, bn(5).eval())
    model[2].running_var[0] = var
    assert found("TN106", model) == severity


def copies(number=2, names="abc"):
    one = net(bn())
    return nn.ModuleDict({names[i]: copy.deepcopy(one) for i in range(number)})


@pytest.mark.parametrize("factor", [2.8, 1 / 2.8])
@pytest.mark.parametrize("number", [2, 3])
def test_a_copy_with_other_statistics_is_an_error_and_told_of_once(number, factor):
    model = copies(number)
    assert found("TN107", model) == []
    model["b"][1].running_var[0] *= factor  # half its logarithm is 0.51
    (finding,) = tn.examine(model).of("TN107")
    assert (finding.severity, finding.layer) == ("error", "b.1")
    model["b"][1].running_var[0] = 2 * 2.6  # 0.48
    assert found("TN107", model) == []


def test_three_copies_that_all_differ_are_told_of_as_two():
    model = copies(3)
    for mean, copied in zip((0.0, 1.0, 2.0), model.values(), strict=True):
        copied[1].running_mean.fill_(mean)
    assert {f.layer for f in tn.examine(model).of("TN107")} == {"b.1", "c.1"}


def test_layers_that_follow_each_other_may_be_made_as_copies():
    model = nn.Sequential(*copies().values())
    model[1][1].running_mean.fill_(9)
    assert found("TN107", model) == NOTE


def test_copies_one_of_which_calls_a_layer_twice_are_compared_by_their_names():
    shared, apart = (nn.Sequential(nn.Linear(4, 4), bn(4), nn.Linear(4, 4), bn(4)) for _ in "ab")
    shared[2], shared[3] = shared[0], shared[1]
    apart.load_state_dict(shared.state_dict())
    model = nn.ModuleDict({"a": shared, "b": apart}).eval()
    assert found("TN107", model) == []
    apart[3].running_mean.fill_(9)
    (finding,) = tn.examine(model).of("TN107")
    assert (finding.severity, finding.layer) == ("error", "b.3")


def test_copies_with_tied_or_with_other_parameters_have_statistics_of_their_own():
    for index in (None, 0):
        model = copies()
        model["b"][1].running_mean.fill_(9)
        assert found("TN107", model) == ERROR
        if index is None:
            nn.init.normal_(model["b"][0].weight)
        else:
            model["b"][0].weight = model["a"][0].weight
        assert found("TN107", model) == []


PICTURES = [(torch.randn(16, 3, 8, 8), torch.randint(0, 3, (16,))) for _ in range(4)]


# -- what has been trained -----------------------------------------------------------------------


def random_gammas(initialize, channels=24):
    """As RepVGG of timm begins: gammas and betas drawn at random, statistics untouched."""
    torch.manual_seed(0)
    layers = []
    for before in (3, channels, channels):
        conv, norm = nn.Conv2d(before, channels, 3, bias=False), nn.BatchNorm2d(channels)
        initialize(conv.weight)
        nn.init.normal_(norm.weight, 0.1, 0.1)
        nn.init.normal_(norm.bias, 0, 0.1)
        layers += [conv, norm, nn.ReLU()]
    last = nn.Linear(channels, 3)
    nn.init.normal_(last.weight, 0, 0.01)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), last)


INITIALIZATIONS = {
    "torch's": lambda w: nn.init.kaiming_uniform_(w, 5**0.5),
    "kaiming normal": lambda w: nn.init.kaiming_normal_(w, mode="fan_out"),
    "xavier uniform": nn.init.xavier_uniform_,
    "normal": lambda w: nn.init.normal_(w, 0, 0.02),
}


@pytest.mark.parametrize("initialize", INITIALIZATIONS.values(), ids=INITIALIZATIONS)
def test_a_model_whose_gammas_begin_random_has_not_been_trained_before_its_first_step(initialize):
    model = random_gammas(initialize)
    assert found("TN101", model) == [*NOTE, *NOTE, *NOTE]
    assert tn.examine(model, PICTURES).healthy
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    model.eval()
    for x, y in PICTURES * 25:  # in eval mode, so that statistics stay
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert found("TN101", model) == [*ERROR, *ERROR, *ERROR]


# -- gammas crushed, and branches that start at 0 -------------------------------------------------


class Residual(nn.Module):
    """x + norm(conv(relu(norm(conv(x)))))."""

    def __init__(self, channels=8):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), used(nn.BatchNorm2d(channels)), nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1), used(nn.BatchNorm2d(channels)),
        )  # fmt: skip

    def forward(self, x):
        return x + self.body(x)


def residual():
    torch.manual_seed(0)
    blocks = [nn.Conv2d(3, 8, 3), Residual(), Residual()]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).eval()


@pytest.mark.parametrize("data", [None, PICTURES], ids=["bare", "data"])
@pytest.mark.parametrize("size", [0.0, 1e-9, 1e-5, 3e-5])
@pytest.mark.parametrize("which", [1, 4], ids=["within", "last of a branch"])
def test_gammas_that_were_crushed_are_found_wherever_they_sit(which, size, data):
    model = residual()
    norm = model[2].body[which]
    with torch.no_grad():
        norm.weight.mul_(size).mul_(torch.linspace(0.5, 1.5, 8))
        norm.bias.normal_(0, 0.3)
    (finding,) = tn.examine(model, data).of("TN106")
    assert (finding.severity, finding.layer) == ("warning", f"2.body.{which}")
    assert finding.evidence["gamma near 0"] == 8


@pytest.mark.parametrize("data", [None, PICTURES], ids=["bare", "data"])
@pytest.mark.parametrize("moved", [0.0, 1e-6, 2e-5])
def test_a_branch_that_started_at_0_is_no_fault_before_it_has_been_trained(moved, data):
    model = residual()
    norm = model[2].body[4]
    with torch.no_grad():
        norm.weight.normal_().mul_(moved)
        norm.bias.normal_().mul_(moved)
    assert found("TN106", model, data) == []


# -- frozen norms of other packages ---------------------------------------------------------------


FROZEN = (foreign.FrozenNorm, foreign.CountedFrozenNorm, foreign.NumberFrozenNorm)


def frozen(kind):
    """Convolution, frozen norm, head; in train mode."""
    torch.manual_seed(0)
    norm = kind(8)
    norm.running_mean.fill_(0.3)
    norm.weight.uniform_(0.5, 1.5)
    tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), norm, nn.ReLU(), *tail)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", FROZEN)
def test_a_frozen_norm_of_another_package_is_a_norm_and_healthy(kind, training):
    model = frozen(kind).train(training)
    for data in (None, PICTURES):
        diagnosis = tn.examine(model, data)
        assert diagnosis.layers == 1
        assert diagnosis.verdict == ("healthy" if data else "not examined with data")
        assert not any(f.layer == "1" for f in diagnosis.findings), str(diagnosis)
    half = tn.examine(model.half())
    assert half.findings == ()


@pytest.mark.parametrize("tensor", ["running_mean", "running_var", "weight", "bias"])
@pytest.mark.parametrize("kind", FROZEN)
def test_a_nan_in_a_frozen_norm_of_another_package_is_an_error(kind, tensor):
    model = frozen(kind)
    getattr(model[1], tensor)[2] = float("nan")
    for data in (None, PICTURES):
        (finding,) = tn.examine(model, data).of("TN102")
        assert (finding.severity, finding.layer) == ("error", "1")
        assert finding.evidence == {f"not finite in {tensor}": 1}


def test_what_recalibration_leaves_is_not_advised_without_what_it_wants_first():
    def advice(code, model, **given):
        return {f.advice for f in tn.examine(model, **given).of(code)}

    plain = net(bn())
    plain[1].running_mean[0] = float("nan")
    assert not any("leaves this layer" in text for text in advice("TN102", plain))
    plain[1].requires_grad_(False)  # in eval mode, while others learn
    (told,) = advice("TN102", plain)
    assert "leaves this layer, which is frozen: its weight" in told
    assert "requires_grad_(True) first" in told
    data = rows(16, 5)
    assert tn.recalibrate(plain, data).left
    plain[1].requires_grad_(True)
    assert tn.recalibrate(plain, data).rows
    fixed = net(ours(frozen=True))
    fixed[1].running_mean[0] = float("nan")
    (told,) = advice("TN102", fixed)
    assert "truenorm.convert(model, to='unfrozen', where='1') first" in told
    assert tn.recalibrate(fixed, data).left
    tn.convert(fixed, to="unfrozen", where="1")
    assert tn.recalibrate(fixed, data).rows
    alien = frozen(foreign.FrozenNorm)
    alien[1].running_mean[0] = float("nan")
    (told,) = advice("TN102", alien)
    assert told.startswith("Load its statistics again")
    reset = net(bn(), bn()).requires_grad_(True)
    reset[1].requires_grad_(False)
    reset[1].reset_running_stats()
    (told,) = advice("TN101", reset)
    assert "leaves this layer" in told


def test_dead_channels_of_a_frozen_norm_of_another_package_are_found():
    model = frozen(foreign.NumberFrozenNorm).eval()
    model[1].weight[:4] = 1e-9
    assert found("TN106", model) == WARNING


# -- TN2xx ----------------------------------------------------------------------------------------


def test_a_layer_in_train_mode_is_an_error_in_a_model_that_evaluates():
    for norm, severity in ((bn(), ERROR), (ours(frozen=True), [])):
        model = net(norm)
        assert found("TN201", model) == []
        norm.train()
        assert found("TN201", model) == severity


def test_a_layer_in_eval_mode_is_a_warning_if_it_learns_and_was_not_chosen():
    model = net(bn(), nn.Sequential(bn())).train()
    model[1].eval()
    assert found("TN201", model) == WARNING
    model[2][0].eval()
    assert found("TN201", model) == [*NOTE, *NOTE]  # all of them rest
    model[1].train()
    model[2].eval()  # with its parent
    assert found("TN201", model) == NOTE
    model[2].requires_grad_(False)
    assert found("TN201", model) == []


def test_a_frozen_layer_whose_statistics_move_is_an_error_and_eval_does_not_last():
    model = net(bn()).train()
    assert found("TN202", model) == []
    model[1].requires_grad_(False)
    assert found("TN202", model) == ERROR
    model[1].eval()
    assert found("TN202", model) == NOTE
    model.eval()
    assert found("TN202", model) == []
    assert found("TN202", model.train().requires_grad_(False)) == WARNING
    model[1].eval()
    assert found("TN202", model) == []  # nothing learns
    assert found("TN202", net(ours(frozen=True)).train()) == []


@pytest.mark.parametrize(("tracks", "severity"), [(False, WARNING), (True, [])])
def test_a_layer_without_running_statistics_is_a_warning(tracks, severity):
    assert found("TN205", nn.BatchNorm1d(8, track_running_stats=tracks)) == severity


# -- TN3xx ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "severity"), [(7, WARNING), (8, NOTE), (15, NOTE), (16, [])])
def test_few_values_per_channel_are_a_warning_below_8_and_a_note_below_16(size, severity):
    model = net(bn())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert found("TN301", model.train(), rows(size, 5)) == severity
    model.eval()
    assert found("TN301", model, rows(size, 5), optimizer=optimizer) == severity
    assert found("TN301", model, rows(size, 5)) == (NOTE if severity else [])
    freeze(model.train()[1])
    assert found("TN301", model, rows(size, 5)) == []


@pytest.mark.parametrize(
    ("options", "size", "severity"),
    [
        ({"ghost": 4}, 32, WARNING),
        ({"ghost": 16}, 32, []),
        ({"renorm": tn.Renorm()}, 4, NOTE),
        ({"min_count": 5}, 4, NOTE),
        ({"min_count": 4}, 4, WARNING),
        ({"sync": True}, 4, WARNING),
    ],
)
def test_values_are_counted_as_the_layer_pools_them(options, size, severity):
    assert found("TN301", net(ours(**options)).train(), rows(size, 5)) == severity


@pytest.mark.parametrize(("size", "severity"), [(3, WARNING), (4, NOTE), (8, [])])
def test_a_synchronized_norm_pools_over_ranks(two_ranks, size, severity):
    for norm in (ours(sync=True), used(nn.SyncBatchNorm(8))):
        assert looked("TN301", net(norm).train(), rows(size, 5)) == severity
    assert looked("TN301", net(bn()).train(), rows(8, 5)) == NOTE


@pytest.mark.parametrize(
    ("last", "severity"), [(1, ERROR), (4, WARNING), (5, []), (7, []), (16, [])]
)
def test_a_last_batch_of_one_is_an_error_of_a_quarter_a_warning(last, severity):
    data = [*rows(16, 5), torch.randn(last, 5)]
    assert found("TN302", net(bn()), data) == severity
    assert found("TN302", net(ours(min_count=8)), data) == []
    assert found("TN302", net(ours(frozen=True)), data) == []


def test_a_last_batch_is_small_from_a_quarter_and_below_8_values_on():
    assert found("TN302", net(bn()), [*rows(64, 5), torch.randn(7, 5)]) == WARNING
    assert found("TN302", net(bn()), [*rows(64, 5), torch.randn(8, 5)]) == []


@pytest.mark.parametrize(
    ("examples", "severity"), [(641, ERROR), (644, WARNING), (645, []), (640, [])]
)
def test_the_last_batch_of_a_long_loader_is_known_by_arithmetic(examples, severity):
    loader = DataLoader(torch.randn(examples, 5), batch_size=16)
    assert found("TN302", net(bn()), loader) == severity
    whole = DataLoader(torch.randn(examples, 5), batch_size=16, drop_last=True)
    assert found("TN302", net(bn()), whole) == []


def test_the_last_batch_is_not_a_later_call_on_a_smaller_map():
    def pyramid(m, x):
        return m.norm(x).mean(2) + m.norm(x[..., :1]).mean(2)

    model = Forward(pyramid, norm=bn(3)).eval()
    assert found("TN302", model, rows(4, 3, 16)) == []
    assert found("TN302", model, [*rows(4, 3, 4), torch.randn(1, 3, 4)]) == WARNING


def test_the_last_batch_of_a_synchronized_norm_is_shared_out(two_ranks):
    data = [*rows(16, 5), torch.randn(1, 5)]
    assert looked("TN302", net(bn()), data) == ERROR
    assert looked("TN302", net(ours(sync=True)), data) == []


def test_batches_of_several_distributions_are_a_warning_where_statistics_move():
    model, data = net(bn()).train(), rows(32, 5, count=8)
    apart = [x + 3 * (i % 2) for i, x in enumerate(data)]
    assert found("TN305", model, data) == []
    assert found("TN305", model, apart) == WARNING
    freeze(model[1])
    assert found("TN305", model, apart) == []


@pytest.mark.parametrize(
    ("size", "change", "severity"),
    [
        (400, lambda x: x, NOTE),
        (400, lambda x: x + 0.7, WARNING),
        (400, lambda x: x + 0.3, NOTE),
        (400, lambda x: 1.6 * x, WARNING),
        (400, lambda x: 1.3 * x, NOTE),
        (4, lambda x: x + 0.7, NOTE),  # no more than chance
        (4, lambda x: 1.6 * x, NOTE),
    ],
)
def test_a_norm_called_again_is_a_warning_if_the_calls_differ_by_more_than_chance(
    size, change, severity
):
    def forward(m, x):
        return m.head(m.norm(x) + m.norm(change(x)))

    def model(norm):
        return Forward(forward, norm=norm, head=nn.Linear(6, 3))

    data = rows(size, 6, count=1)
    assert found("TN306", model(bn(6)), data) == severity
    assert found("TN306", model(freeze(bn(6))), data) == NOTE
    assert found("TN306", model(ours(6, frozen=True)), data) == []


# -- TN4xx ----------------------------------------------------------------------------------------


def test_a_bias_that_the_norm_subtracts_is_a_note():
    model = net(bn()).train()
    assert found("TN401", model, rows(16, 5)) == []
    model[0].bias = nn.Parameter(torch.ones(8))
    assert found("TN401", model, rows(16, 5)) == NOTE
    freeze(model[1])  # the running mean is subtracted: the bias counts
    assert found("TN401", model, rows(16, 5)) == []


def test_a_bias_that_goes_elsewhere_too_counts():
    def branching(m, x):
        y = m.linear(x)
        return y + m.norm(y)

    assert found("TN401", Forward(branching, linear=nn.Linear(5, 8), norm=bn()), rows(9, 5)) == []


def test_dead_biases_are_told_as_one_whatever_the_layers_are_called():
    parts = {"stem": nn.Linear(8, 8), "norm": bn(), "body": nn.Linear(8, 4), "last": bn(4)}
    model = Forward(lambda m, x: m.last(m.body(m.norm(m.stem(x)).relu())), **parts)
    diagnosis = tn.examine(model, rows(16, 8))
    told = [line for line in str(diagnosis).splitlines() if "TN401" in line]
    assert len(told) == 1
    assert "2 layers: norm, last" in told[0]
    assert [f.evidence for f in diagnosis.of("TN401")] == [
        {"bias": "stem.bias", "dead weights": 8},
        {"bias": "body.bias", "dead weights": 4},
    ]


@pytest.mark.parametrize(
    ("rate", "decay", "severity"),
    [(0.1, 1.1e-3, WARNING), (0.1, 0.9e-3, NOTE), (1e-3, 0.01, NOTE), (1.0, 0.0, [])],
)
def test_weight_decay_is_a_warning_where_it_halves_gamma_within_a_training(rate, decay, severity):
    model = net(bn())
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)
    assert found("TN402", model, optimizer=optimizer) == severity
    model[1].requires_grad_(False)  # no gradient, no step
    assert found("TN402", model, optimizer=optimizer) == []


@pytest.mark.parametrize(("p", "severity"), [(0.5, WARNING), (0.1, NOTE), (0.0, [])])
def test_dropout_before_a_norm_is_a_warning_if_the_variance_rises_by_a_quarter(p, severity):
    torch.manual_seed(0)
    data = rows(256, 5, count=4)
    assert found("TN403", nn.Sequential(nn.Dropout(p), *net(bn())).eval(), data) == severity
    between = nn.Sequential(nn.Dropout(p), nn.Linear(5, 5), nn.LayerNorm(5), *net(bn())).eval()
    assert found("TN403", between, data) == []
    assert found("TN403", net(bn(), nn.Dropout(p)), data) == []


def test_a_functional_dropout_is_measured_by_the_mode_of_its_module():
    def forward(m, x):
        return m.norm(nn.functional.dropout(m.linear(x), p=0.5, training=m.training))

    model = Forward(forward, linear=nn.Linear(5, 8), norm=bn()).eval()
    (finding,) = tn.examine(model, rows(256, 5)).of("TN403")
    assert finding.severity == "warning"
    assert finding.evidence["p"] == 0.5


def test_dropout_before_a_frozen_norm_moves_no_statistics():
    model = nn.Sequential(nn.Dropout(0.5), *net(freeze(bn()))).train()
    freeze(model[2])
    assert found("TN403", model, rows(64, 5)) == []


@pytest.mark.parametrize(("length", "severity"), [(8, ERROR), (7, NOTE)])
@pytest.mark.parametrize("between", [nn.Identity, nn.GELU])
def test_features_in_the_last_axis_are_an_error_where_nothing_else_would_tell(
    length, severity, between
):
    model = Forward(
        lambda m, x: m.norm(m.between(m.linear(x))),
        linear=nn.Linear(6, 8), between=between(), norm=bn(length),
    ).eval()  # fmt: skip
    assert found("TN404", model, rows(16, length, 6)) == severity
    swapped = Forward(lambda m, x: m.norm(m.linear(x).transpose(1, 2)), linear=model.linear,
                      norm=bn(8)).eval()  # fmt: skip
    assert found("TN404", swapped, rows(16, length, 6)) == []


@pytest.mark.parametrize(
    "swap",
    [
        lambda x: x.transpose(1, 2),
        lambda x: x.permute(0, 2, 1).contiguous(),
        lambda x: x.movedim(1, 2),
        lambda x: x.mT,
    ],
)
def test_a_linear_layer_that_mixes_positions_keeps_channels_in_their_axis(swap):
    def severities(forward):
        model = Forward(forward, mix=nn.Linear(6, 6), norm=bn(6)).eval()
        return found("TN404", model, rows(16, 6, 6))

    assert severities(lambda m, x: m.norm(m.mix(swap(x)))) == []
    assert severities(lambda m, x: m.norm(swap(m.mix(x)))) == []
    assert severities(lambda m, x: m.norm(m.mix(swap(swap(x))))) == ERROR
    assert severities(lambda m, x: m.norm(m.mix(swap(m.mix(swap(x)))))) == ERROR


@pytest.mark.parametrize(
    ("norm", "shape", "severity"),
    [
        (nn.GroupNorm(8, 8), (4, 8), ERROR),
        (nn.GroupNorm(4, 8), (4, 8), []),
        (nn.GroupNorm(8, 8), (4, 8, 2), []),
        (nn.InstanceNorm2d(8), (4, 8, 1, 2), []),
        (nn.LayerNorm(1), (4, 8, 1), ERROR),
        (nn.LayerNorm(2), (4, 8, 2), []),
        (nn.RMSNorm(1), (4, 8, 1), ERROR),
        (nn.RMSNorm(2), (4, 8, 2), []),
        (tn.RMSNorm(1), (4, 1), ERROR),
        (tn.RMSNorm(1), (4, 1, 2), []),
    ],
)
def test_a_statistic_of_one_value_erases_its_input(norm, shape, severity):
    assert found("TN405", norm.eval(), rows(*shape)) == severity


@pytest.mark.parametrize(("size", "severity"), [(1, ERROR), (2, [])])
def test_a_batch_norm_over_one_value_is_an_error_in_training_alone(size, severity):
    model = net(bn())
    assert found("TN405", model.train(), rows(size, 5)) == severity
    assert found("TN405", model.eval(), rows(size, 5)) == []


def test_a_norm_after_a_norm_is_a_warning_for_a_batch_norm_alone():
    data = rows(16, 5)
    assert found("TN406", net(bn(), bn()), data) == WARNING
    assert found("TN406", net(bn(), nn.Dropout(0.0), bn()), data) == WARNING
    assert found("TN406", net(ours(), ours()), data) == WARNING
    assert found("TN406", net(bn(), nn.LayerNorm(8), bn()), data) == [*WARNING, *NOTE]
    assert found("TN406", net(bn(), nn.LayerNorm(8)), data) == NOTE
    assert found("TN406", net(bn(), nn.ReLU(), bn()), data) == []


def test_a_norm_after_a_norm_is_a_note_where_the_first_is_used_elsewhere_too():
    def residual(m, x):
        y = m.drop(m.first(m.linear(x)))
        return m.head(y + m.second(y))

    for drop in (nn.Identity(), nn.Dropout(0.0)):
        parts = {"linear": nn.Linear(5, 8), "first": bn(), "drop": drop, "second": bn()}
        model = Forward(residual, **parts, head=nn.Linear(8, 3)).eval()
        assert found("TN406", model, rows(16, 5)) == NOTE


@pytest.mark.parametrize(
    ("target", "severity"),
    [
        (torch.arange(16) % 8, WARNING),  # classes
        (torch.zeros(16, 8), WARNING),  # values
        (torch.full((16,), 99), NOTE),  # an embedding's identities
        (None, NOTE),
    ],
)
def test_a_last_norm_is_a_warning_if_its_outputs_are_compared_with_a_target(target, severity):
    (x,) = rows(16, 5, count=1)
    data = [x if target is None else (x, target)]
    given = {"loss": lambda out, target: out.square()}  # of its own, where it is no classification
    assert found("TN406", net(bn(), head=False), data, **given) == severity
    assert found("TN406", net(bn()), [x]) == []


# -- TN5xx ----------------------------------------------------------------------------------------


def test_a_subclass_with_a_forward_of_its_own_is_a_note():
    class Plain(nn.BatchNorm2d):
        pass

    assert found("TN502", used(Activated(3)).eval()) == NOTE
    assert found("TN502", used(Plain(3)).eval()) == []


def with_inner_activations():
    acts = {"act": nn.SiLU(), "drop": nn.Dropout2d(0.1)}
    norms = [foreign.BatchNormAct(8, **acts), foreign.BatchNormAct(8, act=nn.Identity())]
    layers = [nn.Conv2d(3, 8, 3), used(norms[0]), nn.ReLU(), nn.Conv2d(8, 8, 3), used(norms[1])]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).eval()


@pytest.mark.parametrize("data", [None, PICTURES], ids=["bare", "data"])
def test_modules_left_in_a_norm_that_calls_none_are_a_loss(data):
    assert "error" not in found("TN502", with_inner_activations(), data)
    lost = nn.SyncBatchNorm.convert_sync_batchnorm(with_inner_activations()).eval()
    (finding,) = tn.examine(lost, data).of("TN502")
    assert (finding.severity, finding.layer) == ("error", "1")
    assert "act (SiLU)" in finding.cause
    assert "drop (Dropout2d)" in finding.cause
    assert finding.evidence == {"layers": 1, "of": 2}


def test_modules_in_a_norm_that_others_call_are_no_loss():
    norm = used(nn.BatchNorm1d(5))
    norm.act = nn.ReLU()
    model = Forward(lambda m, x: m.norm.act(m.norm(x)), norm=norm).eval()
    assert found("TN502", model, rows(16, 5)) == []
    assert found("TN502", model) == ERROR
    norm.register_forward_hook(lambda norm, _, y: norm.act(y))
    assert found("TN502", model) == []
    parametrized = used(nn.BatchNorm1d(5))
    nn.utils.parametrize.register_parametrization(parametrized, "weight", nn.Softplus())
    assert found("TN502", parametrized.eval()) == []


def test_norms_between_weighted_layers_have_lost_their_activations():
    def model(*after, before=nn.Identity):
        parts = [(nn.Linear(5, 5), before(), used(nn.SyncBatchNorm(5)), *after) for _ in range(2)]
        return nn.Sequential(*parts[0], *parts[1], nn.Linear(5, 3)).eval()

    assert found("TN502", model(), rows(16, 5)) == ERROR
    assert found("TN502", model(nn.ReLU()), rows(16, 5)) == []
    assert found("TN502", model(before=nn.ReLU), rows(16, 5)) == []


@pytest.mark.parametrize(
    ("forward", "severity"),
    [
        (lambda m, x: m.norm(m.linear(x)), []),
        (lambda m, x: m.norm(m.linear(x)) + m.norm(m.other(x)), NOTE),
        (lambda m, x: m.norm(x), NOTE),
        (lambda m, x: [m.norm(y) + y for y in [m.linear(x)]], NOTE),
        (lambda m, x: m.norm(m.linear(x).relu()), NOTE),
        (lambda m, x: m.norm(m.linear(m.linear(x))), NOTE),
    ],
)
def test_what_cannot_be_folded_is_a_note(forward, severity):
    parts = {"linear": nn.Linear(5, 5), "norm": bn(5)}
    if "other" in forward.__code__.co_names:
        parts["other"] = nn.Linear(5, 5)
    model = Forward(forward, **parts).eval()
    assert found("TN503", model, rows(16, 5)) == severity


def test_a_check_leaves_no_trace_for_the_next():
    model = net(bn(momentum=0.01))  # TN103 recalibrates, which sets the count that TN104 reads
    assert found("TN104", model, rows(16, 5)) == []


# -- the table ------------------------------------------------------------------------------------


def severities_in(function):
    """The severities written in ``function`` and in the functions of checks that it names."""
    told, seen, waiting = set(), set(), [function]
    while waiting:
        function = waiting.pop()
        if function in seen:
            continue
        seen.add(function)
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
            if isinstance(node, ast.Constant) and node.value in ("error", "warning", "note"):
                told.add(node.value)
            named = function.__globals__.get(node.id) if isinstance(node, ast.Name) else None
            if inspect.isfunction(named) and named.__module__.startswith("truenorm.doctor.checks."):
                waiting.append(named)
    return told


def test_the_table_of_codes_tells_the_severities_that_the_checks_can_yield():
    can = {
        check.code: {s for look in (check.look, check.watched) if look for s in severities_in(look)}
        for check in CHECKS
    }
    assert {code.code: set(code.severities) for code in codes()} == can
