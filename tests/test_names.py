"""Names and UUIDs by libvirt's rules, and the numbers of its states."""

from __future__ import annotations

import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmdomains.errors import DefinitionError, InvalidName, ShmDomainsError
from shmdomains.names import MAX_NAME_BYTES, check_name, check_text, parse_uuid
from shmdomains.states import (
    REASONS,
    CrashedReason,
    DomainState,
    PausedReason,
    RunningReason,
    ShutoffReason,
)

PLAIN = "c7a5fdbdedaf9455926ad65c16db1809"
EXPECTED = uuid.UUID(PLAIN)


@pytest.mark.parametrize(
    "name", ["a", " ", " a ", "web 1", "a\tb", "...", ".hidden", "Büro ☕", "x" * 251, "é" * 125]
)
def test_a_name_that_libvirt_and_a_directory_take_is_returned_as_it_is(name: str) -> None:
    assert check_name(name) is name


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "missing name information"),
        ("foo/bar", "name foo/bar cannot contain '/'"),
        ("a\nb", "newline"),
        (".", "cannot be a file name"),
        ("..", "cannot be a file name"),
        ("a\0b", "invalid char"),
        ("a\x1bb", "invalid char"),
        ("a\ud800", "invalid char"),
        ("x" * 252, "252 bytes"),
        ("é" * 126, "252 bytes"),
        (None, "NoneType"),
        (b"web1", "bytes"),
    ],
)
def test_a_bad_name_is_refused_with_the_reason(name: str, words: str) -> None:
    with pytest.raises(InvalidName) as caught:
        check_name(name)
    assert words in str(caught.value)
    assert caught.value.element == "name"
    assert isinstance(caught.value, (DefinitionError, ShmDomainsError, ValueError))


@given(st.text())
def test_every_accepted_name_is_a_file_name(name: str) -> None:
    try:
        check_name(name)
    except InvalidName:
        return
    file = (name + ".xml").encode()
    assert 1 <= len(name.encode()) <= MAX_NAME_BYTES
    assert len(file) <= 255
    assert b"/" not in file and b"\0" not in file and b"\n" not in file


@pytest.mark.parametrize(
    "text",
    [
        PLAIN,
        PLAIN.upper(),
        str(EXPECTED),
        f" \n\t{PLAIN}\v ",
        "-" + PLAIN,
        " ".join(PLAIN[i : i + 2] for i in range(0, 32, 2)),
        PLAIN[:8] + "- -" + PLAIN[8:],
        EXPECTED,
        EXPECTED.bytes,
        bytearray(EXPECTED.bytes),
        memoryview(EXPECTED.bytes),
    ],
)
def test_every_spelling_of_a_uuid_that_libvirt_takes(text: object) -> None:
    assert parse_uuid(text) == EXPECTED  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        PLAIN[:-1],
        PLAIN + "0",
        PLAIN + "-",
        PLAIN[:9] + "-" + PLAIN[9:],
        PLAIN[:8] + "\n" + PLAIN[8:],
        "{" + PLAIN + "}",
        "urn:uuid:" + PLAIN,
        "\N{NO-BREAK SPACE}" + PLAIN,
        PLAIN[:-1] + "x",
        PLAIN[:-1] + "\N{FULLWIDTH DIGIT ONE}",
        b"",
        EXPECTED.bytes[:-1],
        EXPECTED.bytes + b"0",
        None,
        7,
    ],
)
def test_a_malformed_uuid_is_refused(text: object) -> None:
    with pytest.raises(DefinitionError, match="malformed uuid"):
        parse_uuid(text)  # type: ignore[arg-type]


BLANK = st.text(" \t\n\r\v\f", max_size=3)
GAP = st.text("- ", max_size=3)


@given(st.uuids(), st.lists(GAP, min_size=16, max_size=16), BLANK, BLANK, st.randoms())
def test_gaps_and_case_do_not_change_a_uuid(
    value: uuid.UUID, gaps: list[str], before: str, after: str, random: object
) -> None:
    pairs = [value.hex[i : i + 2] for i in range(0, 32, 2)]
    mixed = [p.upper() if random.random() < 0.5 else p for p in pairs]  # type: ignore[attr-defined]
    text = before + "".join(g + p for g, p in zip(gaps, mixed, strict=True)) + after
    assert parse_uuid(text) == value


def test_text_that_xml_can_not_carry_is_named() -> None:
    assert check_text("title", "a\tb\r\n\U0001f600") == "a\tb\r\n\U0001f600"
    for bad in ("\0", "\x0b", "\ud83d", "\ufffe"):
        with pytest.raises(DefinitionError, match="title contains"):
            check_text("title", "a" + bad)


def test_states_and_reasons_have_the_numbers_of_libvirt() -> None:
    assert [state.name for state in DomainState] == [
        "NOSTATE",
        "RUNNING",
        "BLOCKED",
        "PAUSED",
        "SHUTDOWN",
        "SHUTOFF",
        "CRASHED",
        "PMSUSPENDED",
    ]
    assert [state.value for state in DomainState] == list(range(8))
    assert len(REASONS) == len(DomainState)
    for reasons in REASONS:
        assert [reason.value for reason in reasons] == list(range(len(reasons)))
        assert reasons(0).name == "UNKNOWN"
    # One from each end, so that a swap shows.
    assert RunningReason.CRASHED == 9 and RunningReason.POSTCOPY_FAILED == 11
    assert PausedReason.IOERROR == 5 and PausedReason.API_ERROR == 14
    assert ShutoffReason.DESTROYED == 2 and ShutoffReason.DAEMON == 8
    assert REASONS[DomainState.CRASHED] is CrashedReason
    assert REASONS[DomainState.SHUTOFF] is ShutoffReason


def test_states_have_the_words_of_virsh_list() -> None:
    assert [state.words for state in DomainState] == [
        "no state",
        "running",
        "idle",
        "paused",
        "in shutdown",
        "shut off",
        "crashed",
        "pmsuspended",
    ]
