"""Recipes: tasks, models and evaluations, which `qwen3_tools.py` puts together to train a model to call tools."""
