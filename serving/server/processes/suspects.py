"""Versions that processes of a server ended over while they opened them: what no check of a package can foresee.

A graph that makes ONNX Runtime crash, or takes memory until the kernel ends the process, would end each process that
is started in the place of the last one.
"""

from headstart.serving.server.models.folder import Opening

_MOST_ENDS = 2
"""Ends after which a version is opened no more. One may be an accident: somebody ended the process just then."""


class Suspects:
    """What must not be opened again, as long as its files are the same and no process has opened it.

        suspects.ended(opening)  # twice
        suspects.found()  # [opening]

    It remembers one mark for each name and version.
    """

    def __init__(self) -> None:
        self._ends: dict[tuple[str, int], tuple[str, int]] = {}  # mark and number by name and version
        self._opened: dict[tuple[str, int], str] = {}  # the mark

    def opened(self, opening: Opening) -> None:
        """It was opened, or refused by a process that lives."""
        self._opened[opening[:2]] = opening.mark
        self._ends.pop(opening[:2], None)

    def ended(self, opening: Opening) -> None:
        """A process ended that was opening it."""
        if self._opened.get(opening[:2]) != opening.mark:
            mark, ends = self._ends.get(opening[:2], (opening.mark, 0))
            self._ends[opening[:2]] = (opening.mark, ends + 1 if mark == opening.mark else 1)

    def found(self) -> list[Opening]:
        """What is not to be opened."""
        return [Opening(*key, mark) for key, (mark, ends) in self._ends.items() if ends >= _MOST_ENDS]
