"""Synthesis, place and route, and what their logs say."""
