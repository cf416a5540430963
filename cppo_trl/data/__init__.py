"""Datasets in TRL's form: ``prompt`` and ``solution`` columns."""
