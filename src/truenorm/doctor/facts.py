"""What the checks look at: each normalization as it stands, and as it works on data."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from truenorm.calling import call as calling
from truenorm.calling.borrowing import to_eval, unwrapped
from truenorm.calling.flow import Flow, flow_of
from truenorm.calling.nested import examples_of, tensors_in
from truenorm.doctor.initial import mostly_drawn
from truenorm.doctor.scores import losses_of, rights_of
from truenorm.errors import InputError
from truenorm.layers.batch_norm import BatchNorm
from truenorm.layers.foreign import epsilon, frozen_statistics
from truenorm.layers.functional import Moments, moments, valid, wide
from truenorm.layers.norms import NORMS

MOST_ANSWERS = 2**20  # numbers of a batch's answers that are kept to be compared
MOST_BATCHES = 32  # enough for every threshold here; a loader of any length may be given


@dataclass
class Seen:
    """One call of a norm on one batch: its input, as evaluation gives it.

    Attributes:
        batch: number of the batch.
        call: number of the call in its forward.
        shape: of the input.
        moments: of the input, (1, C), over batch and positions.
        between: variance between the rows' means, (C,), rows of one example counted as one; what
            i.i.d. batches of N rows would differ by is this over N.
    """

    batch: int
    call: int
    shape: tuple[int, ...]
    moments: Moments
    between: Tensor


@dataclass(eq=False)
class NormFacts:
    """One normalization layer: the module as it stands, and what it was seen to get."""

    name: str
    module: nn.Module
    seen: list[Seen] = field(default_factory=list)

    @property
    def eps(self) -> float:
        """What it adds to the variance."""
        return epsilon(self.module)

    @property
    def is_batch(self) -> bool:
        """Whether it normalizes over the batch, or by what a batch norm has gathered."""
        return isinstance(self.module, _BatchNorm) or self.foreign

    @functools.cached_property
    def foreign(self) -> bool:
        """Whether it is another package's frozen batch norm, which is none of torch's."""
        return frozen_statistics(self.module)

    @property
    def momentum(self) -> float | None:
        """The weight of a new batch in the running statistics; None where it is not one number."""
        momentum = getattr(self.module, "momentum", None)
        return momentum if isinstance(momentum, (int, float)) else None

    @property
    def tracked(self) -> tuple[Tensor, Tensor, int] | None:
        """Running mean and variance and the number of batches, if it has them."""
        mean, var = (getattr(self.module, n, None) for n in ("running_mean", "running_var"))
        if not isinstance(mean, Tensor) or not isinstance(var, Tensor):
            return None
        batches = getattr(self.module, "num_batches_tracked", None)
        return mean, var, -1 if batches is None else int(batches)

    @property
    def untouched(self) -> bool:
        """Whether its statistics are those that its constructor left."""
        if self.tracked is None:
            return False
        mean, var, batches = self.tracked
        return batches <= 0 and not mean.any() and bool((var == 1).all())

    @property
    def fixed(self) -> bool:
        """Whether it is frozen by its class or by TrueNorm's option, and so cannot move."""
        return self.foreign or (isinstance(self.module, BatchNorm) and self.module.options.frozen)

    @property
    def learns(self) -> bool:
        """Whether gamma or beta has a gradient."""
        return any(p.requires_grad for p in self.module.parameters(recurse=False))

    @property
    def initial(self) -> bool:
        """Whether gamma is one constant of 0 or 1 and beta 0, as constructors leave them."""
        weight, bias = self.learned
        constant = weight is None or not bool((weight.detach() * (weight.detach() - 1)).any())
        return constant and (bias is None or not bias.detach().any())

    @property
    def learned(self) -> tuple[Tensor | None, Tensor | None]:
        """Its weight and bias, where it has them."""
        pair = (getattr(self.module, n, None) for n in ("weight", "bias"))
        weight, bias = (t if isinstance(t, Tensor) else None for t in pair)
        return weight, bias


@dataclass
class Evaluation:
    """Loss (a mean over examples), accuracy and answers of one evaluation, where there are any."""

    losses: list[float] = field(default_factory=list)
    weights: list[int] = field(default_factory=list)
    right: float = 0.0
    judged: int = 0
    answers: list[Tensor | None] = field(default_factory=list)  # of each batch, where it has any
    lost: list[Tensor | None] = field(default_factory=list)  # each example's loss, by batches
    hit: list[Tensor | None] = field(default_factory=list)  # likewise, whether it is right

    def add(
        self,
        output: Any,
        target: Any,
        examples: int,
        loss: calling.Loss | None,
        *,
        each: bool = False,
    ) -> None:
        """Take in what the model made of one batch; also of ``each`` example by itself."""
        if each:
            self.lost.append(losses_of(output, target, examples, loss))
            self.hit.append(rights_of(output, target))
        value = calling.loss_of(output, target, loss)
        accuracy = calling.accuracy_of(output, target)
        if value is not None:
            self.losses.append(value)
            self.weights.append(examples)
        if accuracy is not None:
            self.right += accuracy * examples
            self.judged += examples
        answers = calling.answers_of(output, examples)
        self.answers.append(None if answers is None else _sampled(answers.detach()))

    @property
    def loss(self) -> float | None:
        """Mean over examples."""
        if not self.losses:
            return None
        total = sum(self.weights)
        return sum(n * x for n, x in zip(self.weights, self.losses, strict=True)) / total

    @property
    def accuracy(self) -> float | None:
        """Share of examples classified right."""
        return self.right / self.judged if self.judged else None


class Trial(NamedTuple):
    """What became of the loss on held-out batches when a remedy was tried."""

    before: float
    after: float
    worse: bool

    @property
    def change(self) -> str:
        """Both losses."""
        return f"{self.before:.4g} -> {self.after:.4g}"


class Distance(NamedTuple):
    """How far a layer's running statistics are off.

    Attributes:
        layer: its dotted name.
        ratio: running variance over what it is compared with, of the median channel.
        shift: of the means, in standard deviations, of a usual channel.
    """

    layer: str
    ratio: float
    shift: float


class Distances(NamedTuple):
    """The layers in the order of the forward, and from where on a layer is told of.

    Attributes:
        expected: what kind of statistics they are compared with, in a word.
        code: of the check that tells.
        layers: as above.
        ratio: a variance that is more than so many times too large or small is told.
        shift: likewise of means.
    """

    expected: Literal["exact", "likely"]
    code: str
    layers: tuple[Distance, ...]
    ratio: float
    shift: float


@dataclass
class Facts:
    """All that a diagnosis is made from.

    Attributes:
        model: as given.
        norms: every normalization layer, by dotted name.
        optimizer: as given.
        batches: the batches of data that were looked at, at most :data:`MOST_BATCHES`.
        call: how to call the model on one.
        loss: as given.
        arguments: as given.
        held_out: batches to try remedies on, as given.
        flow: the operations of one forward, if there are data.
        evaluated: what the batches come to in evaluation, with the running statistics.
        last: examples in the last batch of the data, also where it was not looked at; None if
            that is not known.
        tried: what remedies came to, by their names; filled when a check first asks.
        distances: of the layers that a check has compared with data, or with their weights.
    """

    model: nn.Module
    norms: dict[str, NormFacts]
    optimizer: torch.optim.Optimizer | None = None
    batches: list[Any] = field(default_factory=list)
    call: calling.Call | None = None
    loss: calling.Loss | None = None
    arguments: calling.Arguments | None = None
    held_out: list[Any] | None = None
    flow: Flow | None = None
    evaluated: Evaluation = field(default_factory=Evaluation)
    last: int | None = None
    tried: dict[str, Trial | None] = field(default_factory=dict)
    distances: Distances | None = None

    @property
    def batch_norms(self) -> list[NormFacts]:
        """Those that normalize over the batch."""
        return [norm for norm in self.norms.values() if norm.is_batch]

    @property
    def inner(self) -> nn.Module:
        """The module itself, without wrappers: this is what is called."""
        return unwrapped(self.model)

    @property
    def untrained(self) -> bool:
        """Whether the model looks as its constructor left it.

        All statistics do, and all gammas and betas; or, where these begin random, most weights.
        """
        tracking = [norm for norm in self.batch_norms if norm.tracked is not None]
        stepped = self.optimizer is not None and bool(self.optimizer.state)
        if stepped or not tracking or not all(norm.untouched for norm in tracking):
            return False
        return all(norm.initial for norm in tracking) or self._drawn

    @functools.cached_property
    def _drawn(self) -> bool:
        return mostly_drawn(self.model)

    @property
    def trains(self) -> bool:
        """Whether the model is in train mode, whatever a wrapper around it says."""
        parts = [m for m in self.model.modules() if not any(m.children())]
        return self.inner.training and any(part.training for part in parts)

    def moves(self, norm: NormFacts) -> bool:
        """Whether training moves the statistics of ``norm``: it is frozen in no way."""
        if norm.fixed:
            return False
        if self.trains:
            return norm.module.training
        own = list(norm.module.parameters(recurse=False))
        learns = any(p.requires_grad for p in self.model.parameters())
        return not own or not learns or norm.learns

    def evaluate(self, parts: Sequence[tuple[int, Any]], *, each: bool = False) -> Evaluation:
        """Evaluate batches as the model stands, in its present modes.

        Args:
            parts: numbered batches; each is begun from the random state that its number gives, so
                that a model that draws in evaluation draws the same each time.
            each: also take in each example by itself.
        """
        result = Evaluation()
        assert self.call is not None
        for number, batch in parts:
            torch.manual_seed(number)
            with torch.no_grad():
                out, target = self.call(batch)
            result.add(out, target, examples_of(batch), self.loss, each=each)
        return result


def _sampled(answers: Tensor) -> Tensor:
    """Some of the numbers of each example, evenly spread, where there are very many."""
    step = -(-answers.numel() // MOST_ANSWERS)
    return answers.flatten(1)[:, ::step].clone() if step > 1 and answers.ndim > 1 else answers


def _shapeless(module: nn.Module) -> bool:
    """Whether it is lazy and no forward has given it its shape: there is nothing to look at."""
    return isinstance(module, LazyModuleMixin) and module.has_uninitialized_params()


def gather(
    model: nn.Module,
    data: Iterable[Any] | None,
    *,
    optimizer: torch.optim.Optimizer | None,
    loss: calling.Loss | None,
    device: torch.device | str | None,
    arguments: calling.Arguments | None,
    held_out: list[Any] | None = None,
) -> Facts:
    """Collect the facts; the caller has borrowed the model and gives it back.

    Raises:
        InputError: the model has no normalization, or data have no batch.
    """
    norms = {
        name: NormFacts(name, module)
        for name, module in model.named_modules()
        if isinstance(module, NORMS) or frozen_statistics(module)
    }
    facts = Facts(model, norms, optimizer)
    if data is None:
        facts.norms = {n: norm for n, norm in norms.items() if not _shapeless(norm.module)}
        return facts
    facts.batches, facts.last = _taken(data)
    if not facts.batches:
        raise InputError("data has no batch; give an iterable of at least one.")
    facts.call = calling.Call(facts.inner, device=device, arguments=arguments)
    facts.loss, facts.arguments = loss, arguments
    facts.held_out = held_out
    return facts


def _taken(data: Iterable[Any]) -> tuple[list[Any], int | None]:
    """At most :data:`MOST_BATCHES` batches, and how many examples the last one of all has.

    Of a longer sequence the last batch is among them; a longer DataLoader says how long its last
    one is; of other streams nobody knows.
    """
    if isinstance(data, Tensor) or not isinstance(data, Iterable):
        raise InputError(
            f"data must be batches that can be iterated, got {type(data).__name__}; put a single "
            "batch into a list."
        )
    if isinstance(data, (list, tuple)) and len(data) > MOST_BATCHES:
        data = [*data[: MOST_BATCHES - 1], data[-1]]
    stream = iter(data)
    batches = list(itertools.islice(stream, MOST_BATCHES))
    if len(batches) < MOST_BATCHES or isinstance(data, list):
        return batches, examples_of(batches[-1]) if batches else None
    return batches, _remainder(data)


def _remainder(data: Any) -> int | None:
    """Examples in the last batch of a DataLoader with a batch size, by arithmetic."""
    size, sampler = getattr(data, "batch_size", None), getattr(data, "sampler", None)
    try:
        examples = len(sampler)  # type: ignore[arg-type]
    except TypeError:
        return None
    if not isinstance(size, int) or getattr(data, "drop_last", False):
        return None
    return examples % size or size


def observe(facts: Facts) -> None:
    """Let the batches pass in evaluation: fills ``flow`` and what each norm was seen to get."""
    model, call = facts.model, facts.call
    assert call is not None
    to_eval(model)
    first = facts.batches[0]
    if any(map(_shapeless, model.modules())):
        with torch.no_grad():
            call(first)
    facts.flow = flow_of(model, lambda: call(first)[0])
    place = {"batch": 0}
    calls: dict[str, int] = {}
    handles = []
    for norm in facts.norms.values():

        def look(_: nn.Module, args: Any, kwargs: Any, norm: NormFacts = norm) -> None:
            inputs = list(tensors_in((args, kwargs)))
            if (
                inputs
                and inputs[0].is_floating_point()
                and inputs[0].ndim >= 2
                and inputs[0].numel()
            ):
                number = calls.get(norm.name, 0)
                calls[norm.name] = number + 1
                mask = kwargs.get("mask", args[1] if len(args) > 1 else None)
                number_of = examples_of(facts.batches[place["batch"]])
                norm.seen.append(_seen(inputs[0], mask, place["batch"], number, number_of))

        handles.append(norm.module.register_forward_pre_hook(look, with_kwargs=True))
    try:
        with torch.no_grad():
            for place["batch"], batch in enumerate(facts.batches):
                calls.clear()
                torch.manual_seed(place["batch"])  # see Facts.evaluate
                out, target = call(batch)
                facts.evaluated.add(out, target, examples_of(batch), facts.loss, each=True)
    finally:
        for handle in handles:
            handle.remove()
    facts.norms = {n: norm for n, norm in facts.norms.items() if not _shapeless(norm.module)}


def _seen(x: Tensor, mask: Any, batch: int, call: int, examples: int) -> Seen:
    x = wide(x.detach())
    where = valid(mask, x) if isinstance(mask, Tensor) and mask.dtype == torch.bool else None
    if where is not None:
        x = torch.where(where, x, 0)
    means = (x.flatten(2).mean(2) if x.ndim > 2 else x).double()
    rows, between = len(means), means.var(0) if len(means) > 1 else means.new_zeros(x.shape[1])
    if 1 < examples < rows and rows % examples == 0:
        # Several rows of one example, as the frames of a video, are alike; they may lie together
        # or be apart.
        grouped = (
            means.view(examples, -1, x.shape[1]).mean(1),
            means.view(-1, examples, x.shape[1]).mean(0),
        )
        between = torch.maximum(grouped[0].var(0), grouped[1].var(0)) * (rows / examples)
    return Seen(batch, call, tuple(x.shape), moments(x, where), between.cpu())


def values_per_channel(shape: tuple[int, ...]) -> int:
    """Values that batch norm pools for a channel of an input of ``shape``."""
    return shape[0] * math.prod(shape[2:])
