"""Variants: which models are trained, and how."""

from dataclasses import dataclass, replace

from hire.models import DecoderConfig, preset

BOS = 2


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A model and its training.

    The learning rate rises over the warmup and then falls linearly to 0. During the density warmup
    the FFNs keep more groups: all groups, then kept^(1/4), kept^(2/4) and kept^(3/4) of them, each
    for the same number of steps.

    Attributes:
        config: Configuration of the model.
        tokens: Training tokens.
        batch: Windows per step.
        length: Tokens of a window.
        rate: Peak learning rate.
        warmup: Fraction of the steps in which the learning rate rises.
        decay: Weight decay.
        seed: Seed of the weights and of the order of the windows.
        density_warmup: Fraction of the steps in which the FFNs keep more groups.
        documents: Number of training documents, for a toy; all by default.
    """

    config: DecoderConfig
    tokens: int
    batch: int = 16
    length: int = 256
    learning_rate: float = 1e-2
    warmup: float = 0.04
    decay: float = 0.1
    seed: int = 0
    density_warmup: float = 0.0
    documents: int | None = None

    @property
    def steps(self) -> int:
        return self.tokens // (self.batch * self.length)

    @property
    def warmup_steps(self) -> int:
        return int(self.warmup * self.steps)

    def config_at(self, step: int) -> DecoderConfig:
        """Return the configuration at a training step.

        With a density warmup it is dense at first and becomes sparser in stages.
        """
        stage = (
            min(4, int(4 * step / (self.density_warmup * self.steps))) if self.density_warmup else 4
        )
        return replace(self.config, kept=self.config.kept ** (stage / 4))


# Training tokens: about 50, 50 (with a vocabulary of 32K) and 8 minutes on two cores.
LONG, LADDER, SHORT = (5_500_000, 2_400_000, 900_000)


# Variants with a committed checkpoint, all of them long runs. A checkpoint takes 13 MB. The
# ladder takes 29 MB; the embedding of its 32K tokens takes 17 MB of them.
SHIPPED = ("dense", "groups8", "groups8-5", "ladder")


# Kinds of text for evaluation: more text of the training kinds, and a novel, which is unlike them.
KINDS = ("speech", "commentary", "novel")


SMALL = preset("small")


MODELS = {
    "dense": SMALL,
    "groups8": replace(SMALL, group_size=8, kept=0.1),
    "groups8-5": replace(SMALL, group_size=8, kept=0.05),
    "groups8-20": replace(SMALL, group_size=8, kept=0.2),
    # Without the density warmup of the other sparse variants.
    "groups8-abrupt": replace(SMALL, group_size=8, kept=0.1),
    "topk": replace(SMALL, kept=0.1),
    **{f"groups{size}": replace(SMALL, group_size=size, kept=0.1) for size in (4, 16, 32)},
    "none": replace(SMALL, ffn_width=0),
    "narrow": replace(SMALL, ffn_width=200),  # as many neurons as groups8 keeps
    "experts": replace(SMALL, group_size=8, kept=0.1, routed=True),
    # The vocabulary is large enough for a search to pay in the softmax, too.
    "ladder": replace(SMALL, group_size=8, kept=0.05, vocabulary=32768),
}


def plan_of(variant: str, *, toy: bool = False) -> Plan:
    """Return the plan of a variant.

    Args:
        variant: A name of MODELS, trained for LONG tokens ("ladder": LADDER). The prefix "short-"
            means SHORT tokens; the suffix "@1" means seed 1.
        toy: Plan a model of the same kind for a dozen steps. It takes seconds, and its results show
            nothing.

    Raises:
        ValueError: The variant is unknown. The message lists the models.
    """
    name, _, seed = variant.removeprefix("short-").partition("@")
    if name not in MODELS or not (seed.isdigit() or not seed):
        raise ValueError(
            f"variant {variant!r}: expected one of {', '.join(MODELS)}, perhaps short- before and "
            "@seed behind it"
        )
    config, seeded = MODELS[name], int(seed or 0)
    if toy:
        sparse = dict(
            group_size=config.group_size,
            kept=config.kept,
            routed=config.routed,
            ffn_width=config.ffn_width // 4,
        )
        config = preset("tiny", gated=False, **sparse)
        return Plan(config=config, tokens=12 * 4 * 32, batch=4, length=32, documents=2, seed=seeded)
    density_warmup = 0.5 if config.kept < 1 and not name.endswith("-abrupt") else 0.0
    tokens = SHORT if variant.startswith("short-") else LADDER if name == "ladder" else LONG
    return Plan(config=config, tokens=tokens, seed=seeded, density_warmup=density_warmup)
