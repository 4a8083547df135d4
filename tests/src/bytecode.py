"""Fails if a compiled Python file of the image has the time of its source.

The source's time in the sandbox is that of its unpacking, so the image would differ from build to build. Python would
also ignore the file: all times in the image are 0. See PEP 552 for the format.
"""

import pathlib
import sys

compiled = list(pathlib.Path("/usr").rglob("*.pyc"))
found = [path for path in compiled if path.read_bytes()[4:8] == bytes(4)]
for path in found:
    print(path, "has the time of its source", file=sys.stderr)
if not compiled:
    print("the image has no compiled Python file", file=sys.stderr)
sys.exit(1 if found or not compiled else 0)
