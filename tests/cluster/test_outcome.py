"""What a run prints at its end."""

import io
from types import SimpleNamespace
from typing import cast

from rich.console import Console

from headstart.cluster.pipeline import Outcome
from headstart.cluster.report.outcome import print_ranking


def test_a_ranking_says_what_a_dash_in_the_place_of_a_distance_means():
    entry = {"source": "a", "available": True, "distances": None, "seconds": 1.0, "licence": "MIT"}
    entry |= dict.fromkeys(("knn", "ridge", "score", "audition_accuracy"), 0.5)
    outcome = SimpleNamespace(summary={"name": "x"}, ranking={"ranking": [entry], "probe": "p"})
    text = io.StringIO()
    print_ranking(cast(Outcome, outcome), Console(file=text, width=300))
    assert " - │" in text.getvalue()
    assert "- where a source has no sketch: finished runs have one" in text.getvalue()
