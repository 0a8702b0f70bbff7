"""The one exception of fastunet's own: something is wrong with a file."""


class DataError(ValueError):
    """A file cannot be used as it is.

    The message is one sentence that names the file, what was found, what was expected and what to do;
    the commands print it as it stands and end with status 2.
    """
