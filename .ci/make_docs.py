"""Build the reference: API pages into FOLDER/docs, man pages into FOLDER/man (`make docs`)."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import click
import pdoc
from click_man.core import write_man_pages

from shmdomains.cli import cli

MODULES = (
    *("shmdomains", "shmdomains.errors", "shmdomains.drivers", "shmdomains.drivers.qemu"),
    *("shmdomains.metrics", "shmdomains.aio", "shmdomains.green", "shmdomains.libvirts"),
    "shmdomains.table",
)


def main(folder: Path) -> None:
    pdoc.render.configure(docformat="markdown")
    pdoc.pdoc(*MODULES, output_directory=folder / "docs")
    man = folder / "man"
    man.mkdir(parents=True, exist_ok=True)
    with click.Context(cli) as context:
        for name in cli.list_commands(context):
            cli.get_command(context, name)  # imported now, for the pages' writer looks no further
    write_man_pages("shmdomains", cli, version=version("shmdomains"), target_dir=str(man))
    pages = len(list((folder / "docs").rglob("*.html")))
    print(f"{pages} pages in {folder / 'docs'}, {len(list(man.iterdir()))} man pages in {man}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
