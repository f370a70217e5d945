"""Measure a fine-tuned classifier, beside an encoder trained on the same texts."""
