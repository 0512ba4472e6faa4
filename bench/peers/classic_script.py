"""The classic protocol as people write it: a Dataset of images, a transform, a DataLoader.

Each example passes through an image object, its conversion to a float tensor and
collation, as torchvision's MNIST and ToTensor do it (torchvision itself is not needed).
"""

from __future__ import annotations

import copy
import time

import numpy as np
import protocol
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Images(Dataset):
    """One PIL image and its label at a time, as torchvision.datasets.MNIST gives them."""

    def __init__(self, images, labels, transform):
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = Image.fromarray(self.images[index])
        return self.transform(image), int(self.labels[index])


def to_tensor(image):
    """What torchvision.transforms.ToTensor does with a grey image."""
    array = torch.from_numpy(np.array(image, np.uint8, copy=True))
    array = array.view(image.size[1], image.size[0], 1).permute((2, 0, 1)).contiguous()
    return array.to(torch.get_default_dtype()).div(255)


def evaluate(model, loader, criterion):
    model.eval()
    loss, correct, seen = 0.0, 0, 0
    with torch.no_grad():
        for x, y in loader:
            output = model(x)
            loss += criterion(output, y).item() * len(y)
            correct += (output.argmax(1) == y).sum().item()
            seen += len(y)
    return loss / seen, correct / seen


def main():
    seed = protocol.seed_from_command_line()
    torch.manual_seed(seed)
    data = protocol.mnist(seed)
    train = Images(data.train_x, data.train_y, to_tensor)
    valid = Images(data.valid_x, data.valid_y, to_tensor)
    test = Images(data.test_x, data.test_y, to_tensor)
    train_loader = DataLoader(train, batch_size=protocol.BATCH, shuffle=True)
    valid_loader = DataLoader(valid, batch_size=protocol.BATCH)
    test_loader = DataLoader(test, batch_size=protocol.BATCH)

    model = nn.Sequential(
        nn.Flatten(), nn.Linear(784, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10)
    )
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=protocol.LR)

    best, best_state, waited, goal = float("inf"), None, 0, None
    start = time.perf_counter()
    for epoch in range(protocol.EPOCHS):
        model.train()
        for x, y in train_loader:
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
        valid_loss, accuracy = evaluate(model, valid_loader, criterion)
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
    _, test_accuracy = evaluate(model, test_loader, criterion)
    protocol.report(
        fit_seconds=seconds, epochs=epoch + 1, test_accuracy=test_accuracy, seconds_to_goal=goal
    )


if __name__ == "__main__":
    main()
