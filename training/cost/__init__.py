"""What a model costs: FLOPs and memory by formula, times as measured, MFU while it trains."""
