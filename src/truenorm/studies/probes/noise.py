"""Training while noise shifts what norms have normalized (Santurkar et al. 2018, algorithm 1)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from truenorm.data.datasets import Splits
from truenorm.layers.norms import NORMS
from truenorm.models import ModelSpec
from truenorm.studies.probes.layers import WEIGHTED
from truenorm.studies.probes.setup import alone, built, stepper_of
from truenorm.studies.probes.shift import watched
from truenorm.training.config import TrainConfig

MEAN = 0.5  # a unit's mean is drawn from U(-MEAN, MEAN) at each step
SCALE = 1.25  # and its scale from U(1, SCALE)
EACH = 0.1  # spread of an example's own shift and scale about those


def noisy(spec: ModelSpec, config: TrainConfig, splits: Splits) -> dict[str, float]:
    """Train as ``shift`` does, with covariate shift put back after each norm.

    At each training forward each unit (channel) j behind each norm draws a distribution anew,
    mu_j ~ U(-0.5, 0.5) and sigma_j ~ U(1, 1.25), and each example i draws from it: what it gets
    is a_ij * N(sigma_j, 0.1) + U(mu_j - 0.1, mu_j + 0.1), the same at all of its positions. The
    paper's constants. With norm "none" the noise stands where norms would.

    ``train_loss``, ``input_shift`` (both with noise), ``test_accuracy`` (without, by running
    statistics taken without) and ``diverged`` are as in ``shift``.
    """
    with alone(config):
        model, places = with_places(spec, config, splits)
        for place in places:
            place.register_forward_hook(Noise(config.seed))
        return watched(stepper_of(model, splits, config))


class Noise:
    """A forward hook that shifts and scales each unit's output while its module trains."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, module: nn.Module, _: object, out: Tensor) -> Tensor | None:
        if not module.training:
            return None
        axis = _channel_axis(module, out)
        shape = [out.shape[0], *(1,) * (out.ndim - 1)]
        shape[axis] = out.shape[axis]
        scale, shift = self.draw(out.shape[0], out.shape[axis])
        return out * scale.view(shape).to(out) + shift.view(shape).to(out)

    def draw(self, examples: int, units: int) -> tuple[Tensor, Tensor]:
        """Scale and shift of each example and unit, (N, C), around units' own of this call."""

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return low + (high - low) * torch.rand(shape, generator=self.generator)

        mu, sigma = uniform(-MEAN, MEAN, units), uniform(1, SCALE, units)
        shift = mu + uniform(-EACH, EACH, examples, units)
        scale = sigma + EACH * torch.randn((examples, units), generator=self.generator)
        return scale, shift


def _channel_axis(module: nn.Module, out: Tensor) -> int:
    """Channels are axis 1, but the last one of tokens (N, L, C) normalized each by itself."""
    per_token = isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.Identity))
    return 2 if per_token and out.ndim == 3 else 1


def with_places(
    spec: ModelSpec, config: TrainConfig, splits: Splits
) -> tuple[nn.Module, list[nn.Module]]:
    """The model, and its norms; for norm "none" the identities that stand where norms would."""
    model = built(spec, config, splits)
    if spec.norm != "none":
        return model, [m for m in model.modules() if isinstance(m, NORMS)]
    twin = built(dataclasses.replace(spec, norm="rms"), config, splits)
    ours = [m for m in model.modules() if isinstance(m, WEIGHTED)]
    theirs = [name for name, m in twin.named_modules() if isinstance(m, WEIGHTED)]
    for name, module in zip(theirs, ours, strict=True):  # which may have biases beside no norm
        twin.set_submodule(name, module)
    norms = [name for name, m in twin.named_modules() if isinstance(m, NORMS)]
    places: list[nn.Module] = [nn.Identity() for _ in norms]
    for name, place in zip(norms, places, strict=True):
        twin.set_submodule(name, place)
    return twin, places
