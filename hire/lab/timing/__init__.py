"""Raw durations of interleaved calls, and lower bounds from bytes."""
