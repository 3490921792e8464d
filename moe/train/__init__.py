"""State that outlives a step: data, optimizer, metrics, and the loop around them."""
