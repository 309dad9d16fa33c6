"""Contracts of the house: config, quantisers, packing, files. Needs numpy only."""
