"""One change of a domain's record and its config file.

The caller has locked the domain. If no directories are remembered, only the record changes.
Otherwise the change is a step of its own (`steps`): a process killed in it leaves a domain that its
next holder settles. `config` changes the files, and undoes that unless the `Commit` happened.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..config.change import ConfigDirs
from ..errors import DomainTransient, SegmentCorrupt, UncommittedChanges
from ..xml.definition import DomainDef
from .owner import Owner
from .steps import Commit, names_of
from .store import Deadline, DomainBase, ListBase
from .work import Step, Work


def commit_of(dom: DomainBase, deadline: Deadline) -> Commit:
    """The commit of the domain's changes."""

    def make(work: Work | None) -> None:
        if work != dom._work:
            dom._work = work
        dom.commit(deadline.left())

    return Commit(dom, make)


def save(
    doms: ListBase[Any],
    dom: DomainBase,
    dirs: ConfigDirs,
    deadline: Deadline,
    commit: Commit,
    step: Step | None = None,
    new: bool = False,
) -> None:
    """Write the definition of the domain's next start; a `new` domain had no file before. `step`:
    the one that it was inserted with."""
    owner = Owner(doms, dom, dirs)

    def change() -> None:
        dirs.save(
            dom.next_definition or dom.definition,
            deadline.left(),
            commit,
            new=new,
            keep_link=dom.autostart,
            owner=owner,
        )

    if step is None:
        step = Step.of("save", dirs, *names_of(dom, dirs, owner))
    commit.run(doms, step, deadline, change)


def save_config(doms: ListBase[Any], dom: DomainBase, deadline: Deadline) -> None:
    """`DomainListRules.save_config`."""
    commit = commit_of(dom, deadline)
    dirs, _ = doms._remembered(), dom.name  # which needs the domain lock, dirs or not
    if dirs is not None:
        save(doms, dom, dirs, deadline, commit)


def delete(
    doms: ListBase[Any],
    dom: DomainBase,
    deadline: Deadline,
    make: Callable[[Work | None], object] | None = None,
) -> None:
    """Remove the domain's file and link; `make` changes the record."""
    dirs, name = doms._remembered(), dom.name
    try:
        work = dom._work
    except SegmentCorrupt:
        dom._commit_work(None, deadline.left())  # damage hinders nobody in getting rid of a domain
        work = None
    if dirs is None:
        if make is not None:
            make(work)
        return
    owner = Owner(doms, dom, dirs)
    commit = Commit(dom, make or (lambda work: dom._commit_work(work, deadline.left())))
    step = Step.of("undefine", dirs, *names_of(dom, dirs, owner))
    # What could not be settled: a file that is left would bring the domain back with the next load.
    left = None if work is None else work.step
    others = left.names if left is not None and left.dirs == dirs else ()
    commit.run(
        doms,
        step,
        deadline,
        lambda: dirs.delete(name, deadline.left(), commit, owner=owner, others=others),
        needs_room=False,
    )


def rename(
    doms: ListBase[Any],
    dom: DomainBase,
    definition: DomainDef,
    deadline: Deadline,
    make: Callable[[Work | None], object],
) -> None:
    """Rename the domain's file and link after the new definition; `make` renames the record."""
    dirs = doms._remembered()
    if dirs is None:
        make(dom._work)
        return
    commit, owner, name = Commit(dom, make), Owner(doms, dom, dirs), dom.name
    autostart = dom.autostart
    if dom.persistent:

        def change() -> None:
            left = deadline.left()
            dirs.rename(name, definition, left, commit, autostart=autostart, owner=owner)

    elif owner.holds(dirs.config_file(name)):
        # It was saved before it was persistent. If the file stayed, a load would find this UUID a
        # second time, under the old name.
        def change() -> None:
            dirs.delete(name, deadline.left(), commit, owner=owner)

    else:
        commit()
        return
    names = (*names_of(dom, dirs, owner), definition.name)
    commit.run(doms, Step.of("rename", dirs, *names), deadline, change)


def set_autostart(doms: ListBase[Any], dom: DomainBase, enabled: bool, deadline: Deadline) -> None:
    """`DomainListRules.set_autostart`."""
    if not dom.persistent:
        raise DomainTransient(f"cannot set autostart for transient domain {dom.name!r}")
    if dom.changed:
        raise UncommittedChanges(f"commit or roll back domain '{dom.name}' first")
    dirs = doms._remembered()
    whole = commit_of(dom, deadline)

    def make(work: Work | None) -> None:
        dom.autostart = enabled
        whole._make(work)

    commit = Commit(dom, make)
    try:
        if dirs is None or (dirs.autostart_dir is None and not enabled):
            commit()
            return
        owner = Owner(doms, dom, dirs)
        name = dom.name
        commit.run(
            doms,
            Step.of("autostart", dirs, *names_of(dom, dirs, owner)),
            deadline,
            lambda: dirs.set_autostart(name, enabled, deadline.left(), commit, owner=owner),
            needs_room=False,
        )
    except BaseException:
        dom.rollback()
        raise
