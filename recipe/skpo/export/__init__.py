"""A trained model as a folder that others can use, with a model card, and on the Hugging Face hub."""
