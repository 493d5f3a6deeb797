"""torch.randn on a GPU, restated thread by thread from its source: Philox, curand's state, the kernel's loop."""

from __future__ import annotations

import numpy as np
import torch

UNROLL = 4
WORD = 2**32 - 1


def philox4x32_10(counter: list[int], key: list[int]) -> list[int]:
    """Random123's loop, one round a turn."""
    c, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) & WORD, (k[1] + 0xBB67AE85) & WORD]
    return c


class Curand:
    """curandStatePhilox4_32_10_t: curand_init, and curand4 of a state whose offset is a multiple of 4."""

    def __init__(self, seed: int, subsequence: int, offset: int) -> None:
        assert offset % 4 == 0
        self.key = [seed & WORD, seed >> 32]
        self.counter = (subsequence << 64) + offset // 4

    def curand4(self) -> list[int]:
        words = philox4x32_10([self.counter >> shift & WORD for shift in (0, 32, 64, 96)], self.key)
        self.counter += 1
        return words


def torch_kernel(numel: int, seed: int, offset: int, threads: int) -> list[tuple[int, int, int]]:
    """distribution_elementwise_grid_stride_kernel with curand_normal4, thread by thread: each element's two words, and
    whether it is the first or second value of them."""
    result = [None] * numel
    rounded_size = ((numel - 1) // (threads * UNROLL) + 1) * threads * UNROLL
    for idx in range(threads):
        state = Curand(seed, idx, offset)
        for linear_index in range(idx, rounded_size, threads * UNROLL):
            x = state.curand4()
            for ii in range(UNROLL):
                li = linear_index + threads * ii
                if li < numel:
                    assert result[li] is None
                    result[li] = (x[ii // 2 * 2], x[ii // 2 * 2 + 1], ii % 2)
    return result


def curand_box_muller(x: np.ndarray, y: np.ndarray, second: np.ndarray) -> np.ndarray:
    """_curand_box_muller: u and v as the float32 that they are there, and the rest in float64."""
    inverse = np.float64(np.float32(2.3283064e-10))
    turn = np.float64(np.float32(np.float32(2.3283064e-10) * np.float32(6.2831855)))
    u = (x.astype(np.float32) * inverse + inverse / 2).astype(np.float32).astype(np.float64)
    v = (y.astype(np.float32) * turn + turn / 2).astype(np.float32).astype(np.float64)
    return np.where(second, np.cos(v), np.sin(v)) * np.sqrt(-2 * np.log(u))


def literal_normals(numel: int, seed: int, offset: int, threads: int) -> torch.Tensor:
    x, y, second = np.array(torch_kernel(numel, seed, offset, threads), dtype=np.uint64).T
    return torch.from_numpy(curand_box_muller(x, y, second.astype(bool)))
