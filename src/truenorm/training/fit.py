"""fit(): train a model and leave it at its best epoch, running statistics included."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from truenorm.data.batches import Batch, chunks, in_batches, shifted
from truenorm.data.datasets import Splits
from truenorm.errors import InputError, one_line
from truenorm.layers.batch_norm import ONE_VALUE
from truenorm.layers.transaction import transactional
from truenorm.training.config import TrainConfig
from truenorm.training.devices import device_of, has_fast_bf16, threads
from truenorm.training.evaluate import autocast, logits_of, score, wide
from truenorm.training.history import Epoch, History, Observer, Progress, Stopped
from truenorm.training.optimizer import Optimizer, learning_rate
from truenorm.training.run import Run
from truenorm.training.steps import loss_of, seeded

_CHECKPOINT_SECONDS = 2.0  # the work that a kill may cost; a checkpoint costs about 20 ms


@dataclass
class EarlyStopping:
    """Stop when the validation loss has not fallen by ``min_delta`` for ``patience`` epochs."""

    patience: int
    min_delta: float  # absolute, so that it means the same at every scale of the loss
    best: float = math.inf
    best_epoch: int = 0

    def improved(self, epoch: int, loss: float) -> bool:
        """Record ``loss``; True if it is the new best. NaN never is."""
        if not loss < self.best - self.min_delta:
            return False
        self.best, self.best_epoch = loss, epoch
        return True

    def exhausted(self, epoch: int) -> bool:
        """Whether ``patience`` epochs have passed since the best."""
        return epoch - self.best_epoch >= self.patience


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict, which by itself only refers to the live tensors."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


class LossNotFinite(ArithmeticError):
    """The training loss became NaN or infinite."""


def fit(
    model: nn.Module,
    splits: Splits,
    config: TrainConfig | None = None,
    *,
    run: Run | None = None,
    observe: Observer | None = None,
) -> History:
    """Train ``model`` in place and leave it at its best epoch, running statistics included.

    The model maps a scaled batch (N, F) or (N, C, H, W) to logits (N, K). It is moved to the
    config's device and left there in eval mode. Submodules that are in eval mode inside a
    model in train mode were frozen on purpose and stay so. torch's generators (of the CPU and
    CUDA) and its number of threads are given back.

    Args:
        model: any module.
        splits: data; the test part is not touched.
        config: by default ``TrainConfig()``, the classic protocol.
        run: where to write metrics and checkpoints. If it holds a checkpoint, training
            continues there and ends with the same bits as if it had never stopped.
        observe: told of progress now and then, and of every epoch's record.

    Returns:
        The history. Ctrl-C ends training like any other stop: ``stopped`` is "interrupted".

    Raises:
        InputError: model, data and config do not fit together, or a file cannot be written.
            The model is at its best epoch then too.
    """
    config = config or TrainConfig()
    device = device_of(config.device)
    generators = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=generators), threads(config.threads):
        model.to(device)
        _try_out(model, splits, device)
        return _Training(model, splits, config, device, run, observe).run_to_end()


@dataclass
class _Training:
    """The loop and all that changes in it; what a checkpoint holds is :meth:`state`."""

    model: nn.Module
    splits: Splits
    config: TrainConfig
    device: torch.device
    run: Run | None
    observe: Observer | None
    epochs: list[Epoch] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = Optimizer(self.model, self.config)
        self.stopping = EarlyStopping(self.config.patience, self.config.min_delta)
        self.best = (0, snapshot(self.model))  # the best epoch and its state; 0 is before any
        self.amp = self.config.amp == "bf16" or (
            self.config.amp == "auto" and has_fast_bf16(self.device)
        )
        # In a model in eval mode nothing was frozen: it was only evaluated before.
        inside = self.model.modules() if self.model.training else ()
        self.frozen = [m for m in inside if not m.training]
        batches = len(chunks(torch.arange(len(self.splits.train)), self.config.batch_size))
        self.steps = math.ceil(batches / self.config.accumulate)
        self.transactional = transactional(self.model)
        self.started = time.perf_counter()
        self.kept_at = 0.0

    def run_to_end(self) -> History:
        """Train from the checkpoint, or from the start, and restore the best epoch."""
        stopped: Stopped = "finished"
        fault = None
        self._resume()
        try:
            while len(self.epochs) < self.config.epochs:
                if self.stopping.exhausted(len(self.epochs)):
                    stopped = "early"
                    break
                self._one_epoch(len(self.epochs) + 1)
        except KeyboardInterrupt:
            stopped = "interrupted"
        except LossNotFinite as error:
            stopped, fault = "nan", str(error)
        finally:
            best_epoch, state = self.best
            self.model.load_state_dict(state)
            self.model.eval()
        return History(tuple(self.epochs), best_epoch, stopped, self._seconds(), fault)

    def _one_epoch(self, epoch: int) -> None:
        self.model.train()
        for module in self.frozen:
            module.eval()
        train_loss = self._train(epoch)
        splits, amp = self.splits, self.amp
        logits = logits_of(self.model, splits.valid, splits.scaling, self.device, amp=amp)
        valid = score(logits, splits.valid)
        best = self.stopping.improved(epoch, valid.loss)
        lr = learning_rate(self.config, epoch * self.steps - 1, self.config.epochs * self.steps)
        record = Epoch(epoch, train_loss, valid.loss, valid.accuracy, lr, self._seconds(), best)
        # In this order, and the pair at once, so that Ctrl-C finds them consistent anywhere.
        self.epochs.append(record)
        if best:
            self.best = (epoch, snapshot(self.model))
        self._keep(self.run)
        self._tell(epoch, len(splits.train), record)

    def _train(self, epoch: int) -> float:
        """One pass over the training data in an order of its own; the mean training loss."""
        generator = seeded(self.config.seed, epoch)
        order = torch.randperm(len(self.splits.train), generator=generator)
        data, size = self.splits.train, self.config.batch_size
        batches = in_batches(data, order, size, self.splits.scaling, self.device)
        told_every = max(1, self.steps // 25)
        losses, shares, done, looked = [], [], 0, 0
        for i in range(self.steps):
            group = list(itertools.islice(batches, self.config.accumulate))
            loss, share = self._step(group, (epoch - 1) * self.steps + i, generator)
            losses.append(loss)
            shares.append(share)
            done += sum(len(batch.y) for batch in group)
            if i % told_every == 0 or i == self.steps - 1:
                self._refuse_non_finite(losses, looked, epoch)
                looked = len(losses)
                self._tell(epoch, done)
        weights = torch.tensor(shares, dtype=torch.float64)
        return float((torch.stack(losses).cpu().double() * weights).sum() / weights.sum())

    def _step(
        self, batches: list[Batch], step: int, generator: torch.Generator
    ) -> tuple[Tensor, float]:
        """One update from ``batches`` together; its loss and its weight in the epoch."""
        shares = [len(b.y) if b.weight is None else float(b.weight.sum()) for b in batches]
        total = sum(shares)
        self.optimizer.zero_grad()
        parts = []
        for batch, share in zip(batches, shares, strict=True):
            loss = self._loss(batch, generator)
            if len(batches) > 1:
                loss = loss * (share / total if total else 0.0)
            loss.backward()  # type: ignore[no-untyped-call]
            parts.append(loss.detach())
        self.optimizer.step(learning_rate(self.config, step, self.config.epochs * self.steps))
        for layer in self.transactional:
            layer.commit()
        return (parts[0] if len(parts) == 1 else torch.stack(parts).sum()), total

    def _loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Mean cross entropy over the batch, by example weights."""
        x, smoothing = batch.x, self.config.label_smoothing
        if self.config.shift and x.ndim == 4:
            x = shifted(x, self.config.shift, generator)
        try:
            with autocast(self.device, self.amp):
                logits = self.model(x)
        except ValueError as error:
            if ONE_VALUE not in str(error):
                raise
            raise InputError(
                f"batch norm cannot normalize a batch of {len(x)}: a channel needs more than one "
                "value. Use a batch_size of at least 2 and at least 2 training examples."
            ) from error
        return loss_of(wide(logits), batch, smoothing)

    def _refuse_non_finite(self, losses: list[Tensor], start: int, epoch: int) -> None:
        finite = torch.isfinite(torch.stack(losses[start:]))
        if finite.all():
            return
        at = start + int((~finite).nonzero()[0])
        last = f"the loss before it was {losses[at - 1].item():.3g}; " if at else ""
        raise LossNotFinite(
            f"the training loss is {losses[at].item()} at epoch {epoch}, step {at + 1}; {last}"
            f"try an lr smaller than {self.config.lr}, or clip_norm=1."
        )

    def _tell(self, epoch: int, done: int, record: Epoch | None = None) -> None:
        if self.observe is not None:
            total = len(self.splits.train)
            self.observe(Progress(epoch, self.config.epochs, done, total, record))

    def _seconds(self) -> float:
        return time.perf_counter() - self.started

    def _keep(self, run: Run | None) -> None:
        """Write metrics and a checkpoint, if enough work could be lost."""
        done = len(self.epochs)
        ends = done == self.config.epochs or self.stopping.exhausted(done)
        if run is None or (self._seconds() - self.kept_at < _CHECKPOINT_SECONDS and not ends):
            return
        run.save_metrics([asdict(e) for e in self.epochs])
        run.save_checkpoint(self.state())
        self.kept_at = self._seconds()

    def state(self) -> dict[str, Any]:
        """All that continuing needs: tensors, numbers and text only."""
        return {
            "model": self.model.state_dict(),
            "best": self.best,
            "best_loss": self.stopping.best,
            "optimizer": self.optimizer.state(),
            "epochs": [asdict(e) for e in self.epochs],
        }

    def _resume(self) -> None:
        state = None if self.run is None else self.run.checkpoint()
        if state is None:
            return
        try:
            self.model.load_state_dict(state["model"])
        except RuntimeError as error:
            self.model.load_state_dict(self.best[1])  # what does fit has been written
            raise InputError(
                f"the run's checkpoint does not fit the model ({one_line(error)}); give the model "
                "that it was begun with, or begin a new run."
            ) from error
        self.best = state["best"]
        self.optimizer.load(state["optimizer"])
        self.stopping.best, self.stopping.best_epoch = state["best_loss"], self.best[0]
        self.epochs = [Epoch(**e) for e in state["epochs"]]
        self.kept_at = self.epochs[-1].seconds
        self.started -= self.kept_at
        for record in self.epochs:
            self._tell(record.epoch, len(self.splits.train), record)


def _try_out(model: nn.Module, splits: Splits, device: torch.device) -> None:
    """Pass two examples through in eval mode, so that what does not fit shows at once."""
    few = splits.valid.take(torch.arange(min(2, len(splits.valid))))
    try:
        logits = logits_of(model, few, splits.scaling, device)
    except (RuntimeError, ValueError, TypeError) as error:
        raise InputError(
            f"the model cannot take a batch of shape (N, {', '.join(map(str, splits.input_shape))})"
            f": {error}"
        ) from error
    score(logits, few)
