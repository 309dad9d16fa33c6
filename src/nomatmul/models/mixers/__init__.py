"""Token mixers, one a file."""
