#!/usr/bin/env python3
"""Prints the licences of the crates that the packaged programs contain.

Most licences ask for their text wherever the program goes. Crates with the same text share one copy.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
TARGET = "x86_64-unknown-linux-gnu"
RULE = "=" * 80


def cargo(*arguments: str) -> str:
    return subprocess.check_output(["cargo", *arguments, "--locked"], cwd=ROOT, text=True)


def linked() -> list[dict]:
    """Returns the crates that are linked into the programs: not those of build scripts, macros and tests."""
    metadata = json.loads(cargo("metadata", "--format-version=1", f"--filter-platform={TARGET}"))
    crates = {(c["name"], c["version"]): c for c in metadata["packages"] if c["source"]}
    programs = ("--package=builder", "--package=firstboot", "--package=page")
    tree = cargo("tree", *programs, "--edges=normal,no-proc-macro", f"--target={TARGET}", "--prefix=none")
    names = {tuple(line.split()[:2]) for line in tree.splitlines() if line}
    found = {(name, version.removeprefix("v")) for name, version in names}
    return [crates[key] for key in sorted(found & crates.keys())]


def texts(crate: dict) -> list[str]:
    """Returns the licence files of a crate."""
    folder = Path(crate["manifest_path"]).parent
    names = ("LICENSE", "LICENCE", "COPYING", "COPYRIGHT", "NOTICE", "UNLICENSE")
    files = sorted(f for f in folder.iterdir() if f.is_file() and f.name.upper().startswith(names))
    return [f.read_text(errors="replace").replace("\r\n", "\n").strip("\n") for f in files]


def main() -> int:
    users: dict[str, list[str]] = {}
    print("The programs of Bakehouse contain these libraries:\n")
    for crate in linked():
        name = f"{crate['name']} {crate['version']}"
        found = texts(crate)
        note = "" if found else f"; the crate has no copy of it; {', '.join(crate['authors']) or 'no authors named'}"
        print(f"{name}: {crate['license']}{note}")
        for text in found:
            users.setdefault(text, []).append(name)
    for text, crates in users.items():
        print(f"\n{RULE}\n{', '.join(crates)}\n{RULE}\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
