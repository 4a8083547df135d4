#!/usr/bin/env python3
"""Compares the measured numbers in README.md and its picture with the page that `bakehouse rehearse` wrote."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/rehearsal-ha-containers.md"
PICTURE = ROOT / "docs/architecture-fleet.svg"


def table(page: Path, first: str) -> list[dict[str, str]]:
    """Returns the rows of the table whose first column has this name."""
    rows = [[cell.strip() for cell in line.strip("|\n ").split("|")] for line in page.open() if line.startswith("|")]
    start = next(i for i, row in enumerate(rows) if row[0] == first)
    return [dict(zip(rows[start], row, strict=True)) for row in rows[start + 2 :]]


def main() -> int:
    """Prints what differs."""
    readme = (ROOT / "README.md").read_text()
    measured = {row["scenario"]: row for row in table(PAGE, "scenario")}
    errors = []

    def compare(what: str, said: str | None, is_measured: str) -> None:
        if said != is_measured:
            errors.append(f"{what}: {said}, but {PAGE.relative_to(ROOT)} has {is_measured}")

    claims = table(ROOT / "README.md", "scenario")
    for claim in claims:
        scenario = claim["scenario"].strip("`")
        row = measured[scenario]
        compare(f"README.md: wait of `{scenario}`", claim["longest wait for Odoo"], f"{row['HTTP s']} s")
        compare(f"README.md: writes of `{scenario}`", claim["lost writes"], row["lost"].replace("/", " of "))
        compare(f"README.md: logouts of `{scenario}`", claim["logouts"], row["logouts"])
        compare(f"README.md: promise of `{scenario}`", "kept", row["promise"])
        compare(f"README.md: date of `{scenario}`", "".join(re.findall(r" on (\d{4}-\d\d-\d\d)", readme)), row["date"])
        if "longest wait of all" in claim["what happens"]:
            longest = max(float(row["HTTP s"]) for row in measured.values() if row["HTTP s"] != "-")
            compare("README.md: longest wait of all", claim["longest wait for Odoo"], f"{longest} s")
    count = re.search(r"\[All (\d+) scenarios\]", readme)
    compare("README.md: number of scenarios", count and count[1], str(len(measured)))
    writes = re.search(r">after ([\d.]+) s,", PICTURE.read_text())
    compare(f"{PICTURE.relative_to(ROOT)}: writes continue after", writes and writes[1], measured["db"]["writes s"])
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    return 1 if errors or not claims else 0


if __name__ == "__main__":
    sys.exit(main())
