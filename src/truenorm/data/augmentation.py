"""Random changes of a batch's images in training: moves, crops, mirroring, light and colour."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

COLOURS = 3  # channels of a colour image
LEAST_SIDE = 0.8  # of a crop, as a share of the image's: objects near the border stay in it
LIGHT, COLOUR = 0.2, 0.3  # largest relative changes
_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601


def shifted(x: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    """Move each image of (B, C, H, W) by up to ``pixels`` in both directions, zero-filled."""
    batch, channels, height, width = x.shape
    padded = F.pad(x, (pixels,) * 4)
    span = 2 * pixels + 1
    moves = torch.randint(span, (2, batch, 1, 1), generator=generator).to(x.device)
    rows = torch.arange(height, device=x.device).view(1, -1, 1) + moves[0]
    columns = torch.arange(width, device=x.device).view(1, 1, -1) + moves[1]
    cells = (rows * padded.shape[-1] + columns).view(batch, 1, -1).expand(-1, channels, -1)
    return padded.flatten(2).gather(2, cells).view_as(x)


def lightly(x: Tensor, generator: torch.Generator) -> Tensor:
    """Change each image of (B, C, H, W) a little, by draws of its own.

    - A window of 0.8 to 1 of both sides, anywhere inside, is resized to the whole, bilinearly.
    - Deviations from the image's mean are multiplied by 0.8 to 1.2 (contrast), and the mean moves
      by up to 0.2 of the image's standard deviation (brightness). That is the same change
      whatever the unit, so it may follow the scaling.
    - With three channels, half of the images are mirrored left to right, and differences between
      the colours multiplied by 0.7 to 1.3 (saturation). Others are not mirrored: grey images are
      often digits and letters, which mirrored mean something else.
    """
    draws = torch.rand(7, len(x), generator=generator).to(x)
    side = 1 - (1 - LEAST_SIDE) * draws[0]
    place = (1 - side) * (2 * draws[1:3] - 1)  # of the window's centre, in [-1, 1]
    in_colour = x.shape[1] == COLOURS
    across = torch.where(draws[3] < 0.5, -side, side) if in_colour else side
    x = _windows(x, across, side, place)
    contrast, brightness = 1 + LIGHT * (2 * draws[4] - 1), LIGHT * (2 * draws[5] - 1)
    if in_colour:
        luma = (x * x.new_tensor(_LUMA).view(1, -1, 1, 1)).sum(1, keepdim=True)
        x = luma + _each(1 + COLOUR * (2 * draws[6] - 1)) * (x - luma)
    var, mean = torch.var_mean(x, (1, 2, 3), correction=0, keepdim=True)
    return mean + _each(brightness) * var.sqrt() + _each(contrast) * (x - mean)


def _windows(x: Tensor, across: Tensor, down: Tensor, place: Tensor) -> Tensor:
    """A window of each image, resized to the whole; a negative ``across`` mirrors it."""
    zero = torch.zeros_like(down)
    rows = (torch.stack([across, zero, place[0]], 1), torch.stack([zero, down, place[1]], 1))
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def _each(values: Tensor) -> Tensor:
    """(B,) as (B, 1, 1, 1)."""
    return values.view(-1, 1, 1, 1)
