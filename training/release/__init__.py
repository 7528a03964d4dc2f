"""What a finished run gives away: a Hugging Face `folder` with its `code` and `card`, or LLaVA's format (`llava`).

The `connector` goes from stage 1 to stage 2. `records` and `table` are what runs and ablations leave for readers.
"""
