"""What a model is for: how its outputs are scored."""
