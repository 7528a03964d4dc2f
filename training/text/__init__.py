"""Conversations to padded batches, in this order: `image`, `templates`, `labels`, `collate`."""
