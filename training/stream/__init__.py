"""From a feature store to this rank's batches: index, order, reader, tars, cache."""
