"""Text and a tokenizer to try training with, made without a network."""
