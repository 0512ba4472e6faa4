"""Training loops as people write them, each under a ledger: healthy ones, and ones with a fault.

Every loop makes a small model, trains it for a while with ``truenorm.watch`` around it, and gives
the ledger back. A fault names the codes and the severity that must be found.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint

import truenorm as tn
from patients import batches, norms

STEPS = 72  # more than two windows of the ledger: the last ones may be summed
EPOCH = 24
Batch = tuple[Tensor, Tensor]
Loop = Callable[[], tn.Ledger]
HEALTHY: dict[str, Loop] = {}
FAULTY: dict[str, tuple[str, str, Loop]] = {}


def healthy(loop: Loop) -> Loop:
    """Enter a loop that no error and no warning may come of."""
    HEALTHY[loop.__name__] = loop
    return loop


def faulty(code: str, severity: str) -> Callable[[Loop], Loop]:
    """Enter a loop with the fault ``code``, which is as bad as ``severity``."""

    def enter(loop: Loop) -> Loop:
        FAULTY[loop.__name__] = code, severity, loop
        return loop

    return enter


class Net(nn.Module):
    """An encoder with two batch norms, and a head with one."""

    def __init__(self, norm: Callable[..., nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), norm(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2, bias=False), norm(8), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Sequential(
            nn.Conv2d(8, 8, 3, bias=False), norm(8), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


def made(norm: Callable[..., nn.Module] = nn.BatchNorm2d) -> tuple[Net, torch.optim.Optimizer]:
    """The net, in train mode, and its optimizer."""
    torch.manual_seed(0)
    model = Net(norm).train()
    return model, torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)


def data(steps: int = STEPS, *, seed: int = 1) -> Iterator[Batch]:
    """Batches of images (24, 3, 12, 12), a few that come again."""
    return itertools.islice(itertools.cycle(batches("convnet", 16, seed=seed)), steps)


def learn(model: Any, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    """One plain step."""
    x, y = batch
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def validate(model: nn.Module) -> None:
    """A few held-out batches, in the mode that the model is in."""
    with torch.no_grad():
        for x, _ in data(3, seed=9):
            model(x)


def trained(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: Callable[[Batch], object] | None = None,
    *,
    watched: nn.Module | None = None,
    after_epoch: Callable[[], object] | None = None,
    stream: Iterator[Batch] | None = None,
) -> tn.Ledger:
    """All steps under a ledger; ``step`` makes one of a batch."""
    with tn.watch(model if watched is None else watched, optimizer) as ledger:
        for i, batch in enumerate(stream or data(), 1):
            learn(model, optimizer, batch) if step is None else step(batch)
            if after_epoch is not None and i % EPOCH == 0:
                after_epoch()
    return ledger


# -- healthy ------------------------------------------------------------------------------------


@healthy
def plain_with_validation() -> tn.Ledger:
    model, optimizer = made()

    def rest() -> None:
        model.eval()
        validate(model)
        model.train()

    return trained(model, optimizer, after_epoch=rest)


@healthy
def validation_after_each_step() -> tn.Ledger:
    model, optimizer = made()

    def step(batch: Batch) -> None:
        learn(model, optimizer, batch)
        model.eval()
        validate(model)
        model.train()

    return trained(model, optimizer, step)


@healthy
def validation_with_gradients_on() -> tn.Ledger:
    model, optimizer = made()

    def rest() -> None:
        model.eval()
        for x, _ in data(3, seed=9):
            model(x)
        model.train()

    return trained(model, optimizer, after_epoch=rest)


@healthy
def gradient_accumulation() -> tn.Ledger:
    model, optimizer = made()

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        for x, y in zip(*(t.split(8) for t in batch), strict=True):
            (F.cross_entropy(model(x), y) / 3).backward()
        optimizer.step()

    return trained(model, optimizer, step)


def adversarial(watch: Callable[[nn.Module, nn.Module], nn.Module]) -> tn.Ledger:
    """A generator and a discriminator as in DCGAN; one optimizer for each."""
    torch.manual_seed(0)
    generator = nn.Sequential(
        nn.Linear(4, 8 * 36), nn.Unflatten(1, (8, 6, 6)), nn.BatchNorm2d(8), nn.ReLU(),
        nn.ConvTranspose2d(8, 3, 2, stride=2), nn.Tanh(),
    )  # fmt: skip
    discriminator = nn.Sequential(Net(), nn.Linear(3, 1))
    for_g = torch.optim.Adam(generator.parameters(), lr=2e-3)
    for_d = torch.optim.Adam(discriminator.parameters(), lr=2e-3)
    judge = F.binary_cross_entropy_with_logits

    def step(batch: Batch) -> None:
        real = batch[0]
        ones, zeros = torch.ones(len(real), 1), torch.zeros(len(real), 1)
        made_up = generator(torch.randn(len(real), 4))
        for_d.zero_grad()
        judge(discriminator(real), ones).backward()
        judge(discriminator(made_up.detach()), zeros).backward()
        for_d.step()
        for_g.zero_grad()
        judge(discriminator(made_up), ones).backward()
        for_g.step()

    both = nn.ModuleList([generator, discriminator]).train()
    return trained(both, for_d, step, watched=watch(generator, discriminator))


@healthy
def gan_with_the_discriminator_watched() -> tn.Ledger:
    return adversarial(lambda generator, discriminator: discriminator)


@healthy
def gan_with_both_watched() -> tn.Ledger:
    return adversarial(lambda *both: nn.ModuleList(both))


@healthy
def two_views_of_a_batch() -> tn.Ledger:
    model, optimizer = made()

    def step(batch: Batch) -> None:
        x, _ = batch
        optimizer.zero_grad()
        views = [x + 0.3 * torch.randn_like(x) for _ in range(2)]
        F.mse_loss(*map(model, views)).backward()
        optimizer.step()

    return trained(model, optimizer, step)


class Sam(torch.optim.Optimizer):
    """Sharpness-aware minimization (Foret et al. 2021), around another optimizer."""

    def __init__(self, params: Any, base: torch.optim.Optimizer) -> None:
        super().__init__(params, {"rho": 0.05})
        self.base, self.moved = base, []

    @torch.no_grad()
    def first_step(self) -> None:
        self.moved = [(p, 0.05 * F.normalize(p.grad, dim=None)) for p in self._with_gradient()]
        for p, up in self.moved:
            p.add_(up)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for p, up in self.moved:
            p.sub_(up)
        self.base.step()
        self.zero_grad()

    def _with_gradient(self) -> list[Any]:
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]


def sharpness_aware(wrapped: bool) -> tn.Ledger:
    model, base = made()
    sam = Sam(model.parameters(), base)

    def step(batch: Batch) -> None:
        x, y = batch
        F.cross_entropy(model(x), y).backward()
        sam.first_step()
        F.cross_entropy(model(x), y).backward()
        sam.second_step()

    return trained(model, sam if wrapped else base, step)


@healthy
def sam_with_its_own_optimizer_given() -> tn.Ledger:
    return sharpness_aware(wrapped=True)


@healthy
def sam_with_the_inner_optimizer_given() -> tn.Ledger:
    return sharpness_aware(wrapped=False)


def checkpointed(norm: Callable[..., nn.Module], *, reentrant: bool) -> tn.Ledger:
    """The encoder's forward is repeated in the backward pass."""
    model, optimizer = made(norm)

    def forward(x: Tensor) -> Tensor:
        z = checkpoint(model.encoder, x.requires_grad_(), use_reentrant=reentrant)
        return model.head(z)

    def step(batch: Batch) -> None:
        x, y = batch
        optimizer.zero_grad()
        F.cross_entropy(forward(x), y).backward()
        optimizer.step()

    return trained(model, optimizer, step)


@healthy
def reentrant_checkpoint_of_truenorms_layers() -> tn.Ledger:
    return checkpointed(tn.BatchNorm2d, reentrant=True)


@healthy
def checkpoint_of_truenorms_layers() -> tn.Ledger:
    return checkpointed(tn.BatchNorm2d, reentrant=False)


@healthy
def update_bn_of_the_model() -> tn.Ledger:
    model, optimizer = made()
    return trained(model, optimizer, after_epoch=lambda: update_bn(data(5), model))


@healthy
def update_bn_of_one_batch() -> tn.Ledger:
    model, optimizer = made()
    return trained(model, optimizer, after_epoch=lambda: update_bn(data(1), model))


@healthy
def update_bn_alone() -> tn.Ledger:
    model, _ = made()
    with tn.watch(model) as ledger:
        update_bn(data(5), model)
    return ledger


@healthy
def weight_averaging() -> tn.Ledger:
    """The averaged copy is watched, and has its statistics made at the end of each epoch."""
    model, optimizer = made()
    averaged = AveragedModel(model)

    def average() -> None:
        averaged.update_parameters(model)
        update_bn(data(5), averaged)
        averaged.eval()
        validate(averaged)

    return trained(model, optimizer, watched=averaged, after_epoch=average)


@healthy
def recalibration_inside() -> tn.Ledger:
    model, optimizer = made()
    return trained(
        model, optimizer, after_epoch=lambda: tn.recalibrate(model, [x for x, _ in data(5)])
    )


@healthy
def learning_rate_finder() -> tn.Ledger:
    """Steps with a growing rate, then all is as it was and training begins."""
    model, optimizer = made()
    with tn.watch(model, optimizer) as ledger:
        kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        for i, batch in enumerate(data(EPOCH)):
            optimizer.param_groups[0]["lr"] = 1e-5 * 1.4**i
            learn(model, optimizer, batch)
        model.load_state_dict(kept[0])
        optimizer.load_state_dict(kept[1])
        for batch in data():
            learn(model, optimizer, batch)
    return ledger


@healthy
def lbfgs() -> tn.Ledger:
    model, _ = made()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.05, max_iter=4)

    def step(batch: Batch) -> None:
        x, y = batch

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)

    return trained(model, optimizer, step, stream=data(EPOCH))


@healthy
def mixed_precision() -> tn.Ledger:
    """With a gradient scaler that skips the first steps, as it does when its scale is too high."""
    model, optimizer = made()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1000)
    skip = iter([True, True])

    def step(batch: Batch) -> None:
        x, y = batch
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss * (1e4 if next(skip, False) else 1e-6)).backward()
        scaler.step(optimizer)
        scaler.update()

    return trained(model, optimizer, step)


@healthy
def data_parallel() -> tn.Ledger:
    model, optimizer = made()
    return trained(nn.DataParallel(model), optimizer)


@healthy
def frozen_backbone_in_eval_mode() -> tn.Ledger:
    model, _ = made()
    model.encoder.requires_grad_(False)
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.02)

    def rest() -> None:
        model.eval()
        validate(model)
        model.train()
        model.encoder.eval()

    model.encoder.eval()
    return trained(model, optimizer, after_epoch=rest)


@healthy
def frozen_backbone_by_truenorm() -> tn.Ledger:
    model, _ = made()
    tn.convert(model, to="frozen", where="encoder")
    model.encoder.requires_grad_(False)
    return trained(model, torch.optim.SGD(model.head.parameters(), lr=0.02))


@healthy
def features_of_a_frozen_backbone_without_gradients() -> tn.Ledger:
    model, _ = made()
    model.encoder.requires_grad_(False).eval()
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.02)

    def step(batch: Batch) -> None:
        x, y = batch
        with torch.no_grad():
            z = model.encoder(x)
        learn(model.head, optimizer, (z, y))

    return trained(model, optimizer, step)


@healthy
def parts_called_one_by_one() -> tn.Ledger:
    model, optimizer = made()

    def step(batch: Batch) -> None:
        learn(lambda x: model.head(model.encoder(x)), optimizer, batch)

    def rest() -> None:
        model.eval()
        with torch.no_grad():
            for x, _ in data(3, seed=9):
                model.head(model.encoder(x))
        model.train()

    return trained(model, optimizer, step, after_epoch=rest)


@healthy
def one_norm_at_two_places() -> tn.Ledger:
    """Siamese: the same module stands under two names, and gets inputs that are alike."""
    model, _ = made()
    twin = nn.Module()
    twin.left, twin.right, twin.forward = model, model, lambda x: model(x) + model(x.flip(0))
    return trained(twin, torch.optim.SGD(twin.parameters(), lr=0.01))


@healthy
def weights_shared_by_two_norms() -> tn.Ledger:
    model, _ = made()
    first, second, _ = norms(model)
    second.weight, second.bias = first.weight, first.bias
    return trained(model, torch.optim.SGD(model.parameters(), lr=0.02))


@healthy
def two_optimizers() -> tn.Ledger:
    model, _ = made()
    pair = [torch.optim.SGD(part.parameters(), lr=0.02) for part in (model.encoder, model.head)]

    def step(batch: Batch) -> None:
        x, y = batch
        for optimizer in pair:
            optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for optimizer in pair:
            optimizer.step()

    return trained(model, None, step)  # type: ignore[arg-type]


@healthy
def parameters_moved_by_hand() -> tn.Ledger:
    model, _ = made()

    def step(batch: Batch) -> None:
        x, y = batch
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(p.grad, alpha=0.02)

    return trained(model, None, step)  # type: ignore[arg-type]


@healthy
def mean_teacher() -> tn.Ledger:
    """The teacher runs in train mode without gradients and follows the student."""
    model, optimizer = made()
    teacher = copy.deepcopy(model).requires_grad_(False)

    def step(batch: Batch) -> None:
        x, y = batch
        optimizer.zero_grad()
        with torch.no_grad():
            aim = teacher(x)
        out = model(x)
        (F.cross_entropy(out, y) + F.mse_loss(out, aim)).backward()
        optimizer.step()
        with torch.no_grad():
            for t, p in zip(teacher.parameters(), model.parameters(), strict=True):
                t.lerp_(p, 0.05)

    return trained(model, optimizer, step, watched=nn.ModuleList([model, teacher]))


OURS: dict[str, dict[str, Any]] = {
    "plain": {}, "ghost": {"ghost": 8}, "renorm": {"renorm": tn.Renorm()}, "sync": {"sync": True},
    "min_count": {"min_count": 2}, "act": {"act": "relu"}, "frozen": {"frozen": True},
}  # fmt: skip


def truenorms_layers(**options: Any) -> tn.Ledger:
    model, optimizer = made(lambda c: tn.BatchNorm2d(c, **options))
    return trained(model, optimizer, after_epoch=lambda: (model.eval(), model.train()))


for _name, _options in OURS.items():
    HEALTHY[f"truenorms_layers_{_name}"] = lambda options=_options: truenorms_layers(**options)  # type: ignore[misc]


@healthy
def truenorms_layers_commit() -> tn.Ledger:
    model, optimizer = made(lambda c: tn.BatchNorm2d(c, commit="step"))
    tn.attach(optimizer, model)
    return trained(model, optimizer)


@healthy
def truenorms_layers_mask() -> tn.Ledger:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.last = tn.BatchNorm1d(6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.norm(x, torch.arange(len(x)) < len(x) - 2))

    model = Masked()
    rows = itertools.islice(itertools.cycle(batches("mlp", 16)), STEPS)
    return trained(model, torch.optim.SGD(model.parameters(), lr=0.02), stream=rows)


# -- with a fault -------------------------------------------------------------------------------


@faulty("TN203", "error")
def validation_in_train_mode() -> tn.Ledger:
    model, optimizer = made()
    return trained(model, optimizer, after_epoch=lambda: validate(model))


@faulty("TN203", "warning")
def validation_in_train_mode_with_gradients_on() -> tn.Ledger:
    model, optimizer = made()
    return trained(model, optimizer, after_epoch=lambda: [model(x) for x, _ in data(3, seed=9)])


@faulty("TN203", "warning")
def a_dummy_pass_before_training() -> tn.Ledger:
    model, optimizer = made()
    with tn.watch(model, optimizer) as ledger:
        with torch.no_grad():
            model(torch.zeros(2, 3, 12, 12))
        for batch in data():
            learn(model, optimizer, batch)
    return ledger


@faulty("TN203", "warning")
def an_attack_in_train_mode() -> tn.Ledger:
    model, optimizer = made()

    def step(batch: Batch) -> None:
        x, y = batch
        x = x.clone().requires_grad_()
        (push,) = torch.autograd.grad(F.cross_entropy(model(x), y), x)
        learn(model, optimizer, ((x + 0.1 * push.sign()).detach(), y))

    return trained(model, optimizer, step)


@faulty("TN203", "error")
def parts_validated_in_train_mode() -> tn.Ledger:
    model, optimizer = made()

    def step(batch: Batch) -> None:
        learn(lambda x: model.head(model.encoder(x)), optimizer, batch)

    def rest() -> None:
        with torch.no_grad():
            for x, _ in data(3, seed=9):
                model.head(model.encoder(x))

    return trained(model, optimizer, step, after_epoch=rest)


@faulty("TN201", "warning")
def train_forgotten_after_validation() -> tn.Ledger:
    model, optimizer = made()

    def rest() -> None:
        model.eval()
        validate(model)

    return trained(model, optimizer, after_epoch=rest)


@faulty("TN201", "warning")
def training_in_eval_mode() -> tn.Ledger:
    model, optimizer = made()
    for batch in data():
        learn(model, optimizer, batch)
    model.eval()
    return trained(model, optimizer)


@faulty("TN202", "error")
def frozen_parameters_and_moving_statistics() -> tn.Ledger:
    model, _ = made()
    model.encoder.requires_grad_(False)
    return trained(model, torch.optim.SGD(model.head.parameters(), lr=0.02))


@faulty("TN202", "error")
def train_undoes_the_freezing() -> tn.Ledger:
    model, _ = made()
    model.encoder.requires_grad_(False).eval()
    return trained(
        model, torch.optim.SGD(model.head.parameters(), lr=0.02), after_epoch=model.train
    )


@faulty("TN102", "error")
def statistics_poisoned() -> tn.Ledger:
    model, optimizer = made()
    stream = [(x * float("nan") if i == 60 else x, y) for i, (x, y) in enumerate(data())]
    return trained(model, optimizer, stream=iter(stream))


@faulty("TN204", "warning")
def reentrant_checkpoint() -> tn.Ledger:
    return checkpointed(nn.BatchNorm2d, reentrant=True)


@faulty("TN204", "warning")
def checkpoint_without_reentry() -> tn.Ledger:
    return checkpointed(nn.BatchNorm2d, reentrant=False)


@faulty("TN205", "warning")
def batch_statistics_in_evaluation() -> tn.Ledger:
    model, optimizer = made(lambda c: nn.BatchNorm2d(c, track_running_stats=False))
    return trained(model, optimizer)


@faulty("TN205", "warning")
def predictions_in_train_mode() -> tn.Ledger:
    model, optimizer = made()
    for batch in data():
        learn(model, optimizer, batch)
    with tn.watch(model) as ledger:
        validate(model)
    return ledger


@faulty("TN302", "warning")
def a_tiny_last_batch() -> tn.Ledger:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    rows = list(itertools.islice(itertools.cycle(batches("mlp", 16)), STEPS))
    cut = [(x[:2], y[:2]) if i % EPOCH == EPOCH - 1 else (x, y) for i, (x, y) in enumerate(rows)]
    return trained(model, torch.optim.SGD(model.parameters(), lr=0.02), stream=iter(cut))


@faulty("TN303", "warning")
def accumulation_of_tiny_batches() -> tn.Ledger:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        for x, y in zip(*(t.split(4) for t in batch), strict=True):
            (F.cross_entropy(model(x), y) / 6).backward()
        optimizer.step()

    rows = itertools.islice(itertools.cycle(batches("mlp", 16)), STEPS)
    return trained(model, optimizer, step, stream=rows)


@faulty("TN305", "warning")
def two_domains_in_turn() -> tn.Ledger:
    model, optimizer = made()
    stream = [(3 * x + 4 if i % 2 else x, y) for i, (x, y) in enumerate(data())]
    return trained(model, optimizer, stream=iter(stream))


@faulty("TN305", "warning")
def two_domains_in_each_step() -> tn.Ledger:
    model, optimizer = made()

    def step(batch: Batch) -> None:
        x, y = batch
        optimizer.zero_grad()
        (F.cross_entropy(model(x), y) + F.cross_entropy(model(3 * x + 4), y)).backward()
        optimizer.step()

    return trained(model, optimizer, step)


def validation_data_of_another_distribution() -> tn.Ledger:
    """The images are scaled for training and not for validation."""
    model, optimizer = made()

    def rest() -> None:
        model.eval()
        with torch.no_grad():
            for x, _ in data(3, seed=9):
                model(3 * x + 4)
        model.train()

    return trained(model, optimizer, after_epoch=rest)


@faulty("TN306", "warning")
def a_shared_head_on_two_levels() -> tn.Ledger:
    class Levels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: Tensor) -> Tensor:
            z = self.net.encoder(x)
            return self.net.head(z) + self.net.head(3 * z + 2)

    torch.manual_seed(0)
    model = Levels()
    return trained(model, torch.optim.SGD(model.parameters(), lr=0.01))
