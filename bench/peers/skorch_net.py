"""The classic protocol with skorch: its loop, its early stopping, best weights loaded back."""

from __future__ import annotations

import itertools
import time

import protocol
import torch
from skorch import NeuralNetClassifier
from skorch.callbacks import EarlyStopping
from skorch.dataset import Dataset
from skorch.helper import predefined_split
from torch import nn


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(784, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10))


def main():
    seed = protocol.seed_from_command_line()
    torch.manual_seed(seed)
    data = protocol.mnist(seed)
    valid = Dataset(protocol.scaled(data.valid_x), data.valid_y)
    net = NeuralNetClassifier(
        Net,
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.Adam,
        lr=protocol.LR,
        batch_size=protocol.BATCH,
        max_epochs=protocol.EPOCHS,
        train_split=predefined_split(valid),
        iterator_train__shuffle=True,
        callbacks=[
            EarlyStopping(
                patience=protocol.PATIENCE,
                threshold=protocol.MIN_DELTA,
                threshold_mode="abs",
                load_best=True,
                sink=lambda _: None,
            )
        ],
        verbose=0,
    )
    start = time.perf_counter()
    net.fit(protocol.scaled(data.train_x), data.train_y)
    seconds = time.perf_counter() - start
    passed = [a > protocol.GOAL for a in net.history[:, "valid_acc"]]
    ends = list(itertools.accumulate(net.history[:, "dur"]))
    protocol.report(
        fit_seconds=seconds,
        epochs=len(net.history),
        test_accuracy=net.score(protocol.scaled(data.test_x), data.test_y),
        seconds_to_goal=ends[passed.index(True)] if True in passed else None,
    )


if __name__ == "__main__":
    main()
