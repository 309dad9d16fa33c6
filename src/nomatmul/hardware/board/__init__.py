"""What stands between the accelerator and a board: memory controllers, host links, top levels."""
