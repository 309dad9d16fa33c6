"""The accelerator in Amaranth. `ports` says what units say to each other, `top` holds the whole."""
