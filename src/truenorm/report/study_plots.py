"""A study's drawings, in the colours of the page."""

from __future__ import annotations

import math

from truenorm.canvas import INK, MARK, QUIET, SERIES, Axes, drawing, style_of, svg, tell, ticker
from truenorm.studies.study import Study
from truenorm.studies.variants import Variant


def by_batch_size(study: Study) -> str:
    """The metric's mean by batch size, a line for each norm, with its 95 % interval as band."""
    summaries = {s.variant: s for s in study.summaries()}
    sizes = sorted({v.config.batch_size for v in study.variants})
    lines = list(dict.fromkeys(map(_line_of, study.variants)))
    said: list[str] = []
    with drawing("by batch size", 1, height=3.2) as figure:
        axes = figure.axes[0]
        for i, line in enumerate(lines):
            own = [v for v in study.variants if _line_of(v) == line]
            points = sorted((v.config.batch_size, summaries[v.label]) for v in own)
            known = [(x, s) for x, s in points if s.mean is not None]
            colour, dodge = SERIES[i % len(SERIES)], 1 + 0.012 * (i - len(lines) / 2)
            x = [size * dodge for size, _ in known]
            means = [_shown(study, s.mean) for _, s in known]
            low = [_shown(study, s.mean if s.low is None else s.low) for _, s in known]
            high = [_shown(study, s.mean if s.high is None else s.high) for _, s in known]
            if len(sizes) > 1:
                axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.vlines(x, low, high, color=colour, linewidth=1.2)
            (drawn,) = axes.plot(x, means, label=line, markersize=4, **style_of(i))
            tell(
                drawn,
                [
                    f"{line}, batch size {size}: {mean:.4g} ({lo:.4g} to {hi:.4g})"
                    for (size, _), mean, lo, hi in zip(known, means, low, high, strict=True)
                ],
            )
            said += [
                f"{line} at batch size {size}: {mean:.4g}"
                for (size, _), mean in zip(known, means, strict=True)
            ]
        axes.set_xscale("log", base=2)
        _ticks(axes, [float(s) for s in sizes], [str(s) for s in sizes])
        axes.set(xlabel="batch size", ylabel=_title(study), title="Means and their 95 % intervals")
        axes.legend()
        return svg(figure, f"{_title(study)} by batch size", f"{'; '.join(said)}.")


def differences(study: Study) -> str:
    """For each verdict the difference of every seed, their mean and its interval."""
    pairs = list(reversed(study.verdicts))
    if not pairs:
        return ""
    with drawing("differences", 1, height=0.9 + 0.32 * len(pairs)) as figure:
        axes = figure.axes[0]
        axes.axvline(0, color=INK, linewidth=1)
        if study.margin is not None:
            edge = _shown(study, study.margin)
            axes.axvspan(-edge, edge, color=QUIET, alpha=0.2, linewidth=0)
        for y, pair in enumerate(pairs):
            seen = [_shown(study, d) for d in study.differences(pair)]
            (dots,) = axes.plot(seen, [y + 0.18] * len(seen), ".", color=QUIET, markersize=4)
            tell(dots, [f"one seed: {d:+.3g}" for d in seen])
            if pair.comparison.difference is None:
                continue
            mean = _shown(study, pair.comparison.difference)
            (dot,) = axes.plot([mean], [y - 0.1], "o", color=MARK, markersize=5)
            tell(dot, [f"mean: {mean:+.3g}"])
            if pair.interval:
                ends = [_shown(study, end) for end in pair.interval]
                axes.plot(ends, [y - 0.1] * 2, color=MARK, linewidth=1.6)
        axes.set_yticks(range(len(pairs)), [f"{p.variant} - {p.reference}" for p in pairs])
        axes.set_ylim(-0.6, len(pairs) - 0.4)
        axes.set(xlabel=f"difference: {_title(study).replace('(%)', '(points)')}")
        return svg(figure, "Paired differences", " ".join(study.sentences()[: len(pairs)]))


def rates(study: Study) -> list[tuple[str, str]]:
    """For each setting, the tuning loss by learning rate; the chosen ones are ringed."""
    drawings = []
    for setting, variants in study.settings().items() if study.tuning else ():
        with drawing(f"rates {setting}", 1) as figure:
            axes = figure.axes[0]
            for i, variant in enumerate(variants):
                tried = study.tried(variant.label)
                finite = [(rate, loss) for rate, loss in tried if math.isfinite(loss)]
                colour = SERIES[i % len(SERIES)]
                axes.plot(
                    [rate for rate, _ in finite],
                    [loss for _, loss in finite],
                    markersize=4,
                    label=variant.spec.norm,
                    **style_of(i),
                )
                chosen = [(r, loss) for r, loss in finite if r == study.lrs[variant.label]]
                for rate, loss in chosen:
                    axes.plot([rate], [loss], "o", color=colour, markersize=8, fillstyle="none")
            axes.set_xscale("log")
            grid = sorted({row.lr for row in study.tuning})
            _ticks(axes, grid, [f"{rate:g}" for rate in grid])
            axes.set(xlabel="learning rate", ylabel="validation loss (nats)", title=setting)
            axes.legend()
            chosen_rates = "; ".join(f"{v.spec.norm} at {study.lrs[v.label]:g}" for v in variants)
            said = f"Validation loss by learning rate; chosen: {chosen_rates}."
            drawings.append((setting, svg(figure, f"Learning rates, {setting}", said)))
    return drawings


def curves(study: Study) -> list[tuple[str, str]]:
    """For each setting, the mean validation accuracy by epoch."""
    drawings = []
    for setting, variants in study.settings().items():
        said: list[str] = []
        with drawing(f"curves {setting}", 1) as figure:
            axes = figure.axes[0]
            for i, variant in enumerate(variants):
                means = [100 * mean for mean in study.curve(variant.label)]
                epochs = range(1, len(means) + 1)
                norm = variant.spec.norm
                (line,) = axes.plot(epochs, means, label=norm, markersize=3, **style_of(i))
                tell(line, [f"{norm}, epoch {e}: {m:.2f} %" for e, m in enumerate(means, 1)])
                said += [f"{norm} ends at {means[-1]:.2f} %"] if means else []
            if study.goal:
                axes.axhline(100 * study.goal, color=QUIET, linewidth=1, linestyle=":")
            axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
            axes.set(xlabel="epoch", ylabel="validation accuracy (%)", title=setting)
            axes.legend()
            drawn = svg(figure, f"Learning curves, {setting}", f"{'; '.join(said)}.")
            drawings.append((setting, drawn))
    return drawings


def _line_of(variant: Variant) -> str:
    norm, _, *rest = variant.label.split("/")
    return ", ".join([norm, *rest])


def _title(study: Study) -> str:
    words = study.metric.replace("_", " ")
    return f"{words} (%)" if study.metric.endswith("accuracy") else f"{words} (nats)"


def _shown(study: Study, value: float | None) -> float:
    assert value is not None
    return 100 * value if study.metric.endswith("accuracy") else value


def _ticks(axes: Axes, places: list[float], labels: list[str]) -> None:
    """Ticks on a logarithmic axis where something was measured, and nowhere else."""
    axes.xaxis.set_major_locator(ticker.FixedLocator(places))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.set_xticks(places, labels)
