"""What a user can mend on the serving side; the server's room shares no code with the trainer's."""


class PackageError(Exception):
    """A package, or an input to one, that cannot be used; the message says the next step."""

    exit_code = 2
