"""Every axis letter of the package, once, and the array types built from them.

b  queries (a batch of hidden states)      d  width of a row and of a query
m  rows (words, groups of neurons, keys)   r  rank of a low-rank copy
k  rows asked for                          c  candidates, k' in the paper
v  vocabulary    f  neurons of an FFN      h  query heads    n  key/value heads    e  width of a head
t  positions of a text    s  slots of a key/value cache    l  128 lanes of a TPU

`*b` stands for any number of leading axes. Arrays are row-major, so that one row is one contiguous read.
"""

import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int8, PRNGKeyArray, Real, UInt8, UInt32

AnyArray = Array | np.ndarray

Rows = Real[AnyArray, "m d"]
Blocks = Real[AnyArray, "m _ l"]  # rows in pieces of 128 entries, each row whole tiles of a TPU's memory
Queries = Float[AnyArray, "b d"]
States = Float[AnyArray, "*b d"]  # queries with any number of leading axes: (d,), (b, d), (b, t, d)
Fingerprint = UInt32[AnyArray, "7"]
Scores = Float[AnyArray, "*b m"]
Indices = Int[AnyArray, "*b c"]
Codes = Int8[Array, "*m d"] | UInt8[Array, "*m half"]
Tokens = Int[AnyArray, "b t"]
Hidden = Float[Array, "b t d"]
Key = PRNGKeyArray

__all__ = [
    "AnyArray",
    "Array",
    "Blocks",
    "Bool",
    "Codes",
    "Fingerprint",
    "Float",
    "Hidden",
    "Indices",
    "Int",
    "Int8",
    "Key",
    "Queries",
    "Rows",
    "Real",
    "Scores",
    "States",
    "Tokens",
    "UInt32",
]
