"""Live megatron-core models: filled from checkpoints, streamed back out, run and compared."""
