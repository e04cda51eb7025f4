"""Text, hidden states and data sets."""
