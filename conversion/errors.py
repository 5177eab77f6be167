"""What goes wrong with checkpoints, as an error that a command line can print in one line."""


class CheckpointError(ValueError):
    """A checkpoint, its parameters or its optimizer are not what they should be.

    The message names the file, what was found and what would be right. Nothing of the file has been executed, and
    nothing has been written.
    """
