"""Training tasks: language modelling and text classification."""
