"""The exceptions that the commands show to people without a traceback."""


class UserError(Exception):
    """Something that the person at the keyboard can mend.

    The message says what was wrong, what was expected and what to do.
    """


class Interrupted(UserError):
    """A run that was asked to stop has saved its state and stopped."""
