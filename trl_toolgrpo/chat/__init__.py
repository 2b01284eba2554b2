"""Between messages and tokens: rendering, parsing, and the ways in which chat templates write calls."""
