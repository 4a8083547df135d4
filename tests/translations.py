#!/usr/bin/env python3
"""Compares each translated page with its original: README.vi.md and the pages in docs/vi/.

Headings, code blocks (except their comments), inline code, tables, numbers and links must be the same in both. Words
may differ. So a change of one page fails `make check` until the other page has it, too.
"""

import os
import re
import sys
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).parent.parent
LANGUAGE = "vi"
LINK = re.compile(r"!?\[([^\]]*)\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`]+)`")
NUMBER = re.compile(r"\d+(?:[.,:-]\d+)*")
# From a `#` that begins a line or follows a space, as in shells and in TOML.
COMMENT = re.compile(r"(^|\s+)#(\s.*)?$")


@dataclass
class Section:
    """A heading, and what follows until the next one."""

    line: int
    level: int
    title: str
    text: list[str] = field(default_factory=list)
    blocks: list[list[str]] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)


def sections(page: Path) -> list[Section]:
    """Splits a page at its headings."""
    found = [Section(1, 0, "")]
    block = None
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if line.lstrip().startswith("```"):
            if block is None:
                block = [line.strip()]
                found[-1].blocks.append(block)
            else:
                block = None
        elif block is not None:
            block.append(COMMENT.sub("", line).rstrip())
        elif heading := re.match(r"(#+) (.*)", line):
            found.append(Section(number, len(heading[1]), heading[2]))
            found[-1].text.append(heading[2])
        elif line.startswith("|"):
            found[-1].rows.append(line)
        else:
            found[-1].text.append(line)
    return found


def original_of(page: str) -> str:
    """Returns the path of the original page, for the path of a translation or of an original."""
    return page.replace(f"docs/{LANGUAGE}/", "docs/").replace(f".{LANGUAGE}.md", ".md")


def slug(title: str) -> str:
    """Returns the anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def links(page: Path, text: str, all_sections: list[Section]) -> list[str]:
    """Returns the targets of links, from the root of the repository. A heading of the same page is its number."""
    slugs = [slug(section.title) for section in all_sections]
    targets = []
    for _, target in LINK.findall(text):
        path, _, anchor = target.partition("#")
        if re.match(r"\w+:", target):
            targets.append(target)
        elif path:
            resolved = os.path.relpath(page.parent / path, ROOT)
            targets.append(f"{resolved}#{anchor}".rstrip("#"))
        else:
            targets.append(f"heading {slugs.index(anchor)}" if anchor in slugs else f"missing heading #{anchor}")
    return targets


def numbers(text: str) -> list[str]:
    """Returns the numbers of a text, without those in code and in links' targets."""
    return NUMBER.findall(CODE.sub("", LINK.sub(r"\1", text)))


def facts(page: Path, section: Section, page_sections: list[Section]) -> dict[str, list]:
    """Returns what a section has in common with its translation."""
    text = "\n".join(section.text)
    everything = "\n".join([text, *section.rows])
    return {
        "level of the heading": [section.level],
        "code block": section.blocks,
        "inline code": sorted(CODE.findall(everything)),
        "link": [original_of(target) for target in links(page, everything, page_sections)],
        "number in the text": numbers(text),
        "columns and numbers of a table's row": [(row.count("|"), numbers(row)) for row in section.rows],
    }


def difference(kind: str, here: list, there: list) -> str | None:
    """Describes the first difference of two lists."""
    for one, other in zip_longest(here, there):
        if one != other:
            if isinstance(one, list) and isinstance(other, list):
                return difference(f"line of the {kind}", one, other)
            return f"{kind}: {one!r}, in the other page {other!r}"
    return None


def compare(original: Path, translation: Path) -> list[str]:
    """Returns the differences of two pages."""
    errors = []
    split = {page: sections(page) for page in (original, translation)}
    for page, other in ((original, translation), (translation, original)):
        name, other_name = (str(p.relative_to(ROOT)) for p in (page, other))
        top = "\n".join(split[page][1].text[:4])
        if other_name not in links(page, top, split[page]):
            errors.append(f"{name}:1: no link to {other_name} below the title")
    for one, other in zip_longest(split[original], split[translation]):
        if one is None or other is None:
            section, page = (one, original) if other is None else (other, translation)
            errors.append(f"{page.relative_to(ROOT)}:{section.line}: `{section.title}` is in one page only")
            break
        here, there = facts(original, one, split[original]), facts(translation, other, split[translation])
        for kind, values in here.items():
            if problem := difference(kind, values, there[kind]):
                place = f"{original.relative_to(ROOT)}:{one.line} and {translation.relative_to(ROOT)}:{other.line}"
                errors.append(f"{place}: {problem}")
    return errors


def main() -> int:
    """Compares all translations."""
    translations = [*ROOT.glob(f"*.{LANGUAGE}.md"), *(ROOT / "docs" / LANGUAGE).rglob("*.md")]
    errors = []
    for translation in sorted(translations):
        name = str(translation.relative_to(ROOT))
        original = ROOT / original_of(name)
        if original.exists():
            errors += compare(original, translation)
        else:
            errors.append(f"{name}: {original_of(name)} does not exist")
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    if errors:
        print("  help: make the same change in both languages", file=sys.stderr)
    return 1 if errors or not translations else 0


if __name__ == "__main__":
    sys.exit(main())
