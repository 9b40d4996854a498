"""Models: one module per source, each a command that leaves a verified Hugging Face checkpoint."""
