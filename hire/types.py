"""Axis letters of the package and the array types built from them.

b  queries (a batch of hidden states)      d  width of a row and of a query
m  rows (tokens, neuron groups, keys)      r  rank of a low-rank estimator
k  results of a search (top-k)             c  candidates, k' in the paper
v  vocabulary size                         f  neurons of an FFN
h  query heads                             n  key/value heads
e  width of a head                         t  positions of a text
s  length of a key/value cache             l  128 lanes of a TPU

`*b` stands for any number of leading axes. Arrays are row-major: one row is one contiguous read.
"""

import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int8, PRNGKeyArray, Real, UInt8, UInt32

AnyArray = Array | np.ndarray

Rows = Real[AnyArray, "m d"]
# Rows in pieces of 128 entries. Each row fills whole tiles of TPU memory.
Blocks = Real[AnyArray, "m _ l"]
Queries = Float[AnyArray, "b d"]
# Queries with any number of leading axes: (d,), (b, d), (b, t, d).
States = Float[AnyArray, "*b d"]
Fingerprint = UInt32[AnyArray, "7"]
Scores = Float[AnyArray, "*b m"]
Indices = Int[AnyArray, "*b c"]
Codes = Int8[Array, "*m d"] | UInt8[Array, "*m half"]
Tokens = Int[AnyArray, "b t"]
Hidden = Float[Array, "b t d"]
PRNGKey = PRNGKeyArray

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
    "PRNGKey",
    "Queries",
    "Rows",
    "Real",
    "Scores",
    "States",
    "Tokens",
    "UInt32",
]
