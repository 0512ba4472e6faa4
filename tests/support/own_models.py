"""Factories of models as users have them, for train and compare."""

from __future__ import annotations

import torch
from torch import nn


def plain(input_shape, classes):
    """A small convolutional network."""
    return nn.Sequential(
        nn.Conv2d(input_shape[0], 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * (input_shape[1] - 2) * (input_shape[2] - 2), classes),
    )


def transformers_resnet(input_shape, num_classes):
    """A ResNet of transformers', which returns a ModelOutput."""
    import transformers

    settings = transformers.ResNetConfig(
        num_channels=input_shape[0],
        embedding_size=4,
        hidden_sizes=[4, 8],
        depths=[1, 1],
        layer_type="basic",
        num_labels=num_classes,
    )
    return transformers.ResNetForImageClassification(settings)


def monai_densenet(input_shape, classes):
    """A DenseNet of monai's."""
    from monai.networks.nets import DenseNet

    return DenseNet(
        spatial_dims=2,
        in_channels=input_shape[0],
        out_channels=classes,
        init_features=4,
        growth_rate=2,
        block_config=(1, 1),
    )


def with_batches():
    """A model with its batches, as the doctor takes one; for 4 features and 3 classes."""
    return rows(classes=3), [(torch.randn(8, 4), torch.arange(8) % 3)]


def rows(*, classes):
    """A network for rows of 4 features."""
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, classes))


def without_norm(classes):
    """A network without any normalization."""
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, classes))


def seven(input_shape):
    """A head of its own."""
    return plain(input_shape, 7)


def demanding(width):
    """A factory that takes what nobody gives."""
    return nn.Linear(width, 3)


def moody(input_shape, classes):
    """Another model each time."""
    model = plain(input_shape, classes)
    nn.init.normal_(model[0].weight, generator=torch.Generator().manual_seed(next(_MOODS)))
    return model


_MOODS = iter(range(1000))


def nothing():
    """No model."""
    return 3


def failing():
    """A factory with a fault."""
    raise KeyError("width")


MODEL = nn.Linear(4, 3)
