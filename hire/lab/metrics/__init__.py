"""Quality, recall and sparsity, with confidence intervals."""
