"""From prompts to trajectories: the loop of turns, calls and results."""
