"""How to train: one frozen dataclass, and the recipes that fill it.

Imports no torch, so that ``truenorm --help`` is quick.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

from truenorm.errors import InputError, choose

Schedule = Literal["constant", "cosine", "onecycle"]
OptimizerName = Literal["adam", "adamw", "sgd"]
Amp = Literal["auto", "off", "bf16"]
Augment = Literal["none", "light"]
ClassWeight = Literal["none", "balanced"]
KernelChoice = Literal["auto", "torch"]
Recipe = Literal["default", "classic"]
RECIPES: tuple[str, ...] = get_args(Recipe)


def option(default: Any, help: str) -> Any:
    """A dataclass's field with its help, which the command line prints."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train. The defaults are the classic protocol: Adam 1e-3, batch 64, patience 3.

    Raises:
        InputError: a value lies outside its range.
    """

    epochs: int = option(20, "Train for at most this many epochs.")
    batch_size: int = option(64, "Examples per batch; what batch norm normalizes over.")
    optimizer: OptimizerName = option("adam", "Adam, AdamW, or SGD with Nesterov momentum 0.9.")
    lr: float = option(1e-3, "Learning rate; with a schedule, its peak.")
    schedule: Schedule = option("constant", "Course of the learning rate over all steps.")
    warmup: float = option(0.1, "One-cycle: the part of all steps in which the rate rises.")
    patience: int = option(3, "Stop after this many epochs without improvement.")
    min_delta: float = option(1e-3, "Fall of the validation loss that counts as improvement.")
    weight_decay: float = option(0.0, "Weight decay (L2 for adam and sgd, decoupled for adamw).")
    l1: float = option(0.0, "L1 penalty on the parameters that decay.")
    decay_all: bool = option(False, "Decay normalization parameters and biases too.")
    label_smoothing: float = option(0.0, "Share of each label spread over all classes.")
    shift: int = option(0, "Augment images: move each by up to this many pixels.")
    augment: Augment = option(
        "none", "light: crop and light images a little; in colour, mirror and tint them too."
    )
    class_weight: ClassWeight = option(
        "none", "balanced: rare classes weigh more in the loss, so that all count alike."
    )
    accumulate: int = option(1, "Batches whose gradients are pooled into one step.")
    clip_norm: float | None = option(None, "Clip the gradient to this 2-norm.")
    amp: Amp = option("off", "bf16 autocast; auto: where the hardware multiplies bf16.")
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps.")
    threads: int | None = option(None, "CPU threads; by default torch's own choice.")
    kernels: KernelChoice = option(
        "auto", "Batch norm on a CPU: auto, TrueNorm's kernels where compiled; torch, torch's own."
    )
    seed: int = option(0, "Seeds initial weights, split, order, dropout and augmentation.")

    def __post_init__(self) -> None:
        choose("optimizer", self.optimizer, get_args(OptimizerName))
        choose("schedule", self.schedule, get_args(Schedule))
        choose("amp", self.amp, get_args(Amp))
        choose("augment", self.augment, get_args(Augment))
        choose("kernels", self.kernels, get_args(KernelChoice))
        choose("class_weight", self.class_weight, get_args(ClassWeight))
        for name in ("epochs", "batch_size", "patience", "accumulate"):
            self._need(name, "must be an integer of at least 1", _whole(getattr(self, name), 1))
        for name in ("shift", "seed"):
            self._need(name, "must be an integer of at least 0", _whole(getattr(self, name), 0))
        self._need("threads", "must be at least 1", self.threads is None or _whole(self.threads, 1))
        self._need("lr", "must be a finite number above 0", _finite(self.lr) and self.lr > 0)
        for name in ("min_delta", "weight_decay", "l1"):
            value = getattr(self, name)
            self._need(name, "must be a finite number of at least 0", _finite(value) and value >= 0)
        clip = self.clip_norm
        self._need("clip_norm", "must be above 0", clip is None or (_finite(clip) and clip > 0))
        for name in ("label_smoothing", "warmup"):
            value = getattr(self, name)
            self._need(name, "must lie in [0, 1)", _finite(value) and 0 <= value < 1)
        self._need("seed", "must be below 2**63", self.seed < 2**63)

    def to_json(self) -> dict[str, Any]:
        """The fields; later ones only where they say something.

        Digests over configs that older versions stored stay as they were.
        """
        later = {"augment": "none", "class_weight": "none", "kernels": "auto"}
        fields = dataclasses.asdict(self)
        return {k: v for k, v in fields.items() if k not in later or v != later[k]}

    def augmentation(self) -> dict[str, Any]:
        """The fields that change images in training, where they do."""
        idle = {"shift": 0, "augment": "none"}
        return {k: v for k, v in vars(self).items() if k in idle and v != idle[k]}

    def check_shape(self, input_shape: tuple[int, ...]) -> None:
        """Refuse to move or crop what is no image.

        Raises:
            InputError: examples of ``input_shape``, (F,) or (C, H, W), are rows.
        """
        for name, value in self.augmentation().items():
            if len(input_shape) != 3:
                raise InputError(
                    f"{name} changes images, got {value!r} for rows of {input_shape[0]} numbers; "
                    f"leave {name} out."
                )

    def _need(self, name: str, rule: str, kept: bool) -> None:
        if not kept:
            raise InputError(f"{name} {rule}, got {getattr(self, name)!r}.")


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class _Pace(NamedTuple):
    """A default recipe before the size of the data is known."""

    epochs: int
    batch_size: int
    settings: dict[str, Any]


_ONE_CYCLE: dict[str, Any] = {
    "schedule": "onecycle",
    "label_smoothing": 0.1,
    "min_delta": 0.0,
}
# How these were chosen, with n, spread and commands: docs/recipes.md.
_PACES = {
    "mlp": _Pace(5, 256, {**_ONE_CYCLE, "lr": 0.03}),
    "convnet": _Pace(6, 128, {**_ONE_CYCLE, "lr": 0.01, "shift": 1, "amp": "auto"}),
    "resnet": _Pace(6, 128, {**_ONE_CYCLE, "lr": 0.01, "shift": 1, "amp": "auto"}),
    "transformer": _Pace(
        15, 128, {**_ONE_CYCLE, "lr": 0.002, "optimizer": "adamw", "weight_decay": 0.05}
    ),
}
_MIN_STEPS = 900  # a small data set is repeated until the one cycle has this many steps
_MIN_BATCHES = 20  # and its batches are cut so that an epoch has this many, down to 16 examples


def recipe(name: str, model: str, examples: int, **changes: Any) -> TrainConfig:
    """Return the config of recipe ``name`` for a model kind and a number of training examples.

    ``classic`` is the textbook protocol, the same for every model and every data set.
    ``default`` is one cycle of the learning rate at a high peak with label smoothing, which
    batch norm makes safe; small data get smaller batches and more epochs, so that the cycle
    is long enough to learn from. ``changes`` replace single fields and come last.

    Raises:
        InputError: an unknown recipe, or a value outside its range.
    """
    choose("recipe", name, RECIPES)
    if name == "classic":
        return TrainConfig(**changes)
    pace = _PACES.get(model, _PACES["mlp"])
    batch = changes.get("batch_size", _fitting_batch(pace.batch_size, examples))
    per_epoch = max(1, math.ceil(examples / batch)) if _whole(batch, 1) else 1
    epochs = changes.get("epochs", max(pace.epochs, math.ceil(_MIN_STEPS / per_epoch)))
    chosen = {
        **pace.settings,
        "epochs": epochs,
        "batch_size": batch,
        # The loss may wander while the rate is high: only its second half can judge.
        "patience": max(3, epochs // 2) if _whole(epochs, 1) else 3,
    }
    return TrainConfig(**{**chosen, **changes})


def _fitting_batch(largest: int, examples: int) -> int:
    size = largest
    while size > 16 and examples < size * _MIN_BATCHES:
        size //= 2
    return size


def config_help() -> dict[str, str]:
    """Each field's line of help."""
    return {f.name: f.metadata["help"] for f in dataclasses.fields(TrainConfig)}
