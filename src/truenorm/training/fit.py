"""fit(): train a model and leave it at its best epoch, running statistics included."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from truenorm.calling.borrowing import Randoms, evaluating
from truenorm.calling.call import Arguments, Loss, model_device
from truenorm.cores import share_cores
from truenorm.data.datasets import Splits
from truenorm.errors import InputError, one_line
from truenorm.kernels.ops import use
from truenorm.training.config import TrainConfig
from truenorm.training.devices import device_of, threads
from truenorm.training.evaluate import AnyBatch, class_logits, logits_in, own_loss
from truenorm.training.feed import Feed, InMemory, feed_of
from truenorm.training.history import Epoch, EpochProgress, History, Observer, Stopped
from truenorm.training.progress import shown
from truenorm.training.run import Run
from truenorm.training.state import TrainingState
from truenorm.training.steps import LoneValues, Stepper
from truenorm.training.user_optimizer import (
    Every,
    OptimizerFactory,
    SchedulerFactory,
    UserOptimizer,
)

_CHECKPOINT_SECONDS = 2.0  # the work that a kill may cost; a checkpoint costs about 20 ms
_REPORTS = 25  # of progress in an epoch


class LossNotFinite(ArithmeticError):
    """The training loss became NaN or infinite."""


def fit(
    model: nn.Module,
    data: Any,
    config: TrainConfig | None = None,
    *,
    loss: Loss | None = None,
    arguments: Arguments | None = None,
    optimizer: OptimizerFactory | None = None,
    scheduler: SchedulerFactory | None = None,
    scheduler_every: Every = "step",
    valid: float = 0.2,
    run: Run | None = None,
    verbose: bool = False,
    observe: Observer | None = None,
) -> History:
    """Train ``model`` in place and leave it at its best epoch, running statistics included.

    It is moved to the config's device and left there in eval mode. Submodules that are in eval
    mode inside a model in train mode were frozen on purpose and stay so. The random states of
    torch (and, with data of your own, numpy and Python) and torch's number of threads are given
    back.

    Args:
        model: any module. It is called on each batch as :class:`truenorm.calling.call.Call` tells:
            on the x of (x, y), or by name on what of a dict its forward takes. Logits are the
            tensor it returns, or ``logits`` or ``out`` of a dict or ModelOutput, or the first
            tensor of a tuple.
        data: :class:`truenorm.Splits`, which are scaled, in batches of the config, and whose test
            part is not touched; or, all of it as it is:

            - a torch Dataset (or another thing with a length and numbered examples), or a pair
              (x, y) of arrays, of which the share ``valid`` is held out for validation;
            - a pair (train, valid) of such, or of DataLoaders or other iterables of batches, which
              are gone through anew each epoch.

            Datasets are given out in the config's batch size, training data shuffled by seed and
            epoch; a DataLoader keeps its own ways.
        config: by default ``TrainConfig()``, the classic protocol.
        loss: a function of the model's output, as it is, and the targets, that returns the mean
            loss or one for each example. By default the ``loss`` that the output holds, if
            it does, or else cross entropy. What is not classification has no accuracy: it is NaN,
            and the validation loss says which epoch is the best.
        arguments: makes of a batch of your own the tuple of the model's arguments, the dict of
            keyword arguments, or (tuple, dict); as for :func:`truenorm.examine`.
        optimizer: makes a torch.optim.Optimizer of the list of trainable parameters, or is one
            over them, in place of the config's. The config's schedule scales its rates.
        scheduler: makes a torch LRScheduler of the optimizer, in place of the config's schedule.
        scheduler_every: whether it moves with each optimizer "step" or each "epoch";
            ReduceLROnPlateau moves with each epoch, by the validation loss.
        valid: the share of a single Dataset that is held out.
        run: where to write metrics and checkpoints. If it holds a checkpoint, training
            continues there and ends with the same bits as if it had never stopped. With a config
            of more epochs than before, a run that has ended goes on: the schedule is that of all
            epochs, and patience counts anew.
        verbose: show a bar and a line an epoch, in a terminal or a notebook.
        observe: told of progress now and then, and of every epoch's record.

    Returns:
        The history. Ctrl-C ends training like any other stop: ``stopped`` is "interrupted".

    Raises:
        InputError: model, data, config and the others do not fit together, or a file cannot be
            written. The model is at its best epoch then too.
    """
    config = config or TrainConfig()
    device = device_of(config.device)
    generators = [device] if device.type == "cuda" else []
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=generators))
        stack.enter_context(threads(config.threads))
        stack.enter_context(use(config.kernels))
        stack.enter_context(share_cores())
        model.to(device)
        feed = feed_of(data, valid, config, model, arguments)
        if not isinstance(feed, InMemory):
            stack.callback(Randoms(*data if isinstance(data, tuple | list) else ()).rewind)
        named = _try_out(model, feed, loss, config)
        own = None
        if optimizer is not None or scheduler is not None:
            own = UserOptimizer(model, config, optimizer, scheduler, scheduler_every)
        stepper = Stepper(model, feed, config, optimizer=own, loss=loss)
        observers = [] if observe is None else [observe]
        if verbose:
            console = Console(highlight=False, soft_wrap=True)
            total = None if feed.examples is None else config.epochs * feed.examples
            observers.append(stack.enter_context(shown(console, total)))
        history = _Training(stepper, run, observers).run_to_end()
        return dataclasses.replace(history, loss=named)


def check_head(model: nn.Module, splits: Splits, name: str) -> None:
    """Refuse a model, where it lies, that does not give a logit for each class and no more.

    Raises:
        InputError: it does not, or cannot take the data.
    """
    feed = InMemory(splits, TrainConfig(), model_device(model))
    given = logits_in(_tried(model, feed, feed.few(), name))
    if given.ndim != 2 or given.shape[1] != len(splits.classes):
        raise InputError(
            f"{name} gives {tuple(given.shape)} for {len(given)} examples, and "
            f"{splits.train.name} has {len(splits.classes)} classes; let the factory take classes, "
            "and build as many logits."
        )


def _tried(model: nn.Module, feed: Feed, few: AnyBatch, name: str = "the model") -> Any:
    """What ``model`` says of a few examples in eval mode."""
    randoms = Randoms()
    try:
        with torch.no_grad(), evaluating(model):
            return few.run(model)
    except (RuntimeError, ValueError, TypeError) as error:
        raise InputError(
            f"{name} cannot take a batch of {feed.described(few)}: {one_line(error)}"
        ) from error
    finally:
        randoms.rewind()


def _try_out(model: nn.Module, feed: Feed, loss: Loss | None, config: TrainConfig) -> str:
    """Pass a few examples through in eval mode, so that what does not fit shows at once.

    Returns:
        What the loss is.
    """
    few = feed.few()
    output = _tried(model, feed, few)
    try:
        own = own_loss(output, few, loss)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"loss= cannot take what the model returns, and targets: {one_line(error)}"
        ) from error
    if own is None:
        feed.check(logits_in(output))
        class_logits(output, few)
        return History.loss
    of_cross_entropy = {"label_smoothing": 0, "class_weight": "none"}
    for name, idle in of_cross_entropy.items():
        if getattr(config, name) != idle:
            raise InputError(
                f"{name} is for cross entropy, and the loss is "
                f"{'loss=' if loss is not None else 'the one that the model returns'}; leave it at "
                f"{idle}."
            )
    if loss is None:
        return "the model's own loss"
    return str(getattr(loss, "__name__", type(loss).__name__))


class _Training:
    """The loop over epochs, what it reports and what it writes down."""

    def __init__(self, stepper: Stepper, run: Run | None, observers: Sequence[Observer]) -> None:
        self.stepper, self.run, self.observers = stepper, run, observers
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
        stepper = self.stepper
        train_loss, done = self._train(epoch)
        valid = stepper.feed.validate(stepper.model, stepper.loss, amp=stepper.amp)
        best = self.state.stopping.improved(epoch, valid.loss)
        lr = stepper.optimizer.lr
        stepper.optimizer.end_epoch(valid.loss)
        record = Epoch(epoch, train_loss, valid.loss, valid.accuracy, lr, self._seconds(), best)
        self.state.add(record)
        self._keep(self.run)
        self._report(epoch, done, record)

    def _train(self, epoch: int) -> tuple[float, int]:
        """One pass over the training data: the mean training loss, and how many they were."""
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
                    "examples; of a DataLoader, drop_last=True."
                ) from error
            losses.append(loss)
            shares.append(share)
            done += sum(batch.examples for batch in batches)
            if i % every == 0 or i == stepper.per_epoch - 1:
                _refuse_non_finite(losses, looked, epoch, stepper.config.lr)
                looked = len(losses)
                self._report(epoch, done)
        if not losses:
            raise InputError(
                f"the training loader gave no batch in epoch {epoch}; give one that is not empty "
                "and can be gone through again."
            )
        _refuse_non_finite(losses, looked, epoch, stepper.config.lr)
        weights = torch.tensor(shares, dtype=torch.float64)
        mean = float((torch.stack(losses).cpu().double() * weights).sum() / weights.sum())
        return mean, done

    def _report(self, epoch: int, done: int, record: Epoch | None = None) -> None:
        epochs, total = self.stepper.config.epochs, self.stepper.feed.examples
        for observe in self.observers:
            observe(EpochProgress(epoch, epochs, done, done if total is None else total, record))

    def _seconds(self) -> float:
        return time.perf_counter() - self.started

    def _keep(self, run: Run | None) -> None:
        """Write metrics and a checkpoint, if enough work could be lost."""
        soon = self._seconds() - self.kept_at < _CHECKPOINT_SECONDS
        if run is None or (soon and not self.state.ended):
            return
        run.save_metrics([dataclasses.asdict(e) for e in self.state.epochs])
        run.save_checkpoint(self.state.to_dict())
        self.kept_at = self._seconds()

    def _resume(self) -> None:
        if self.run is None:
            return
        epochs, asked = self.stepper.config.epochs, self.run.request().train.epochs
        stored = self.run.checkpoint()
        if stored is not None:
            stored.setdefault("asked", asked)  # an older version wrote it
            self.state.load(stored)
        if epochs > asked:
            if stored is not None:
                self.run.save_checkpoint(stored)  # which knows, then, what was asked before
            self.run.lengthen(epochs)
        if stored is None:
            return
        self.kept_at = self.state.epochs[-1].seconds
        self.started -= self.kept_at
        for record in self.state.epochs:
            self._report(record.epoch, self.stepper.feed.examples or 0, record)


def _refuse_non_finite(losses: list[Tensor], start: int, epoch: int, lr: float) -> None:
    finite = torch.isfinite(torch.stack(losses[start:])) if losses[start:] else torch.ones(0)
    if finite.all():
        return
    at = start + int((~finite).nonzero()[0])
    last = f"the loss before it was {losses[at - 1].item():.3g}; " if at else ""
    raise LossNotFinite(
        f"the training loss is {losses[at].item()} at epoch {epoch}, step {at + 1}; {last}"
        f"try an lr smaller than {lr}, or clip_norm=1."
    )
