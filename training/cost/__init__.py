"""What a model costs: FLOPs, memory, MFU."""
