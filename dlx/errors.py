"""The one error that is the user's to mend."""


class BadInput(ValueError):
    """A value that cannot work, said in one line that names the value and the fix.

    The command line prints the line and exits with 2; in a notebook it is an ordinary
    ``ValueError``.
    """
