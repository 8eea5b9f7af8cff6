"""The exceptions with a sentence for the user."""


class UserError(ValueError):
    """Bad input. The message is one sentence: what is wrong, where, and what would be right."""


class DivergenceError(FloatingPointError):
    """Training found a number that is not finite; nothing has moved by it.

    The message is the beginning of a sentence: which number, and where.
    """


def one_line(error: object) -> str:
    """What an error says, for a message of one line."""
    return " ".join(str(error).split())
