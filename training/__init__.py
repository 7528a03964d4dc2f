"""A feature store in, a multimodal model with compact vision tokens out (Composer)."""
