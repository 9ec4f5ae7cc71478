"""The plain text files of this folder: lines under `[section]` headings, `#` comments."""

from pathlib import Path


def read_sections(path: Path) -> dict[str, tuple[str, ...]]:
    """The lines of each section; those before the first heading are under the name ''."""
    return parse_sections(path.read_text(encoding="utf-8"))


def parse_sections(text: str) -> dict[str, tuple[str, ...]]:
    """See `read_sections`."""
    sections: dict[str, list[str]] = {"": []}
    lines = sections[""]
    for raw in text.splitlines():
        line = raw.partition("#")[0].strip()
        if line.startswith("[") and line.endswith("]"):
            lines = sections.setdefault(line[1:-1], [])
        elif line:
            lines.append(line)
    return {name: tuple(lines) for name, lines in sections.items()}
