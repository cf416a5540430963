"""A run from its YAML recipe: arguments, data, training, and the dry run."""
