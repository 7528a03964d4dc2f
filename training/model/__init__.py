"""The model and all that travels with an export: connectors, the Hugging Face model, processor and tokenizer."""
