"""A hire model as lm-evaluation-harness takes one (PyPI lm-eval, whose base needs no torch): dense, or searched."""

from collections.abc import Iterable, Sequence

import jax.numpy as jnp
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from hire.lab.evaluation import Asked, States, filled_length, sliding, states_of, told
from hire.models import TextModel, convert
from hire.models.generation import Split, prefill, step
from hire.softmax import HireSoftmax

EOS, BOS = 1, 2  # of Gemma's tokenizer, and of those trained here


class Harness(TemplateLM):
    """A model with its tokenizer, which may be converted; with a `softmax`, the model searched by it.

    Harnesses of one model that differ in their softmax alone may share `kept`, the hidden states of what was asked for: then one
    prefill serves them all. Raises ValueError, saying which request, for one with nothing to predict or with more text than
    the model's context: no text is cut.
    """

    def __init__(self, subject: TextModel, softmax: HireSoftmax | None = None, kept: dict[bytes, np.ndarray] | None = None):
        super().__init__()
        self.subject, self.kept = subject, {} if kept is None else kept
        self.model = subject.model if softmax is None else convert(subject.model, softmax=softmax)
        rows = self.model.embedding[...]
        self.softmax = rows if self.model.softmax is None else self.model.softmax.over(rows)

    @property
    def eot_token_id(self) -> int:
        return EOS

    @property
    def prefix_token_id(self) -> int:
        return BOS

    @property
    def max_length(self) -> int:
        return self.model.config.context

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """The ids of a text, after <bos> unless add_special_tokens is False."""
        return self.subject.tokens(string).tolist()[add_special_tokens is False :]

    def answered(self, asked: Sequence[Asked], owners: Sequence[int], count: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each of `count` requests, which own what is asked for: log p of it in nats, and whether greedy decoding gives it."""
        names = [each.tokens.tobytes() + each.wanted.to_bytes(4, "big") for each in asked]
        new = {name: each for name, each in zip(names, asked, strict=True) if name not in self.kept}
        if new:
            states = states_of(self.model, list(new.values()))
            ends = np.cumsum([each.wanted for each in new.values()])[:-1]
            self.kept |= dict(zip(new, np.split(states.hidden, ends), strict=True))
        hidden = np.concatenate([self.kept[name] for name in names])
        targets = np.concatenate([each.tokens[-each.wanted :] for each in asked])
        of = np.repeat(owners, [each.wanted for each in asked])
        found = told(self.softmax, States(hidden, targets, of))
        return -np.bincount(of, found.nats, count), np.bincount(of, ~found.hits, count) == 0

    def _loglikelihood_tokens(self, requests: Sequence[tuple], **kwargs) -> list[tuple[float, bool]]:
        asked = [Asked(np.asarray([*context, *text], np.int32), len(text)) for _, context, text in requests]
        likely, greedy = self.answered(asked, range(len(asked)), len(asked))
        return list(zip(likely.tolist(), greedy.tolist(), strict=True))

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """log p in nats of each text after its context, and whether greedy decoding gives it."""
        for place, request in enumerate(requests):
            if not request.arguments[1]:
                raise ValueError(f"request {place}: expected text to predict, it is empty")
        return super().loglikelihood(list(requests), disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> list[float]:
        """log p in nats of whole texts, every token once: windows as in evaluation.sliding, each with half a window before it."""
        length = min(1024, self.max_length)
        asked: list[tuple[int, Asked]] = []
        for place, request in enumerate(requests):
            if not request.args[0]:
                raise ValueError(f"request {place}: expected text to predict, it is empty")
            asked += [(place, each) for each in sliding(self.subject.tokens(request.args[0]), length, length // 2)]
        return self.answered([each for _, each in asked], [place for place, _ in asked], len(requests))[0].tolist()

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> list[str]:
        """Greedy continuations, each up to the first of the strings that it is to stop at. Raises ValueError as `written` does."""
        return [self.written(*request.args) for request in requests]

    def written(self, context: str, settings: dict) -> str:
        """A greedy continuation: at most settings["max_gen_toks"] (or "max_new_tokens") tokens, 256 by default, up to the first of
        settings["until"].

        Raises ValueError for settings that ask for sampling, that it does not know or that contradict each other, and for a
        context that leaves no room for so many tokens.
        """
        most, until = generation_settings(settings)
        tokens = self.subject.tokens(context)
        if len(tokens) + most > self.max_length:
            raise ValueError(f"{len(tokens)} tokens and {most} to write: expected at most {self.max_length}, the model's context")
        parts, slots = Split.of(self.model), filled_length(len(tokens) + most, self.max_length)
        # A few programs for all lengths: what a prefill of few lengths leaves over is stepped through.
        first = max((size for size in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if size <= len(tokens)), default=1)
        top, cache = prefill(parts, jnp.asarray(tokens[None, :first]), slots, 1)
        for token in tokens[first:]:
            top, cache = step(parts, jnp.asarray([token]), cache, 1)
        ids, text = [], ""
        while len(ids) < most and (word := int(top.indices[0, 0])) != EOS:
            ids.append(word)
            text = self.subject.tokenizer.decode(ids)
            if len(ids) == most or any(stop in text for stop in until):
                break
            top, cache = step(parts, jnp.asarray([word]), cache, 1)
        return cut(text, until)


LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens")  # one meaning, as in lm-eval's own adapters
UNUSED = ("top_p", "top_k", "min_p", "seed", "num_beams")  # of draws and beams


def generation_settings(settings: dict) -> tuple[int, list[str]]:
    """The most tokens to write, and the strings to stop at. Raises ValueError for settings that greedy decoding cannot have."""
    unknown = sorted(set(settings) - {*LENGTHS, "until", "do_sample", "temperature", *UNUSED})
    if unknown:
        known = ", ".join((*LENGTHS, "until", "do_sample", "temperature"))
        raise ValueError(f"generation setting {unknown[0]!r}: expected one of {known}")
    if settings.get("do_sample"):
        raise ValueError(f"do_sample = {settings['do_sample']!r}: expected False; this adapter decodes greedily")
    temperature = settings.get("temperature")
    if temperature is not None and temperature != 0:
        raise ValueError(f"temperature = {temperature!r}: expected 0; this adapter decodes greedily")
    beams = settings.get("num_beams")
    if beams is not None and beams != 1:
        raise ValueError(f"num_beams = {beams!r}: expected 1; this adapter decodes greedily")
    given = {name: settings[name] for name in LENGTHS if settings.get(name) is not None}
    if len(set(given.values())) > 1:
        raise ValueError(f"{' and '.join(f'{name} = {count!r}' for name, count in given.items())}: expected one length")
    most = next(iter(given.values()), 256)
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise ValueError(f"{next(iter(given))} = {most!r}: expected a whole number of at least 1")
    return most, stops(settings.get("until"))


def stops(until: str | Iterable[str] | None) -> list[str]:
    """The strings to stop at, none of them empty."""
    listed = [] if until is None else [until] if isinstance(until, str) else until
    return [stop for stop in listed if stop]


def cut(text: str, until: Iterable[str]) -> str:
    """The text before the first of some strings."""
    for stop in until:
        text = text.partition(stop)[0]
    return text
