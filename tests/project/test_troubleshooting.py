"""docs/troubleshooting/ has every error and warning of nexus/ by its words, and nothing that is said no more."""

from __future__ import annotations

import re

import pytest
from messages import REST, ROOT, Message, messages

PAGES = sorted((ROOT / "docs" / "troubleshooting").glob("*.md"))

# Places whose words are another's, and which entry has those.
ELSEWHERE = {
    ("nexus/backends/__init__.py", "say_once"): "its callers' words are messages of their own",
    ("nexus/files.py", "write_whole"): "caught where it is raised",
    ("nexus/plot_command.py", "_truth"): "argparse replaces it",
    ("nexus/schedules/imports/transformers.py", "from_transformers"): "the name that metric_driven begins with",
    ("nexus/training/schedulers.py", "__init__"): "those of Cosine",
}


def entries() -> dict[str, str]:
    """What each heading in backticks is followed by."""
    found: dict[str, str] = {}
    for page in PAGES:
        text = page.read_text("utf-8")
        for _, words, body in re.findall(r"^### (`+) ?(.*?) ?\1\n((?:(?!#).*\n?)*)", text, re.MULTILINE):
            assert words not in found, f"{page.name}: {words} is there twice"
            found[words] = body.strip()
        assert text.count("\n### ") == len(re.findall(r"^### `.*`$", text, re.MULTILINE))
    return found


ENTRIES = entries()
MESSAGES = messages()


def is_of(words: str, message: Message) -> bool:
    """Whether the message has the fixed words of an entry, in this order."""
    place = 0
    for part in words.split(REST):
        place = message.words.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return True


@pytest.mark.parametrize("file", sorted({message.file for message in MESSAGES}))
def test_every_message_has_an_entry(file: str) -> None:
    missing = [
        f"line {message.line}: {message.words}"
        for message in MESSAGES
        if message.file == file
        and (message.file, message.function) not in ELSEWHERE
        and not any(is_of(words, message) for words in ENTRIES)
    ]
    assert not missing, (
        "add an entry to docs/troubleshooting/: '### `the fixed words, … for the rest`', and below it when the error "
        f"comes and what to do\n{file}:\n" + "\n".join(missing)
    )


def test_every_entry_is_of_a_message_and_says_something() -> None:
    assert len(ENTRIES) > 150
    assert [words for words in ENTRIES if not any(is_of(words, message) for message in MESSAGES)] == []
    assert [words for words in ENTRIES if len(words.replace(REST, "")) < 12] == []
    assert [words for words, body in ENTRIES.items() if len(body) < 15] == []


def test_the_sources_are_read() -> None:
    """A message with its arguments, one that is made by a function, in a loop, and one of several by a condition."""
    said = "\n".join(message.words for message in MESSAGES)
    assert len(MESSAGES) > 350
    assert "backend=… runs on …, but the tensors are on …" in said
    assert "… is metric-driven" in said
    assert "… has heard no metric in … updates" in said
    assert "backend=… cannot run here: Triton is not installed; run 'pip install triton'" in said
    assert set(ELSEWHERE) <= {(message.file, message.function) for message in MESSAGES}
