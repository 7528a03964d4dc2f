"""The multimodal model and all that travels with its export: `model`, `processor`, `tokenizer`.

`reducers` make vision tokens of features, `decoders` say what a family of language models needs.
"""
