"""How far a curve along a line rises above its chords.

    barrier        max_k f_k - [(1 - t) f_0 + t f_n],  t = k / n
    convexity gap  the largest barrier between any two points of the line: 0 where f is convex along it

Values at n + 1 evenly spaced points, along the last axis. Exact for the points given; what lies between two of them is not
seen. Source: Frankle, Dziugaite, Roy, Carbin 2020 (error barrier); Juneja et al. 2023, arXiv 2205.12411 (convexity gap).
"""

import numpy as np


def barriers(values: np.ndarray) -> np.ndarray:
    """(..., n + 1) -> (...): at least 0, as the ends lie on their chord."""
    t = np.linspace(0, 1, values.shape[-1])
    chord = values[..., :1] * (1 - t) + values[..., -1:] * t
    found: np.ndarray = np.maximum((values - chord).max(-1), 0.0)
    return found


def convexity_gaps(values: np.ndarray) -> np.ndarray:
    """(..., n + 1) -> (...): O(n^2) chords of n points each."""
    n = values.shape[-1]
    parts = [barriers(values[..., i : j + 1]) for i in range(n) for j in range(i + 2, n)]
    found: np.ndarray = np.max(parts, axis=0) if parts else np.zeros(values.shape[:-1])
    return found
