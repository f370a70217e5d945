"""Mapping between Hugging Face tensors and Megatron parameters, block by block, as pure data."""
