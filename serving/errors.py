"""What a user can mend on the serving side; the server's room shares no code with the trainer's."""

_BRIEF = 200  # characters


class PackageError(Exception):
    """A package, or an input to one, that cannot be used; the message says the next step."""

    exit_code = 2


def printable(text: str) -> str:
    r"""What somebody else wrote, with an escape (`\n`, `\x1b`, `\udcff`) for each character that nobody can see."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def brief(text: str) -> str:
    """What somebody else wrote, as a message quotes it: `printable`, and no more of it than a reader takes in."""
    return printable(text if len(text) <= _BRIEF else f"{text[:_BRIEF]}...")


def first_line(error: BaseException) -> str:
    """What an error of another library says, without its pages of advice."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
