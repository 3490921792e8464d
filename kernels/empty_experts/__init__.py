"""The gradients of experts without rows, which a grouped product may leave undefined."""
