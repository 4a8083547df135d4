"""Reads manifests of Odoo's add-ons. Input: name → text. Output: name → version and required Python packages. JSON."""

import ast
import json
import sys

found = {}
for name, text in json.load(sys.stdin).items():
    try:
        manifest = ast.literal_eval(text)
        version = str(manifest.get("version", "1.0"))
        python = [str(library) for library in manifest.get("external_dependencies", {}).get("python", [])]
    except (AttributeError, SyntaxError, ValueError) as e:
        sys.exit(f"{name}/__manifest__.py cannot be read: {e}")
    found[name] = {"version": version, "python": python}
json.dump(found, sys.stdout)
