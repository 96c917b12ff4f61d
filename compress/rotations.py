"""Orthogonal matrices that spread outliers over all channels: Hadamard of many orders, random, mean-keeping."""

from __future__ import annotations

import torch
from torch import Tensor


def rotation(size: int, kind: str, seed: int, keep_mean: bool = False) -> tuple[Tensor, str]:
    """A random orthogonal matrix [size, size] in float64 and what it is; `kind` is hadamard or random.

    With `keep_mean` it maps the vector of ones to itself, so that it commutes with a layer norm's mean subtraction.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = hadamard(size) if kind == "hadamard" else None
    if signs is None:
        matrix, name = random_orthogonal(size, generator), "random"
    else:
        flips = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
        matrix, name = signs * flips / size**0.5, "hadamard"
    return (mean_keeping(matrix) if keep_mean else matrix), name


def random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """Uniform among the orthogonal matrices: the signs that the QR decomposition leaves open are made random too."""
    normal = torch.randn(size, size, dtype=torch.float64, generator=generator)
    matrix, triangle = torch.linalg.qr(normal)
    return matrix * triangle.diagonal().sign()


def mean_keeping(matrix: Tensor) -> Tensor:
    """The orthogonal matrix followed by the one reflection after which the vector of ones is mapped to itself."""
    ones = torch.full((len(matrix),), len(matrix) ** -0.5, dtype=matrix.dtype)
    normal = matrix @ ones - ones
    length = normal.square().sum()
    if length < 1e-24:
        return matrix
    return matrix - (2 / length) * normal[:, None] * (normal @ matrix)


def hadamard(size: int) -> Tensor | None:
    """A Hadamard matrix of signs: a power of two times an order of Paley's; None where there is no such order."""
    doublings, core = 0, None
    while core is None:
        core = torch.ones(1, 1, dtype=torch.float64) if size == 1 else paley(size)
        if core is None:
            if size % 2:
                return None
            size, doublings = size // 2, doublings + 1
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    for _ in range(doublings):
        core = torch.kron(pair, core)
    return core


def paley(size: int) -> Tensor | None:
    """Paley's Hadamard matrix: of order q + 1 for primes q = 3 mod 4, of order 2 (q + 1) for primes q = 1 mod 4."""
    if size % 4:
        return None
    if is_prime(size - 1):  # size is a multiple of 4, so this prime is 3 mod 4
        return bordered(size - 1, -1.0) + torch.eye(size, dtype=torch.float64)
    prime = size // 2 - 1
    if not is_prime(prime) or prime % 4 != 1:
        return None
    whole = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(bordered(prime, 1.0), whole) + torch.kron(torch.eye(prime + 1, dtype=torch.float64), diagonal)


def bordered(prime: int, corner: float) -> Tensor:
    """Which differences are squares modulo the prime (1, else -1; 0 on the diagonal), with a border of ones."""
    squares = torch.full((prime,), -1.0, dtype=torch.float64)
    squares[[i * i % prime for i in range(1, prime)]] = 1.0
    squares[0] = 0.0
    index = torch.arange(prime)
    matrix = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    matrix[1:, 1:] = squares[(index[:, None] - index[None]) % prime]
    matrix[0, 1:], matrix[1:, 0] = 1.0, corner
    return matrix


def is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
