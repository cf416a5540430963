"""Pictures of a training run, drawn from what it logged."""
