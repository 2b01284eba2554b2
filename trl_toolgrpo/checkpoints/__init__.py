"""Checkpoints that are whole or not there, and exact resuming."""
