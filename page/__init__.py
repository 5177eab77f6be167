"""The web page: its models, the checks of what it is asked for, drawing step by step, downloads, and its looks."""
