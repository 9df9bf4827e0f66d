"""What a check says: one line, and where something is wrong what to do about it."""

from dataclasses import asdict, dataclass
from typing import Literal

Status = Literal["ok", "warning", "would fail"]


@dataclass(frozen=True)
class Finding:
    """``subject`` names what was looked at, ``text`` what was found; ``fix`` is empty where nothing is to be done."""

    status: Status
    subject: str
    text: str
    fix: str = ""

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


def ok(subject: str, text: str) -> Finding:
    return Finding("ok", subject, text)


def warning(subject: str, text: str, fix: str) -> Finding:
    return Finding("warning", subject, text, fix)


def failure(subject: str, text: str, fix: str) -> Finding:
    return Finding("would fail", subject, text, fix)
