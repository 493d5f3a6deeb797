"""Laplacian pyramids, as matrices of one axis each."""

from __future__ import annotations

import itertools

import torch


def blur(size):
    """Return the matrix of the binomial with reflected edges."""
    matrix = torch.zeros(size, size, dtype=torch.float64)
    for row in range(size):
        for offset, weight in zip(range(-2, 3), (1, 4, 6, 4, 1), strict=True):
            place = abs(row + offset)
            place = 2 * (size - 1) - place if place >= size else place
            matrix[row, place] += weight / 16
    return matrix


def resize(before, after):
    """Return the matrix of linear interpolation between the centres of pixels."""
    matrix = torch.zeros(after, before, dtype=torch.float64)
    for row in range(after):
        place = max((row + 0.5) * before / after - 0.5, 0.0)
        low = min(int(place), before - 1)
        high, share = min(low + 1, before - 1), place - low
        matrix[row, low] += 1 - share
        matrix[row, high] += share
    return matrix


def both_axes(image, matrix_of):
    height, width = image.shape[-2:]
    return torch.einsum("ih,jw,...hw->...ij", matrix_of(height).to(image), matrix_of(width).to(image), image)


def down(image):
    return both_axes(image, lambda size: resize(size, size // 2) @ blur(size))


def up(image, size):
    sizes = dict(zip(image.shape[-2:], size, strict=True))
    if image.shape[-2] == image.shape[-1]:
        assert size[0] == size[1]
    return both_axes(image, lambda before: blur(sizes[before]) @ resize(before, sizes[before]))


def pyramid(image, levels):
    gaussian = [image]
    for _ in range(levels - 1):
        gaussian.append(down(gaussian[-1]))
    bands = [fine - up(coarse, fine.shape[-2:]) for fine, coarse in itertools.pairwise(gaussian)]
    return [*bands, gaussian[-1]]
