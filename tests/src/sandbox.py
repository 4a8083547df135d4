"""Helpers for programs that tests run as checks in an image's tree."""

import fcntl
import os
import pwd
import socket
import struct
import subprocess
import sys


def loopback():
    """Brings up the loopback interface, which is down in the sandbox's network namespace."""
    with socket.socket() as line:
        # SIOCSIFFLAGS with IFF_UP and IFF_RUNNING.
        fcntl.ioctl(line, 0x8914, struct.pack("16sH14s", b"lo", 0x41, b""))


class Account:
    """A user of the image, with a working folder."""

    def __init__(self, name, place, **environment):
        user = pwd.getpwnam(name)
        os.makedirs(place)
        os.chown(place, user.pw_uid, -1)
        self.settings = {
            "user": user.pw_uid,
            "group": user.pw_gid,
            "extra_groups": [],
            "env": {"PATH": "/usr/bin:/bin", "HOME": place} | environment,
        }

    def start(self, *command, **more):
        return subprocess.Popen(command, **self.settings | more)

    def run(self, *command, stdin=None):
        process = self.start(*command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        process.communicate(stdin)
        if process.returncode:
            sys.exit(f"{command[0]} ended with {process.returncode}")
