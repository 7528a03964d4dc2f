"""A trained model answers: in batches, in a talk, on a web page, to lmms-eval."""
