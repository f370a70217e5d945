"""Training of live models, the way OLMo was trained."""
