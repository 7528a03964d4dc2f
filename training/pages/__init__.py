"""HTML pages of a run and of an ablation, made from files: pages, their charts and their templates."""
