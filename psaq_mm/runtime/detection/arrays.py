# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Arithmetic that several parts of the detection glue share."""

import numpy as np

__all__ = ['best', 'descending', 'exponential', 'sigmoid', 'softmax']


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) in float32, of any shape."""
    return 1 / (1 + exponential(-x))


def softmax(x: np.ndarray) -> np.ndarray:
    """Softmax over the last axis in float32."""
    exponentials = exponential(x - x.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True, dtype=np.float64).astype(np.float32)


def exponential(x: np.ndarray) -> np.ndarray:
    """exp(x), correctly rounded to float32."""
    # NumPy's float32 exponential is up to 3 units in the last place off, and differs between processors. Rounded from
    # float64 it is exact, and scores are ordered as their logits are.
    with np.errstate(over='ignore'):
        return np.exp(x, dtype=np.float64).astype(np.float32)


def descending(scores: np.ndarray) -> np.ndarray:
    """Positions of scores (n,) from the greatest to the least; equal ones in their order."""
    return np.argsort(-scores, kind='stable')


def best(scores: np.ndarray, count: int) -> np.ndarray:
    """Positions of the ``count`` greatest of scores (n,), the greatest first; of equal ones the first come first."""
    if count <= 0:
        return np.zeros(0, np.int64)
    if count < len(scores):
        least = np.partition(scores, len(scores) - count)[len(scores) - count]
        above = np.flatnonzero(scores > least)
        equal = np.flatnonzero(scores == least)[: count - len(above)]
        chosen = np.sort(np.concatenate([above, equal]))
        return chosen[descending(scores[chosen])]
    return descending(scores)
