"""Hidden states of a model on real text, with their documents."""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from hire.lab.data.text import Document
from hire.models import Decoder, TextModel
from hire.ops.batches import batches
from hire.types import AnyArray, Hidden

# Tokens per forward pass. With more of them, the activations of a layer no longer fit into a CPU's
# caches.
TOKENS_PER_PASS = 1024


def windows_per_pass(windows: int, length: int) -> int:
    """Return how many of `windows` windows of `length` tokens go into one forward pass."""
    return min(windows, max(1, TOKENS_PER_PASS // length))


class States(NamedTuple):
    """Hidden states with their next tokens and documents.

    Attributes:
        hidden: Hidden states (n, d).
        targets: The token that followed each state (n,).
        documents: The document of each state (n,).
    """

    hidden: np.ndarray
    targets: np.ndarray
    documents: np.ndarray


def windows(
    subject: TextModel,
    texts: Sequence[Document],
    length: int,
    windows_per_document: int = 1,
    *,
    limit: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Cut windows of tokens from documents.

    Documents shorter than a window are left out.

    Args:
        subject: The model, for its tokenizer.
        texts: Documents.
        length: Tokens of a window; the first is the one that begins every text, if there is one.
        windows_per_document: Number of windows per document, at most. They are evenly spaced.
        limit: Number of windows, at most; documents after the last of them are not read. None
            means all.

    Returns:
        Tokens (w, length), and the name of each window's document (w,).

    Raises:
        ValueError: No document is long enough.
    """
    tokens, names, first = [], [], 0 if subject.first_token is None else 1
    for text in texts:
        if limit is not None and len(tokens) >= limit:
            break
        # One window needs only the beginning of a book.
        ids = subject.tokens(text.text if windows_per_document > 1 else text.text[: 32 * length])
        spans = min(windows_per_document, (len(ids) - first) // (length - first))
        for span in range(spans):
            start = first + span * ((len(ids) - first) // spans)
            tokens.append(np.concatenate([ids[:first], ids[start : start + length - first]]))
            names.append(text.name)
    if not tokens:
        raise ValueError(f"{len(texts)} documents: none has {length} tokens")
    return np.stack(tokens[:limit]), np.asarray(names[:limit])


def in_batches(function: Callable, values: AnyArray, batch: int, *more: AnyArray):
    """Call a compiled function in batches of one size, so that it compiles once.

    Args:
        function: Function of one batch of each array.
        values: Array (n, …).
        batch: Size of a batch. The last one is padded.
        *more: Further arrays (n, …).

    Returns:
        What the function returns for all n, as numpy arrays.
    """
    padded = [
        np.concatenate([array, array[:1].repeat(-len(array) % batch, 0)])
        for array in (values, *more)
    ]
    results = [
        jax.device_get(function(*batch_arrays))
        for batch_arrays in zip(*(batches(array, batch) for array in padded), strict=True)
    ]
    return jax.tree.map(lambda *pieces: np.concatenate(pieces)[: len(values)], *results)


@partial(jax.jit, static_argnames="graph")
def passed(graph: nnx.GraphDef, state: nnx.State, x: Hidden) -> Hidden:
    """Apply one block to the inputs (b, t, d) of texts."""
    block = nnx.merge(graph, state)
    return block(x, block.attention.prefill, x.shape[1])[0]


def hidden_states(model: Decoder) -> Callable[[AnyArray], Hidden]:
    """Return a function that maps texts (b, t) to hidden states (b, t, d).

    They are the hidden states of Decoder.prefill. The function applies one block after the other,
    so that only one block of each kind is compiled.
    """
    blocks = [nnx.split(block) for block in model.blocks]

    def prefilled(tokens: AnyArray) -> Hidden:
        return model.norm(reduce(lambda x, block: passed(*block, x), blocks, model.embed(tokens)))

    return prefilled


def collect(model: Decoder, tokens: np.ndarray, names: np.ndarray, *, skip: int = 1) -> States:
    """Compute the hidden states of windows (w, t) from position `skip` on.

    The last position is left out: its next token is unknown.

    Args:
        model: The decoder.
        tokens: Windows of tokens (w, t).
        names: The document of each window (w,).
        skip: Positions at the beginning of each window that are left out.
    """
    hidden = in_batches(hidden_states(model), tokens, windows_per_pass(*tokens.shape))[:, skip:-1]
    count = hidden.shape[1]
    return States(
        hidden.reshape(-1, hidden.shape[-1]),
        tokens[:, skip + 1 :].reshape(-1),
        np.repeat(names, count),
    )


class Asked(NamedTuple):
    """A request to predict tokens.

    Attributes:
        tokens: Tokens (t,), from the one that begins every text, if there is one.
        queries: How many of the last tokens are predicted, each from all tokens before it.
    """

    tokens: np.ndarray
    queries: int


def continuation(subject: TextModel, context: str, text: str) -> Asked:
    """Request the tokens of a text after a context.

    The last tokens of `context + text` are predicted: all but as many as the context alone has.
    Without a context, in a model whose texts have no first token, the first token of the text has
    nothing before it and is not predicted.
    """
    tokens = subject.tokens(context + text)
    count = len(tokens) - len(subject.tokens(context))
    return Asked(tokens, min(count, len(tokens) - 1))


def sliding(
    tokens: np.ndarray, length: int, stride: int, *, repeat_first: bool = True
) -> list[Asked]:
    """Request every token but the first once, in sliding windows of length + 1 tokens.

    The first window predicts `length` tokens. Each later window predicts its last `stride` tokens
    from a context that reaches back as far.

    Args:
        tokens: Tokens (t,).
        length: Tokens of a window after its first.
        stride: Tokens that each later window predicts.
        repeat_first: Whether every window begins with the first token, as it does in a model whose
            texts all begin with one, such as <bos>. Otherwise a window begins with the token that
            stands before the others in the text.

    Returns:
        The requests; none if there are fewer than two tokens.

    Raises:
        ValueError: `1 <= stride <= length` does not hold.
    """
    if not 1 <= stride <= length:
        raise ValueError(f"stride = {stride}: expected 1 <= stride <= length = {length}")
    requests, done = [], 1
    while done < len(tokens):
        end = min(len(tokens), done + (length if done == 1 else stride))
        start = max(1, end - length)
        first = 0 if repeat_first else start - 1
        window = np.concatenate([tokens[first : first + 1], tokens[start:end]])
        requests.append(Asked(window, end - done))
        done = end
    return requests


def filled_length(count: int, context: int) -> int:
    """Return the padded length of a text of `count` tokens, at most `context`.

    It is a power of two or three quarters of one, so that few programs are compiled.
    """
    power = max(32, 1 << (count - 1).bit_length())
    return min(context, power * 3 // 4 if count <= power * 3 // 4 else power)


def states_of(model: Decoder, asked: Sequence[Asked]) -> States:
    """Compute the hidden states that requested tokens are predicted from.

    Texts of similar length are computed together.

    Args:
        model: The decoder.
        asked: The requests.

    Returns:
        States in the order of the requests. `targets` are the requested tokens; `documents` are
        indices into `asked`.

    Raises:
        ValueError: A request has no token to predict, or more text than the model's context. The
            message names its index.
    """
    prefill, context, hidden = hidden_states(model), model.config.context, {}
    for place, (tokens, count) in enumerate(asked):
        if not 1 <= count < len(tokens) <= context + 1:
            raise ValueError(
                f"text {place}: {count} of {len(tokens)} tokens to predict: expected at least 1, "
                "after one that is known, and at most the "
                f"context of {context} before the last"
            )
    lengths = [len(tokens) - 1 for tokens, _ in asked]  # the last token is only a target
    remaining = sorted(range(len(asked)), key=lambda place: -lengths[place])
    while remaining:
        length = filled_length(lengths[remaining[0]], context)
        size = windows_per_pass(len(remaining), length)
        indices, remaining = remaining[:size], remaining[size:]
        window = np.zeros((size, length), np.int32)
        for row, place in zip(window, indices, strict=False):
            row[: lengths[place]] = asked[place].tokens[:-1]
        for row, place in zip(np.asarray(prefill(window)), indices, strict=False):
            hidden[place] = row[lengths[place] - asked[place].queries : lengths[place]]
    targets, counts = ([tokens[-count:] for tokens, count in asked], [count for _, count in asked])
    all_hidden = np.concatenate([hidden[place] for place in range(len(asked))])
    return States(all_hidden, np.concatenate(targets), np.repeat(np.arange(len(asked)), counts))


def document_states(
    subject: TextModel, texts: Sequence[Document], length: int = 256, stride: int = 128
) -> States:
    """Compute the hidden states that every token of every document is predicted from.

    In a model whose texts have no first token, the first token of a document has no context and is
    not predicted.

    Args:
        subject: The model with its tokenizer.
        texts: Documents.
        length: Tokens of a window, see `sliding`.
        stride: Tokens that each later window predicts, see `sliding`.

    Returns:
        States; `documents` are indices into `texts`.

    Raises:
        ValueError: A document has no token to predict (the message names it), or `1 <= stride <=
            length <= the model's context` does not hold.
    """
    requests, context = [], subject.model.config.context
    if length > context:
        raise ValueError(f"length = {length}: expected at most {context}, the model's context")
    for index, text in enumerate(texts):
        tokens = subject.tokens(text.text)
        if len(tokens) < 2:
            raise ValueError(
                f"document {text.name!r} of {len(text.text)} characters: expected at least one "
                "token to predict; leave the document out"
            )
        windows = sliding(tokens, length, stride, repeat_first=subject.first_token is not None)
        requests += [(index, request) for request in windows]
    states = states_of(subject.model, [request for _, request in requests])
    return states._replace(documents=np.asarray([index for index, _ in requests])[states.documents])
