"""Model layers with a search: softmax and FFN."""
