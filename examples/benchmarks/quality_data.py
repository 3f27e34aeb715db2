"""The data of the quality bench: two kinds of text and one of images, on every machine alike.

Code is the standard library's sources, prose the language reference that Python carries for its
`help`, images the digits that scikit-learn carries. Nothing is downloaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from char_lm import load_corpus

# The library's top level alone is larger, so the prose, which lies in one of its last folders, is
# in none of the code.
CODE_BYTES = 4_000_000


class Data(NamedTuple):
    """Training examples and a fixed set to validate on."""

    batch: Callable[[np.random.Generator], Any]  # one training batch
    validation: Any  # arrays [batches, batch, ...]
    sha256: str  # of everything the examples are made of


def code_text(context: int, batch: int, validation_rows: int) -> Data:
    """Python: windows of context + 1 bytes."""
    corpus = load_corpus(None, CODE_BYTES)
    return _text(corpus.train, corpus.validation, context, batch, validation_rows, corpus.sha256)


def prose_text(context: int, batch: int, validation_rows: int) -> Data:
    """English: the topics of `help`, a tenth of them, from the middle, for validation."""
    from pydoc_data.topics import topics

    raw = "\n".join(topics[name] for name in sorted(topics)).encode()
    text = np.frombuffer(raw, np.uint8)
    start = len(text) // 2
    before, held_out, after = np.split(text, [start, start + len(text) // 10])
    sha256 = hashlib.sha256(raw).hexdigest()
    train = np.concatenate([before, after])
    return _text(train, held_out, context, batch, validation_rows, sha256)


def digits(batch: int, validation_batches: int) -> Data:
    """8 x 8 images, shifted by up to a pixel either way; those for validation once and for all."""
    from sklearn.datasets import load_digits  # here, because only one task needs it

    found: Any = load_digits()  # a dict with attributes
    images, labels = np.asarray(found.images, np.float32), np.asarray(found.target, np.int32)
    sha256 = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    padded = np.pad(images / 16 - 0.3, ((0, 0), (1, 1), (1, 1)), constant_values=-0.3)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(padded))
    train, held_out = order[:1280], order[1280:]

    def take(rng: np.random.Generator, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return _shifted(padded[rows], rng.integers(0, 3, (2, len(rows)))), labels[rows]

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return take(rng, rng.choice(train, batch, replace=False))

    x, y = take(rng, np.resize(held_out, validation_batches * batch))
    shape = (validation_batches, batch)
    return Data(draw, (x.reshape(*shape, 8, 8), y.reshape(shape)), sha256)


def _shifted(padded: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Each image's 8 x 8 window that starts at its corner."""
    rows, columns = corners[..., None] + np.arange(8)
    return padded[np.arange(len(padded))[:, None, None], rows[:, :, None], columns[:, None, :]]


def _text(
    train: np.ndarray,
    held_out: np.ndarray,
    context: int,
    batch: int,
    validation_rows: int,
    sha256: str,
) -> Data:
    def windows(text: np.ndarray, starts: np.ndarray) -> np.ndarray:
        return text[starts[:, None] + np.arange(context + 1)]

    def draw(rng: np.random.Generator) -> np.ndarray:
        return windows(train, rng.integers(0, len(train) - context, batch))

    starts = np.linspace(0, len(held_out) - context - 1, validation_rows).astype(np.int64)
    validation = windows(held_out, starts).reshape(-1, batch, context + 1)
    return Data(draw, validation, sha256)
