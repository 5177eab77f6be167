"""The web page: its models, checks of what it is asked for, sampling step by step, downloads, and its style."""
