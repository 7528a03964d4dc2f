"""Arms x seeds: what is asked for, the runs of an ablation, here or on Ray, and its table."""
