"""What a trained model is held against: n-grams with Kneser-Ney smoothing on the same tokens, and a general compressor."""

import lzma
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

from hire.lab.text import Document


def kneser_ney(train: np.ndarray, text: np.ndarray, vocabulary: int, order: int = 5) -> np.ndarray:
    """-log p (t,) in nats of every token of a text (t,), from n-grams counted in the training tokens.

    Interpolated Kneser-Ney with one discount an order, n1 / (n1 + 2 n2) (Chen and Goodman, 1998); order 1 without context is the
    unigram. Raises ValueError when `order` tokens do not fit 63 bits.
    """
    bits = (vocabulary - 1).bit_length()
    if bits * order > 63:
        raise ValueError(f"order = {order}: expected at most {63 // bits} for a vocabulary of {vocabulary}")

    def grams(tokens: np.ndarray, n: int) -> np.ndarray:
        """The n tokens that end at each position, as one number; what is before the first is token 0."""
        padded = np.concatenate([np.zeros(n - 1, np.int64), tokens.astype(np.int64)])
        return np.sum([padded[at : at + len(tokens)] << bits * (n - 1 - at) for at in range(n)], axis=0)

    keys, counts = np.unique(grams(train, order), return_counts=True)
    levels = [(keys, counts)]
    for n in range(order - 1, 0, -1):  # below the highest order a gram counts once for every token that came before it
        keys, counts = np.unique(levels[-1][0] & ((1 << bits * n) - 1), return_counts=True)
        levels.append((keys, counts))
    p = np.full(len(text), 1.0 / vocabulary)
    for n, (keys, counts) in enumerate(reversed(levels), 1):
        once, twice = np.sum(counts == 1), np.sum(counts == 2)
        discount = once / max(1, once + 2 * twice)
        contexts, first = np.unique(keys >> bits, return_index=True)
        seen, types = np.add.reduceat(counts, first), np.diff(first, append=len(keys))
        asked = grams(text, n)
        count, (total, kinds) = lookup(keys, asked, counts)[0], lookup(contexts, asked >> bits, seen, types)
        known = total > 0
        p[known] = (np.maximum(count - discount, 0) + discount * kinds * p)[known] / total[known]
    return -np.log(p)


def lookup(keys: np.ndarray, asked: np.ndarray, *values: np.ndarray) -> list[np.ndarray]:
    """The values of sorted keys that are asked for, 0 where there is no such key."""
    place = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    return [np.where(keys[place] == asked, value[place], 0) for value in values]


def baselines(tokenizer: Tokenizer, train: np.ndarray, texts: Sequence[Document]) -> dict[str, float]:
    """Bits a byte of texts: 1-gram and 5-gram counted in the training tokens, each document from its beginning, and `xz -9`."""
    raw = "\n".join(text.text for text in texts).encode()
    size = sum(len(text.text.encode()) for text in texts)
    before = np.zeros(4, np.int64)  # as far as a 5-gram looks back
    pieces = [np.concatenate([before, ids.ids]) for ids in tokenizer.encode_batch([text.text for text in texts])]
    real = np.concatenate([np.arange(len(piece)) >= len(before) for piece in pieces])
    bits = {
        f"{order}-gram": kneser_ney(train, np.concatenate(pieces), tokenizer.get_vocab_size(), order)[real].sum() / np.log(2)
        for order in (1, 5)
    }
    return {name: float(value / size) for name, value in bits.items()} | {"xz -9": 8 * len(lzma.compress(raw, preset=9)) / len(raw)}
