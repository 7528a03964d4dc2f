"""From a feature store to this rank's batches: stream.py puts the others together and says how."""
