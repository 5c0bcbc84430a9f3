"""Which versions of a model are served, and which of them answers a request that names none."""

import re
from dataclasses import dataclass
from typing import Literal

from headstart.serving.errors import PackageError

_UNITS = 10_000  # a share in hundredths of a percent: integers, so that a counter gives it exactly
VERSION = re.compile(r"[1-9][0-9]{0,17}")
ACCEPTED = "latest, pinned:VERSION, or canary:VERSION:SHARE with a share such as 10% or 0.1"


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A rule of one model.

    Policy.parse("canary:3:10%")
    """

    kind: Literal["latest", "pinned", "canary"] = "latest"
    """`latest`: the largest number that loads. `pinned`: one number. `canary`: one number takes a share."""
    version: int = 0
    """The version that is pinned, or the canary."""
    share: int = 0
    """The canary's part of the requests in ten-thousandths, 1 to 9999."""

    @classmethod
    def parse(cls, text: str) -> "Policy":
        """Read `latest`, `pinned:2`, `canary:3:10%` or `canary:3:0.1`.

        Raises:
            PackageError: another word, number or share.
        """
        kind, *rest = text.strip().split(":")
        if kind == "latest" and not rest:
            return cls()
        if kind == "pinned" and len(rest) == 1 and VERSION.fullmatch(rest[0]):
            return cls(kind="pinned", version=int(rest[0]))
        if kind == "canary" and len(rest) == 2 and VERSION.fullmatch(rest[0]):
            share = _share(rest[1])
            if 0 < share < _UNITS:
                return cls(kind="canary", version=int(rest[0]), share=share)
        raise PackageError(f"the policy {text.strip()[:80]!r} is not known; accepted: {ACCEPTED}")

    def __str__(self) -> str:
        if self.kind == "latest":
            return self.kind
        return f"{self.kind}:{self.version}" + (f":{self.share / 100:g}%" if self.kind == "canary" else "")

    def chooses(self, version: int) -> bool:
        """Whether a version may serve by it."""
        return self.kind != "pinned" or version == self.version

    def candidates(self, versions: list[int]) -> list[int]:
        """The versions of which the first that loads takes the requests, best first."""
        chosen = (one for one in versions if self.chooses(one) and (self.kind != "canary" or one != self.version))
        return sorted(chosen, reverse=True)

    def canary(self, versions: list[int]) -> int | None:
        """The version that takes `share`, where it is there."""
        return self.version if self.kind == "canary" and self.version in versions else None

    def absent(self, versions: list[int]) -> str:
        """What it names that is not there, in words; empty where all is."""
        if self.kind == "latest" or self.version in versions:
            return ""
        which = f"version {self.version}" if self.kind == "pinned" else f"the canary {self.version}"
        return f"{which} of its policy is not there"

    def takes(self, count: int) -> bool:
        """Whether request `count` (0, 1, ...) is the canary's; of any 10,000 in a row exactly `share` are.

        They lie evenly: the multiples of `share` that pass a whole number.
        """
        return (count + 1) * self.share // _UNITS > count * self.share // _UNITS


def _share(text: str) -> int:
    """A share in ten-thousandths; 0 where the text is none."""
    match = re.fullmatch(r"(\d{1,3}(?:\.\d{1,4})?)(%?)", text)
    return round(float(match[1]) * (_UNITS / 100 if match[2] else _UNITS)) if match else 0
