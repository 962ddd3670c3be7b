"""Takes the token losses out of a model while a trainer computes its loss."""
