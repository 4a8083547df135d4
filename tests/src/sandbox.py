"""For programs that tests run in an image's tree, while it is built."""
import fcntl
import os
import pwd
import socket
import struct
import subprocess
import sys


def loopback():
    """Is down."""
    with socket.socket() as line:
        fcntl.ioctl(line, 0x8914, struct.pack("16sH14s", b"lo", 0x41, b""))


class Account:
    """One of the image's users, with a folder to work in."""

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
