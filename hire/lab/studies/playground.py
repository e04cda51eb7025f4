"""Notebook 00: one sentence, its best tokens by exact and estimated scores, and its texts."""

import math
from collections.abc import Mapping

import numpy as np
import pandas

import hire
from hire.lab.data import model_states
from hire.lab.data.text import documents
from hire.models import TextModel
from hire.tuning import candidates_needed
from hire.types import AnyArray, Float, Int

# Windows of each calibration document, and their tokens. With few of them the fit takes seconds.
WINDOWS, WINDOW_LENGTH = 2, 64
# Numbers of candidates that are compared.
CANDIDATES = (32, 64, 128, 256, 512, 1024, 2048)
# Tokens in a line of the two texts.
TOKENS_PER_LINE = 5


def calibration_states(subject: TextModel) -> np.ndarray:
    """Return hidden states `(n, d)` of the committed calibration text, speeches and commentary.

    Args:
        subject: The model with its tokenizer.
    """
    tokens, names = model_states.windows(subject, documents("calibration"), WINDOW_LENGTH, WINDOWS)
    return model_states.collect(subject.model, tokens, names).hidden


def sentence_states(subject: TextModel, sentence: str) -> np.ndarray:
    """Return the hidden state after each token of a sentence `(t, d)`, after the final norm.

    Args:
        subject: The model with its tokenizer.
        sentence: The sentence.

    Raises:
        ValueError: The sentence has no token.
    """
    tokens = subject.tokens(sentence)
    if not len(tokens):
        raise ValueError(f"sentence = {sentence!r}: expected at least one token")
    return np.asarray(subject.model.prefill(tokens[None])[0][0])


def shown(token: str) -> str:
    """Return the text of a token with its spaces and line ends made visible."""
    return token.replace(" ", "␣").replace("\n", "↵")


def best_tokens(
    subject: TextModel, softmax: hire.HireSoftmax, state: Float[AnyArray, " d"]
) -> pandas.DataFrame:
    """Compare the k best next tokens with what the search returns, best first.

    Args:
        subject: The model with its tokenizer.
        softmax: The search.
        state: Hidden state of one position.

    Returns:
        One line for each token: its exact and estimated logit, its rank by the estimate (the number
        of candidates that it takes to nominate it), and whether it is returned.
    """
    query = state[None]
    exact = np.asarray(subject.model.logits(query)[0])
    tokens = np.asarray(hire.exact_top_k(exact[None], softmax.k).indices[0])
    estimated = np.asarray(softmax.estimator.scores(query)[0])[tokens]
    if cap := softmax.soft_cap:
        estimated = cap * np.tanh(estimated / cap)
    returned = np.isin(tokens, np.asarray(softmax(query).indices[0]))
    return pandas.DataFrame(
        {
            "token": [shown(subject.tokenizer.decode([token])) for token in tokens.tolist()],
            "exact logit": exact[tokens].astype(float).round(2),
            "estimated logit": estimated.astype(float).round(2),
            "rank by the estimate": candidates_needed(softmax.estimator, query, tokens[None])[0],
            "search": np.where(returned, "returned", "← MISSED"),
        },
        index=pandas.RangeIndex(1, len(tokens) + 1, name="exact rank"),
    )


def missed_line(comparison: pandas.DataFrame, softmax: hire.HireSoftmax) -> str:
    """Say how many of the best tokens the search missed, and how many candidates find all.

    Args:
        comparison: What `best_tokens` returned.
        softmax: The search.
    """
    missed = np.count_nonzero(comparison["search"] != "returned")
    needed = max(softmax.k, *comparison["rank by the estimate"].tolist())
    return (
        f"{softmax.candidates} candidates: {missed} of the {len(comparison)} best tokens missed. "
        f"{needed} candidates find all of them."
    )


def judge_candidates(
    softmax: hire.HireSoftmax,
    estimators: Mapping[str, hire.Estimator],
    hidden: Float[AnyArray, "t d"],
) -> pandas.DataFrame:
    """Judge estimators with more and more candidates on the positions of one sentence.

    Args:
        softmax: The search, for its rows, k and soft cap.
        estimators: Estimators of these rows, by name.
        hidden: Hidden states of the sentence.

    Returns:
        Recall, and bytes as a share of all rows, for each number of candidates.
    """
    largest = softmax.rows.shape[0]
    lines = {}
    for count in (count for count in CANDIDATES if softmax.k <= count <= largest):
        cells = {}
        for name, estimator in estimators.items():
            variant = hire.HireSoftmax(
                softmax.rows, estimator, softmax.k, count, soft_cap=softmax.soft_cap
            )
            quality = hire.evaluate(variant, hidden)
            cells[f"{name}: recall"] = f"{quality.recall.mean:.1%}"
            cells[f"{name}: bytes"] = f"{quality.bytes_fraction:.1%}"
        lines[count] = cells
    table = pandas.DataFrame.from_dict(lines, orient="index")
    return table.rename_axis("candidates")


def first_difference(dense: Int[AnyArray, " t"], searched: Int[AnyArray, " t"]) -> int | None:
    """Return the first position where two texts of one length differ, or None."""
    differing = np.flatnonzero(np.asarray(dense) != np.asarray(searched))
    return int(differing[0]) if len(differing) else None


def side_by_side(
    subject: TextModel, prompt: Int[np.ndarray, " p"], texts: Mapping[str, Int[AnyArray, " t"]]
) -> pandas.DataFrame:
    """Return continuations of a prompt beside each other, a few tokens in each line.

    Args:
        subject: The model, for its tokenizer.
        prompt: Tokens of the prompt.
        texts: Tokens of the prompt and its continuation, by name; the first is the dense model's.

    Returns:
        The texts. In each of them ▶ ◀ mark the first token that differs from the dense text.
    """
    dense, *_ = texts.values()
    starts = range(len(prompt), len(dense), TOKENS_PER_LINE)
    columns = {}
    for name, tokens in texts.items():
        difference = first_difference(dense, tokens)
        lines = [np.asarray(tokens)[start : start + TOKENS_PER_LINE].tolist() for start in starts]
        columns[name] = [
            marked_line(subject, line, None if difference is None else difference - start)
            for start, line in zip(starts, lines, strict=True)
        ]
    first_tokens = [start - len(prompt) + 1 for start in starts]
    return pandas.DataFrame(columns, index=pandas.Index(first_tokens, name="from token"))


def marked_line(subject: TextModel, tokens: list[int], marked: int | None) -> str:
    """Return the text of tokens as one line.

    Args:
        subject: The model, for its tokenizer.
        tokens: The tokens.
        marked: Index of the token that stands in ▶ ◀. None, or an index out of range, marks none.
    """
    decode = subject.tokenizer.decode
    text = decode(tokens)
    if marked is not None and 0 <= marked < len(tokens):
        before, token, after = tokens[:marked], tokens[marked : marked + 1], tokens[marked + 1 :]
        text = f"{decode(before)}▶{decode(token)}◀{decode(after)}"
    return text.replace("\n", "↵").strip()


def difference_lines(
    prompt: Int[np.ndarray, " p"], texts: Mapping[str, Int[AnyArray, " t"]]
) -> str:
    """Say where each continuation of a prompt differs first from the dense one.

    Args:
        prompt: Tokens of the prompt.
        texts: As in `side_by_side`.
    """
    dense, *_ = texts.values()
    lines = []
    for name, tokens in list(texts.items())[1:]:
        difference = first_difference(dense, tokens)
        if difference is None:
            lines.append(f"{name}: the same {len(dense) - len(prompt)} tokens")
        else:
            lines.append(f"{name}: token {difference - len(prompt) + 1} is the first that differs")
    return "\n".join(lines)


def bytes_table(subject: TextModel, softmax: hire.HireSoftmax) -> pandas.DataFrame:
    """Return the megabytes of weights that one new token reads, dense and searched.

    Args:
        subject: The model.
        softmax: The search of its LM head.
    """
    parts, rows = subject.model.config.parameters(), softmax.rows
    weight_bytes = rows.nbytes / math.prod(rows.shape)
    layers = sum(parts[part] for part in ("ffn", "attention", "norms")) * weight_bytes
    lines = {
        name: {
            "LM head": f"{size / 1e6:.1f} MB",
            "share of the LM head": f"{size / rows.nbytes:.1%}",
            "other layers": f"{layers / 1e6:.1f} MB",
        }
        for name, size in dict(dense=rows.nbytes, searched=softmax.bytes_read()).items()
    }
    return pandas.DataFrame.from_dict(lines, orient="index")
