"""How calls of tools run: many at a time, in order where they must be, each within its time limit."""
