"""A study's variants: every combination of norm and setting, checked before anything starts."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

from truenorm.errors import InputError
from truenorm.models import ModelSpec, norm_named
from truenorm.studies.plan import StudyPlan
from truenorm.studies.trial import Purpose, Trial
from truenorm.training.config import TrainConfig
from truenorm.training.config import recipe as recipe_for

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

    def shared_config(self) -> dict[str, Any]:
        """The config's fields that are the same in all its runs."""
        fields = dataclasses.asdict(self.config)
        return {k: v for k, v in fields.items() if k not in ("seed", "lr", "threads")}

    def trial(self, seed: int, lr: float, part: Purpose = "judged") -> Trial:
        """The run of this variant with ``seed`` and ``lr``."""
        config = dataclasses.replace(self.config, seed=seed, lr=lr)
        return Trial(self.label, self.spec, config, part)


def variants_of(plan: StudyPlan, examples: int) -> list[Variant]:
    """Every combination of values; within a setting the norms follow in their order.

    Args:
        plan: whose norms, models, batch sizes and changes are combined; its recipe fills the rest.
        examples: in the training part; the recipe depends on it.

    Raises:
        InputError: a field or value that cannot be, or a variant that is there twice.
    """
    norms, varied = tuple(map(norm_named, plan.norms)), plan.varied()
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
        variants += _of_setting(norms, chosen, several, _config(plan.recipe, chosen, examples))
    labels = [v.label for v in variants]
    twice = [label for i, label in enumerate(labels) if label in labels[:i]]
    if twice:
        raise InputError(f"two variants are {twice[0]}; leave one of the two values out.")
    return variants


def _config(recipe: str, chosen: dict[str, Any], examples: int) -> TrainConfig:
    """The recipe's config with what is ``chosen`` of its fields."""
    fields = {k: v for k, v in chosen.items() if k in _CONFIG_FIELDS}
    if chosen["batch_size"] is not None:
        fields["batch_size"] = chosen["batch_size"]
    return recipe_for(recipe, chosen["name"], examples, **fields)


def _of_setting(
    norms: tuple[str, ...], chosen: dict[str, Any], several: list[str], config: TrainConfig
) -> list[Variant]:
    """A setting's variants, one for each norm, named by what there are ``several`` of."""
    built = {k: v for k, v in chosen.items() if k in _SPEC_FIELDS | {"name"}}
    extra = [f"{'model' if n == 'name' else n} {chosen[n]}" for n in several]
    setting = ", ".join([f"batch size {config.batch_size}", *extra])
    return [
        Variant(
            "/".join([norm, str(config.batch_size), *(str(chosen[n]) for n in several)]),
            setting,
            ModelSpec(norm=norm, **built),  # type: ignore[arg-type]
            config,
        )
        for norm in norms
    ]


def _choices(name: str, value: Any) -> tuple[Any, ...]:
    several = isinstance(value, list | tuple)
    if name == "widths":
        several = several and any(w is None or isinstance(w, list | tuple) for w in value)
        return tuple(None if w is None else tuple(w) for w in (value if several else (value,)))
    return tuple(value) if several else (value,)
