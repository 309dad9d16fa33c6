"""What Hugging Face's transformers asks of a model: config, files, cache, arguments."""
