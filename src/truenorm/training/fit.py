"""fit(): train a model and leave it at its best epoch, running statistics included."""

from __future__ import annotations

import time
from dataclasses import asdict

import torch
from torch import Tensor, nn

from truenorm.cores import share_cores
from truenorm.data.datasets import Splits
from truenorm.errors import InputError
from truenorm.training.config import TrainConfig
from truenorm.training.devices import device_of, threads
from truenorm.training.evaluate import Scores, logits_of, score
from truenorm.training.history import Epoch, EpochProgress, History, Observer, Stopped
from truenorm.training.optimizer import learning_rate
from truenorm.training.run import Run
from truenorm.training.state import TrainingState
from truenorm.training.steps import LoneValues, Stepper

_CHECKPOINT_SECONDS = 2.0  # the work that a kill may cost; a checkpoint costs about 20 ms
_REPORTS = 25  # of progress in an epoch


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
    with torch.random.fork_rng(devices=generators), threads(config.threads), share_cores():
        model.to(device)
        _try_out(model, splits, device)
        return _Training(Stepper(model, splits, config), run, observe).run_to_end()


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


class _Training:
    """The loop over epochs, what it reports and what it writes down."""

    def __init__(self, stepper: Stepper, run: Run | None, observe: Observer | None) -> None:
        self.stepper, self.run, self.observe = stepper, run, observe
        self.state = TrainingState(stepper)
        self.started = time.perf_counter()
        self.kept_at = 0.0  # seconds of fitting at the last checkpoint

    def run_to_end(self) -> History:
        """Train from the checkpoint, or from the start, and restore the best epoch."""
        stopped: Stopped = "finished"
        fault = None
        state = self.state
        self._resume()
        try:
            while len(state.epochs) < self.stepper.config.epochs:
                if state.exhausted:
                    stopped = "early"
                    break
                self._one_epoch(len(state.epochs) + 1)
        except KeyboardInterrupt:
            stopped = "interrupted"
        except LossNotFinite as error:
            stopped, fault = "nan", str(error)
        finally:
            state.restore_best()
            self.stepper.model.eval()
        return History(tuple(state.epochs), state.best[0], stopped, self._seconds(), fault)

    def _one_epoch(self, epoch: int) -> None:
        train_loss = self._train(epoch)
        valid = self._validate()
        best = self.state.stopping.improved(epoch, valid.loss)
        stepper = self.stepper
        lr = learning_rate(stepper.config, epoch * stepper.per_epoch - 1, stepper.steps)
        record = Epoch(epoch, train_loss, valid.loss, valid.accuracy, lr, self._seconds(), best)
        self.state.add(record)
        self._keep(self.run)
        self._report(epoch, len(stepper.splits.train), record)

    def _train(self, epoch: int) -> float:
        """One pass over the training data in an order of its own; the mean training loss."""
        stepper = self.stepper
        every = max(1, stepper.per_epoch // _REPORTS)
        losses: list[Tensor] = []
        shares: list[float] = []
        done = looked = 0
        for i, (number, batches) in enumerate(stepper.steps_of(epoch)):
            try:
                loss, share = stepper.update(number, batches)
            except LoneValues as error:
                raise InputError(
                    f"batch norm cannot normalize a batch of {error.examples}: a channel needs "
                    "more than one value. Use a batch_size of at least 2 and at least 2 training "
                    "examples."
                ) from error
            losses.append(loss)
            shares.append(share)
            done += sum(len(batch.y) for batch in batches)
            if i % every == 0 or i == stepper.per_epoch - 1:
                _refuse_non_finite(losses, looked, epoch, stepper.config.lr)
                looked = len(losses)
                self._report(epoch, done)
        weights = torch.tensor(shares, dtype=torch.float64)
        return float((torch.stack(losses).cpu().double() * weights).sum() / weights.sum())

    def _validate(self) -> Scores:
        stepper, splits = self.stepper, self.stepper.splits
        logits = logits_of(
            stepper.model, splits.valid, splits.scaling, stepper.device, amp=stepper.amp
        )
        return score(logits, splits.valid)

    def _report(self, epoch: int, done: int, record: Epoch | None = None) -> None:
        if self.observe is not None:
            epochs, total = self.stepper.config.epochs, len(self.stepper.splits.train)
            self.observe(EpochProgress(epoch, epochs, done, total, record))

    def _seconds(self) -> float:
        return time.perf_counter() - self.started

    def _keep(self, run: Run | None) -> None:
        """Write metrics and a checkpoint, if enough work could be lost."""
        soon = self._seconds() - self.kept_at < _CHECKPOINT_SECONDS
        if run is None or (soon and not self.state.ended):
            return
        run.save_metrics([asdict(e) for e in self.state.epochs])
        run.save_checkpoint(self.state.to_dict())
        self.kept_at = self._seconds()

    def _resume(self) -> None:
        stored = None if self.run is None else self.run.checkpoint()
        if stored is None:
            return
        self.state.load(stored)
        self.kept_at = self.state.epochs[-1].seconds
        self.started -= self.kept_at
        for record in self.state.epochs:
            self._report(record.epoch, len(self.stepper.splits.train), record)


def _refuse_non_finite(losses: list[Tensor], start: int, epoch: int, lr: float) -> None:
    finite = torch.isfinite(torch.stack(losses[start:]))
    if finite.all():
        return
    at = start + int((~finite).nonzero()[0])
    last = f"the loss before it was {losses[at - 1].item():.3g}; " if at else ""
    raise LossNotFinite(
        f"the training loss is {losses[at].item()} at epoch {epoch}, step {at + 1}; {last}"
        f"try an lr smaller than {lr}, or clip_norm=1."
    )
