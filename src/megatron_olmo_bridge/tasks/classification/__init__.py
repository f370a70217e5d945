"""Fine-tuning of text classifiers: data, problem types, metrics, the task."""
