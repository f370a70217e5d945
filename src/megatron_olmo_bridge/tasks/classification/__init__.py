"""Fine-tuning a classifier of texts: data, problem types, measures, the task."""
