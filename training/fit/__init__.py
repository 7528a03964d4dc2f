"""One stage, from settings to a finished run."""
