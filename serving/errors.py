"""What a user can mend on the serving side; the server's room shares no code with the trainer's."""


class PackageError(Exception):
    """A package, or an input to one, that cannot be used; the message says the next step."""

    exit_code = 2


def first_line(error: BaseException) -> str:
    """What an error of another library says, without its pages of advice."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
