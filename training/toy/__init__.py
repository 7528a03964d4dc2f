"""The demo's models and sizes."""
