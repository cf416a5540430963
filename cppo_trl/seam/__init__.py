"""What the trainer relies on in TRL and vLLM: signatures that are checked, and readers of Top-K log-probs."""
