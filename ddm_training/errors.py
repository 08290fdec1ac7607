"""The one exception for mistakes in what a user gives: files, folders, flags."""


class InputError(ValueError):
    """Bad input. The message says what was found, what was expected and what to do; command lines show only it."""
