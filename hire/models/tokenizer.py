"""Tokenizers of the `tokenizers` library.

They are those of models in GGUF files, built from their contents, and byte-level ones of this
package.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE

# SentencePiece's types of the pieces that represent text. The other types are control and bytes.
NORMAL, USER_DEFINED = (1, 4)
SPACE = "\u2581"
ALPHABET = pre_tokenizers.ByteLevel.alphabet()
# How Llama 3 and Qwen 2 split a text into words, as in their tokenizer.json. They differ in the
# digits of a number: at most three together, or each alone.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def gguf_tokenizer(
    metadata: Mapping[str, Any], lists: Mapping[str, Sequence], vocabulary: int
) -> tuple[Tokenizer, int | None]:
    """Builds the tokenizer that a GGUF describes.

    Args:
        metadata: The metadata of the GGUF, by key.
        lists: The long values under `tokenizer.ggml`: `tokens`, and `scores`, `token_type` and
            `merges` where there are.
        vocabulary: Number of tokens in the vocabulary of the model.

    Returns:
        The tokenizer, and the token that begins every text, or None.

    Raises:
        ValueError: When the tokenizer is not supported, or its parts do not fit together.
        KeyError: When a part is missing.
    """
    kind, pieces = metadata.get("tokenizer.ggml.model"), lists["tokens"]
    counts = {
        name: len(lists[name]) for name in ("tokens", "scores", "token_type") if name in lists
    }
    if len(set(counts.values())) > 1 or len(pieces) > vocabulary:
        raise ValueError(f"counts of {counts} for {vocabulary} tokens")
    if len(set(pieces)) < len(pieces):
        raise ValueError("a piece occurs twice")
    if kind == "llama":
        is_gemma = str(metadata.get("general.architecture")).startswith("gemma")
        tokenizer = sentencepiece_bpe(
            pieces,
            lists["scores"],
            lists["token_type"],
            space_first=bool(metadata.get("tokenizer.ggml.add_space_prefix", not is_gemma)),
        )
        begins = True
    elif kind == "gpt2":
        name = metadata.get("tokenizer.ggml.pre")
        kinds = lists.get("token_type", [NORMAL] * len(pieces))
        tokenizer = gguf_byte_level(str(name), pieces, kinds, lists["merges"])
        begins = name in LLAMA3_NAMES
    else:
        raise ValueError(f"tokenizer.ggml.model = {kind!r}, expected llama or gpt2")
    if not metadata.get("tokenizer.ggml.add_bos_token", begins):
        return tokenizer, None
    first = metadata["tokenizer.ggml.bos_token_id"]
    if not 0 <= first < len(pieces):
        raise ValueError(f"tokenizer.ggml.bos_token_id = {first}, expected 0 to {len(pieces) - 1}")
    return tokenizer, int(first)


# End of text, of turn and of message. llama.cpp stops at each of them.
GGUF_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


def gguf_end_tokens(metadata: Mapping[str, Any], count: int) -> tuple[int, ...]:
    """Returns the tokens any of which ends a text, () if a GGUF states none.

    Args:
        metadata: The metadata of the GGUF, by key.
        count: Number of pieces.

    Raises:
        ValueError: When one is no token. The message names the key and the value.
    """
    keys = [f"tokenizer.ggml.{key}" for key in GGUF_END_KEYS]
    stated = {key: metadata[key] for key in keys if key in metadata}
    for key, token in stated.items():
        if not 0 <= token < count:
            raise ValueError(f"{key} = {token}, expected 0 to {count - 1}")
    return tuple(dict.fromkeys(map(int, stated.values())))


LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")


def gguf_byte_level(
    name: str, pieces: Sequence[str], kinds: Sequence[int], merges: Sequence[str]
) -> Tokenizer:
    """Builds a byte-level BPE tokenizer from the contents of a GGUF.

    The tokenizer never recognizes control pieces, such as <|im_start|>, in text.

    Args:
        name: How texts are split into words: the value of `tokenizer.ggml.pre`.
        pieces: The pieces, in the order of their ids.
        kinds: The type of each piece, with the numbers of SentencePiece.
        merges: Pairs of pieces that are joined, best first, with a space between the two.

    Returns:
        The tokenizer.

    Raises:
        ValueError: When the name is not supported, or a merge is not a pair of pieces.
    """
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def split(digits: str) -> pre_tokenizers.PreTokenizer:
        by_words = pre_tokenizers.Split(Regex(WORDS % digits), "isolated")
        return pre_tokenizers.Sequence([by_words, by_bytes])

    in_gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    splits = {
        "gpt-2": in_gpt2,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), in_gpt2]),
        "qwen2": split(""),
        **dict.fromkeys(LLAMA3_NAMES, split("{1,3}")),
    }
    if name not in splits:
        raise ValueError(f"tokenizer.ggml.pre = {name!r}, expected one of {', '.join(splits)}")
    if any(merge.count(" ") != 1 for merge in merges):
        raise ValueError("a merge is not a pair of pieces")
    pairs = [(merge.partition(" ")[0], merge.partition(" ")[2]) for merge in merges]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    # Llama 3 takes a word that is a piece as it is.
    tokenizer = Tokenizer(BPE(vocabulary, pairs, ignore_merges=name in LLAMA3_NAMES))
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer, tokenizer.decoder = splits[name], decoders.ByteLevel()
    add_user_defined(tokenizer, pieces, kinds)
    return tokenizer


def add_user_defined(tokenizer: Tokenizer, pieces: Sequence[str], kinds: Sequence[int]) -> None:
    """Makes a tokenizer recognize the user-defined pieces, whole, in a text."""
    user_defined = [pieces[index] for index, kind in enumerate(kinds) if kind == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in user_defined])


def sentencepiece_bpe(
    pieces: Sequence[str],
    scores: Sequence[float],
    kinds: Sequence[int],
    *,
    space_first: bool = False,
) -> Tokenizer:
    """Builds the BPE tokenizer of a SentencePiece vocabulary.

    SentencePiece stores no merges. It joins the two neighbours that form the piece with the best
    score. Every split of a piece into two other pieces thus becomes a merge, in the order of the
    scores. Text that no piece covers falls back to bytes. The tokenizer never recognizes control
    pieces, such as <bos>, in text.

    Args:
        pieces: The pieces, in the order of their ids.
        scores: The score of each piece.
        kinds: The SentencePiece type of each piece.
        space_first: Whether a space is added before a text.

    Returns:
        The tokenizer.

    Raises:
        ValueError: When there is no piece <unk>.
    """
    if "<unk>" not in pieces:
        raise ValueError("the piece <unk> is missing")
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    normal_ids = [index for index, kind in enumerate(kinds) if kind == NORMAL]
    normal_pieces = {pieces[index] for index in normal_ids}
    lengths = {len(piece) for piece in normal_pieces}
    merges = []
    for index in sorted(normal_ids, key=lambda index: -scores[index]):
        piece = pieces[index]
        # A generator of splits, without lengths that no piece has: all splits of a long piece take
        # gigabytes.
        positions = (
            position
            for position in range(1, len(piece))
            if position in lengths and len(piece) - position in lengths
        )
        splits = ((piece[:position], piece[position:]) for position in positions)
        merges += [
            (prefix, suffix)
            for prefix, suffix in splits
            if prefix in normal_pieces and suffix in normal_pieces
        ]
    tokenizer = Tokenizer(
        BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    spaces: normalizers.Normalizer = normalizers.Replace(" ", SPACE)
    decoding = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if space_first:
        spaces = normalizers.Sequence([normalizers.Prepend(SPACE), spaces])
        decoding.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer, tokenizer.decoder = spaces, decoders.Sequence(decoding)
    add_user_defined(tokenizer, pieces, kinds)
    return tokenizer


def first_token_of(tokenizer: Tokenizer) -> int | None:
    """Returns the token that a tokenizer puts before every text, or None if it puts none."""
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    complete = tokenizer.encode("a").ids
    return complete[0] if complete[1 : 1 + len(plain)] == plain else None


def read_tokenizer(path: Path) -> Tokenizer:
    """Reads the tokenizer from a tokenizer.json.

    Truncation and padding that the file may state are switched off.

    Args:
        path: Path of the tokenizer.json.

    Returns:
        The tokenizer.

    Raises:
        ValueError: When the file is damaged. The message names the file.
    """
    try:
        return whole_texts(Tokenizer.from_file(str(path)))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(
            f"{path}: not a whole tokenizer ({str(error).partition(chr(10))[0]}); fetch it again"
        ) from None


def whole_texts(tokenizer: Tokenizer) -> Tokenizer:
    """Switches off truncation and padding of a tokenizer, and returns it."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def byte_tokenizer() -> Tokenizer:
    """Returns the tokenizer of the small test model.

    It has one id per byte, after four ids that are reserved for control tokens.
    """
    return byte_level(BPE({piece: 4 + index for index, piece in enumerate(sorted(ALPHABET))}, []))


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """Trains a byte-level BPE tokenizer.

    The first four ids are control tokens. <eos> is 1 and <bos> is 2, as in Gemma.

    Args:
        texts: The training texts.
        vocabulary: Number of ids.

    Returns:
        The tokenizer.
    """
    tokenizer = byte_level(BPE())
    special_tokens = ["<pad>", "<eos>", "<bos>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special_tokens,
        initial_alphabet=ALPHABET,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def byte_level(pieces: BPE) -> Tokenizer:
    """Returns a tokenizer that represents bytes, including spaces, by the characters of ALPHABET.

    Args:
        pieces: The BPE model.
    """
    tokenizer = Tokenizer(pieces)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
