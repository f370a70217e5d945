"""Runs that can be trained by name: `olmo-bridge recipes` lists them."""
