"""From text to token ids: documents of many formats into Megatron's indexed datasets."""
