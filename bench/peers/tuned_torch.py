"""The classic protocol in torch tuned by hand: data in RAM, batched gather, fused Adam."""

from __future__ import annotations

import copy
import time

import protocol
import torch
import torch.nn.functional as F
from torch import nn


@torch.no_grad()
def evaluate(model, x, y):
    model.eval()
    loss, correct = 0.0, 0
    for a, b in zip(x.split(1024), y.split(1024), strict=True):
        output = model(a)
        loss += F.cross_entropy(output, b, reduction="sum").item()
        correct += (output.argmax(1) == b).sum().item()
    return loss / len(y), correct / len(y)


def main():
    seed = protocol.seed_from_command_line()
    torch.manual_seed(seed)
    data = protocol.mnist(seed)
    train_x, valid_x, test_x = (
        torch.from_numpy(protocol.scaled(x)) for x in (data.train_x, data.valid_x, data.test_x)
    )
    train_y, valid_y, test_y = (
        torch.from_numpy(y) for y in (data.train_y, data.valid_y, data.test_y)
    )
    model = nn.Sequential(nn.Linear(784, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=protocol.LR, fused=True)

    best, best_state, waited, goal = float("inf"), None, 0, None
    start = time.perf_counter()
    for epoch in range(protocol.EPOCHS):
        model.train()
        for index in torch.randperm(len(train_x)).split(protocol.BATCH):
            loss = F.cross_entropy(model(train_x[index]), train_y[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        valid_loss, accuracy = evaluate(model, valid_x, valid_y)
        if goal is None and accuracy > protocol.GOAL:
            goal = time.perf_counter() - start
        if valid_loss < best - protocol.MIN_DELTA:
            best, best_state, waited = valid_loss, copy.deepcopy(model.state_dict()), 0
        else:
            waited += 1
        if waited >= protocol.PATIENCE:
            break
    model.load_state_dict(best_state)
    seconds = time.perf_counter() - start
    _, test_accuracy = evaluate(model, test_x, test_y)
    protocol.report(
        fit_seconds=seconds, epochs=epoch + 1, test_accuracy=test_accuracy, seconds_to_goal=goal
    )


if __name__ == "__main__":
    main()
