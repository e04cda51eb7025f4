"""Baselines of a trained model: n-grams on the same tokens, and a general compressor.

The n-grams use Kneser-Ney smoothing.
"""

import lzma
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

from hire.lab.data.text import Document


def kneser_ney(train: np.ndarray, text: np.ndarray, vocabulary: int, order: int = 5) -> np.ndarray:
    """Return the negative log-likelihood of every token of a text under an n-gram model.

    Interpolated Kneser-Ney with one discount per order, n1 / (n1 + 2 n2) (Chen and Goodman, 1998).
    Order 1, without context, is the unigram.

    Args:
        train: Training tokens, in which the n-grams are counted.
        text: Tokens of the text (t,).
        vocabulary: Size of the vocabulary.
        order: Tokens of the longest n-gram.

    Returns:
        -log p (t,) in nats.

    Raises:
        ValueError: `order` tokens do not fit into 63 bits.
    """
    bits = (vocabulary - 1).bit_length()
    if bits * order > 63:
        raise ValueError(
            f"order = {order}: expected at most {63 // bits} for a vocabulary of {vocabulary}"
        )

    def grams(tokens: np.ndarray, n: int) -> np.ndarray:
        """Pack the n tokens that end at each position into one integer.

        Token 0 stands before the first token.
        """
        padded = np.concatenate([np.zeros(n - 1, np.int64), tokens.astype(np.int64)])
        return np.sum(
            [padded[at : at + len(tokens)] << bits * (n - 1 - at) for at in range(n)], axis=0
        )

    keys, counts = np.unique(grams(train, order), return_counts=True)
    orders = [(keys, counts)]
    # Below the highest order an n-gram counts once for every distinct token before it.
    for n in range(order - 1, 0, -1):
        keys, counts = np.unique(orders[-1][0] & ((1 << bits * n) - 1), return_counts=True)
        orders.append((keys, counts))
    p = np.full(len(text), 1.0 / vocabulary)
    for n, (keys, counts) in enumerate(reversed(orders), 1):
        once, twice = np.sum(counts == 1), np.sum(counts == 2)
        discount = once / max(1, once + 2 * twice)
        contexts, first = np.unique(keys >> bits, return_index=True)
        context_counts, types = np.add.reduceat(counts, first), np.diff(first, append=len(keys))
        ngrams = grams(text, n)
        count, (total, kinds) = (
            lookup(keys, ngrams, counts)[0],
            lookup(contexts, ngrams >> bits, context_counts, types),
        )
        has_context = total > 0
        p[has_context] = (np.maximum(count - discount, 0) + discount * kinds * p)[
            has_context
        ] / total[has_context]
    return -np.log(p)


def lookup(keys: np.ndarray, asked: np.ndarray, *values: np.ndarray) -> list[np.ndarray]:
    """Return the values at the requested keys, 0 where the key is not in the sorted `keys`."""
    positions = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    return [np.where(keys[positions] == asked, value[positions], 0) for value in values]


def baselines(
    tokenizer: Tokenizer, train: np.ndarray, texts: Sequence[Document]
) -> dict[str, float]:
    """Return the bits per byte of texts under the baselines.

    Args:
        tokenizer: The tokenizer.
        train: Training tokens, in which the n-grams are counted.
        texts: Documents. The n-grams start each document without context.

    Returns:
        Bits per byte of "1-gram", "5-gram" and "xz -9".
    """
    raw = "\n".join(text.text for text in texts).encode()
    size = sum(len(text.text.encode()) for text in texts)
    before = np.zeros(4, np.int64)  # the context of a 5-gram
    pieces = [
        np.concatenate([before, ids.ids])
        for ids in tokenizer.encode_batch([text.text for text in texts])
    ]
    real = np.concatenate([np.arange(len(piece)) >= len(before) for piece in pieces])
    bits = {
        f"{order}-gram": kneser_ney(
            train, np.concatenate(pieces), tokenizer.get_vocab_size(), order
        )[real].sum()
        / np.log(2)
        for order in (1, 5)
    }
    return {name: float(value / size) for name, value in bits.items()} | {
        "xz -9": 8 * len(lzma.compress(raw, preset=9)) / len(raw)
    }
