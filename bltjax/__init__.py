"""The Byte Latent Transformer for JAX: raw bytes in, no tokenizer."""

__version__ = "0.1.0"
