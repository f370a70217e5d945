"""Which block of which Hugging Face tensor stands where in which Megatron parameter. Pure data."""
