"""Operations on scores and rows: top-k, products, quantization and TPU kernels."""
