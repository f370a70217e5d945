"""Offline conversion: a plan of byte ranges from headers alone, carried out by the kernel."""
