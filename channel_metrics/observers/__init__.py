"""What is told of each closed window."""
