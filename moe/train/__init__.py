"""State that outlives a step: data, optimizer, checkpoints, metrics, and the loop around them."""
