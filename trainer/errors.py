"""What a user can mend: each message says what was wrong, which value, and the next step."""


class HeadstartError(Exception):
    """Base of every error that the user, and not a developer, can mend."""

    exit_code = 2


class RecipeError(HeadstartError):
    """A recipe that cannot be read or asks for what cannot be."""


class DataError(HeadstartError):
    """Labelled data that cannot be used as it is."""


class SourceError(HeadstartError):
    """A source task, its weights or its architecture that cannot be used."""


class RunError(HeadstartError):
    """A run directory, a cache or a machine that cannot take what is to be written."""
