"""Whether this Python, on this machine, can build shmdomains: silence, or one line and status 1.

The Makefile runs it before it sets anything up, with whatever `python3` there is; so it keeps to
what Python 2.7 and 3.4 can read, because a Python too old must get the line and no SyntaxError.
What is missing is named with the Debian package that has it.
"""

import os
import shlex
import subprocess
import sys
import sysconfig

OLDEST_PYTHON, NEWEST_PYTHON = (3, 10), (3, 14)
OLDEST_GLIBC = (2, 30)  # the first with pthread_mutex_clocklock


def refuse(reason):
    sys.exit("shmdomains: " + reason)


def check_system():
    if not sys.platform.startswith("linux"):
        refuse("made for Linux with glibc 2.30 or newer, and this is " + sys.platform)


def check_c_library():
    try:
        libc = os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (ValueError, OSError):
        libc = ""
    if not libc.startswith("glibc "):
        refuse("made for glibc 2.30 or newer, and this Python uses another C library (musl?)")
    if tuple(int(part) for part in libc.split()[1].split(".")[:2]) < OLDEST_GLIBC:
        refuse("made for glibc 2.30 or newer, and this is " + libc)
    if sys.maxsize < 2**32:
        refuse("made for 64-bit machines, and this Python is a 32-bit one")


def check_python():
    fits = OLDEST_PYTHON <= sys.version_info[:2] <= NEWEST_PYTHON
    if not fits or sys.implementation.name != "cpython":
        version = ".".join(str(part) for part in sys.version_info[:3])
        refuse(
            "made for CPython 3.10 to 3.14, and %s is %s: name another with PYTHON=python3.12"
            % (sys.executable, version)
        )


def missing_packages():
    """What is not installed: pairs of the thing and the Debian package that has it."""
    if not can_import("venv") or not can_import("ensurepip"):
        yield "Python's venv and ensurepip", "python3-venv"
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "gcc")
    if not can_include(compiler, None):
        yield "a C compiler (%s)" % compiler[0], "gcc"
    elif not can_include(compiler, "pthread.h"):
        yield "the C library's headers", "libc6-dev"
    if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
        yield "Python's header Python.h", "python3-dev"


def can_import(module):
    try:
        __import__(module)
    except ImportError:
        return False
    return True


def can_include(compiler, header):
    """Whether the compiler runs and finds the header; asking it beats guessing where it looks."""
    command = compiler + ["-E", "-x", "c", "-"]
    source = "#include <%s>\n" % header if header else "\n"
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
    except OSError:
        return False
    process.communicate(source.encode())
    return process.returncode == 0


if __name__ == "__main__":
    check_system()
    check_python()
    check_c_library()
    missing = list(missing_packages())
    if missing:
        things, packages = zip(*missing)
        refuse("missing: %s; apt install %s" % (", ".join(things), " ".join(packages)))
