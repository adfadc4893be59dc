"""Shipped presets, a TOML file each; installed as ``compress.presets``."""
