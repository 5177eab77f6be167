"""What goes wrong with data, as errors that a command line can print in one line."""


class DataError(ValueError):
    """Data, or options for it, that are not what they should be.

    The message names the file or option, what was found and what would be right.
    """


class UnsafePickleError(DataError):
    """A pickle that asks for something other than arrays of numbers: refused, and never run."""
