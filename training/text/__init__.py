"""Conversations to prompts, token ids, labels and padded batches: image, templates, labels, collate."""
