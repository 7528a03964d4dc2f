"""The demo's tiny models, and the settings that fit them."""
