"""The demo's tiny models, and the settings with which the real commands train them."""
