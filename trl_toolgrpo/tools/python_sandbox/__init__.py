"""A tool that runs Python code which the policy writes, in a sandbox."""
