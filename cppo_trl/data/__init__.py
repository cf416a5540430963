"""Datasets with the columns ``prompt`` and ``solution`` that TRL's trainer and the math rewards read."""
