"""What can be learned: to predict the next token, or the label of a text."""
