from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import patients
import truenorm as tn
from patients import batches, trained


def why(diagnosis, code="TN103"):
    return next((s.why for s in diagnosis.skipped if s.code == code), "")


def passed(diagnosis, code="TN103"):
    return code in diagnosis.passed


class Counted(nn.Module):
    """Counts the examples that pass, whatever the batches."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.told = inner, ([],)  # deeper than what examine gives back

    @property
    def seen(self):
        return self.told[0]

    def forward(self, x):
        self.seen.append(len(x))
        return self.inner(x)


class Answering(nn.Module):
    """A trained network whose output is made of its logits by a function."""

    def __init__(self, form):
        super().__init__()
        self.net, self.form = trained("mlp"), form

    def forward(self, x):
        return self.form(self.net(x))


def shifted(model, by=4.0):
    norm = patients.norms(model)[0]
    norm.running_mean.add_(by * norm.running_var.sqrt())
    return model


# -- false alarms ----------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_few_data_are_no_reason_for_an_alarm(seed, targets):
    # In the very data that they come from, statistics of 32 rows look better than honest ones.
    data = [(x, y) if targets else x for x, y in batches("mlp", 2, seed=seed, size=32)]
    assert passed(tn.examine(trained("mlp"), data))


def test_in_sample_optimism_is_no_gap():
    """The largest of 400 standardized channels: exact statistics of the data bound it."""

    class Largest(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(400)

        def forward(self, x):
            return self.norm(x)

    def loss(out, target):
        means = out.double().mean(0)  # in-sample statistics make it 0
        return 20 * means.square().mean() + 1e-3

    torch.manual_seed(0)
    model, data = Largest().eval(), list(torch.randn(2, 40, 400).unbind())
    model.norm.running_mean.normal_(0, 1e-4)
    model.norm.num_batches_tracked.fill_(1000)
    (own,) = (tn.recalibrate(Largest().eval(), [x]).model(x) for x in data[:1])
    assert loss(model(data[0]), None) > 10 * loss(own, None)  # what a naive comparison would see
    assert passed(tn.examine(model, data, loss=loss))


def test_two_kinds_of_batches_in_turn_come_into_both_halves():
    data = [(x + 2 * (i % 2), y) for i, (x, y) in enumerate(batches("mlp", 8))]
    model = trained("mlp")
    tn.recalibrate(model, [x for x, _ in data])
    assert passed(tn.examine(model, data))


def test_statistics_that_differ_without_harm_to_the_loss_are_a_note():
    model = trained("mlp")
    for norm in patients.norms(model):
        norm.running_var.div_(1.5)  # larger logits, in the same order
    found = tn.examine(model, batches("mlp")).of("TN103")
    assert [f.severity for f in found] == ["note"]


@pytest.mark.parametrize(("factor", "severity"), [(2.2, "warning"), (6, "warning"), (9, "error")])
def test_statistics_that_are_far_off_are_told_by_their_size_though_the_loss_bears_them(
    factor, severity
):
    model = trained("mlp")
    patients.norms(model)[-1].running_var.div_(factor)
    found = tn.examine(model, batches("mlp")).of("TN103")
    assert [f.severity for f in found] == [severity]


@pytest.mark.parametrize(
    ("count", "size", "least"), [(2, 20, "20 values"), (1, 40, "20 values"), (8, 4, "16 values")]
)
def test_too_few_values_are_said_to_be_too_few(count, size, least):
    diagnosis = tn.examine(shifted(trained("mlp")), batches("mlp", count, size=size))
    assert least in why(diagnosis)
    assert "need 32" in why(diagnosis)


# -- a misfit by itself --------------------------------------------------------------------------


def rolled(norm):
    norm.running_mean, norm.running_var = norm.running_mean.roll(1), norm.running_var.roll(1)


MISFITS = {
    "a variance times 30": lambda norm: norm.running_var.mul_(30),
    "rolled by a channel": rolled,
    "the sign of the means": lambda norm: norm.running_mean.neg_(),
    "means off by a deviation": lambda norm: norm.running_mean.add_(norm.running_var.sqrt()),
}


@pytest.mark.parametrize("targets", [True, False])
@pytest.mark.parametrize("change", MISFITS.values(), ids=MISFITS)
@pytest.mark.parametrize("kind", ["mlp", "convnet", "resnet"])
def test_statistics_of_something_else_are_told_of_whatever_harm_they_do(kind, change, targets):
    model = trained(kind)
    norm = patients.norms(model)[-1]
    name = next(n for n, m in model.named_modules() if m is norm)
    change(norm)
    data = [(x, y) if targets else x for x, y in batches(kind)]
    found = tn.examine(model, data).of("TN103")
    assert {f.layer for f in found} == {name}
    assert found[0].severity != "note"


def test_weights_that_grew_after_the_statistics_were_taken_are_a_misfit_of_the_norm_behind_them():
    model = trained("convnet")
    before, norm = model.features[0], model.features[1]
    with torch.no_grad():
        before.weight.mul_(3)
    (found,) = tn.examine(model, batches("convnet")).of("TN103")
    assert model.get_submodule(found.layer) is norm
    assert found.evidence["exact over running variance"] == pytest.approx(9, rel=0.3)
    assert found.severity == "error"


def test_channels_that_are_constant_or_rare_in_these_data_are_no_misfit():
    model = trained("convnet")
    before, norm = model.features[0], model.features[1]
    with torch.no_grad():  # dead in these data, alive in those of training
        before.weight[:2] = 0
    assert float(norm.running_var[:2].min()) > 1e-3
    assert not [
        f for f in tn.examine(model, batches("convnet")).of("TN103") if "misfit" in f.evidence
    ]


@pytest.mark.parametrize("kind", ["convnet", "resnet"])
@pytest.mark.parametrize("seed", range(6))
def test_examples_that_are_few_leave_a_misfit_open(kind, seed):
    """Of one image each half has a thousand values a channel, and they are not independent."""
    model = trained(kind)
    found = tn.examine(model, batches(kind, 2, seed=seed + 20, size=1)).of("TN103")
    assert not [f for f in found if f.severity != "note"], found


def test_a_misfit_whose_mending_raises_the_loss_is_told_with_what_recalibrate_takes():
    model, data = trained("convnet"), batches("convnet", 20)
    patients.norms(model)[-1].running_var.div_(80)  # surer answers
    (found,) = tn.examine(model, data).of("TN103")
    evidence = found.evidence
    assert evidence["loss with exact statistics"] > evidence["loss with running statistics"]
    assert found.fix is None
    assert "keep_worse=True" in found.advice
    assert not tn.recalibrate(model, data).kept
    assert tn.recalibrate(model, data, keep_worse=True).kept
    assert passed(tn.examine(model, data))


def test_what_dropout_does_to_a_variance_is_left_to_its_own_code():
    torch.manual_seed(0)
    layers = [nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 12), nn.BatchNorm1d(12)]
    model = patients.train(nn.Sequential(*layers, nn.ReLU(), nn.Linear(12, 3)), "mlp")
    diagnosis = tn.examine(model, batches("mlp"))
    assert not [f for f in diagnosis.of("TN103") if "misfit" in f.evidence]
    assert diagnosis.of("TN403")
    model[4].running_var.mul_(30)
    assert [f.severity for f in tn.examine(model, batches("mlp")).of("TN103")] == ["error"]


# -- the choice of the examples ------------------------------------------------------------------


class SomeSuffer(nn.Module):
    """Answers right, but on examples that are marked, where the mean of a channel is off."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x):
        off = (self.norm(x)[:, 1] - x[:, 1]).square() * (x[:, 0] > 2.5)
        return torch.stack([4 - 0 * off, 140 * off], 1)


def marked(often):
    """64 examples of standardized data, of which each ``often``-th is marked."""
    torch.manual_seed(0)
    x = torch.randn(64, 6).clamp(-2, 2)
    x[:: 64 // often, 0] = 3
    x = (x - x.mean(0)) / x.std(0)
    x[:: 64 // often, 0] = 3
    return [(part, torch.zeros(32, dtype=torch.long)) for part in x.split(32)]


@pytest.mark.parametrize("loss", [None, F.cross_entropy, nn.CrossEntropyLoss()])
@pytest.mark.parametrize(("number", "told"), [(1, False), (2, False), (16, True), (64, True)])
def test_one_example_of_64_is_no_evidence(number, told, loss):
    model = SomeSuffer().eval()
    model.norm.num_batches_tracked.fill_(1000)
    model.norm.running_mean[1] = 0.35
    data = marked(number)
    diagnosis = tn.examine(model, data, loss=loss)
    assert bool([f for f in diagnosis.of("TN103") if f.severity != "note"]) == told
    worse = tn.examine(model, data * 8, loss=loss).of("TN103")  # the same share of more examples
    assert bool([f for f in worse if f.severity != "note"])


# -- what is found ---------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_a_gap_is_found_in_few_batches_too(count):
    size = 96 if count < 3 else 48
    (found,) = tn.examine(shifted(trained("mlp")), batches("mlp", count, size=size)).of("TN103")
    assert found.severity == "error"
    evidence = found.evidence
    assert evidence["loss with running statistics"] > evidence["loss with exact statistics"] + 0.5
    assert evidence["accuracy with running statistics"] < evidence["accuracy with exact statistics"]
    assert evidence[f"share of {found.layer} alone"] > 0.8
    assert 3 < evidence["shift of the mean in standard deviations"] < 6
    assert "batch" in evidence["measured on"]


def test_in_a_chain_that_is_stale_throughout_each_layer_has_a_share():
    model = trained("resnet")
    for norm in patients.norms(model):
        norm.running_mean.mul_(0.3)
        norm.running_var.mul_(0.3).add_(0.7 * 9)
    first, *others = tn.examine(model, batches("resnet")).of("TN103")
    turns = [v for k, v in first.evidence.items() if k.endswith("in turn")]
    assert len(turns) == 3
    assert all(math.isfinite(v) for v in turns)
    assert len({f.layer for f in (first, *others)}) == len(patients.norms(model))
    assert {f.fix for f in others} == {first.fix}
    first.fix()
    assert passed(tn.examine(model, batches("resnet")))


def test_layers_are_looked_at_by_suspicion_and_it_is_said():
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU()) for _ in range(12)]
    model = patients.train(nn.Sequential(*layers, nn.Linear(6, 3)), "mlp")
    model[3][1].running_var.div_(100)
    (found,) = tn.examine(model, batches("mlp")).of("TN103")
    assert found.layer == "3.1"
    assert "2 of 8 batches, 8 of 12 layers" in found.evidence["measured on"]


def test_the_cause_tells_of_the_channel_where_only_one_is_off():
    model = trained("mlp")
    norm = patients.norms(model)[0]
    channel = int(norm.weight.abs().argmax())
    norm.running_var[channel] /= 3000
    (found,) = tn.examine(model, batches("mlp")).of("TN103")
    assert f"x too small in channel {channel}" in found.cause


def test_layers_with_too_few_values_keep_theirs_and_are_counted():
    class Squeezed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
            self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8), nn.Sigmoid())
            self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))

        def forward(self, x):
            y = self.body(x)
            return self.head(y * self.gate(y))

    torch.manual_seed(0)
    model = patients.train(Squeezed(), "convnet")
    model.body[1].running_var.div_(200)
    (found,) = tn.examine(model, batches("convnet", 4, size=12)).of("TN103")
    assert found.layer == "body.1"
    assert found.evidence["layers left out for too few values"] == 1


# -- what must not crash ---------------------------------------------------------------------------


@dataclass
class Told:
    text: str


class Opaque:
    pass


@pytest.mark.parametrize(
    "form", [lambda y: None, lambda y: Opaque(), lambda y: Told("x"), lambda y: y.argmax(1)]
)
def test_an_output_without_answers_is_not_looked_at(form):
    diagnosis = tn.examine(Answering(form), batches("mlp"))
    assert "holds no loss, and no tensor" in why(diagnosis)
    assert "no tensor" in why(diagnosis, "TN304")


@pytest.mark.parametrize("form", [lambda y: (y, None), lambda y: {"a": "x", "z": y}])
def test_answers_may_lie_anywhere_in_the_output(form):
    assert tn.examine(shifted(Answering(form)), batches("mlp")).of("TN103")


def test_answers_of_another_shape_in_each_batch_are_compared_batch_by_batch():
    def ragged(y):
        return y.repeat(1, 1 + int(y.shape[0] % 3))

    data = [x[: 20 + i] for i, (x, _) in enumerate(batches("mlp"))]
    assert passed(tn.examine(Answering(ragged), data))
    assert tn.examine(shifted(Answering(ragged)), data).of("TN103")


def test_answers_whose_shape_hangs_on_the_statistics_are_not_compared():
    def kept(y):
        return y.repeat(1, 1 + int(y.detach().abs().sum() * 1e4) % 97)

    diagnosis = tn.examine(shifted(Answering(kept), 0.4), [x for x, _ in batches("mlp")])
    assert "other shapes" in why(diagnosis)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_never_finite_is_said_to_be_so(value):
    diagnosis = tn.examine(
        trained("mlp"), batches("mlp"), loss=lambda out, target: out.sum() * 0 + value
    )
    assert "with exact statistics, too" in why(diagnosis)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_only_running_statistics_spoil_is_an_error_of_their_layer(value):
    sound = shifted(trained("mlp"), by=0)

    def loss(out, target):
        usual = F.cross_entropy(out, target)
        return usual if usual < 1.5 else usual * value

    assert passed(tn.examine(sound, batches("mlp"), loss=loss))
    (found,) = tn.examine(shifted(trained("mlp"), by=9), batches("mlp"), loss=loss).of("TN103")
    assert found.severity == "error"
    assert found.layer == "1"


def test_a_constant_answer_has_no_gap():
    slightly = shifted(Answering(lambda y: y * 0), 0.5)
    assert passed(tn.examine(slightly, [x for x, _ in batches("mlp")]))


def test_a_model_that_draws_in_evaluation_is_compared_with_the_same_draws():
    noisy = Answering(lambda y: y + 30 * torch.randn_like(y))
    assert passed(tn.examine(noisy, batches("mlp")))


def test_a_layer_that_has_no_shape_yet_is_not_looked_at():
    model = Answering(lambda y: y)
    model.spare = nn.LazyBatchNorm1d()  # never called
    for data in (None, batches("mlp")):
        assert not tn.examine(model, data).worse_than("warning")
    assert model.spare.has_uninitialized_params()


def test_a_lazy_model_is_examined_and_lazy_again():
    model = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(3))
    assert tn.examine(model, batches("mlp")).healthy
    assert [type(m) for m in model[:2]] == [nn.LazyLinear, nn.LazyBatchNorm1d]


def test_large_answers_are_compared_in_part(monkeypatch):
    monkeypatch.setattr("truenorm.doctor.facts.MOST_ANSWERS", 40)
    wide = Answering(lambda y: y.repeat(1, 50))
    data = [x for x, _ in batches("mlp")]
    assert passed(tn.examine(wide, data))
    assert tn.examine(shifted(wide), data).of("TN103")


# -- cost ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ill", [False, True])
def test_an_examination_takes_few_forwards(ill):
    model = Counted(trained("resnet"))
    if ill:
        shifted(model)
    data = batches("resnet")
    diagnosis = tn.examine(model, data)
    assert bool(diagnosis.of("TN103")) == ill
    assert 0 < sum(model.seen) <= (9 if ill else 4) * sum(len(x) for x, _ in data)


def test_batches_that_cannot_be_joined_are_passed_one_by_one():
    model = Counted(shifted(trained("convnet")))
    data = batches("convnet", 4) + [(x[..., :10], y) for x, y in batches("convnet", 4, seed=2)]
    (found,) = tn.examine(model, data).of("TN103")
    assert found.layer == next(n for n, m in model.named_modules() if m in patients.norms(model))
    assert max(model.seen) == patients.BATCH
