"""Checkpoints of a run, whole or not there: on disk (`checkpoint`) and in a bucket (`remote`)."""
