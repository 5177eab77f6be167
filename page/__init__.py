"""The web page: its layout, its models, checks of what it is asked for, and sampling step by step."""
