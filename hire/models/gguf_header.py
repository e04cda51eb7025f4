"""Checks of the header of a GGUF against the size of the file, before the loader trusts it."""

import math
import struct
from pathlib import Path
from typing import BinaryIO

MAX_ENTRIES = 2**16  # keys or tensors in a file; Gemma 3 27B has about 800 tensors
MAX_VALUES = 2**22  # in all arrays of a header; a vocabulary of 262,144 tokens needs 786,432
MAX_KEY_BYTES = 2**16
MAX_NESTING = 4
STRING, ARRAY = 8, 9
# by GGUF's number of a type
SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


class HeaderReader:
    """Reads numbers and strings of a file in order.

    A read beyond the end of the file raises ValueError.

    Attributes:
        file: The open file.
        size: Size of the file, in bytes.
    """

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size = file, size

    @property
    def remaining(self) -> int:
        """Number of bytes from the current position to the end of the file."""
        return self.size - self.file.tell()

    def take(self, nbytes: int) -> bytes:
        """Reads `nbytes` bytes."""
        if nbytes > self.remaining:
            raise ValueError(
                f"{nbytes} bytes stated at byte {self.file.tell()}, where {self.remaining} are left"
            )
        return self.file.read(nbytes)

    def number(self, form: str) -> int:
        """Reads one number in a format of the struct module."""
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def count(self, form: str, item_bytes: int, most: int) -> int:
        """Reads a number of items that must fit into the rest of the file.

        Args:
            form: Format of the number, as in the struct module.
            item_bytes: Smallest size of an item, in bytes.
            most: Largest number allowed.

        Returns:
            The number of items.

        Raises:
            ValueError: When the number exceeds `most`, or the items do not fit into the rest of the
                file.
        """
        count = self.number(form)
        if count > most or count * item_bytes > self.remaining:
            raise ValueError(
                f"a count of {count} at byte {self.file.tell()}, where {self.remaining} bytes "
                "are left"
            )
        return count

    def skip(self, nbytes: int) -> None:
        """Skips `nbytes` bytes."""
        if nbytes > self.remaining:
            raise ValueError(
                f"{nbytes} bytes stated at byte {self.file.tell()}, where {self.remaining} are left"
            )
        self.file.seek(nbytes, 1)

    def key(self) -> str:
        """Reads a key: its length in bytes, then its text."""
        return self.take(self.count("<Q", 1, MAX_KEY_BYTES)).decode()

    def skip_value(self, kind: int, values: int, depth: int = 0) -> int:
        """Skips one value.

        Args:
            kind: Type of the value, as a number of GGUF.
            values: Number of array values read before.
            depth: Number of arrays around the value.

        Returns:
            Number of array values read so far.

        Raises:
            ValueError: When the type is unknown, arrays are nested too deeply, or the value does
                not fit into the rest of the file.
        """
        if kind in SCALAR_BYTES:
            self.skip(SCALAR_BYTES[kind])
        elif kind == STRING:
            self.skip(self.number("<Q"))
        elif kind == ARRAY and depth < MAX_NESTING:
            item_type = self.number("<I")
            item_bytes = SCALAR_BYTES.get(item_type) or (8 if item_type == STRING else 12)
            count = self.count("<Q", item_bytes, MAX_VALUES - values)
            values += count
            if item_type in SCALAR_BYTES:
                self.skip(count * item_bytes)
            else:
                for _ in range(count):
                    values = self.skip_value(item_type, values, depth + 1)
        else:
            raise ValueError(f"a value of the unknown type {kind} at byte {self.file.tell()}")
        return values


def check_gguf_header(path: Path) -> None:
    """Checks every count, length and offset in the header of a GGUF against the size of the file.

    Time and memory depend on the bytes in the file, not on the numbers that the header states.

    Args:
        path: Path of the GGUF.

    Raises:
        ValueError: When the header does not fit the file. The message names the file.
    """
    import gguf

    try:
        with path.open("rb") as file:
            reader = HeaderReader(file, path.stat().st_size)
            if reader.take(4) != b"GGUF":
                raise ValueError("it does not begin with GGUF")
            if (version := reader.number("<I")) not in (2, 3):
                raise ValueError(f"GGUF version {version}, expected 2 or 3, little-endian")
            tensors = reader.count("<Q", 24, MAX_ENTRIES)
            keys, values, alignment = reader.count("<Q", 13, MAX_ENTRIES), 0, 32
            for _ in range(keys):
                key, kind = reader.key(), reader.number("<I")
                if key == "general.alignment":
                    if kind != 4:
                        raise ValueError(f"general.alignment of type {kind}, expected 4")
                    alignment = reader.number("<I")
                else:
                    values = reader.skip_value(kind, values)
            if alignment < 1 or alignment & (alignment - 1) or alignment > 2**20:
                raise ValueError(
                    f"general.alignment = {alignment}, expected a power of two up to {2**20}"
                )
            ends = []
            for _ in range(tensors):
                name, dimensions = reader.key(), reader.number("<I")
                if dimensions > 4:
                    raise ValueError(
                        f"tensor {name} of {dimensions} dimensions, expected at most 4"
                    )
                shape = [reader.number("<Q") for _ in range(dimensions)]
                kind, offset = reader.number("<I"), reader.number("<Q")
                block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
                if shape and shape[0] % block:
                    raise ValueError(f"tensor {name} of shape {shape}, expected blocks of {block}")
                ends.append((name, offset + math.prod(shape) // block * nbytes))
            data_start = -(-file.tell() // alignment) * alignment
            for name, end in ends:
                if data_start + end > reader.size:
                    raise ValueError(
                        f"tensor {name} ends at byte {data_start + end} of {reader.size}"
                    )
    except (ValueError, KeyError, struct.error) as error:  # a UnicodeDecodeError is a ValueError
        raise ValueError(f"{path}: not a whole GGUF file ({error}); fetch it again") from None
