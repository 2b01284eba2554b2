"""Sampling on vLLM, in the training process or served."""
