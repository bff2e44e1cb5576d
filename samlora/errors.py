"""The exceptions that mean: something the user handed in cannot be used."""


class InputError(ValueError):
    """A file, flag or array the user gave cannot be used.

    The message is one line: which file or flag, what value, what is allowed, what to do next.
    The command line prints it and exits with code 2; every other exception is a bug and keeps its traceback.
    """


class MissingFileError(InputError, FileNotFoundError):
    """A file or folder the user named, or one that is needed, is not there."""

    def __str__(self) -> str:  # OSError's own form would show a tuple
        return str(self.args[0]) if self.args else ""


class NoSegmentationError(InputError):
    """The source of a DICOM segmentation is none that a segmentation can refer to."""
