"""A hire model, dense or searched, for lm-evaluation-harness.

The package is lm-eval on PyPI; its base installation does not need torch.
"""

from collections.abc import Iterable, Sequence

import jax.numpy as jnp
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from hire.lab.data.model_states import Asked, States, filled_length, sliding, states_of
from hire.lab.metrics.model_quality import head_outputs
from hire.layers.softmax import HireSoftmax
from hire.models import TextModel, convert
from hire.models.generation import SplitModel, prefill, step

# The ids in Gemma's tokenizer and in those trained here.
EOS, BOS = 1, 2


class Harness(TemplateLM):
    """A model with its tokenizer as an lm-eval model.

    Several instances of one model that differ only in their softmax can share `prefilled`: one
    prefill then serves all of them. No text is truncated.

    Args:
        subject: The model with its tokenizer; the model may be converted.
        softmax: Search the LM head with this softmax.
        prefilled: Hidden states by request, extended with those of new requests.

    Raises:
        ValueError: A request has nothing to predict, or more text than the model's context. The
            message states the request.
    """

    def __init__(
        self,
        subject: TextModel,
        softmax: HireSoftmax | None = None,
        prefilled: dict[bytes, np.ndarray] | None = None,
    ):
        super().__init__()
        self.subject, self.prefilled = subject, {} if prefilled is None else prefilled
        self.model = subject.model if softmax is None else convert(subject.model, softmax=softmax)
        rows = self.model.embedding[...]
        self.softmax = rows if self.model.softmax is None else self.model.softmax.with_rows(rows)

    @property
    def eot_token_id(self) -> int:
        return EOS

    @property
    def prefix_token_id(self) -> int:
        return BOS

    @property
    def max_length(self) -> int:
        return self.model.config.context

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs
    ) -> list[int]:
        """Return the ids of a text, after <bos> unless add_special_tokens is False."""
        return self.subject.tokens(string).tolist()[add_special_tokens is False :]

    def answered(
        self, asked: Sequence[Asked], owners: Sequence[int], count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Score requests.

        Args:
            asked: The predictions.
            owners: The request (0..count - 1) of each prediction.
            count: Number of requests.

        Returns:
            For each request: log p of its tokens in nats, and whether greedy decoding yields them.
        """
        cache_keys = [
            prediction.tokens.tobytes() + prediction.queries.to_bytes(4, "big")
            for prediction in asked
        ]
        uncached = {
            key: prediction
            for key, prediction in zip(cache_keys, asked, strict=True)
            if key not in self.prefilled
        }
        if uncached:
            states = states_of(self.model, list(uncached.values()))
            ends = np.cumsum([prediction.queries for prediction in uncached.values()])[:-1]
            self.prefilled |= dict(zip(uncached, np.split(states.hidden, ends), strict=True))
        hidden = np.concatenate([self.prefilled[key] for key in cache_keys])
        targets = np.concatenate([prediction.tokens[-prediction.queries :] for prediction in asked])
        token_owners = np.repeat(owners, [prediction.queries for prediction in asked])
        outputs = head_outputs(self.softmax, States(hidden, targets, token_owners))
        return -np.bincount(token_owners, outputs.nats, count), np.bincount(
            token_owners, ~outputs.hits, count
        ) == 0

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple], **kwargs
    ) -> list[tuple[float, bool]]:
        predictions = [
            Asked(np.asarray([*context, *text], np.int32), len(text))
            for _, context, text in requests
        ]
        log_p, greedy = self.answered(predictions, range(len(predictions)), len(predictions))
        return list(zip(log_p.tolist(), greedy.tolist(), strict=True))

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Return log p of each text after its context.

        Returns:
            For each request: log p in nats, and whether greedy decoding yields the text.

        Raises:
            ValueError: A text is empty. The message names the request.
        """
        for index, request in enumerate(requests):
            if not request.arguments[1]:
                raise ValueError(f"request {index}: expected text to predict, it is empty")
        return super().loglikelihood(list(requests), disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """Return log p in nats of complete texts; every token counts once.

        Windows are those of hire.lab.data.model_states.sliding; each has half a window of context.

        Raises:
            ValueError: A text is empty. The message names the request.
        """
        length = min(1024, self.max_length)
        predictions: list[tuple[int, Asked]] = []
        for index, request in enumerate(requests):
            if not request.args[0]:
                raise ValueError(f"request {index}: expected text to predict, it is empty")
            predictions += [
                (index, prediction)
                for prediction in sliding(self.subject.tokens(request.args[0]), length, length // 2)
            ]
        return self.answered(
            [prediction for _, prediction in predictions],
            [index for index, _ in predictions],
            len(requests),
        )[0].tolist()

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> list[str]:
        """Return greedy continuations, each up to the first of its stop strings.

        Raises:
            ValueError: As in `written`.
        """
        return [self.generate_text(*request.args) for request in requests]

    def generate_text(self, context: str, settings: dict) -> str:
        """Return the greedy continuation of a context.

        Args:
            context: The context.
            settings: "max_gen_toks" (or "max_new_tokens") is the maximum number of tokens, 256 by
                default. "until" contains the stop strings; the text ends before the first of them.

        Raises:
            ValueError: The settings request sampling, are unknown or contradict each other, or the
                context leaves no room for that many tokens.
        """
        max_tokens, until = generation_settings(settings)
        tokens = self.subject.tokens(context)
        if len(tokens) + max_tokens > self.max_length:
            raise ValueError(
                f"{len(tokens)} tokens and {max_tokens} to write: expected at most "
                f"{self.max_length}, the model's context"
            )
        split_model, cache_length = (
            SplitModel.of(self.model),
            filled_length(len(tokens) + max_tokens, self.max_length),
        )
        # Prefill a power of two and step through the remaining tokens, so that a few compiled
        # programs serve all lengths.
        prefill_length = max(
            (size for size in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if size <= len(tokens)),
            default=1,
        )
        top, cache = prefill(
            split_model, jnp.asarray(tokens[None, :prefill_length]), cache_length, 1
        )
        for token in tokens[prefill_length:]:
            top, cache = step(split_model, jnp.asarray([token]), cache, 1)
        ids, text = [], ""
        while len(ids) < max_tokens and (new_token := int(top.indices[0, 0])) != EOS:
            ids.append(new_token)
            text = self.subject.tokenizer.decode(ids)
            if len(ids) == max_tokens or any(stop in text for stop in until):
                break
            top, cache = step(split_model, jnp.asarray([new_token]), cache, 1)
        return cut(text, until)


# Synonyms, as in the adapters of lm-eval.
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens")
# Settings of sampling and beam search.
UNUSED = ("top_p", "top_k", "min_p", "seed", "num_beams")


def generation_settings(settings: dict) -> tuple[int, list[str]]:
    """Return the maximum number of tokens and the stop strings.

    Raises:
        ValueError: Greedy decoding does not support the settings.
    """
    unknown = sorted(set(settings) - {*LENGTHS, "until", "do_sample", "temperature", *UNUSED})
    if unknown:
        known = ", ".join((*LENGTHS, "until", "do_sample", "temperature"))
        raise ValueError(f"generation setting {unknown[0]!r}: expected one of {known}")
    if settings.get("do_sample"):
        raise ValueError(
            f"do_sample = {settings['do_sample']!r}: expected False; this adapter decodes greedily"
        )
    temperature = settings.get("temperature")
    if temperature is not None and temperature != 0:
        raise ValueError(
            f"temperature = {temperature!r}: expected 0; this adapter decodes greedily"
        )
    beams = settings.get("num_beams")
    if beams is not None and beams != 1:
        raise ValueError(f"num_beams = {beams!r}: expected 1; this adapter decodes greedily")
    lengths = {name: settings[name] for name in LENGTHS if settings.get(name) is not None}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"{' and '.join(f'{name} = {count!r}' for name, count in lengths.items())}: expected "
            "one length"
        )
    max_tokens = next(iter(lengths.values()), 256)
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
        raise ValueError(
            f"{next(iter(lengths))} = {max_tokens!r}: expected a whole number of at least 1"
        )
    return max_tokens, stops(settings.get("until"))


def stops(until: str | Iterable[str] | None) -> list[str]:
    """Return the stop strings without empty ones."""
    listed = [] if until is None else [until] if isinstance(until, str) else until
    return [stop for stop in listed if stop]


def cut(text: str, until: Iterable[str]) -> str:
    """Return the text before the first stop string."""
    for stop in until:
        text = text.partition(stop)[0]
    return text
