"""NormClassifier: scikit-learn's interface to fit()."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from truenorm.data.datasets import Dataset, Scaling, Splits, dataset, examples, split
from truenorm.errors import InputError
from truenorm.models import ModelSpec, build
from truenorm.training.config import TrainConfig, recipe
from truenorm.training.evaluate import logits_of
from truenorm.training.fit import fit
from truenorm.training.history import History

Array = np.ndarray[Any, Any]


class NormClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # sklearn is untyped
    """A normalized multi-layer perceptron with early stopping on held-out data.

    Args:
        hidden: units of each hidden layer.
        norm: none, batch, layer, group, instance, rms, renorm or ghost.
        norm_position: before or after the activation.
        dropout: probability of dropping a hidden unit.
        recipe: "default", or "classic" for the textbook protocol.
        epochs, batch_size, lr, patience, weight_decay: None for the recipe's choice.
        class_weight: None for equal ones; "balanced", by which each class weighs n / (K n_c); or a
            dict from label to weight. They multiply what ``fit`` is given as ``sample_weight``.
        valid: share of the training data held out to choose the best epoch. Data too few to
            hold any out are validated on themselves.
        warm_start: whether another fit goes on from the weights of the last.
        device: auto, cpu, cuda, cuda:N or mps.
        threads: CPU threads while fitting; None for torch's own choice.
        random_state: seeds weights, order, dropout and the held-out share.

    Attributes:
        classes_: (K,) the labels.
        model_: the network at its best epoch, in eval mode.
        scaling_: how features are standardized.
        history_: the :class:`truenorm.History` of the last fit.
        best_epoch_: the epoch whose weights were kept; ``n_iter_`` is how many ran.
        n_features_in_, feature_names_in_: as everywhere in scikit-learn.
    """

    def __init__(
        self,
        hidden: tuple[int, ...] = (128,),
        norm: str = "batch",
        *,
        norm_position: str = "before",
        dropout: float = 0.0,
        recipe: str = "default",
        epochs: int | None = None,
        batch_size: int | None = None,
        lr: float | None = None,
        patience: int | None = None,
        weight_decay: float | None = None,
        class_weight: dict[Any, float] | str | None = None,
        valid: float = 0.2,
        warm_start: bool = False,
        device: str = "auto",
        threads: int | None = None,
        random_state: Any = None,
    ) -> None:
        self.hidden = hidden
        self.norm = norm
        self.norm_position = norm_position
        self.dropout = dropout
        self.recipe = recipe
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.patience = patience
        self.weight_decay = weight_decay
        self.class_weight = class_weight
        self.valid = valid
        self.warm_start = warm_start
        self.device = device
        self.threads = threads
        self.random_state = random_state

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Fit to X (N, F) of finite numbers and labels y (N,), weighing the loss by example.

        Raises:
            ValueError: X, y or a parameter is not as said above.
        """
        X, y = validate_data(self, X, y, dtype=[np.float32, np.float64])
        check_classification_targets(y)
        if sample_weight is not None:
            sample_weight = _check_sample_weight(sample_weight, X, ensure_non_negative=True)
            kept = sample_weight > 0  # weight zero is absence, from the held-out share too
            X, y, sample_weight = X[kept], y[kept], sample_weight[kept]
        if self.class_weight is not None:
            sample_weight = self._by_class(y, sample_weight)
        if len(X) < 2:
            raise InputError(f"X: needs at least 2 examples, got n_samples = {len(X)}.")
        data = dataset(X, y, weight=sample_weight, name="X")
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        splits = self._splits(data, seed)
        config = self._config(len(splits.train), seed)
        goes_on = self.warm_start and hasattr(self, "model_")
        if goes_on:
            self._refuse_other_classes(np.unique(y))
        else:
            self.classes_ = np.unique(y)
            self.scaling_: Scaling = splits.scaling
            self.model_ = build(self._spec(), splits.input_shape, len(self.classes_), seed=seed)
        self.history_: History = fit(self.model_, splits, config)
        self.best_epoch_, self.n_iter_ = self.history_.best_epoch, len(self.history_.epochs)
        if self.history_.fault is not None and not self.best_epoch_:
            raise InputError(self.history_.fault)
        return self

    def predict_proba(self, X: Any) -> Array:
        """Class probabilities (N, K), in the order of ``classes_``."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=[np.float32, np.float64], reset=False)
        x = examples(X, "X")
        data = Dataset(x, torch.zeros(len(x), dtype=torch.int64), tuple(self.classes_))
        device = next(self.model_.parameters()).device
        logits = logits_of(self.model_, data, self.scaling_, device)
        probabilities: Array = logits.double().softmax(1).numpy()
        return probabilities

    def predict(self, X: Any) -> Array:
        """The most probable label of each example, (N,)."""
        check_is_fitted(self)
        labels: Array = self.classes_[self.predict_proba(X).argmax(1)]
        return labels

    def _spec(self) -> ModelSpec:
        return ModelSpec(
            norm=self.norm,  # type: ignore[arg-type]  # checked there
            norm_position=self.norm_position,  # type: ignore[arg-type]
            widths=tuple(self.hidden),
            dropout=self.dropout,
        )

    def _by_class(self, y: Array, sample_weight: Array | None) -> Array:
        """Each example's weight times that of its class."""
        classes, places = np.unique(y, return_inverse=True)
        weights = compute_class_weight(
            self.class_weight, classes=classes, y=y, sample_weight=sample_weight
        )
        if not (np.isfinite(weights).all() and weights.min() >= 0 < weights.max()):
            raise InputError(
                "class_weight must hold finite numbers of at least 0, one of them above it, got "
                f"{self.class_weight!r}."
            )
        of_class: Array = weights[places]
        return of_class if sample_weight is None else of_class * sample_weight

    def _config(self, count: int, seed: int) -> TrainConfig:
        names = ("epochs", "batch_size", "lr", "patience", "weight_decay")
        changes = {n: getattr(self, n) for n in names if getattr(self, n) is not None}
        more = {"seed": seed, "device": self.device, "threads": self.threads}
        return recipe(self.recipe, "mlp", count, **changes, **more)

    def _splits(self, data: Dataset, seed: int) -> Splits:
        scaling = self.scaling_ if self.warm_start and hasattr(self, "model_") else None
        if round(self.valid * len(data)) < 1 and 0 < self.valid < 1:
            return Splits(data, data, scaling=scaling)  # type: ignore[arg-type]
        parts = split(data, test=None, valid=self.valid, seed=seed)
        return Splits(parts.train, parts.valid, scaling=scaling)  # type: ignore[arg-type]

    def _refuse_other_classes(self, found: Array) -> None:
        if not np.array_equal(found, self.classes_):
            raise InputError(
                f"y: warm_start goes on with the classes {list(self.classes_)}, got "
                f"{list(found)}; fit anew with warm_start=False."
            )
