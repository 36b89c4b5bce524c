"""What a model is compiled for: one file a target."""
