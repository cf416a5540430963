"""What a run leaves behind and how it ends: checkpoints, run files, token log, model card, uploads."""
