"""Run live models in separate processes: compare with transformers, and generate text."""
