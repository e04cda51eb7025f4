"""Tokenizers of the `tokenizers` library: Gemma's from what a GGUF file carries, and our own on bytes."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE

NORMAL, USER_DEFINED = 1, 4  # SentencePiece's kinds of pieces that text can become; the others are control and bytes
SPACE = "\u2581"
ALPHABET = pre_tokenizers.ByteLevel.alphabet()


def sentencepiece_bpe(pieces: Sequence[str], scores: Sequence[float], kinds: Sequence[int]) -> Tokenizer:
    """The BPE tokenizer of a SentencePiece vocabulary: pieces, their scores and kinds, in the order of their ids.

    SentencePiece stores no merges: it joins the two neighbours whose joint piece scores best, so every way to split a
    piece into two others is a merge, in the order of scores. Text that no piece covers falls back to bytes. Control pieces such as
    <bos> are never read out of text.
    """
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    normal = [index for index, kind in enumerate(kinds) if kind == NORMAL]
    known = {pieces[index] for index in normal}
    lengths = {len(piece) for piece in known}
    merges = []
    for index in sorted(normal, key=lambda index: -scores[index]):
        piece = pieces[index]
        # One split at a time, and none into lengths that no piece has: all splits of a long piece take gigabytes.
        places = (at for at in range(1, len(piece)) if at in lengths and len(piece) - at in lengths)
        splits = ((piece[:at], piece[at:]) for at in places)
        merges += [(left, right) for left, right in splits if left in known and right in known]
    tokenizer = Tokenizer(BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    whole = [pieces[index] for index, kind in enumerate(kinds) if kind == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in whole])
    return tokenizer


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a tokenizer.json, without the truncation and padding that it may store: no text is cut or filled up.

    Raises ValueError, which names the file, when it is not whole.
    """
    try:
        return whole_texts(Tokenizer.from_file(str(path)))
    except Exception as error:  # the library raises plain ones
        raise ValueError(f"{path}: not a whole tokenizer ({str(error).partition(chr(10))[0]}); fetch it again") from None


def whole_texts(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer, with truncation and padding switched off."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def byte_tokenizer() -> Tokenizer:
    """One id a byte, after four that are kept for control: what the toy model reads."""
    return byte_level(BPE({piece: 4 + index for index, piece in enumerate(sorted(ALPHABET))}, []))


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE tokenizer of so many ids, trained on texts; the first four are for control, <bos> is 2 as in Gemma."""
    tokenizer = byte_level(BPE())
    control = ["<pad>", "<eos>", "<bos>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=control, initial_alphabet=ALPHABET, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def byte_level(pieces: BPE) -> Tokenizer:
    """A tokenizer that writes bytes as the characters of ALPHABET, and spaces among them."""
    tokenizer = Tokenizer(pieces)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
