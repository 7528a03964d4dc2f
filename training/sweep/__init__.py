"""Arms x seeds: the runs of an ablation and its table."""
