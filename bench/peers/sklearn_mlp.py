"""The same job with scikit-learn's MLPClassifier, which has no batch norm.

It stops on its own validation accuracy, as its early_stopping does, over the same training
images (training and validation part together; it holds out a fifth itself).
"""

from __future__ import annotations

import time

import numpy as np
import protocol
from sklearn.neural_network import MLPClassifier


def main():
    seed = protocol.seed_from_command_line()
    data = protocol.mnist(seed)
    x = protocol.scaled(np.concatenate([data.train_x, data.valid_x]))
    y = np.concatenate([data.train_y, data.valid_y])
    model = MLPClassifier(
        (128,),
        batch_size=protocol.BATCH,
        learning_rate_init=protocol.LR,
        max_iter=protocol.EPOCHS,
        early_stopping=True,
        validation_fraction=0.2,
        n_iter_no_change=protocol.PATIENCE,
        tol=protocol.MIN_DELTA,
        random_state=seed,
    )
    start = time.perf_counter()
    model.fit(x, y)
    seconds = time.perf_counter() - start
    protocol.report(
        fit_seconds=seconds,
        epochs=model.n_iter_,
        test_accuracy=model.score(protocol.scaled(data.test_x), data.test_y),
        seconds_to_goal=None,
    )


if __name__ == "__main__":
    main()
