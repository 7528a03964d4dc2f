"""LLaVA-format data in, a feature store of frozen CLIP hidden states out (Ray Data)."""
