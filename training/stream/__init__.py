"""From a feature store to this rank's batches. `stream` puts the other files together and says how."""
