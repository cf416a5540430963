"""CPPO while rollouts and training go on at the same time, on TRL's experimental `AsyncGRPOTrainer`."""
