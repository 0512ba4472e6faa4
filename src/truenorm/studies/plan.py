"""What a study will run: variants, seeds and learning rates, checked before anything starts."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from truenorm.errors import InputError, choose
from truenorm.models import ModelSpec
from truenorm.studies.trial import Part, Trial
from truenorm.training.config import TrainConfig
from truenorm.training.config import recipe as recipe_for

GRID = (0.001, 0.003, 0.01, 0.03, 0.1)
MOST_SEEDS = 1000  # of a study until decided
TUNING_SEEDS_FROM = 1_000_000  # so far from the judged seeds that the two never meet
_SPEC_FIELDS = {f.name for f in dataclasses.fields(ModelSpec)} - {"name", "norm"}
_CONFIG_FIELDS = {f.name for f in dataclasses.fields(TrainConfig)} - {
    *("seed", "lr", "batch_size", "threads")
}


@dataclass(frozen=True)
class Variant:
    """One way to train: a model and a config, without seed; ``lr`` is set once it is tuned.

    ``setting`` is what it shares with the variants it is compared with: all but the norm.
    """

    label: str
    setting: str
    spec: ModelSpec
    config: TrainConfig

    def told(self) -> dict[str, Any]:
        """The config's fields that are the same in all its runs."""
        fields = dataclasses.asdict(self.config)
        return {k: v for k, v in fields.items() if k not in ("seed", "lr", "threads")}

    def trial(self, seed: int, lr: float, part: Part = "judged") -> Trial:
        """The run of this variant with ``seed`` and ``lr``."""
        config = dataclasses.replace(self.config, seed=seed, lr=lr)
        return Trial(self.label, self.spec, config, part)


def seeds_of(seeds: int | Sequence[int]) -> tuple[int, ...]:
    """The judged seeds: so many from 0, or those given.

    Raises:
        InputError: there is none, one is there twice, or is one of tuning's.
    """
    chosen = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not chosen or len(set(chosen)) < len(chosen):
        raise InputError(f"seeds must be at least one, and all different, got {seeds!r}.")
    if not all(0 <= s < TUNING_SEEDS_FROM for s in chosen):
        raise InputError(
            f"seeds must lie in [0, {TUNING_SEEDS_FROM}), beyond which tuning has its own; "
            f"got {seeds!r}."
        )
    return chosen


def looks_of(until: str, first: int | Sequence[int] | None, max_seeds: int) -> tuple[int, ...]:
    """Numbers of seeds at which a study that ends when it is decided is looked at.

    Every sixteenth of the most seeds, so at most 16 times; from ``first`` on.

    Raises:
        InputError: values that cannot be.
    """
    choose("until", until, ("decided",))
    if not 2 <= max_seeds <= MOST_SEEDS:
        raise InputError(f"max_seeds must lie in [2, {MOST_SEEDS}], got {max_seeds!r}.")
    step = math.ceil(max_seeds / 16)
    if first is None:
        first = max(2, step)
    if not isinstance(first, int) or not 2 <= first <= max_seeds:
        raise InputError(
            f"seeds must be a number from 2 to max_seeds ({max_seeds}) in a study until decided, "
            f"got {first!r}."
        )
    return (*range(first, max_seeds, step), max_seeds)


def variants_of(
    examples: int, norms: tuple[str, ...], varied: dict[str, Any], recipe: str
) -> list[Variant]:
    """Every combination of values; within a setting the norms follow in their order.

    Args:
        examples: in the training part; the recipe depends on it.
        norms: of each setting.
        varied: fields of ModelSpec and TrainConfig, each with a value or several.
        recipe: fills what ``varied`` does not say.

    Raises:
        InputError: a field or value that cannot be, or a variant that is there twice.
    """
    unknown = varied.keys() - _SPEC_FIELDS - _CONFIG_FIELDS - {"name", "batch_size"}
    if unknown:
        raise InputError(
            f"changes cannot hold {', '.join(sorted(unknown))}; fields of ModelSpec and "
            "TrainConfig can stand there but norm, batch_size, lr, seed and threads."
        )
    choices = {name: _choices(name, value) for name, value in varied.items()}
    for name, values in {"norms": norms, **choices}.items():
        if not values or len(set(values)) < len(values):
            raise InputError(f"{name} must be at least one, and all different, got {values!r}.")
    several = [n for n, values in choices.items() if len(values) > 1 and n != "batch_size"]
    variants = []
    for values in itertools.product(*choices.values()):
        chosen = dict(zip(choices, values, strict=True))
        told = {k: v for k, v in chosen.items() if k in _CONFIG_FIELDS}
        if chosen["batch_size"] is not None:
            told["batch_size"] = chosen["batch_size"]
        config = recipe_for(recipe, chosen["name"], examples, **told)
        built = {k: v for k, v in chosen.items() if k in _SPEC_FIELDS | {"name"}}
        extra = [f"{'model' if n == 'name' else n} {chosen[n]}" for n in several]
        setting = ", ".join([f"batch size {config.batch_size}", *extra])
        for norm in norms:
            label = "/".join([norm, str(config.batch_size), *(str(chosen[n]) for n in several)])
            variants.append(Variant(label, setting, ModelSpec(norm=norm, **built), config))  # type: ignore[arg-type]
    labels = [v.label for v in variants]
    twice = [label for i, label in enumerate(labels) if label in labels[:i]]
    if twice:
        raise InputError(f"two variants are {twice[0]}; leave one of the two values out.")
    return variants


def _choices(name: str, value: Any) -> tuple[Any, ...]:
    several = isinstance(value, list | tuple)
    if name == "widths":
        several = several and any(w is None or isinstance(w, list | tuple) for w in value)
        return tuple(None if w is None else tuple(w) for w in (value if several else (value,)))
    return tuple(value) if several else (value,)


def rates_of(lr: float | str, grid: Sequence[float], tuning_seeds: int) -> tuple[float, ...]:
    """The learning rates to try for each variant, rising; none where nothing is tuned.

    Raises:
        InputError: ``lr`` or one of ``grid`` is no rate, or there is nothing to tune by.
    """
    if isinstance(lr, str) and lr not in ("recipe", "tune"):
        raise InputError(f"lr must be recipe, tune or a number, got {lr!r}.")
    rates = tuple(grid) if lr == "tune" else () if isinstance(lr, str) else (lr,)
    for rate in rates:
        TrainConfig(lr=rate)  # refuses what is no rate
    if lr != "tune":
        return ()
    if not rates or tuning_seeds < 1:
        raise InputError("tuning needs at least one learning rate and one tuning seed.")
    return tuple(sorted(set(rates)))
