"""The training run: data, optimizer, evaluation, and the loop around them."""
