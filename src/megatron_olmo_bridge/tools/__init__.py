"""Tools for checkpoints: verify, inspect, synth, model card, and the doctor."""
