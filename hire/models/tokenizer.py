"""Tokenizers of the `tokenizers` library.

They are that of Gemma, built from the contents of a GGUF, and byte-level ones of this package.
"""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE

# SentencePiece's types of the pieces that represent text. The other types are control and bytes.
NORMAL, USER_DEFINED = (1, 4)
SPACE = "\u2581"
ALPHABET = pre_tokenizers.ByteLevel.alphabet()


def sentencepiece_bpe(
    pieces: Sequence[str], scores: Sequence[float], kinds: Sequence[int]
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

    Returns:
        The tokenizer.
    """
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
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    user_defined = [pieces[index] for index, kind in enumerate(kinds) if kind == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in user_defined])
    return tokenizer


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

    The first four ids are control tokens. <bos> is 2, as in Gemma.

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
