"""Reads requirements of Python packages, as pip does. Input and output are JSON.

Input: the version of Python in the image, and the requirements of each package. Output: for each requirement that holds
in the image, the package that has it, its name, and the versions that it accepts.
"""

import json
import sys

from pip._vendor.packaging.requirements import InvalidRequirement, Requirement
from pip._vendor.packaging.specifiers import SpecifierSet
from pip._vendor.packaging.utils import canonicalize_name
from pip._vendor.packaging.version import InvalidVersion, Version

asked = json.load(sys.stdin)
image = {
    "extra": "",
    "implementation_name": "cpython",
    "os_name": "posix",
    "platform_machine": "x86_64",
    "platform_python_implementation": "CPython",
    "platform_system": "Linux",
    "python_full_version": asked["python"] + ".0",
    "python_version": asked["python"],
    "sys_platform": "linux",
}


def accepts(versions: SpecifierSet, version: str) -> bool:
    if not version:
        # An add-on of the fleet takes the place of a package.
        return True
    try:
        return versions.contains(Version(version), prereleases=True)
    except InvalidVersion:
        # A version of Debian with parts that Python does not know is taken as it is.
        return True


found = []
for package, texts in asked["requires"].items():
    for text in texts:
        try:
            requirement = Requirement(text)
        except InvalidRequirement as e:
            sys.exit(f"{package} has the invalid requirement {text!r}: {e}")
        if requirement.marker is None or requirement.marker.evaluate(image):
            name = canonicalize_name(requirement.name)
            have = asked["have"].get(name)
            found.append(
                {
                    "of": package,
                    "name": name,
                    "text": f"{name}{requirement.specifier}",
                    "accepts": None if have is None else accepts(requirement.specifier, have),
                }
            )
json.dump(found, sys.stdout)
