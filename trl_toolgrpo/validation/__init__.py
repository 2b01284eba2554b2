"""What is refused at construction: data, prompts, rewards and parameters that cannot work."""
