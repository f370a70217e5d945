"""Offline conversion: open a checkpoint, map its tensors, plan the copy, carry it out."""
