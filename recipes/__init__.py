"""Recipes: tasks, models and evaluations, which `qwen3_tools.py` combines to train a model to call tools."""
