"""Tools: what one is, how a call of it runs, and where tools come from."""
