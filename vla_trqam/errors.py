"""The one exception that means: the user can mend this."""


class UserError(ValueError):
    """Bad input. The message is one sentence: what is wrong, where, and what would be right."""
