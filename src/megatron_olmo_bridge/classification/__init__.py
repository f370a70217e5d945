"""Fine-tuning a classifier of texts: data, a baseline beside it, figures, and a report."""
