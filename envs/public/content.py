"""Item content: what is written about items as small vectors.

Shape legend: I items, C features of a vector, B buckets of hashed tokens.
"""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Sequence

import numpy as np

NUM_FEATURES = 32
"""C: features of a vector."""
NUM_BUCKETS = 2**16
"""B: buckets that tokens are hashed into."""
_CHUNK = 4096


def item_vectors(texts: Sequence[str]) -> np.ndarray:
    """Turn the text of each item into a vector of unit length.

    Tokens are runs of letters and digits in lower case, hashed into B buckets by CRC-32. With n items that have text,
    df(b) of them in bucket b, an item's weight in b is tf(b) · (1 + log((1 + n) / (1 + df(b)))). A fixed sparse random
    projection to C = 32 features, whose entries are -1, 0 and 1 with probabilities 1/6, 2/3 and 1/6, keeps cosines to
    about 1/√C; the result is scaled to unit length.

    Args:
        texts: one text an item, "" where nothing is known.

    Returns:
        float32 [I, C]: rows of unit length, zero where there is no token. The same texts give the same vectors on
        every machine.

    References:
        Weinberger et al. (2009), Feature hashing for large scale multitask learning. ICML.
        Li, Hastie, Church (2006), Very sparse random projections. KDD.

    Example:
        >>> vectors = item_vectors(["red mug", "blue mug", "", "garden chair"])
        >>> vectors.shape, vectors[0] @ vectors[1] > vectors[0] @ vectors[3], float(abs(vectors[2]).sum())
        ((4, 32), np.True_, 0.0)
    """
    item, bucket, count = _token_counts(texts)
    frequency = np.bincount(bucket, minlength=NUM_BUCKETS)
    weight = count * (1.0 + np.log((1 + len(np.unique(item))) / (1 + frequency[bucket])))
    # Fixed for all time: vectors of different runs and domains must mean the same.
    entries = np.random.default_rng(0).integers(0, 6, size=(NUM_BUCKETS, NUM_FEATURES), dtype=np.int8)
    projection = (entries == 0).astype(np.float32) - (entries == 1)
    vectors = np.zeros((len(texts), NUM_FEATURES), dtype=np.float32)
    bounds = np.searchsorted(item, np.arange(0, len(texts) + _CHUNK, _CHUNK))
    for low, high in itertools.pairwise(bounds):
        part = slice(low, high)
        np.add.at(vectors, item[part], weight[part, None].astype(np.float32) * projection[bucket[part]])
    norm = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norm > 0, norm, 1.0)


def _token_counts(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Items, buckets and how often, in order of the item."""
    hashed = [
        [zlib.crc32(token.encode()) % NUM_BUCKETS for token in re.findall(r"[^\W_]+", text.lower())] for text in texts
    ]
    item = np.repeat(np.arange(len(texts)), [len(tokens) for tokens in hashed])
    bucket = np.fromiter((code for tokens in hashed for code in tokens), dtype=np.int64, count=len(item))
    key, count = np.unique(item * NUM_BUCKETS + bucket, return_counts=True)
    return key // NUM_BUCKETS, key % NUM_BUCKETS, count
