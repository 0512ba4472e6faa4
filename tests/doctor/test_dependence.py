from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import patients
import truenorm as tn
from patients import batches, trained


def found(model, data):
    return tn.examine(model, data).of("TN304")


def why(model, data):
    return next((s.why for s in tn.examine(model, data).skipped if s.code == "TN304"), "")


class Formed(nn.Module):
    def __init__(self, net, form):
        super().__init__()
        self.net, self.form = net, form

    def forward(self, x):
        return self.form(self.net(x))


class Functional(nn.Module):
    """Normalizes by the batch in evaluation, too."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x):
        return F.batch_norm(self.linear(x), None, None, training=True)


def untracked():
    model = trained("mlp")
    patients._untracked(model)
    return model


@dataclass
class Told:
    loss: torch.Tensor
    scores: torch.Tensor


# -- answers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", patients.KINDS)
def test_a_norm_without_statistics_is_named(kind):
    model = trained(kind)
    patients._untracked(model)
    (finding,) = found(model, batches(kind))
    assert finding.severity == "error"
    assert finding.layer == next(n for n, m in model.named_modules() if m in patients.norms(model))


def test_a_functional_norm_in_training_form_is_named():
    (finding,) = found(nn.Sequential(nn.Identity(), Functional()), batches("mlp"))
    assert (finding.severity, finding.layer) == ("error", "1")


@pytest.mark.parametrize(
    "form",
    [lambda y: Told(y.sum(), y), lambda y: {"loss": y.sum(), "z": y}, lambda y: (y.sum(), y)],
)
def test_answers_are_found_beside_a_loss(form):
    (finding,) = found(Formed(untracked(), form), [x for x, _ in batches("mlp")])
    assert finding.severity == "error"
    assert not found(Formed(trained("mlp"), form), [x for x, _ in batches("mlp")])


@pytest.mark.parametrize("form", [lambda y: y.sum(), lambda y: None, lambda y: {"loss": y.mean()}])
def test_an_output_without_examples_is_not_looked_at(form):
    assert "no tensor with an entry" in why(Formed(untracked(), form), batches("mlp"))


def test_examples_that_meet_by_design_are_a_note_at_most():
    def capacity(y: torch.Tensor) -> torch.Tensor:
        return y * (torch.arange(len(y)) >= len(y) // 4)[:, None] / len(y)

    diagnosis = tn.examine(Formed(trained("mlp"), capacity), batches("mlp"))
    assert [f.severity for f in diagnosis.of("TN304")] == ["note"]
    assert diagnosis.healthy


@pytest.mark.parametrize(
    "form",
    [
        lambda y: y - y.mean(0),
        lambda y: y / y.abs().amax(0, keepdim=True),
        lambda y: (y - y.mean()) / y.std(),
    ],
)
def test_statistics_of_the_batch_taken_by_hand_are_a_warning(form):
    (found,) = tn.examine(Formed(trained("mlp"), form), batches("mlp")).of("TN304")
    assert found.severity == "warning"
    assert "over the batch" in found.evidence["by"]


def test_a_contrastive_matrix_is_not_compared():
    model = Formed(trained("mlp"), lambda y: y @ y.T)
    assert "another shape" in why(model, [x for x, _ in batches("mlp")])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["convnet", "resnet"])
def test_rounding_is_no_difference(kind, dtype):
    data = [(x.to(dtype), y) for x, y in batches(kind)]
    assert not found(trained(kind).to(dtype), data)
    model = trained(kind)
    patients._untracked(model)
    if dtype != torch.bfloat16:  # there 4 % of an answer's size is rounding; TN205 tells of it
        assert found(model.to(dtype), data)


# -- padding ---------------------------------------------------------------------------------------


class Sequences(nn.Module):
    def __init__(self, stride=1):
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 3, padding=1, stride=stride)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x, attention_mask=None, padding_mask=None):
        return self.head(self.norm(self.conv(x)).relu().amax(2))


def padded(noise=0.0, left=False):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 4, 32, generator=generator) + 3
    real = torch.arange(32) < torch.randint(8, 24, (16, 1), generator=generator)
    if left:
        real = real.flip(1)
    blank = noise * torch.randn(16, 4, 32, generator=generator)
    return torch.where(real[:, None], x, blank), real


@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("name", ["attention_mask", "padding_mask"])
def test_a_mask_of_the_batch_tells_where_padding_is(name, left, stride):
    torch.manual_seed(0)
    x, real = padded(0.1, left)  # no constant tail gives it away
    mask = real.long() if name == "attention_mask" else ~real
    (finding,) = found(Sequences(stride).eval(), [{"x": x, name: mask}])
    assert (finding.layer, finding.severity) == ("norm", "warning")
    share = 1 - real.float().mean().item()
    assert finding.evidence["padded share"] == pytest.approx(share, abs=0.1)


@pytest.mark.parametrize("stride", [1, 2])
def test_constant_tails_are_padding_behind_a_stride_too(stride):
    torch.manual_seed(0)
    (finding,) = found(Sequences(stride).eval(), [padded()[0]])
    assert finding.layer == "norm"


def test_a_mask_without_padding_or_of_another_kind_tells_of_nothing():
    torch.manual_seed(0)
    x = torch.randn(16, 4, 32)
    model = Sequences().eval()
    for mask in (torch.ones(16, 32), torch.rand(16, 32).round(), torch.rand(16, 32)):
        assert not found(model, [{"x": x, "attention_mask": mask}])


@pytest.mark.parametrize("frozen", [True, False])
def test_padding_does_no_harm_to_a_frozen_norm(frozen):
    torch.manual_seed(0)
    model = Sequences().eval()
    model.norm.requires_grad_(not frozen)
    assert bool(found(model, [padded()[0]])) != frozen


def test_padding_is_found_where_answers_cannot_be_compared():
    torch.manual_seed(0)
    (finding,) = found(Formed(Sequences().eval(), lambda y: y.sum()), [padded()[0]])
    assert finding.layer == "net.norm"
