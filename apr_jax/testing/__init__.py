"""What tests of this package, and of code built on it, start from."""

from apr_jax.testing.tiny import MULTIVERSE_TAGS, byte_tokenizer, tiny_config, tiny_decoder

__all__ = ["MULTIVERSE_TAGS", "byte_tokenizer", "tiny_config", "tiny_decoder"]
