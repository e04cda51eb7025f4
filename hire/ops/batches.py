"""Splitting of queries into batches."""

# Queries scored at once: 256 x 262,144 float32 scores take 268 MB.
BATCH = 256


def batches(queries, size: int = BATCH):
    """Split queries into consecutive batches.

    Args:
        queries: Queries `(n, d)`.
        size: Largest number of queries in a batch.

    Returns:
        A list of slices of `queries`; the last may be smaller.
    """
    return [queries[start : start + size] for start in range(0, len(queries), size)]
