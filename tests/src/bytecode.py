"""Fails if a compiled Python file of the image has the time of its source.

The source's time in the sandbox is that of its unpacking, so the image would differ from build to build. Python would
also ignore the file: all times in the image are 0. See PEP 552 for the format.
"""

import pathlib
import sys

found = [path for path in pathlib.Path("/usr").rglob("*.pyc") if path.read_bytes()[4:8] == bytes(4)]
for path in found:
    print(path, "has the time of its source", file=sys.stderr)
sys.exit(1 if found else 0)
