"""Checkpoints: whole or not there, on disk and in a bucket."""
