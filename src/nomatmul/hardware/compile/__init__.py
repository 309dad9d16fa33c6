"""From a packed model to what the accelerator reads: a program, a memory image and a map."""
