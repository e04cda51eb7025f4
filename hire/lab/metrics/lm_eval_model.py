"""A hire model, dense or searched, for lm-evaluation-harness.

The package is lm-eval on PyPI; its base installation does not need torch.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text

from hire.lab.data.model_states import Asked, States, filled_length, sliding, states_of
from hire.lab.metrics.model_quality import head_outputs
from hire.layers.softmax import HireSoftmax
from hire.models import TextModel, convert
from hire.models.generation import check_integer, stream_tokens

DEFAULT_LENGTH = 256  # tokens of a continuation, as in the adapters of lm-eval
# Synonyms in lm-eval, which takes the first that is stated.
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# Settings of hire.generate that change greedy decoding too, and those that only sampling has.
PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
SAMPLING = ("top_k", "top_p", "min_p")
KNOWN = ("do_sample", "temperature", *SAMPLING, "seed", *PENALTIES, "num_beams", "until")
ALL_TOKENS = (0, -1)  # top_k of transformers and of vLLM


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
        searched = self.model.softmax
        self.softmax = (
            self.model.head_rows() if searched is None else searched.with_rows(self.model.head[...])
        )

    @property
    def eot_token_id(self) -> int:
        """The first of the tokens that end a text.

        Raises:
            ValueError: The model's file states no such token.
        """
        if not self.subject.end_tokens:
            raise ValueError("end_tokens = (): expected a token that ends a text; state one")
        return self.subject.end_tokens[0]

    @property
    def prefix_token_id(self) -> int:
        """The token from which a text without context is predicted.

        It is the one that begins every text. In a model without it, it is the end of the text
        before, as in TemplateLM of lm-eval.

        Raises:
            ValueError: The model has neither.
        """
        first = self.subject.first_token
        return self.eot_token_id if first is None else first

    @property
    def max_length(self) -> int:
        return self.model.config.context

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs
    ) -> list[int]:
        """Return the ids of a text.

        Args:
            string: The text.
            add_special_tokens: Whether the token that begins every text, if the model has one, is
                put before the ids. By default it is, unless the text itself begins with it.
            **kwargs: Ignored.
        """
        ids = self.subject.tokenizer.encode(string, add_special_tokens=False).ids
        first = [] if self.subject.first_token is None else [self.subject.first_token]
        if add_special_tokens is None:
            add_special_tokens = ids[:1] != first
        return first + ids if add_special_tokens else ids

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
        outputs = head_outputs(
            self.softmax,
            States(hidden, targets, token_owners),
            soft_cap=self.model.config.logit_soft_cap,
        )
        return -np.bincount(token_owners, outputs.nats, count), np.bincount(
            token_owners, ~outputs.hits, count
        ) == 0

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple], **kwargs
    ) -> list[tuple[float, bool]]:
        predictions = [
            Asked(np.asarray([*(context or [self.prefix_token_id]), *text], np.int32), len(text))
            for _, context, text in requests
        ]
        log_p, greedy = self.answered(predictions, range(len(predictions)), len(predictions))
        return list(zip(log_p.tolist(), greedy.tolist(), strict=True))

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Return log p of each text after its context, or after `prefix_token_id` without one.

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
        The first begins with `prefix_token_id`, as in lm-eval. The others do so too if that token
        begins every text of the model.

        Raises:
            ValueError: A text is empty. The message names the request.
        """
        length, is_first = min(1024, self.max_length), self.subject.first_token is not None
        predictions: list[tuple[int, Asked]] = []
        for index, request in enumerate(requests):
            if not request.args[0]:
                raise ValueError(f"request {index}: expected text to predict, it is empty")
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            tokens = np.asarray([self.prefix_token_id, *tokens], np.int32)
            windows = sliding(tokens, length, length // 2, repeat_first=is_first)
            predictions += [(index, prediction) for prediction in windows]
        return self.answered(
            [prediction for _, prediction in predictions],
            [index for index, _ in predictions],
            len(requests),
        )[0].tolist()

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> list[str]:
        """Return continuations, each up to the first of its stop strings.

        Sampling repeats from run to run: its noise depends on the setting "seed" (0 by default), on
        the context, and on how many of the earlier requests are the same one, so that the repeats
        of a task differ. It does not depend on the other requests or on the softmax.

        Raises:
            ValueError: As in `generate_text`.
        """
        count: Counter[str] = Counter()
        texts = []
        for request in requests:
            identity = repr(request.args)
            texts.append(self.generate_text(*request.args, repeat=count[identity]))
            count[identity] += 1
        return texts

    def generate_text(self, context: str, settings: dict, repeat: int = 0) -> str:
        """Return the continuation of a context.

        It is what hire.generate writes with `request_seed`, up to an end token or a stop string.

        Args:
            context: The context. If it has no tokens, `prefix_token_id` takes its place.
            settings: Generation settings of lm-eval, see `generation_settings`.
            repeat: Number of earlier requests that are the same one.

        Raises:
            ValueError: As in `generation_settings`; or a sampling setting is invalid, top_k is more
                than the softmax returns, or the context leaves no room for that many tokens.
        """
        max_tokens, until, seed, options = generation_settings(settings)
        if "temperature" in options and options["top_k"] is None:
            options["top_k"] = self.all_tokens()
        tokens = self.tok_encode(context) or [self.prefix_token_id]
        if len(tokens) + max_tokens > self.max_length:
            raise ValueError(
                f"{len(tokens)} tokens and max_gen_toks = {max_tokens}: expected at most "
                f"{self.max_length} in all, the model's context; lower max_gen_toks"
            )
        stream = stream_tokens(
            self.model,
            np.asarray(tokens, np.int32),
            new_tokens=max_tokens,
            seed=request_seed(seed, context, repeat),
            # A few compiled programs serve all lengths.
            cache_length=filled_length(len(tokens) + max_tokens, self.max_length),
            prefill_length=min(1024, 1 << (len(tokens).bit_length() - 1)),
            **options,
        )
        ids, text = [], ""
        for token in map(int, stream):
            if token in self.subject.end_tokens:
                break
            ids.append(token)
            # Stop strings may be control tokens.
            text = self.subject.tokenizer.decode(ids, skip_special_tokens=False)
            if (before_stop := postprocess_generated_text(text, until, None)) != text:
                return before_stop
        return text

    def all_tokens(self) -> int:
        """Return the top_k that samples from the complete vocabulary.

        Raises:
            ValueError: The softmax returns fewer tokens.
        """
        vocabulary, most = self.model.config.vocabulary, self.model.max_top_k
        if most < vocabulary:
            raise ValueError(
                f"top_k = None, all {vocabulary} tokens: expected at most {most}, which the "
                f"searched softmax returns; set top_k from 1 to {most}, or take the dense model"
            )
        return vocabulary


def request_seed(seed: int, context: str, repeat: int) -> int:
    """Return the seed of hire.generate for a request, a number of 31 bits.

    Args:
        seed: The setting "seed".
        context: The context.
        repeat: Number of earlier requests that are the same one.
    """
    digest = hashlib.sha256(f"{seed} {repeat} {context}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def generation_settings(settings: dict) -> tuple[int, list[str], int, dict[str, Any]]:
    """Return what generation settings of lm-eval mean, by its own normalize_gen_kwargs.

    Greedy decoding unless "do_sample" is true, or is not stated and "temperature" is above 0; it
    ignores the settings of sampling. A setting of None counts as not stated.

    Args:
        settings: "max_gen_toks" or a synonym: the largest number of tokens, 256 by default.
            "until": stop strings; the text ends before the first of them.
            "do_sample", "temperature", "top_k", "top_p", "min_p", "seed", "repetition_penalty",
            "presence_penalty", "frequency_penalty": as in hire.generate, except that all tokens are
            sampled from if top_k is not stated, 0 or -1. The penalties act on the prompt too, and
            in greedy decoding.
            "num_beams": 1.

    Returns:
        The largest number of tokens, the stop strings, the seed, and the other settings of
        hire.generate. They have a "temperature" only if tokens are sampled; its "top_k" is None for
        all tokens.

    Raises:
        ValueError: A setting is unknown or of another type, two lengths differ, sampling has no
            temperature above 0, or num_beams is not 1. The message is one line, with the setting
            and its value.
    """
    stated = {name: value for name, value in settings.items() if value is not None}
    for name, value in stated.items():
        if name not in (*LENGTHS, *KNOWN):
            raise ValueError(
                f"generation setting {name!r} = {value!r}: expected one of "
                f"{', '.join((*LENGTHS, *KNOWN))}; leave it out"
            )
    check_types(stated)
    if stated.get("num_beams", 1) != 1:
        raise ValueError(
            f"num_beams = {stated['num_beams']!r}: expected 1; beams are not searched, leave it out"
        )
    normalized: dict[str, Any] = dict(normalize_gen_kwargs(stated, DEFAULT_LENGTH))
    options = {name: normalized[name] for name in PENALTIES if name in normalized}
    if normalized["do_sample"]:
        temperature = normalized.get("temperature", 0.0)
        if temperature == 0:
            raise ValueError(
                f"do_sample = True with temperature = {temperature!r}: expected a temperature "
                "above 0; set it, or do_sample = False"
            )
        options |= {name: normalized[name] for name in SAMPLING if name in normalized}
        options["temperature"] = temperature
        top_k = options.get("top_k")
        options["top_k"] = None if top_k in ALL_TOKENS else top_k
    return normalized["max_gen_toks"], normalized["until"], normalized.get("seed", 0), options


def check_types(settings: dict[str, Any]) -> None:
    """Check values that normalize_gen_kwargs would round, choose from or fail at.

    Raises:
        ValueError: A value is of another type than its setting, a length or a temperature is too
            small, or two lengths differ. The message names the setting and the value.
    """
    lengths = {name: check_integer(name, settings[name]) for name in LENGTHS if name in settings}
    for name, length in lengths.items():
        if length < 1:
            raise ValueError(f"{name} = {length}: expected a whole number of at least 1")
    if len(set(lengths.values())) > 1:
        stated = " and ".join(f"{name} = {length}" for name, length in lengths.items())
        raise ValueError(f"{stated}: expected one length; leave out the others")
    for name in ("top_k", "seed", "num_beams"):
        check_integer(name, settings.get(name, 1))
    for name in ("temperature", "top_p", "min_p", *PENALTIES):
        value = settings.get(name, 1.0)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{name} = {value!r}: expected a number")
    if not settings.get("temperature", 0.0) >= 0:
        raise ValueError(f"temperature = {settings['temperature']!r}: expected at least 0")
    if not isinstance(settings.get("do_sample", False), bool):
        raise ValueError(f"do_sample = {settings['do_sample']!r}: expected True or False")
    until = settings.get("until", [])
    if not isinstance(until, str) and not (
        isinstance(until, list) and all(isinstance(stop, str) for stop in until)
    ):
        raise ValueError(f"until = {until!r}: expected a string or a list of strings")
