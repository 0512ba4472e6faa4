"""compare(): variants x seeds -> rows -> paired differences; "cannot tell" is an answer."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from truenorm import sources
from truenorm.config import TrainConfig
from truenorm.config import recipe as recipe_for
from truenorm.data import Splits
from truenorm.errors import InputError, choose
from truenorm.models import ModelSpec, build
from truenorm.run import environment
from truenorm.store import Store
from truenorm.train import device_of
from truenorm.trial import Part, Row, Trial
from truenorm.workers import Pool, default_processes

METRICS = ("test_accuracy", "test_loss", "valid_accuracy", "valid_loss")
ENGINES = ("local", "ray")
GRID = (0.001, 0.003, 0.01, 0.03, 0.1)
_TUNING_SEEDS_FROM = 1_000_000  # so far from the judged seeds that the two never meet
_SPEC_FIELDS = {f.name for f in dataclasses.fields(ModelSpec)} - {"name", "norm"}
_CONFIG_FIELDS = {f.name for f in dataclasses.fields(TrainConfig)} - {
    *("seed", "lr", "batch_size", "threads")
}

Decision = Literal["better", "worse", "equivalent", "cannot tell"]


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


@dataclass(frozen=True)
class Pair:
    """A paired comparison of two variants over the seeds that both have a figure for.

    Attributes:
        variant, reference: labels; the difference is the first minus the second.
        n: seeds.
        difference, low, high: mean of the metric's differences and its 95 % interval.
        p: two-sided; in a study's verdicts corrected by Holm over all of them.
        decision: of the variant, beside its reference.
        more_seeds: for "cannot tell", how many more would probably (80 %) do, if the observed
            difference is the true one; None where none can be named.
    """

    variant: str
    reference: str
    setting: str
    n: int
    difference: float | None
    low: float | None
    high: float | None
    p: float | None
    decision: Decision
    more_seeds: int | None = None


@dataclass(frozen=True)
class Summary:
    """A variant over its judged seeds.

    ``mean`` to ``iqm`` are of the study's metric, ``low`` and ``high`` its mean's 95 % interval
    by Student's t; ``seconds`` a mean, the ways to the goal medians over the runs that reach it.
    """

    variant: str
    n: int
    mean: float | None
    sd: float | None
    iqm: float | None
    low: float | None
    high: float | None
    lr: float
    diverged: int
    failed: int
    seconds: float | None
    reached: int
    epochs_to_goal: float | None
    seconds_to_goal: float | None


@dataclass(frozen=True)
class Study:
    """Rows of all runs, and what follows from them.

    Attributes:
        variants: in the order asked for; within a setting the reference is the first.
        rows: of the judged runs, by variant and then seed.
        tuning: of the runs that chose the learning rates.
        lrs: each variant's learning rate.
        metric: what is compared.
        margin: the difference below which two variants are equivalent, or None.
        goal: the validation accuracy to which epochs and seconds are counted.
        pairs: all pairs within each setting, each by itself.
        verdicts: each variant beside its setting's reference, corrected as one family.
        provenance: command, versions, machine, data.
    """

    variants: tuple[Variant, ...]
    rows: tuple[Row, ...]
    tuning: tuple[Row, ...]
    lrs: dict[str, float]
    metric: str
    margin: float | None
    goal: float | None
    pairs: tuple[Pair, ...]
    verdicts: tuple[Pair, ...]
    provenance: dict[str, Any]

    def of(self, label: str) -> list[Row]:
        """The judged rows of a variant, by seed."""
        return [row for row in self.rows if row.variant == label]

    def settings(self) -> dict[str, list[Variant]]:
        """The variants of each setting, the reference first."""
        return {
            setting: [v for v in self.variants if v.setting == setting]
            for setting in dict.fromkeys(v.setting for v in self.variants)
        }

    def differences(self, pair: Pair) -> list[float]:
        """The metric's difference for each seed that both variants of ``pair`` have it for."""
        values = _values(self.of(pair.variant), self.metric) - _values(
            self.of(pair.reference), self.metric
        )
        return [float(v) for v in values if not math.isnan(v)]

    def tried(self, label: str) -> list[tuple[float, float]]:
        """The learning rates tried for a variant, each with its :func:`tuning_loss`."""
        own = [row for row in self.tuning if row.variant == label]
        rates = sorted({row.lr for row in own})
        return [(rate, tuning_loss([row for row in own if row.lr == rate])) for rate in rates]

    def curve(self, label: str) -> list[float]:
        """Mean validation accuracy by epoch; a run that has ended counts on with its best."""
        runs = [row for row in self.of(label) if row.curve]
        longest = max((len(row.curve) for row in runs), default=0)
        ends = [row.valid_accuracy or 0.0 for row in runs]
        return [
            sum(
                row.curve[i][1] if i < len(row.curve) else end
                for row, end in zip(runs, ends, strict=True)
            )
            / len(runs)
            for i in range(longest)
        ]

    def summaries(self) -> list[Summary]:
        """A line for each variant."""
        return [self._summary(v.label) for v in self.variants]

    def _summary(self, label: str) -> Summary:
        rows = [row for row in self.of(label) if row.error is None]
        values = _values(rows, self.metric)
        values = values[~np.isnan(values)]
        low, high = _interval(values) or (None, None)
        reached = [at for row in rows if self.goal and (at := row.reaches(self.goal))]
        return Summary(
            variant=label,
            n=len(values),
            mean=float(values.mean()) if len(values) else None,
            sd=float(values.std(ddof=1)) if len(values) > 1 else None,
            iqm=_interquartile_mean(values) if len(values) else None,
            low=low,
            high=high,
            lr=self.lrs[label],
            diverged=sum(row.diverged for row in rows),
            failed=len(self.of(label)) - len(rows),
            seconds=float(np.mean([row.seconds for row in rows])) if rows else None,
            reached=len(reached),
            epochs_to_goal=float(np.median([e for e, _ in reached])) if reached else None,
            seconds_to_goal=float(np.median([s for _, s in reached])) if reached else None,
        )

    def tally(self) -> str:
        """How many verdicts there are of each kind."""
        counts = collections.Counter(pair.decision for pair in self.verdicts)
        kinds: tuple[Decision, ...] = ("better", "worse", "equivalent", "cannot tell")
        told = [f"{counts[kind]} {kind}" for kind in kinds if counts[kind]]
        return f"{len(self.verdicts)} verdicts: {', '.join(told)}." if told else "No verdicts."

    def sentences(self) -> list[str]:
        """The verdicts in words, and what one should know of the tuning."""
        return [sentence(pair, self.metric, self.margin) for pair in self.verdicts] + _at_the_edge(
            self.tuning, self.lrs
        )

    def to_json(self) -> dict[str, Any]:
        """What programs read."""
        return {
            "metric": self.metric,
            "margin": self.margin,
            "goal": self.goal,
            "summaries": [dataclasses.asdict(s) for s in self.summaries()],
            "rows": [{**row.to_json(), "diverged": row.diverged} for row in self.rows],
            "tuning": [{**row.to_json(), "diverged": row.diverged} for row in self.tuning],
            "pairs": [dataclasses.asdict(pair) for pair in self.pairs],
            "verdicts": [dataclasses.asdict(pair) for pair in self.verdicts],
            "sentences": self.sentences(),
            "provenance": self.provenance,
        }

    def __str__(self) -> str:
        return "\n".join([*self.sentences(), self.tally()])


class Progress(NamedTuple):
    """What an observer is told: runs and optimizer steps, done and in all, and the newest row.

    ``row`` is None for the rows that the store held already, told of together.
    """

    runs: int
    total_runs: int
    steps: int
    total_steps: int
    row: Row | None


Observer = Callable[[Progress], None]


def compare(
    data: Any,
    *,
    norms: Sequence[str] = ("none", "batch", "group", "layer"),
    batch_sizes: Sequence[int] | None = None,
    seeds: int | Sequence[int] = 8,
    model: str | Sequence[str] = "mlp",
    lr: float | str = "recipe",
    metric: str = "test_accuracy",
    margin: float | None = None,
    recipe: str = "default",
    changes: dict[str, Any] | None = None,
    target: str | None = None,
    grid: Sequence[float] = GRID,
    tuning_seeds: int = 2,
    goal: float | None = None,
    processes: int | None = None,
    engine: str = "local",
    store: Path | str | None = None,
    retry: bool = False,
    observe: Observer | None = None,
) -> Study:
    """Train every variant with every seed, and say which norm serves the task, if one can tell.

    A variant is a norm with a batch size, and with one value of each of ``changes``. All
    variants of a seed have the same split, the same initial weights where shapes allow, and
    the same order of the data, so their differences are paired.

    Args:
        data: a data source, as :func:`truenorm.load` takes it, or Splits, which are then the
            same for all seeds.
        norms: the first is the reference of each batch size.
        batch_sizes: by default the recipe's own.
        seeds: how many (from 0), or which.
        model: one architecture, or several.
        lr: "recipe"; a number for all variants; or "tune": for each variant the rate of
            ``grid`` with the least mean validation loss over ``tuning_seeds`` seeds of their
            own. A rate with which any of them diverges or fails is out.
        metric: one of test_accuracy, test_loss, valid_accuracy, valid_loss.
        margin: differences of the metric within +- margin count as none.
        changes: fields of ModelSpec and TrainConfig; a list or tuple is one variant for each
            value (of ``widths``, a list of tuples).
        target: the label's column, for tables.
        goal: validation accuracy to which epochs and seconds are counted; by default 99 % of
            the best variant's mean.
        processes: by default one for each core; 0 runs all here. Rows do not depend on it.
        engine: "local".
        store: an SQLite file where rows are kept as they come and found again; None for
            memory. What it holds already is not run again.
        retry: run again what failed.
        observe: told of progress.

    Raises:
        InputError: data, models, config or store will not do.
        KeyboardInterrupt: Ctrl-C; finished rows are in the store, and no process is left.
    """
    choose("metric", metric, METRICS)
    _local_only(choose("engine", engine, ENGINES))
    judged = _seeds(seeds)
    if margin is not None and not margin > 0:
        raise InputError(f"margin must be above 0, got {margin!r}.")
    uncut, splits = _data(data, target, judged[0])
    if metric.startswith("test") and splits.test is None:
        raise InputError(f"{splits.train.name}: has no test part; use the metric valid_accuracy.")
    models = (model,) if isinstance(model, str) else tuple(model)
    varied = {"name": models, "batch_size": tuple(batch_sizes or (None,)), **(changes or {})}
    variants = _variants(len(splits.train), tuple(norms), varied, recipe)
    for variant in variants:  # refuse before anything is run
        build(variant.spec, splits.input_shape, len(splits.classes), seed=0)
        device_of(variant.config.device)
    rates = _rates(lr, grid, tuning_seeds)
    count = default_processes() if processes is None else _process_count(processes)
    held = Store(None if store is None else Path(store))
    try:
        with Pool(uncut, count) as pool:
            runner = _Runner(held, pool, uncut.fingerprint(), len(splits.train), retry, observe)
            runner.expect(len(variants) * tuning_seeds * len(rates), len(variants) * len(judged))
            tuning, lrs = _tuned(variants, rates, tuning_seeds, runner)
            if isinstance(lr, float | int):
                lrs = {v.label: float(lr) for v in variants}
            rows = runner.rows(v.trial(s, lrs[v.label]) for v in variants for s in judged)
    finally:
        held.close()
    about = {
        "data": splits.train.name if not isinstance(data, str) else data,
        "fingerprint": uncut.fingerprint(),
        "store": None if store is None else str(store),
        "processes": count,
        "seeds": list(judged),
        "recipe": recipe,
        "tuned": lr == "tune",
    }
    return conclude(
        variants,
        rows,
        tuning=tuning,
        lrs=lrs,
        metric=metric,
        margin=margin,
        goal=goal,
        provenance={**environment(), **about},
    )


def conclude(
    variants: Sequence[Variant],
    rows: Sequence[Row],
    *,
    tuning: Sequence[Row],
    lrs: dict[str, float],
    metric: str,
    margin: float | None,
    goal: float | None,
    provenance: dict[str, Any],
) -> Study:
    """What follows from finished rows."""
    scores = {
        v.label: _values([row for row in rows if row.variant == v.label], metric) for v in variants
    }
    families = [
        tuple(v for v in variants if v.setting == setting)
        for setting in dict.fromkeys(v.setting for v in variants)
    ]
    within = [(b, a) for family in families for a, b in itertools.combinations(family, 2)]
    beside = [(v, family[0]) for family in families for v in family[1:]]
    higher = metric.endswith("accuracy")
    judge = [(v.label, r.label, v.setting) for v, r in within]
    verdict = [(v.label, r.label, v.setting) for v, r in beside]
    return Study(
        tuple(variants),
        tuple(rows),
        tuple(tuning),
        lrs,
        metric,
        margin,
        _goal(variants, rows) if goal is None else goal,
        tuple(_paired(scores, judge, margin, higher, family=False)),
        tuple(_paired(scores, verdict, margin, higher, family=True)),
        provenance,
    )


# The plan ------------------------------------------------------------------------------------


def _local_only(engine: str) -> None:
    if engine != "ray":
        return
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise InputError(
            "engine 'ray' needs the package ray: pip install 'truenorm[cluster]'."
        ) from error
    raise InputError("engine 'ray' is not built yet; use --engine local.")


def _seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    chosen = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not chosen or len(set(chosen)) < len(chosen):
        raise InputError(f"seeds must be at least one, and all different, got {seeds!r}.")
    if not all(0 <= s < _TUNING_SEEDS_FROM for s in chosen):
        raise InputError(
            f"seeds must lie in [0, {_TUNING_SEEDS_FROM}), beyond which tuning has its own; "
            f"got {seeds!r}."
        )
    return chosen


def _process_count(processes: int) -> int:
    if processes < 0:
        raise InputError(f"processes must be at least 0, got {processes!r}.")
    return processes


def _data(data: Any, target: str | None, seed: int) -> tuple[sources.Uncut, Splits]:
    if isinstance(data, Splits):
        return sources.Uncut(data.train, data.test, data.valid, data.scaling), data
    uncut = sources.uncut(data, target=target)
    return uncut, uncut.cut(seed)


def _variants(
    examples: int, norms: tuple[str, ...], varied: dict[str, Any], recipe: str
) -> list[Variant]:
    """Every combination of values; within a setting the norms follow in their order."""
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


def _rates(lr: float | str, grid: Sequence[float], tuning_seeds: int) -> tuple[float, ...]:
    """The learning rates to try for each variant; none where nothing is tuned."""
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


# The runs ------------------------------------------------------------------------------------


@dataclass
class _Runner:
    """Gets rows: from the store where they are, else from the pool and into the store."""

    store: Store
    pool: Pool
    fingerprint: str
    examples: int
    retry: bool
    observe: Observer | None

    def expect(self, tuning: int, judged: int) -> None:
        """Say how many runs there will be."""
        self.total_runs, self.runs = tuning + judged, 0
        self.steps = 0

    def rows(self, trials: Iterable[Trial]) -> list[Row]:
        """The rows of ``trials``, in their order."""
        asked = {trial.key(self.fingerprint): trial for trial in trials}
        found = self.store.rows(asked)
        if self.retry:
            found = {key: row for key, row in found.items() if row.error is None}
        missing = {trial: key for key, trial in asked.items() if key not in found}
        total = sum(map(self._steps, missing))
        self.runs += len(found)
        self._tell(total, None)
        # A seed's variants together, so that a worker cuts the data once; long runs first.
        order = sorted(missing, key=lambda t: (t.config.seed, -self._steps(t)))
        for trial, row in self.pool.run(order):
            self.store.add(missing[trial], trial, row)
            found[missing[trial]] = row
            self.runs += 1
            self.steps += self._steps(trial)
            total -= self._steps(trial)
            self._tell(total, row)
        return [
            dataclasses.replace(found[key], variant=trial.variant) for key, trial in asked.items()
        ]

    def _steps(self, trial: Trial) -> int:
        return trial.config.epochs * math.ceil(self.examples / trial.config.batch_size)

    def _tell(self, left: int, row: Row | None) -> None:
        if self.observe is not None:
            self.observe(Progress(self.runs, self.total_runs, self.steps, self.steps + left, row))


def _tuned(
    variants: Sequence[Variant], rates: Sequence[float], seeds: int, runner: _Runner
) -> tuple[list[Row], dict[str, float]]:
    """Rows of the tuning runs, and each variant's learning rate: the recipe's without any."""
    own = {v.label: v.config.lr for v in variants}
    if not rates:
        return [], own
    tried = range(_TUNING_SEEDS_FROM, _TUNING_SEEDS_FROM + seeds)
    trials = [v.trial(s, rate, "tuning") for v in variants for rate in rates for s in tried]
    rows = runner.rows(trials)

    def loss(label: str, rate: float) -> float:
        return tuning_loss([row for row in rows if (row.variant, row.lr) == (label, rate)])

    return rows, {label: min(rates, key=lambda rate: loss(label, rate)) for label in own}


def tuning_loss(rows: Sequence[Row]) -> float:
    """Mean best validation loss over ``rows``, infinite if any diverged or failed."""
    losses = [
        math.inf if row.diverged or row.valid_loss is None else row.valid_loss for row in rows
    ]
    return sum(losses) / len(losses)


# The figures ---------------------------------------------------------------------------------


def _values(rows: Sequence[Row], metric: str) -> np.ndarray[Any, Any]:
    """The metric by seed; NaN where a run has none."""
    held = [getattr(row, metric) for row in rows]
    return np.array([math.nan if v is None else v for v in held], dtype=float)


def _interquartile_mean(values: np.ndarray[Any, Any]) -> float:
    from scipy import stats

    return float(stats.trim_mean(values, 0.25))


def _interval(values: np.ndarray[Any, Any]) -> tuple[float, float] | None:
    from scipy import stats

    if len(values) < 2:
        return None
    half = float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return float(values.mean()) - half, float(values.mean()) + half


def _goal(variants: Sequence[Variant], rows: Sequence[Row]) -> float | None:
    means = []
    for variant in variants:
        own = [row for row in rows if row.variant == variant.label]
        reached = [row.valid_accuracy for row in own if row.valid_accuracy is not None]
        if reached:
            means.append(sum(reached) / len(reached))
    return 0.99 * max(means) if means else None


def _paired(
    scores: dict[str, np.ndarray[Any, Any]],
    pairs: Sequence[tuple[str, str, str]],
    margin: float | None,
    higher_is_better: bool,
    *,
    family: bool,
) -> list[Pair]:
    """Compare each (variant, reference, setting) seed by seed; Holm's correction if a family."""
    from scipy import stats

    found: list[Pair] = []
    for variant, reference, setting in pairs:
        d = scores[variant] - scores[reference]
        d = d[~np.isnan(d)]
        n, mean = len(d), float(d.mean()) if len(d) else None
        if n < 2 or mean is None:
            found.append(
                Pair(variant, reference, setting, n, mean, None, None, None, "cannot tell")
            )
            continue
        error = float(d.std(ddof=1)) / math.sqrt(n)
        half = float(stats.t.ppf(0.975, n - 1)) * error
        # Equal differences have no t; the sign-flip test of n equal signs still has a p.
        p = (
            2 * float(stats.t.sf(abs(mean) / error, n - 1))
            if error
            else 2.0 ** (1 - n)
            if mean
            else 1.0
        )
        found.append(
            Pair(variant, reference, setting, n, mean, mean - half, mean + half, p, "cannot tell")
        )
    if family:
        found = _holm(found)
    return [_decided(pair, margin, higher_is_better) for pair in found]


def _holm(pairs: list[Pair]) -> list[Pair]:
    order = sorted((p.p, i) for i, p in enumerate(pairs) if p.p is not None)
    corrected, floor = list(pairs), 0.0
    for rank, (p, i) in enumerate(order):
        floor = max(floor, min(1.0, p * (len(order) - rank)))
        corrected[i] = dataclasses.replace(pairs[i], p=floor)
    return corrected


def _decided(pair: Pair, margin: float | None, higher_is_better: bool) -> Pair:
    if pair.p is None or pair.difference is None or pair.low is None or pair.high is None:
        return pair
    if margin is not None and -margin < pair.low and pair.high < margin:
        return dataclasses.replace(pair, decision="equivalent")
    if pair.p <= 0.05:
        gains = (pair.difference > 0) == higher_is_better
        return dataclasses.replace(pair, decision="better" if gains else "worse")
    return dataclasses.replace(pair, more_seeds=_more_seeds(pair))


def _more_seeds(pair: Pair) -> int | None:
    """Seeds lacking to 80 % power at 5 %, by the normal approximation."""
    from scipy import stats

    assert pair.difference is not None
    assert pair.high is not None
    if not pair.difference:
        return None
    sd = (pair.high - pair.difference) / float(stats.t.ppf(0.975, pair.n - 1)) * math.sqrt(pair.n)
    needed = math.ceil(((1.96 + 0.8416) * sd / pair.difference) ** 2) + 2
    return max(1, needed - pair.n) if needed < 10_000 else None


def sentence(pair: Pair, metric: str, margin: float | None) -> str:
    """A verdict in words."""
    norm, reference = (label.split("/")[0] for label in (pair.variant, pair.reference))
    unit, factor = ("points", 100.0) if metric.endswith("accuracy") else ("nats", 1.0)
    said = {
        "better": f"{norm} is better than {reference}",
        "worse": f"{norm} is worse than {reference}",
        "equivalent": f"{norm} and {reference} are equivalent (margin {factor * (margin or 0):g} "
        f"{unit})",
        "cannot tell": f"cannot tell {norm} from {reference}",
    }[pair.decision]
    if pair.difference is None or pair.low is None or pair.high is None or pair.p is None:
        seeds = "1 seed has" if pair.n == 1 else f"{pair.n} seeds have"
        return f"{pair.setting}: {said}: only {seeds} both figures."
    figures = (
        f"{factor * pair.difference:+.2f} {unit} of {metric.replace('_', ' ')} "
        f"(95 % interval {factor * pair.low:+.2f} to {factor * pair.high:+.2f}, "
        f"p {pair.p:.2g}, {pair.n} seeds)"
    )
    return f"{pair.setting}: {said}: {figures}.{_outlook(pair)}"


def _outlook(pair: Pair) -> str:
    if pair.decision != "cannot tell":
        return ""
    if pair.more_seeds is None:
        return " No reasonable number of seeds would tell, if this difference is the true one."
    return f" About {pair.more_seeds:,} more seeds would, if this difference is the true one."


def _at_the_edge(tuning: Sequence[Row], lrs: dict[str, float]) -> list[str]:
    rates = sorted({row.lr for row in tuning})
    return [
        f"{label}: the chosen learning rate {lr:g} is the "
        f"{'least' if lr == rates[0] else 'largest'} that was tried; a wider grid may do better."
        for label, lr in lrs.items()
        if len(rates) > 1 and lr in (rates[0], rates[-1])
    ]
