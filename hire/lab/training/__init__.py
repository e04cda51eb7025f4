"""Training of small decoders."""
