"""Channel mixers, one a file."""
