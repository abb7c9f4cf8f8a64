"""Writes a new settings file, or changes keys of one and nothing else: comments, order, permissions stay."""

import codecs
import json
import os
import re
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from rbc_edge import config
from rbc_edge.errors import UnavailableError, UsageError, unavailable
from rbc_edge.store.outdir import replacing
from rbc_edge.text import path_text

_TABLE: Final = re.compile(r"^[ \t]*\[", re.MULTILINE)


def assignments(values: Mapping[str, int | str]) -> str:
    """Returns keys and values as they stand in the file, in one line."""
    return ", ".join(f"{key} = {json.dumps(value)}" for key, value in values.items())


def write_new(file: Path, text: str, *, force: bool) -> None:
    """Writes a settings file, completely or not at all. Makes its folder if it is missing.

    Raises `UsageError` where the file is there already and `force` is not given.
    """
    if not force and os.path.lexists(file):
        raise UsageError(f"{file}: there are settings already", "edit them, or give --force to replace them")
    failed = unavailable(f"{file}: cannot write", "check permissions, or name another --file")
    with failed, replacing(file) as stream:
        stream.write(text.encode("utf-8"))


def check_writable(file: Path) -> None:
    """Raises what `write_settings` would raise, before the values for it are measured."""
    target = Path(os.path.realpath(file))
    if target.is_file():
        config.load({}, file=target, env={})
    folder = next(p for p in target.parents if p.exists())
    if not os.access(folder, os.W_OK) or target.is_dir():
        raise UnavailableError(f"{path_text(file)}: cannot write it", "check the permissions of its folder")


def write_settings(file: Path, values: Mapping[str, int | str]) -> None:
    """Sets keys in a settings file. The new text is checked before it replaces the file, or makes a new one.

    Raises `UsageError` where the file has an error or the keys cannot be changed safely, and
    `UnavailableError` where it cannot be written.
    """
    target = Path(os.path.realpath(file))  # a link stays a link
    try:
        old = target.read_bytes() if target.exists() else b""
    except OSError as error:
        text = f"{path_text(file)}: cannot read it: {error.strerror}"
        raise UsageError(text, "check its permissions") from error
    if old:
        config.load({}, file=target, env={})  # a file with an error is not changed
    text = changed = old.decode("utf-8-sig")
    for key, value in values.items():
        changed = _with(changed, key, json.dumps(value))
    try:
        is_right = tomllib.loads(changed) == tomllib.loads(text) | dict(values)
    except tomllib.TOMLDecodeError:  # the key is there twice: the old one has a form that we do not see
        is_right = False
    if not is_right:
        name = path_text(file)
        text = f"{name}: {', '.join(values)} cannot be changed in it without changing something else"
        raise UsageError(text, f"write it yourself: {assignments(values)}")
    failed = unavailable(f"{path_text(file)}: cannot write it", "check the permissions of its folder")
    with failed, replacing(target) as stream:
        if target.exists():
            status = target.stat()
            os.fchmod(stream.fileno(), status.st_mode & 0o7777)
            with suppress(PermissionError):  # only root may change the owner
                os.fchown(stream.fileno(), status.st_uid, status.st_gid)
        bom = codecs.BOM_UTF8 if old.startswith(codecs.BOM_UTF8) else b""
        stream.write(bom + changed.encode("utf-8"))
        stream.flush()
        os.fsync(stream.fileno())
        config.load({}, file=Path(stream.name), env={})


def _with(text: str, key: str, value: str) -> str:
    """Returns TOML text with a top-level key set: in its own line, below its comment, or at the end."""
    line = f"{key} = {value}"
    newline = "\r\n" if "\r\n" in text else "\n"
    end = _TABLE.search(text)
    top, rest = (text[: end.start()], text[end.start() :]) if end else (text, "")
    for written in (
        rf"^[ \t]*{key}[ \t]*=[ \t]*[^#\r\n]*?(?=[ \t]*(#[^\r\n]*)?\r?$)",
        rf"^#[ \t]?{key}[ \t]*=[^\r\n]*",
    ):
        found = re.search(written, top, re.MULTILINE)
        if found:
            comment = found[0] + newline if found[0].startswith("#") else ""
            return top[: found.start()] + comment + line + top[found.end() :] + rest
    if top and not top.endswith("\n"):
        top += newline
    return top + line + newline + rest
