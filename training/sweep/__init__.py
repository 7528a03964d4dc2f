"""An ablation, arms x seeds: its `plan`, its `runs`, here or `on_ray`, and its `table`."""
