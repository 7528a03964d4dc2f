"""HTML pages of a `run` and of an `ablation`, made from the files that they left; `charts` places points and bars."""
