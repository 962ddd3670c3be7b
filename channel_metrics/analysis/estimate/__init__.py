"""Channel losses where only the loss of each window is known."""
