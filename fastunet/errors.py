"""The exceptions of fastunet's own: something is wrong with a file."""

from pathlib import Path


class DataError(ValueError):
    """A file cannot be used as it is.

    The message is one sentence that names the file, what was found, what was expected and what to do;
    the commands print it as it stands and end with status 2.
    """


class FileProblem(DataError):
    """A file that cannot be used, told in four parts.

    Parameters
    ----------
    path : Path
        The file or folder.
    found, expected, fix : str
        What was found in it, what was expected, and what the user can do about it.
    """

    def __init__(self, path: Path | str, found: str, expected: str, fix: str) -> None:
        self.path, self.found, self.expected, self.fix = Path(path), found, expected, fix
        super().__init__(f"{path}: {found}, but expected {expected}; {fix}")

    def __reduce__(self) -> tuple[type, tuple[Path, str, str, str]]:
        """So that it comes back from a process of another worker."""
        return type(self), (self.path, self.found, self.expected, self.fix)
