#!/usr/bin/env python3
"""Checks the dependencies in Cargo.lock against deny.toml, offline.

cargo-deny does the same and knows advisories; building it takes minutes, so `make check` uses this script.
"""

import json
import re
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

CRATES_IO = "registry+https://github.com/rust-lang/crates.io-index"


def accepts(expression: str, allowed: set[str]) -> bool:
    """Returns whether an SPDX expression is satisfied by the allowed licences."""
    tokens = re.findall(r"[()]|[^\s()/]+(?: WITH [^\s()/]+)?|/", expression)
    python = []
    for token in tokens:
        match token:
            case "(" | ")":
                python.append(token)
            case "OR" | "/":
                python.append("or")
            case "AND":
                python.append("and")
            case licence:
                python.append(str(licence in allowed))
    return bool(eval(" ".join(python)))  # the tokens are `True`, `False`, operators and parentheses


def main() -> int:
    root = Path(__file__).parent.parent
    policy = tomllib.loads((root / "deny.toml").read_text())
    allowed = set(policy["licenses"]["allow"])
    command = ["cargo", "metadata", "--format-version=1", "--locked"]
    packages = json.loads(subprocess.check_output(command, cwd=root))["packages"]
    errors = []
    for package in packages:
        name = f"{package['name']} {package['version']}"
        if package["source"] not in (None, CRATES_IO):
            errors.append(f"{name}: source {package['source']} is not crates.io")
        if not accepts(package["license"] or "none", allowed):
            errors.append(f"{name}: licence `{package['license']}` is not allowed in deny.toml")
        for dependency in package["dependencies"]:
            if package["source"] is None and dependency["req"] == "*" and dependency["source"]:
                errors.append(f"{name}: dependency {dependency['name']} has no version")
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    twice = [name for name, count in Counter(p["name"] for p in packages).items() if count > 1]
    print(f"{len(packages)} packages; in more than one version: {', '.join(sorted(twice)) or 'none'}")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
