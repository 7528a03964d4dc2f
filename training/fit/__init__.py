"""One stage, from settings to a finished run; `stage.train` is its table of contents.

`parts` opens store, model (`build`) and stream; `trainer` gives them to Composer; `run_folder` writes what is left.
"""
