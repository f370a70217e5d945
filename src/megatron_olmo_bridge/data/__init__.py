"""Tokenize documents of many formats into Megatron's indexed datasets."""
