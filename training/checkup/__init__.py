"""The doctor's questions. Is the `machine` ready, does the `run` fit it? `examine` asks both on every rank."""
