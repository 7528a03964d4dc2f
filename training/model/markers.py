"""Marks on which the text side of training and the model agree. Nothing is imported: settings are checked with them."""

IMAGE = "<image>"  # in a text: here stands an image
IGNORE = -100  # in labels: this token is not predicted; PyTorch's cross-entropy skips it too
