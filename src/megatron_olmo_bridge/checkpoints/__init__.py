"""Checkpoints of every kind, opened with their model: tensors by Hugging Face names."""
