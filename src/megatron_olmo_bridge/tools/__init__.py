"""What is done with checkpoints beside converting them: verify, inspect, synth, doctor."""
