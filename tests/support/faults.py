"""Faults that can be planted in any trained model, and the models that they are planted in.

A fault damages a copy of a trained host, or its data or optimizer, and says by the severity how
loud the doctor has to be. Many come in several strengths: the weak ones are near a threshold.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import blind
import patients
import truenorm as tn
import zoo
from truenorm.calling import call as calling
from truenorm.calling.nested import examples_of
from truenorm.doctor.check import Severity
from truenorm.doctor.diagnosis import Diagnosis

BATCHES = 4


@dataclass
class Case:
    """A model with what ``examine`` takes."""

    host: str
    model: nn.Module
    batches: list[Any]
    given: dict[str, Any] = field(default_factory=dict)

    def examine(self, *, data: bool = True) -> Diagnosis:
        """The doctor's word."""
        return tn.examine(self.model, self.batches if data else None, **self.given)


def case(host: str) -> Case:
    """A healthy one: a fresh copy of the trained host, in eval mode."""
    if host not in zoo.ZOO and host not in patients.KINDS:
        return Case(host, nn.Identity(), [])  # the fault brings its model
    if host in patients.KINDS:
        return Case(host, patients.trained(host), patients.batches(host, BATCHES))
    given = {"arguments": zoo.arguments_of(host)}
    return Case(host, zoo.trained(host), zoo.batches(host, BATCHES), given)


@dataclass(frozen=True)
class Fault:
    """One way to damage a model.

    Attributes:
        name: of the damage.
        plant: does it to a case in place; returns False where the model has no place for it.
        severity: the least that has to be said of it.
        data: whether the doctor gets the batches.
        hosts: where alone it can be planted; None for :data:`POOL`.
        blind: whether it is tried in the blind hosts although it has hosts of its own.
    """

    name: str
    plant: Callable[[Case], object]
    severity: Severity = "warning"
    data: bool = False
    hosts: tuple[str, ...] | None = None
    blind: bool = False


@dataclass(frozen=True)
class Called:
    """A batch norm that is called once in a forward, and the shape that it gets."""

    name: str
    norm: _BatchNorm
    shape: tuple[int, ...]


def called(case: Case, kind: type[nn.Module] = _BatchNorm) -> list[Called]:
    """In the order of the calls."""
    seen: list[Called] = []
    handles = []
    for name, module in case.model.named_modules():
        if isinstance(module, kind):

            def look(module: nn.Module, args: Any, name: str = name) -> None:
                shape = tuple(getattr(args[0], "shape", ())) if args else ()
                seen.append(Called(name, module, shape))  # type: ignore[arg-type]

            handles.append(module.register_forward_pre_hook(look))
    call = calling.Call(case.model, arguments=case.given.get("arguments"))
    with torch.no_grad():
        call(case.batches[0])
    for handle in handles:
        handle.remove()
    names = [c.name for c in seen]
    return [c for c in seen if names.count(c.name) == 1]


def replace(case: Case, name: str, change: Callable[[Any], nn.Module]) -> None:
    """Put ``change(module)`` in the place of a module."""
    parent, _, last = name.rpartition(".")
    holder = case.model.get_submodule(parent)
    made = change(getattr(holder, last))
    made.train(case.model.training)
    setattr(holder, last, made)


Place = Callable[[list[Called]], list[Called]]


def first(norms: list[Called]) -> list[Called]:
    return norms[:1]


def middle(norms: list[Called]) -> list[Called]:
    return norms[len(norms) // 2 :][:1]


def last(norms: list[Called]) -> list[Called]:
    return norms[-1:]


def every(norms: list[Called]) -> list[Called]:
    return norms


def affine(where: Place) -> Place:
    """Of those with gamma and beta alone."""
    return lambda norms: where([c for c in norms if c.norm.affine])


def on(
    where: Place, change: Callable[[Any], object], *, training: bool = False, affine: bool = False
) -> Any:
    """A change of batch norms; of those with gamma and beta alone if ``affine``."""

    def plant(case: Case) -> bool:
        chosen = where([c for c in called(case) if c.norm.affine or not affine])
        with torch.no_grad():
            for one in chosen:
                change(one.norm)
        if training:
            case.model.train()
            for one in chosen:
                change(one.norm)  # modes among them
        return bool(chosen)

    return plant


def wrapped(where: Place, change: Callable[[Any], nn.Module]) -> Any:
    """A batch norm replaced by something that holds it."""

    def plant(case: Case) -> bool:
        chosen = where(called(case))
        for one in chosen:
            replace(case, one.name, change)
        return bool(chosen)

    return plant


# -- TN1xx ----------------------------------------------------------------------------------------


def put(**values: Any) -> Callable[[Any], None]:
    """Set attributes of a norm."""

    def change(norm: Any) -> None:
        for name, value in values.items():
            setattr(norm, name, value)

    return change


def entry(tensor: str, value: float) -> Callable[[Any], None]:
    """One channel of one tensor of a norm set to a value."""

    def change(norm: Any) -> None:
        held = getattr(norm, tensor)
        if held is not None:
            held.data[len(held) // 2] = value

    return change


def scaled(factor: float) -> Callable[[Any], None]:
    return lambda norm: norm.running_var.mul_(factor)


def moved(deviations: float) -> Callable[[Any], None]:
    return lambda norm: norm.running_mean.add_(deviations * norm.running_var.sqrt())


def short_of_steps(momentum: float, steps: int = 40) -> Callable[[Any], None]:
    """The statistics as they are after so few steps: initial values for the most part."""

    def change(norm: Any) -> None:
        share = (1 - momentum) ** steps
        norm.momentum = momentum
        norm.running_mean.mul_(1 - share)
        norm.running_var.mul_(1 - share).add_(share)
        norm.num_batches_tracked.fill_(steps)

    return change


def of_dtype(dtype: torch.dtype) -> Callable[[Case], None]:
    return lambda case: case.model.to(dtype).train() and None


def halved_statistics(norm: Any) -> None:
    norm.running_mean, norm.running_var = norm.running_mean.half(), norm.running_var.half()


def some_channels(tensor: str, value: float, share: float = 0.25) -> Callable[[Any], None]:
    """A share of the channels, and at least two, set to a value."""

    def change(norm: Any) -> None:
        held = getattr(norm, tensor)
        held.data[: max(2, round(share * len(held)))] = value

    return change


def other_channels(norm: Any) -> None:
    """The statistics of the channel before."""
    norm.running_mean.copy_(norm.running_mean.roll(1))
    norm.running_var.copy_(norm.running_var.roll(1))


def exchanged(case: Case) -> bool:
    """Two layers of as many channels have each other's statistics."""
    for one, other in itertools.combinations(called(case), 2):
        if one.norm.num_features == other.norm.num_features > 1:
            for name in ("running_mean", "running_var"):
                a, b = (getattr(c.norm, name) for c in (one, other))
                kept = a.clone()
                a.copy_(b)
                b.copy_(kept)
            return True
    return False


def grown(factor: float) -> Callable[[Case], bool]:
    """The weights before a norm are larger than when its statistics were taken."""

    def plant(case: Case) -> bool:
        pairs = before_a_norm(case)
        for one in pairs[len(pairs) // 2 :][:1]:
            layer: Any = one.norm
            for tensor in (layer.weight, layer.bias):
                if tensor is not None:
                    tensor.data.mul_(factor)
        return bool(pairs)

    return plant


def branch_gone(case: Case) -> bool:
    """All gammas 0 in the last layer, whose beta has been trained."""
    chosen = last([c for c in called(case) if c.norm.affine])
    for one in chosen:
        one.norm.weight.data.zero_()
        one.norm.bias.data.add_(0.1)
    return bool(chosen)


def gammas_times(factor: float) -> Callable[[Any], None]:
    return lambda norm: norm.weight.mul_(factor)


def twins(change: Callable[[Any], object], noise: float = 0.0) -> Callable[[Case], bool]:
    """The model beside a copy that follows in the parameters."""

    def plant(case: Case) -> bool:
        chosen = called(case)
        target = copy.deepcopy(case.model)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in target.parameters():
                if p.ndim > 1:
                    step = torch.randn(p.shape, generator=generator)
                    p.add_(noise * p.std(correction=0) * step)
            for one in chosen:
                change(target.get_submodule(one.name))
        case.model = nn.ModuleDict({"online": case.model, "target": target}).eval()
        return bool(chosen)

    return plant


# -- TN2xx ----------------------------------------------------------------------------------------


def learning_norm_rests(norm: Any) -> None:
    norm.training = False


def unlearning(norm: Any) -> None:
    norm.requires_grad_(False)


def untracked(norm: Any) -> None:
    norm.track_running_stats = False
    norm.running_mean = norm.running_var = norm.num_batches_tracked = None


def half(norms: list[Called]) -> list[Called]:
    return norms[: (len(norms) + 1) // 2]


def body_frozen(case: Case) -> bool:
    """Transfer learning by requires_grad alone: all parameters but those of the last module."""
    parameters = list(case.model.parameters())
    for p in parameters[:-2]:
        p.requires_grad_(False)
    case.model.train()
    return len(parameters) > 2


# -- TN3xx ----------------------------------------------------------------------------------------


def cut(value: Any, number: int, keep: int) -> Any:
    """The first ``keep`` of ``number`` examples."""
    if isinstance(value, Tensor):
        return value[:keep] if value.ndim and len(value) == number else value
    if isinstance(value, dict):
        return {k: cut(v, number, keep) for k, v in value.items()}
    return type(value)(cut(v, number, keep) for v in value)


def batches_of(size: int) -> Callable[[Case], None]:
    """Training in batches of ``size``."""

    def plant(case: Case) -> None:
        case.batches = [cut(b, examples_of(b), size) for b in case.batches]
        case.model.train()

    return plant


def last_of(size: int) -> Callable[[Case], None]:
    """A remainder of ``size`` examples."""

    def plant(case: Case) -> None:
        batch = case.batches[0]
        case.batches = [*case.batches, cut(batch, examples_of(batch), size)]

    return plant


class Centred(nn.Module):
    """Answers less their mean over the batch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.model(x)
        return y - y.mean(0)


def centred(case: Case) -> None:
    case.model = Centred(case.model).eval()


class Ranked(nn.Module):
    """Channels of an example in relation to the largest of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.abs().amax(0, keepdim=True).clamp(min=1e-6)


def inputs_changed(change: Callable[[Tensor], Tensor]) -> Callable[[Case], bool]:
    """Every second batch is of another distribution."""

    def of(batch: Any) -> Any:
        if isinstance(batch, dict):
            key = next(k for k, v in batch.items() if v.is_floating_point())
            return {**batch, key: change(batch[key])}
        return tuple(change(t) if t.is_floating_point() and t.ndim > 1 else t for t in batch)

    def plant(case: Case) -> bool:
        case.batches = [of(b) if i % 2 else b for i, b in enumerate(case.batches)]
        return True

    return plant


class Again(nn.Module):
    """One norm on two inputs of different distributions, as a head on several levels."""

    def __init__(self, norm: nn.Module, scale: float, shift: float) -> None:
        super().__init__()
        self.norm, self.scale, self.shift = norm, scale, shift

    def forward(self, x: Tensor) -> Tensor:
        other: Tensor = self.norm(self.scale * x + self.shift * x.std())
        here: Tensor = self.norm(x)
        return 0.5 * (here + other)


# -- TN4xx ----------------------------------------------------------------------------------------

_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def before_a_norm(case: Case) -> list[Called]:
    """Linear and convolution layers whose next called layer is a batch norm of their channels."""
    calls = [c for c in called(case, nn.Module) if isinstance(c.norm, (_BatchNorm, *_WEIGHTED))]
    return [
        one
        for one, after in itertools.pairwise(calls)
        if isinstance(one.norm, _WEIGHTED)
        and isinstance(after.norm, _BatchNorm)
        and one.norm.weight.shape[0] == after.norm.num_features
    ]


def biased(where: Place) -> Callable[[Case], bool]:
    """A bias for layers whose bias the norm that is called next takes off again."""

    def plant(case: Case) -> bool:
        pairs = [one for one in before_a_norm(case) if _dead(case, one.name)]
        for pair in where(pairs):
            layer = case.model.get_submodule(pair.name)
            bias = torch.randn(layer.weight.shape[0], generator=torch.Generator().manual_seed(0))  # type: ignore[index]
            layer.bias = nn.Parameter(0.1 * bias)
        return bool(pairs)

    return plant


def _dead(case: Case, name: str) -> bool:
    """Whether a bias of this layer changes no answer while the norms go by the batch."""
    model = copy.deepcopy(case.model)
    for norm in zoo.batch_norms(model):
        norm.train()
    call = calling.Call(model, arguments=case.given.get("arguments"))
    layer: Any = model.get_submodule(name)
    with torch.no_grad():
        answers = []
        for level in (0.0, 3.0):
            layer.bias = nn.Parameter(torch.full((layer.weight.shape[0],), level))
            answers.append(next(calling.tensors_in(call(case.batches[0])[0])))
    return torch.allclose(*answers, rtol=1e-3, atol=1e-3 * float(answers[0].abs().mean()))


def optimized(kind: Any, **options: Any) -> Callable[[Case], bool]:
    """All parameters in one group."""

    def plant(case: Case) -> bool:
        learned = [p for p in case.model.parameters() if p.requires_grad]
        case.given["optimizer"] = kind(learned, **options)
        return any(n.weight is not None for n in zoo.batch_norms(case.model))

    return plant


class Dropped(nn.Module):
    """Dropout by the function, then the norm."""

    def __init__(self, norm: nn.Module, p: float) -> None:
        super().__init__()
        self.norm, self.p = norm, p

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(F.dropout(x, self.p, self.training))
        return y


def swapped_axis(where: Place) -> Callable[[Case], bool]:
    """A norm over features of (N, L, C) replaced by a batch norm, where L is C: no error tells."""

    def plant(case: Case) -> bool:
        norms = [c for c in called(case, nn.LayerNorm) if len(c.shape) == 3]
        chosen = where([c for c in norms if c.shape[1] == c.shape[2]])
        for one in chosen:
            replace(case, one.name, lambda _, n=one.shape[2]: nn.BatchNorm1d(n))
        return bool(chosen)

    return plant


def longer_words(plant: Callable[[Case], bool]) -> Callable[[Case], bool]:
    """Sentences of 16 words, the width of transformers' models here."""

    def longer(case: Case) -> bool:
        generator = torch.Generator().manual_seed(1)
        batch = zoo.named(zoo.tokens(length=16), "input_ids", "labels")
        case.batches = [batch(generator, 12) for _ in range(BATCHES)]
        return plant(case)

    return longer


def rows_of(*layers: Callable[[], nn.Module]) -> Callable[[Case], None]:
    """A little model of (N, 16, 16): positions, then features; with statistics, untrained."""

    def plant(case: Case) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            case.model = nn.Sequential(*[layer() for layer in layers])
            case.batches = [torch.randn(12, 16, 16) for _ in range(BATCHES)]
            case.given = {}
            for batch in case.batches * 10:
                case.model(batch)
        case.model.eval()

    return plant


class Recurrent(nn.LSTM):
    """The states at all positions alone."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        states: Tensor = super().forward(x)[0]
        return states


def vectors(norms: list[Called]) -> list[Called]:
    """Those of (N, C)."""
    return [c for c in norms if len(c.shape) == 2 or all(n == 1 for n in c.shape[2:])]


def one_value_each(norm: Any) -> nn.Module:
    return nn.GroupNorm(norm.num_features, norm.num_features)


def after_pool(norm: Callable[[int], nn.Module]) -> Callable[[Case], bool]:
    """A norm behind the global average."""

    def plant(case: Case) -> bool:
        pools = called(case, nn.AdaptiveAvgPool2d)
        pools = [p for p in pools if p.norm.output_size in {1, (1, 1)}]  # type: ignore[union-attr]
        for one in pools[-1:]:
            replace(case, one.name, lambda pool, n=one.shape[1]: nn.Sequential(pool, norm(n)))
        return bool(pools)

    return plant


def twice(norm: Any) -> nn.Module:
    """The norm and one more, which has the statistics that the first leaves."""
    more = type(norm)(norm.num_features)
    if norm.affine:
        more.running_mean.copy_(norm.bias.detach())
        more.running_var.copy_(norm.weight.detach().square() + 1e-3)
    more.num_batches_tracked.fill_(1000)
    return nn.Sequential(norm, more)


def normed_answer(case: Case) -> bool:
    """A batch norm on the scores."""
    with torch.no_grad():
        out, _ = calling.Call(case.model)(case.batches[0])
    if not isinstance(out, Tensor) or out.ndim != 2:
        return False
    with torch.no_grad():
        case.model = nn.Sequential(case.model, nn.BatchNorm1d(out.shape[1]))
        case.model.eval()[1].train()
        for batch in case.batches * 10:
            case.model(batch[0])
    case.model.eval()
    return True


def before(*layers: nn.Module) -> Callable[[Any], nn.Module]:
    return lambda norm: nn.Sequential(*copy.deepcopy(layers), norm)


# -- TN5xx ----------------------------------------------------------------------------------------


def parallel(size: int | None) -> Callable[[Case], None]:
    def plant(case: Case) -> None:
        if size is not None:
            batches_of(size)(case)
        case.model = patients.on_devices(case.model).train()

    return plant


class Activated(nn.Module):
    """Mixed into a class of norms: an activation of its own."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)  # type: ignore[misc]
        return y.relu()


def subclassed(norm: Any) -> None:
    norm.__class__ = type("Activated" + type(norm).__name__, (Activated, type(norm)), {})


def activations_lost(case: Case) -> bool:
    """What convert_sync_batchnorm makes of norms that hold their activation."""
    if not any(isinstance(m, nn.ReLU) for m in case.model.modules()):
        return False
    for name, module in list(case.model.named_modules()):
        if isinstance(module, nn.ReLU):
            replace(case, name, lambda _: nn.Identity())
    case.model = nn.SyncBatchNorm.convert_sync_batchnorm(case.model).eval()
    return True


def activations_left(case: Case) -> bool:
    """What convert_sync_batchnorm makes of norms that hold their activation, with it inside."""
    case.model = nn.SyncBatchNorm.convert_sync_batchnorm(case.model).eval()
    held = [m for norm in zoo.batch_norms(case.model) for m in norm.children()]
    return any(not isinstance(child, nn.Identity) for child in held)


class Frozen(nn.Module):
    """A frozen norm as other packages have it: four buffers."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.eps = norm.eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, getattr(norm, name).detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        held = (self.running_mean, self.running_var, self.weight, self.bias)
        return F.batch_norm(x, *held, eps=self.eps)  # type: ignore[arg-type]


def frozen_with(tensor: str, value: float) -> Callable[[Any], nn.Module]:
    """A norm frozen in another package's way, one entry of it broken."""

    def change(norm: Any) -> nn.Module:
        made = Frozen(norm)
        getattr(made, tensor)[0] = value
        return made

    return change


def elsewhere_too(case: Case) -> bool:
    """What a norm gets is added to what it makes."""

    class Beside(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.norm = norm

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.norm(x)
            return y + 0.1 * x

    return bool(wrapped(middle, Beside)(case))


# -- where and what -------------------------------------------------------------------------------

# In turn of one half and of the other, so that each has every source and kind.
POOL = (
    "mlp", "convnet", "resnet", "regnet y", "torchvision resnet", "mobilenet v3",
    "segresnet", "monai densenet", "transformer", "levit", "table", "projector",
    "autoencoder", "critic", "wav2vec2 conformer", "transformer with batch norm",
    "timm norms with activation", "pointnet", "unet", "classifier",
)  # fmt: skip
VECTORS = ("mlp", "table", "projector", "reid neck", "simsiam", "two towers", "arcface embedder")
PICTURES = ("convnet", "torchvision resnet", "mobilenet v3", "densenet", "shufflenet", "repvgg",
            "timm norms with activation", "spectral norm")  # fmt: skip
WORDS = ("bert", "gpt2")
SCORERS = ("mlp", "convnet", "torchvision resnet", "mobilenet v3", "pointnet", "densenet")
ACTIVE = ("convnet", "temporal convolutions", "timm norms with activation", "spectral norm",
          "video", "pointnet", "crnn")  # fmt: skip
# A group norm before the batch norms of wav2vec2 takes such changes off.
FLOATS = tuple(
    h for h in POOL if h not in {"table", "transformer with batch norm", "wav2vec2 conformer"}
)

FAULTS: dict[str, tuple[Fault, ...]] = {
    "TN101": (
        Fault("the last reset", on(last, lambda n: n.reset_running_stats())),
        Fault("all reset", on(every, lambda n: n.reset_running_stats())),
        Fault("momentum 0", on(middle, put(momentum=0.0))),
        Fault("reset but for the count", on(middle, lambda n: (
            n.reset_running_stats(), n.num_batches_tracked.fill_(500)))),
    ),
    "TN102": (
        Fault("one nan in a variance", on(first, entry("running_var", float("nan")))),
        Fault("one inf in a mean", on(last, entry("running_mean", float("inf")))),
        Fault("a negative variance", on(middle, entry("running_var", -0.5))),
        Fault("a nan in gamma", on(middle, entry("weight", float("nan")), affine=True)),
    ),
    "TN103": (
        Fault("first variance times 40", on(first, scaled(40)), data=True),
        Fault("last variance over 40", on(last, scaled(1 / 40)), data=True),
        Fault("all variances times 4", on(every, scaled(4)), data=True),
        Fault("means off by 2 deviations", on(every, moved(2)), data=True),
    ),
    "TN104": (
        Fault("Keras's 0.99", on(every, put(momentum=0.99), training=True)),
        Fault("0.9999", on(every, put(momentum=0.9999), training=True)),
        Fault("0.7", on(every, put(momentum=0.7), training=True)),
        Fault("0.001 for 40 steps", on(every, short_of_steps(0.001))),
        Fault("0.005 for 40 steps", on(every, short_of_steps(0.005))),
        Fault("0.01 for 40 steps", on(every, short_of_steps(0.01)), "note"),
    ),
    "TN105": (
        Fault("half", of_dtype(torch.float16)),
        Fault("bfloat16", of_dtype(torch.bfloat16)),
        Fault("statistics alone", on(every, halved_statistics, training=True)),
    ),
    "TN106": (
        Fault("a quarter of gammas at 1e-9", on(last, some_channels("weight", 1e-9), affine=True)),
        Fault("a quarter of gammas at 3e-5", on(last, some_channels("weight", 3e-5), affine=True)),
        Fault("all gammas times 1e-8", on(middle, gammas_times(1e-8), affine=True)),
        Fault("a quarter of variances at 1e-9", on(last, some_channels("running_var", 1e-9))),
        Fault("a variance of 1.6e7", on(last, entry("running_var", 1.6e7))),
    ),
    "TN107": (
        Fault("target as initialized", twins(lambda n: n.reset_running_stats())),
        Fault("target behind by a deviation", twins(moved(1.0), noise=0.02)),
        Fault("target's variances of a third", twins(scaled(1 / 3), noise=0.05)),
    ),
    "TN201": (
        Fault("one trains in evaluation", on(first, lambda n: n.train())),
        Fault("half train in evaluation", on(half, lambda n: n.train())),
        Fault("one rests in training", on(first, learning_norm_rests, training=True, affine=True)),
    ),
    "TN202": (
        Fault("one", on(first, unlearning, training=True, affine=True)),
        Fault("half of them", on(half, unlearning, training=True, affine=True)),
        Fault("the body", body_frozen),
    ),
    "TN205": (
        Fault("one", on(middle, untracked)),
        Fault("all", on(every, untracked)),
        Fault("the last, with data", on(last, untracked), data=True),
    ),
    "TN301": (
        Fault("batches of 2", batches_of(2), data=True, hosts=VECTORS),
        Fault("batches of 4", batches_of(4), data=True, hosts=VECTORS),
        Fault("batches of 7", batches_of(7), data=True, hosts=VECTORS),
    ),
    "TN302": (
        Fault("one left", last_of(1), data=True, hosts=VECTORS),
        Fault("two left", last_of(2), data=True, hosts=VECTORS),
        Fault("three left", last_of(3), data=True, hosts=VECTORS),
    ),
    "TN304": (
        Fault("one without statistics", on(middle, untracked), data=True),
        Fault("all without statistics", on(every, untracked), data=True),
        Fault("answers centred", centred, data=True, hosts=SCORERS),
        Fault("by the largest of the batch", wrapped(middle, before(Ranked())), data=True),
    ),
    "TN305": (
        Fault("shifted by 6", inputs_changed(lambda x: x + 6), data=True, hosts=FLOATS),
        Fault("shifted by 2", inputs_changed(lambda x: x + 2), data=True, hosts=FLOATS),
        Fault("upside down", inputs_changed(lambda x: -x - 1), data=True, hosts=FLOATS),
        Fault("three times as large", inputs_changed(lambda x: 3 * x), data=True, hosts=FLOATS),
    ),
    "TN306": (
        Fault("on 5 x + 3", wrapped(middle, lambda n: Again(n, 5, 3)), data=True),
        Fault("on 2 x", wrapped(first, lambda n: Again(n, 2, 0)), data=True),
        Fault("on x + 1", wrapped(last, lambda n: Again(n, 1, 1)), data=True),
        Fault("on the same", wrapped(middle, lambda n: Again(n, 1, 0)), "note", data=True),
    ),
    "TN401": (
        Fault("one", biased(middle), "note", data=True),
        Fault("all", biased(every), "note", data=True),
        Fault("the last", biased(last), "note", data=True),
    ),
    "TN402": (
        Fault("AdamW, 0.05 at 0.01", optimized(torch.optim.AdamW, lr=0.01, weight_decay=0.05)),
        Fault("SGD, 2e-3 at 0.1", optimized(torch.optim.SGD, lr=0.1, weight_decay=2e-3)),
        Fault("SGD, 5e-4 at 0.1", optimized(torch.optim.SGD, lr=0.1, weight_decay=5e-4), "note"),
    ),
    "TN403": (
        Fault("0.5", wrapped(middle, before(nn.Dropout(0.5))), data=True),
        Fault("0.3", wrapped(last, before(nn.Dropout(0.3))), data=True),
        Fault("0.4 by the function", wrapped(first, lambda n: Dropped(n, 0.4)), data=True),
        Fault("0.05", wrapped(middle, before(nn.Dropout(0.05))), "note", data=True),
    ),
    "TN404": (
        Fault("first of words", longer_words(swapped_axis(first)), data=True, hosts=WORDS),
        Fault("last of words", longer_words(swapped_axis(last)), data=True, hosts=WORDS),
        Fault("after linear and GELU", rows_of(
            lambda: nn.Linear(16, 16), nn.GELU, lambda: nn.BatchNorm1d(16), nn.Flatten,
            lambda: nn.Linear(256, 3)), data=True, hosts=("linear",)),
        Fault("after an LSTM", rows_of(
            lambda: Recurrent(16, 16, batch_first=True), lambda: nn.BatchNorm1d(16), nn.Flatten,
            lambda: nn.Linear(256, 3)), data=True, hosts=("recurrent",)),
    ),
    "TN405": (
        Fault("as many groups as channels", wrapped(
            lambda n: vectors(n)[-1:], one_value_each), data=True, hosts=VECTORS),
        Fault("group norm of an average", after_pool(lambda n: nn.GroupNorm(n, n)), data=True,
              hosts=PICTURES),
        Fault("batches of one", batches_of(1), data=True, hosts=VECTORS),
    ),
    "TN406": (
        Fault("twice", wrapped(middle, twice), data=True),
        Fault("group norm before", wrapped(last, lambda n: before(
            nn.GroupNorm(1, n.num_features))(n)), data=True),
        Fault("on the scores", normed_answer, data=True, hosts=SCORERS),
    ),
    "TN501": (
        Fault("DataParallel", parallel(None), "note"),
        Fault("DataParallel, batches of 12", parallel(12), data=True, hosts=VECTORS),
        Fault("DataParallel, batches of 4", parallel(4), data=True, hosts=VECTORS),
    ),
    "TN502": (
        Fault("activations lost", activations_lost, data=True, hosts=ACTIVE),
        Fault("one with an activation", on(middle, subclassed), "note"),
        Fault("all with an activation", on(every, subclassed), "note"),
    ),
    "TN503": (
        Fault("activation before", wrapped(middle, before(nn.ReLU())), "note", data=True),
        Fault("its input goes elsewhere", elsewhere_too, "note", data=True),
        Fault("called twice", wrapped(last, lambda n: Again(n, 1, 0)), "note", data=True),
    ),
}  # fmt: skip

# Kinds that others planted and found silent; after the first, so that these keep their hosts.
MORE: dict[str, tuple[Fault, ...]] = {
    "TN102": (
        Fault("a nan in a mean frozen elsewhere", wrapped(
            affine(middle), frozen_with("running_mean", float("nan")))),
        Fault("a negative variance frozen elsewhere", wrapped(
            affine(last), frozen_with("running_var", -0.5))),
    ),
    "TN103": (
        Fault("a variance times 30", on(middle, scaled(30)), data=True),
        Fault("a variance over 30", on(first, scaled(1 / 30)), data=True),
        Fault("two layers' exchanged", exchanged, data=True),
        Fault("those of the channel before", on(middle, other_channels), data=True),
        Fault("the sign of the means", on(middle, lambda n: n.running_mean.neg_()), data=True),
        Fault("weights times 3", grown(3), data=True),
    ),
    "TN106": (
        Fault("all gammas times 1e-5", on(middle, gammas_times(1e-5), affine=True)),
        Fault("all gammas times 1e-5, with data", on(last, gammas_times(1e-5), affine=True),
              data=True),
        Fault("all gammas 0, beta trained", branch_gone, data=True),
    ),
    "TN502": (
        Fault("activations left in the norm", activations_left,
              hosts=("timm norms with activation",), blind=True),
    ),
    "TN108": (
        Fault("all variances times 4e5", on(every, scaled(4e5))),
        Fault("a variance times 4e5", on(middle, scaled(4e5))),
        Fault("means plus 1000", on(every, lambda n: n.running_mean.add_(1000))),
    ),
}  # fmt: skip

# Told by truenorm.watch alone, and tested with it.
OF_THE_LEDGER = ("TN203", "TN204", "TN303")
HOSTS_OF_A_FAULT = 6
HOSTS_OF_A_BLIND_FAULT = 4
# A layer of its own that needs its statistics, a bias that is no dead one, norms called twice or
# after no such pooling.
NO_PLACE = {
    ("TN304", "all without statistics", "timm norms with activation"),
    ("TN205", "the last, with data", "cross stages"),
    ("TN304", "one without statistics", "cross stages"),
    ("TN304", "all without statistics", "cross stages"),
    ("TN401", "one", "transformer with batch norm"),
    ("TN401", "the last", "table"),
    ("TN405", "as many groups as channels", "simsiam"),
    ("TN405", "as many groups as channels", "two towers"),
    ("TN405", "group norm of an average", "torchvision resnet"),
}


@dataclass(frozen=True)
class Plan:
    """One fault for one host, not yet planted."""

    code: str
    fault: Fault
    host: str

    def __str__(self) -> str:
        return f"{self.code} {self.fault.name}, {self.host}"

    def made(self) -> Case:
        """The patient."""
        patient = self.tried()
        assert patient is not None, f"{self}: no place for it"
        return patient

    def tried(self) -> Case | None:
        """The patient; None where the host has no place for the fault."""
        patient = case(self.host)
        return None if self.fault.plant(patient) is False else patient


def plans() -> Iterator[Plan]:
    """Every fault with hosts in turn, so that all hosts of the pool get some."""
    turn = 0
    for code, faults in (*FAULTS.items(), *MORE.items()):
        for fault in faults:
            hosts = fault.hosts or POOL
            hosts = tuple(h for h in hosts if code not in zoo.EXPECTED.get(h, set()))
            for i in range(min(HOSTS_OF_A_FAULT, len(hosts))):
                host = hosts[(turn + i) % len(hosts)]
                if (code, fault.name, host) not in NO_PLACE:
                    yield Plan(code, fault, host)
            turn += 7


def blind_plans() -> Iterator[Plan]:
    """Every fault that may be anywhere, with some of the blind hosts in turn."""
    turn = 0
    for code, faults in (*FAULTS.items(), *MORE.items()):
        for fault in faults:
            if fault.hosts is None or fault.blind:
                for i in range(len(blind.NAMES) if fault.blind else HOSTS_OF_A_BLIND_FAULT):
                    host = blind.NAMES[(turn + i) % len(blind.NAMES)]
                    if (code, fault.name, host) not in NO_PLACE:
                        yield Plan(code, fault, host)
                turn += HOSTS_OF_A_BLIND_FAULT


def told(diagnosis: Diagnosis, plan: Plan) -> bool:
    """Whether the fault was found, as loud as it has to be."""
    return any(f.severity != "note" or plan.fault.severity == "note"
               for f in diagnosis.of(plan.code))  # fmt: skip


# What is not found: of a fault, the hosts by name, and why.
_SLIGHT = (
    "These statistics are nearly those that fit: the mean over channels of squared shifts and "
    "logarithms of ratios is below 0.5, and the loss does not suffer."
)
_FEW = (
    "Half of the batches give the layer fewer than 32 values a channel: exact ones are not taken."
)
_MEANS = (
    "TN305 compares the batches' means alone. Here these differ by 0.2 to 0.4 standard deviations, "
    "too little for batches so small; of what is three times as large, the variances differ."
)
_BETWEEN = (
    "The bias is dead, but a sum, a flatten or a transpose stands between its layer and the norm, "
    "which TN401 does not look through."
)
_POOLED = (
    "TN502 asks that most norms go straight into the next layer; here half of them or more go "
    "into a pooling, a sum or a dropout."
)
_DATA = (
    "It is behind a weight that takes 9 values, an embedding's 3 and 6 numbers, which no weight "
    "makes: they may be the data as they come, and TN108 judges no such layer."
)
MISSED: dict[tuple[str, str], tuple[tuple[str, ...], str]] = {
    ("TN103", "all variances times 4"): (("table",), _FEW),
    ("TN103", "a variance times 30"): (("table", "projector"), _FEW),
    ("TN103", "two layers' exchanged"): (("transformer",), _SLIGHT),
    ("TN103", "those of the channel before"): (
        ("table", "projector", "critic", "transformer with batch norm"), f"{_SLIGHT} {_FEW}",
    ),
    ("TN103", "the sign of the means"): (("unet", "classifier"), _SLIGHT),
    ("TN108", "a variance times 4e5"): (("table",), _DATA),
    ("TN305", "upside down"): (("autoencoder", "critic", "unet"), _MEANS),
    ("TN305", "three times as large"): (("mlp",), _MEANS),
    ("TN401", "the last"): (("segresnet", "transformer", "levit"), _BETWEEN),
    ("TN404", "last of words"): (("gpt2",), (
        "Its features come from transformers' Conv1D, an addmm and a view, which TN404 does not "
        "know to keep features in the last axis."
    )),
    ("TN502", "activations lost"): (
        ("convnet", "temporal convolutions", "spectral norm", "video", "pointnet"), _POOLED,
    ),
}  # fmt: skip


def missed(plan: Plan) -> str:
    """Why the doctor does not find it; empty if it does."""
    hosts, why = MISSED.get((plan.code, plan.fault.name), ((), ""))
    return why if plan.host in hosts else ""
