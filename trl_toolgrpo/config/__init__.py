"""`ToolGRPOConfig`: every option, the checks of options against each other, and the parser of command lines."""
