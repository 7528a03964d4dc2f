"""A feature store in, a multimodal model with compact vision tokens out (Composer).

A file at the top is a command; `config.py` has every setting. All else lives in a sub-package, named for its step:

    stream         feature store -> this rank's batches, in an order that resumes exactly
    text           conversations -> token ids and labels
    model          columns of features -> vision tokens -> language model; what travels with an export
    fit            one stage, from settings to a finished run
    engines        how the model is spread over the ranks
    checkpoints    saved whole or not at all
    cost           FLOPs, memory, measured times
    release        a finished run -> folders that others load
    answers        a model answers questions
    benchmarks     answers -> scores
    sweep          arms x seeds -> one table
    pages          files -> HTML
    checkup        is the machine ready, does the run fit it?
    toy            the demo's tiny models
"""
