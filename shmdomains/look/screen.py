"""``shmdomains top``: looks at a list, one after the other, on a terminal.

The looks are taken in a thread, so the screen stays quick however long one takes. `lines` says the
same in plain text, for a pipe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

try:
    from textual import work
    from textual.app import App, ComposeResult
    from textual.containers import Horizontal, Vertical
    from textual.widgets import DataTable, Footer, Input, Static
except ImportError:
    raise ImportError("top needs textual: pip install 'shmdomains[top]'") from None

from rich.text import Text

from ..errors import ShmDomainsError
from ..text import one_line
from .lines import COLUMNS, SORTS, cells, chosen, event_lines, head, lock_lines
from .picture import Looker, Picture

_NARROW = 100  # columns below which the panels lie below each other


class Top(App[str | None]):
    """The screen; it returns why it ended, if that was not its user's wish."""

    CSS = """
    #head { height: 3; padding: 0 1; background: $panel; }
    #find { display: none; height: 3; }
    #find.shown { display: block; }
    #domains { height: 2fr; }
    #below { height: 1fr; }
    #locks, #events { width: 1fr; padding: 0 1; border-top: solid $primary; overflow-y: auto; }
    .narrow #events { display: none; }
    """
    BINDINGS: ClassVar[list[Any]] = [
        ("q", "quit", "Quit"),
        ("s", "sort", "Sort"),
        ("r", "reverse", "Reverse"),
        ("slash", "find", "Filter"),
        ("a", "active", "Active only"),
        ("space", "pause", "Pause"),
    ]
    ENABLE_COMMAND_PALETTE = False
    AUTO_FOCUS = "#domains"

    def __init__(self, looker: Looker, interval: float) -> None:
        super().__init__()
        self._looker, self._interval = looker, interval
        self._picture: Picture | None = None
        self._sort = 0
        self._reverse = False
        self._active_only = False
        self._words = ""
        self._paused = False
        self._looking = False

    def compose(self) -> ComposeResult:
        yield Static(id="head")
        yield Input(placeholder="part of a name, a state or a job", id="find")
        yield DataTable(id="domains", cursor_type="row", zebra_stripes=True)
        with Vertical(id="below"), Horizontal():
            yield Static(id="locks")
            yield Static(id="events")
        yield Footer()

    def on_mount(self) -> None:
        table: DataTable[Text] = self.query_one(DataTable)
        for column in COLUMNS:
            table.add_column(column.title, key=column.title)
        self.set_interval(self._interval, self._look_again)
        self.look()

    def on_resize(self) -> None:
        self.set_class(self.size.width < _NARROW, "narrow")
        self._show()

    # --- looking ---

    def _look_again(self) -> None:
        if not self._paused:
            self.look()

    def look(self) -> None:
        """Begin one look, unless one is going on; the screen shows it when it is there."""
        if not self._looking:
            self._looking = True
            self._look()

    @work(thread=True)
    def _look(self) -> None:
        try:
            picture = self._looker.look()
        except ShmDomainsError as error:
            self.call_from_thread(self.exit, str(error))
            return
        self.call_from_thread(self._take, picture)

    def _take(self, picture: Picture) -> None:
        self._looking = False
        self._picture = picture
        self._show()

    def _show(self) -> None:
        picture = self._picture
        if picture is None:
            return
        self.query_one("#head", Static).update(Text("\n".join(self._head(picture))))
        self.query_one("#locks", Static).update(_block("locks", lock_lines(picture)))
        self.query_one("#events", Static).update(_block("events", event_lines(picture)))
        table: DataTable[Text] = self.query_one(DataTable)
        row, scroll = table.cursor_row, table.scroll_y
        table.clear()
        rows = chosen(picture, SORTS[self._sort], self._reverse, self._words, self._active_only)
        for one in rows:
            table.add_row(*(Text(cell) for cell in cells(one)), key=str(one.uuid))
        if rows:
            table.move_cursor(row=min(row, len(rows) - 1), animate=False)
        table.scroll_to(y=scroll, animate=False)

    def _head(self, picture: Picture) -> Iterator[str]:
        yield from head(picture)
        words = [f"by {SORTS[self._sort]}{' reversed' if self._reverse else ''}"]
        words += [f"with '{self._words}'"] if self._words else []
        words += ["active"] if self._active_only else []
        words += ["PAUSED"] if self._paused else []
        yield ", ".join(words)

    # --- keys ---

    def action_sort(self) -> None:
        """By the next column."""
        self._sort = (self._sort + 1) % len(SORTS)
        self._show()

    def action_reverse(self) -> None:
        """The other way round."""
        self._reverse = not self._reverse
        self._show()

    def action_active(self) -> None:
        """Active domains, or all."""
        self._active_only = not self._active_only
        self._show()

    def action_pause(self) -> None:
        """Look no more, or again."""
        self._paused = not self._paused
        self._show()

    def action_find(self) -> None:
        """Ask for a word."""
        find = self.query_one("#find", Input)
        find.add_class("shown")
        find.focus()

    def on_input_changed(self, event: Input.Changed) -> None:
        self._words = event.value
        self._show()

    def on_input_submitted(self) -> None:
        self.query_one("#find", Input).remove_class("shown")
        self.query_one(DataTable).focus()


def _block(title: str, lines: list[str]) -> Text:
    return Text("\n".join([title.upper(), *map(one_line, lines)]), no_wrap=True)


def run(looker: Looker, interval: float, made: Callable[..., Top] = Top) -> str | None:
    """Show it until the user quits; what ended it otherwise."""
    return made(looker, interval).run()
