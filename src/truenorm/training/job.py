"""The main job, whole: load, build, fit, judge, save; started anew or resumed."""

from __future__ import annotations

import dataclasses
import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from truenorm.data import sources
from truenorm.data.datasets import Splits
from truenorm.data.reading import Reading
from truenorm.errors import InputError
from truenorm.factories import is_factory
from truenorm.kernels.ops import kernels, use
from truenorm.models import ModelSpec, build
from truenorm.training.config import recipe as recipe_for
from truenorm.training.devices import device_of, threads
from truenorm.training.fit import check_head, fit
from truenorm.training.history import History, Observer
from truenorm.training.judgement import Judgement, judge
from truenorm.training.run import Request, Run
from truenorm.training.saved import save_model


@dataclass(frozen=True)
class Outcome:
    """What a job came to.

    ``judgement`` is None where no epoch was completed, so that nothing was learned.
    """

    history: History
    model: nn.Module
    result: dict[str, Any]
    judgement: Judgement | None


@dataclass(frozen=True)
class Job:
    """A run folder, what was asked of it, and the data; begun anew, or resumed."""

    run: Run
    request: Request
    splits: Splits
    resumed: bool = False
    longer_than: int | None = None  # the epochs asked for before, of a run that is to go on

    def execute(self, observe: Observer | None = None) -> Outcome:
        """Train, restore the best epoch, and judge it on the test part.

        Raises:
            InputError: model, data and config do not fit, or a file cannot be written; then
                the last checkpoint is intact and the run can be resumed.
        """
        spec, splits = self.request.spec, self.splits
        assert spec is not None, "only Python callers train modules without a spec"
        config = self.request.train
        with threads(config.threads), use(config.kernels):
            model = build(spec, splits.input_shape, len(splits.classes), seed=config.seed)
            history = self._fit(model, observe)
            judgement = judge(model, splits) if history.best_epoch else None
            result = result_of(model, history, judgement, splits, self._about())
        return Outcome(history, model, result, judgement)

    def save(self, outcome: Outcome, report: str | None = None) -> None:
        """Write the model, the report page and last the result, which marks the run as ended.

        A run that was interrupted gets no result, and can be resumed.

        Raises:
            InputError: a file cannot be written; the run can be resumed to write it.
        """
        if outcome.judgement is not None:
            save_model(self.run, outcome.model, self.request, self.splits)
        if report is not None:
            self.run.save_report(report)
        if outcome.history.stopped != "interrupted":
            self.run.save_result(outcome.result)

    def _fit(self, model: nn.Module, observe: Observer | None) -> History:
        try:
            return fit(model, self.splits, self.request.train, run=self.run, observe=observe)
        except InputError:
            if not self.resumed:
                self.run.abandon()  # so that the mended command may use the same folder
            raise

    def _about(self) -> dict[str, Any]:
        """What the result says of what was asked."""
        request = self.request
        assert request.spec is not None
        return {
            "run": str(self.run.folder),
            "data": request.data,
            "model": request.spec.name,
            "norm": request.spec.norm,
            "recipe": request.recipe,
            "seed": request.train.seed,
        }


def result_of(
    model: nn.Module,
    history: History,
    judgement: Judgement | None,
    splits: Splits,
    about: dict[str, Any],
) -> dict[str, Any]:
    """What programs read: of train, the object that --json prints."""
    best = history.best
    tested = judgement.scores if judgement is not None and splits.test is not None else None
    return {
        **about,
        "epochs": len(history.epochs),
        "best_epoch": history.best_epoch,
        "stopped": history.stopped,
        "restored": history.best_epoch > 0,
        "train_loss": best.train_loss if best else None,
        "val_loss": best.valid_loss if best else None,
        "val_accuracy": best.valid_accuracy if best else None,
        "test_loss": tested.loss if tested else None,
        "test_accuracy": tested.accuracy if tested else None,
        **_by_class(judgement),
        "fit_seconds": history.seconds,
        "fault": history.fault,
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_examples": len(splits.train),
        "val_examples": len(splits.valid),
        "test_examples": 0 if splits.test is None else len(splits.test),
        "device": str(next(model.parameters()).device),
        "threads": torch.get_num_threads(),
    }


def _by_class(judgement: Judgement | None) -> dict[str, Any]:
    """What accuracy hides, of the part that was judged."""
    if judgement is None:
        return dict.fromkeys(("majority_share", "balanced_accuracy", "macro_f1", "f1"))
    scores, classes = judgement.by_class, judgement.data.classes
    return {
        "majority": classes[scores.majority],
        "majority_share": scores.majority_share,
        "balanced_accuracy": scores.balanced_accuracy,
        "macro_f1": scores.macro_f1,
        "f1": {str(c): of.f1 for c, of in zip(classes, scores.of, strict=True)},
    }


def start(
    data: str,
    spec: ModelSpec,
    *,
    target: str | None = None,
    recipe: str = "default",
    changes: dict[str, Any] | None = None,
    folder: Path | None = None,
    reading: Reading | None = None,
) -> Job:
    """Load ``data``, settle the config and claim a run folder.

    Args:
        data: a data source, as :func:`truenorm.load` takes it.
        spec: the model.
        target: the label's column, for tables.
        recipe: ``default`` or ``classic``.
        changes: fields of TrainConfig that win over the recipe's.
        folder: the run folder; by default a new one in ``runs/``, named after the job.
        reading: how the data are read.

    Raises:
        InputError: data, model, config or folder will not do.
    """
    changes = changes or {}
    recipe_for(recipe, spec.name, 1, **changes)  # refuse a bad value before reading any data
    kernels()
    reading = reading or Reading()
    splits = sources.uncut(data, target=target, reading=reading).cut(changes.get("seed", 0))
    source = data if data in sources.EMBEDDED else str(Path(data).absolute())
    model = build(spec, splits.input_shape, len(splits.classes), seed=0)  # refuse before writing
    if is_factory(spec.name):
        check_head(model, splits, spec.name)
    # Another number of threads may add in another order: a resumed run must keep its own.
    changes = {"threads": torch.get_num_threads(), **changes}
    config = recipe_for(recipe, spec.name, len(splits.train), **changes)
    device_of(config.device)
    config.check_shape(splits.input_shape)
    request = Request(spec, config, recipe, source, target, splits.fingerprint(), reading)
    return Job(Run.create(folder or _new_folder(source, spec), request), request, splits)


def resume(folder: Path, *, epochs: int | None = None) -> Job:
    """Take up the run in ``folder`` where its last checkpoint stands.

    Args:
        folder: a run's.
        epochs: more than it was asked for, so that it goes on, also if it has ended; see
            :func:`truenorm.fit`. None for as many.

    Raises:
        InputError: there is no such run, it came from Python, its data have changed, or it was
            asked for as many epochs already.
    """
    run = Run.open(folder)
    request = run.request()
    if request.data is None or request.spec is None:
        raise InputError(
            f"{folder}: its data or model came from Python; resume it there with "
            "truenorm.fit(..., run=truenorm.Run.open(folder))."
        )
    uncut = sources.uncut(request.data, target=request.target, reading=request.reading)
    splits = uncut.cut(request.train.seed)
    if splits.fingerprint() != request.fingerprint:
        raise InputError(
            f"{request.data}: has changed since {folder} began; put the old data back, or start "
            "a new run."
        )
    before = request.train.epochs
    if epochs is None:
        return Job(run, request, splits, resumed=True)
    if epochs <= before:
        raise InputError(
            f"epochs must be more than the {before} that {folder} was asked for, got {epochs}; "
            "they count from its first epoch."
        )
    request = dataclasses.replace(request, train=dataclasses.replace(request.train, epochs=epochs))
    return Job(run, request, splits, resumed=True, longer_than=before)


def _new_folder(source: str, spec: ModelSpec) -> Path:
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    name = f"{Path(source).stem}-{spec.name.replace(':', '-')}-{spec.norm}-{stamp}"
    folder, again = Path("runs") / name, 1
    while folder.exists():
        again += 1
        folder = Path("runs") / f"{name}-{again}"
    return folder
