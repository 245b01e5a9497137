"""The core once more, with bugs in it that a recorded history must show.

A copy of its sources is changed in a few places and built in ``build/planted-bugs``, as the one
with crash points is (Makefile). All the bugs are in the one build; `sd_planted`, which it exports
and the real core does not have, says which of them is on. Each place is found by its text, and a
text that is not there exactly once is an error: a bug that is not planted is not caught either.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

from killing import CORE, TESTS

PACKAGE = TESTS.parent / "shmdomains"

FOLDER = TESTS.parent / "build" / "planted-bugs"

BUGS = {
    "none": 0,
    "unlocks before the commit": 1,
    "finds without looking again under the lock": 2,
    "renames without the index": 3,
    "reads without looking again": 4,
    "commits in two steps": 5,
    "misses without looking at the sequence": 6,
    "undoes a commit when it repairs": 7,
    "stores next_id after it gave the id out": 8,
    "renames over small data": 9,
    "writes small data where it counts": 10,
}

_SWITCH = '__attribute__((visibility("default"))) long sd_planted;'
_EXTERN = """extern long sd_planted;
struct sd_segment;
void sd_undo_state(struct sd_segment *segment, uint32_t slot);

"""
_DECLARED = {
    "codes.h": [("enum {\n    SD_OK = 0,", _EXTERN + "enum {\n    SD_OK = 0,")],
    "thread.c": [("static uint64_t start_of_self", f"{_SWITCH}\nstatic uint64_t start_of_self")],
    "c.pxd": [
        (
            'cdef extern from "core.h" nogil:\n',
            'cdef extern from "core.h" nogil:\n    long sd_planted\n',
        )
    ],
}

PLANTED = {
    "hold.pxi": [
        (
            """
    if mine.touched or mine.pending or mine.intends:
        try:
""",
            """
    if mine.touched or mine.pending or mine.intends:
        if sd_planted == 1:
            end_hold(mine, True)
            commit_changes(mine, deadline)
            return 0
        try:
""",
        )
    ],
    "info.pxi": [
        (
            "    if written != sd_blob_sum(",
            "    if sd_planted != 4 and written != sd_blob_sum(",
        )
    ],
    "find.pxi": [
        (
            "    result = sd_verify(doms.segment, slot, key, &record.values)\n",
            "    result = sd_verify(doms.segment, slot, key, &record.values)\n"
            "    if sd_planted == 2:\n"
            "        result = sd_values_get(doms.segment, slot, &record.values)\n",
        )
    ],
    "record.c": [
        ("#include <errno.h>\n", "#include <errno.h>\n#include <sched.h>\n#include <unistd.h>\n"),
        (
            """
    int listed = sd_index_insert(segment, SD_NAME_INDEX,
                                 sd_hash_name(segment, name + 1, name[0]), slot);
    if (gone == SD_OK""",
            """
    if (sd_planted == 6) usleep(1000);
    int listed = sd_planted == 3 ? SD_OK
                                 : sd_index_insert(segment, SD_NAME_INDEX,
                                                   sd_hash_name(segment, name + 1, name[0]), slot);
    if (gone == SD_OK""",
        ),
        (
            """
    else sd_publish(&header->next_id, sd_seal(next + 1));
    sd_ids_unlock(segment);
""",
            """
    else if (sd_planted != 8) sd_publish(&header->next_id, sd_seal(next + 1));
    sd_ids_unlock(segment);
    if (sd_planted == 8 && result == SD_OK) {
        usleep(1000);
        sd_publish(&header->next_id, sd_seal(next + 1));
    }
""",
        ),
        (
            "    if (data->change) return SD_MISMATCH;",
            "    if (sd_planted == 9) return SD_OK;\n    if (data->change) return SD_MISMATCH;",
        ),
        (
            """
                data->bytes, data->size);
}

/* A name is about""",
            """
                data->bytes, data->size);
    if (sd_planted == 10) usleep(300);
}

/* A name is about""",
        ),
        (
            """
    next->flags ^= SD_FLAG_CHOICE(SD_DATA);
    next->flags |= SD_FLAG_PRESENT(SD_DATA);
    sd_blob_put(""",
            """
    if (sd_planted != 10) next->flags ^= SD_FLAG_CHOICE(SD_DATA);
    next->flags |= SD_FLAG_PRESENT(SD_DATA);
    sd_blob_put(""",
        ),
        (
            """
    else
        sd_values_flip(&segment->slots[slot], next);
    if (news)""",
            """
    else {
        if (sd_planted == 5) {
            sd_values half = *next;
            half.state = now->state;
            sd_values_flip(&segment->slots[slot], &half);
            sched_yield();
        }
        sd_values_flip(&segment->slots[slot], next);
    }
    if (news)""",
        ),
    ],
    "find.c": [
        (
            "    if (before & 1 || sd_load(sequence) != before) return SD_DOUBT;",
            "    if (sd_planted == 6) return SD_MISS;\n"
            "    if (before & 1 || sd_load(sequence) != before) return SD_DOUBT;",
        ),
    ],
    "fields.c": [
        ('#include "fields.h"\n', '#include "fields.h"\n\n#include <sched.h>\n'),
        (
            """
    atomic_thread_fence(memory_order_acquire);
    return sd_load(&record->life) == view->life && """,
            """
    if (sd_planted == 4) {
        sched_yield();
        return SD_OK;
    }
    atomic_thread_fence(memory_order_acquire);
    return sd_load(&record->life) == view->life && """,
        ),
        (
            "    return sound ? SD_OK : SD_CORRUPT;\n}\n\nint sd_view_begin(",
            "    return sound || sd_planted == 4 ? SD_OK : SD_CORRUPT;\n}\n\nint sd_view_begin(",
        ),
        (
            "/* --- name and uuid ",
            """
void sd_undo_state(sd_segment *segment, uint32_t slot)
{
    sd_slot *record = &segment->slots[slot];
    uint64_t cur = sd_load(&record->cur);
    sd_values before, now;
    if (sd_count_value(cur) < 2) return;
    read_fields(record, sd_count_seal(sd_count_value(cur) - 1), &before);
    sd_values_get(segment, slot, &now);
    now.state = before.state;
    sd_values_flip(record, &now);
}

/* --- name and uuid """,
        ),
    ],
    "locks.c": [
        (
            "        sd_events_unlock(segment);\n    }\n    sd_tidy(",
            "        sd_events_unlock(segment);\n    }\n"
            "    if (sd_planted == 7) sd_undo_state(segment, slot);\n"
            "    sd_tidy(",
        )
    ],
}


def plant(bug: str) -> None:
    """Turn one on, in this process, which has the core with bugs."""
    from shmdomains.memory._core import core

    ctypes.c_long.in_dll(ctypes.CDLL(core.__file__), "sd_planted").value = BUGS[bug]


def build() -> Path:
    """The folder with the package whose core has the bugs, up to date."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _build(FOLDER / "shmdomains")
    return FOLDER


def _build(package: Path) -> None:
    source = package / CORE.relative_to(PACKAGE)
    binary = source / f"core{_SUFFIX}"
    texts = {file.name: _with_bugs(file) for file in _SOURCES}
    wanted = hashlib.sha256(repr((sorted(texts.items()), _OPTIONS)).encode()).hexdigest()
    stamp = package / "built-from"
    source.mkdir(parents=True, exist_ok=True)
    for file in PACKAGE.rglob("*.py"):
        link = package / file.relative_to(PACKAGE)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(file)
    if binary.exists() and stamp.exists() and stamp.read_text() == wanted:
        return
    stamp.unlink(missing_ok=True)
    for name, text in texts.items():
        (source / name).write_text(text)
    c_files = ["core.c", *(name for name in texts if name.endswith(".c"))]
    new = f"{binary.name}.new"
    _run([sys.executable, "-m", "cython", "-3", "-o", "core.c", "core.pyx"], source)
    _run([*_OPTIONS, "-o", new, *c_files], source)
    (source / new).rename(binary)
    stamp.write_text(wanted)


_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
_SOURCES = sorted(
    file
    for kind in ("pyx", "pxd", "pxi", "h", "c")
    for file in CORE.glob(f"*.{kind}")
    if file.name != "core.c"
)
_OPTIONS = [
    *shlex.split(os.environ.get("CC") or "cc"),
    *["-std=c11", "-O1", "-fvisibility=hidden", "-pthread", "-fPIC", "-shared", "-I."],
    f"-I{sysconfig.get_path('include')}",
    *shlex.split(os.environ.get("CFLAGS", "")),
]


def _with_bugs(file: Path) -> str:
    text = file.read_text()
    for old, new in _DECLARED.get(file.name, []) + PLANTED.get(file.name, []):
        assert text.count(old) == 1, f"{file.name} has it {text.count(old)} times:\n{old}"
        text = text.replace(old, new)
    return text


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, f"the core with bugs cannot be built:\n{done.stdout}"
