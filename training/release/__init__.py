"""What a finished run gives away: folders in Hugging Face's format and others, and the model card."""
