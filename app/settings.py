"""The settings, where each value comes from, and what it may be.

A flag of `python -m app` beats its environment variable, which beats the default. Flag and variable follow from the
field's name: `max_body_bytes` is `--max-body-bytes` and CIFAR_MAX_BODY_BYTES. Nothing here reads the real environment:
it is an argument.
"""

import argparse
import dataclasses
import difflib
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_type_hints

from app.errors import SettingsError
from app.machine import available_cpus, available_memory

PREFIX = "CIFAR_"
PROJECT = Path(__file__).resolve().parent.parent
MIB = 1024 * 1024
DEVICES = ("cuda", "mps", "cpu")
DEVICE = re.compile(r"cuda(:(0|[1-9][0-9]*))?|mps|cpu")
ENGINES = ("auto", "torch", "openvino")
KUBERNETES = re.compile(r"CIFAR_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_[A-Z]+(_(PROTO|PORT|ADDR))?)")
"""What Kubernetes sets in every container of a namespace with a Service named cifar or cifar-*; also CIFAR_PORT as an
address: https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables."""
MAX_PIXELS = 50_000_000
"""Limit for a picture: enough for the cameras of today's phones."""
BYTES_OF_A_PROCESS = 1024 * MIB
"""Memory allowed for each process when choosing how many: 0.75 GB for the first, 0.1 for each other, and in each what
large pictures take."""
SHARES_ADDRESS = sys.platform == "linux"
"""Whether the system deals connections out among processes that listen on one address."""


def whole(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise ValueError(f"a whole number from {least:,} to {most:,}")
        return value

    return parse


def process_count(text: str) -> int:
    if not SHARES_ADDRESS and text.strip() != "1":
        raise ValueError("1 on this system; several processes need Linux")
    return whole(1, 64)(text)


def seconds(least: float, most: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:  # false for nan, too
            raise ValueError(f"a number of seconds from {least:g} to {most:g}")
        return value

    return parse


def switch(value: str) -> bool:
    if value not in ("on", "off"):
        raise ValueError("on or off")
    return value == "on"


def host_name(value: str) -> str:
    if not value.strip():
        raise ValueError("a host name or an address")
    return value.strip()


def secret(value: str) -> str:
    if len(value) < 16 or not (value.isascii() and value.isprintable()) or " " in value:
        raise ValueError("at least 16 letters, digits or signs, without spaces")
    return value


def location(value: str) -> Path:
    if not value.strip():
        raise ValueError("a path")
    try:
        return Path(value).expanduser()
    except RuntimeError:  # ~nobody-of-that-name
        raise ValueError("a path; there is no user with that home") from None


def device_name(value: str) -> str:
    if not DEVICE.fullmatch(value):
        raise ValueError("cuda, cuda:0, cuda:1, ..., mps or cpu")
    return value


def engine_name(value: str) -> str:
    if value not in ENGINES:
        raise ValueError(f"{', '.join(ENGINES[:-1])} or {ENGINES[-1]}")
    return value


def usual_processes(threads: int | None = None) -> int:
    """The default number: each process keeps two cores busy, and gives both to a lone client with many pictures."""
    if not SHARES_ADDRESS:
        return 1
    return int(max(1, min((threads or available_cpus()) // 2, 4, available_memory() // BYTES_OF_A_PROCESS)))


@dataclass(frozen=True)
class Setting:
    """How a field is parsed and explained."""

    parse: Callable[[str], Any]
    help: str


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that can be set. The texts are what `python -m app --help` prints."""

    weights: Annotated[Path, Setting(location, "the weights file to serve")] = PROJECT / "weights" / "cifar_net.pth"
    data: Annotated[
        Path | None,
        Setting(location, "a data set on whose test part to evaluate the weights after start-up (default: none)"),
    ] = None
    host: Annotated[str, Setting(host_name, "the address to listen on; 0.0.0.0 for all")] = "127.0.0.1"
    port: Annotated[int, Setting(whole(0, 65_535), "the port; 0 takes a free one and prints it")] = 8000
    device: Annotated[
        str | None, Setting(device_name, "cuda, cuda:1, mps or cpu (default: the first that works here)")
    ] = None
    engine: Annotated[
        str,
        Setting(engine_name, "torch, openvino (if installed; CPU only), or auto: whichever is faster at start-up"),
    ] = "auto"
    threads: Annotated[
        int, Setting(whole(1, 1024), "threads on a CPU, divided among the processes (default: the cores it may use)")
    ] = dataclasses.field(default_factory=available_cpus)
    processes: Annotated[
        int,
        Setting(
            process_count,
            "worker processes (default: one for every two threads, at most one for each GB of memory, up to 4)",
        ),
    ] = dataclasses.field(default_factory=usual_processes)
    max_body_bytes: Annotated[int, Setting(whole(1, 1024 * MIB), "a larger request body is refused")] = 8 * MIB
    max_pixels: Annotated[
        int,
        Setting(whole(1024, 1_000_000_000), "a picture with more is refused; decoding takes up to 21 bytes a pixel"),
    ] = MAX_PIXELS
    max_pictures: Annotated[
        int, Setting(whole(1, 1_000_000), "pictures in one request; a request with more is refused")
    ] = 1024
    max_batch: Annotated[
        int,
        Setting(
            whole(1, 1024),
            "most pictures per forward pass; those waiting run together, 32 unless there are many",
        ),
    ] = 128
    # Twice a request's limit, so that single pictures are still admitted beside the largest request.
    max_waiting: Annotated[
        int, Setting(whole(1, 1_000_000), "pictures that a process has admitted and not yet answered; more get 429")
    ] = 2048
    max_waiting_bytes: Annotated[
        int, Setting(whole(1, 64 * 1024 * MIB), "the same limit for the bytes of their bodies")
    ] = 64 * MIB
    deadline_seconds: Annotated[
        float,
        Setting(seconds(0.001, 3600), "a request that would wait longer gets 429; one that has waited longer gets 504"),
    ] = 5.0
    drain_seconds: Annotated[
        float, Setting(seconds(0, 3600), "after SIGTERM: how long to accept requests while /readyz answers 503")
    ] = 5.0
    # On, because a service that cannot say what it did costs more than 4 % of its requests per second.
    access_log: Annotated[bool, Setting(switch, "on or off: a line on stderr for each request")] = True
    admin_key: Annotated[
        str | None,
        Setting(
            secret,
            "for POST /admin/reload, at least 16 characters; other users can see flags, so set CIFAR_ADMIN_KEY",
        ),
    ] = dataclasses.field(default=None, repr=False)


KNOWN: dict[str, Setting] = {
    name: hint.__metadata__[0] for name, hint in get_type_hints(Settings, include_extras=True).items()
}


def parse_settings(arguments: Sequence[str], environment: Mapping[str, str]) -> Settings:
    """Settings from the command line and the environment, where an empty variable counts as none.

    Raises:
        SettingsError: a value is invalid, or a flag or a CIFAR_ variable does not exist.
        SystemExit: `--help` was asked for and printed.
    """
    flags = _read_flags(arguments)
    variables = {f"{PREFIX}{name.upper()}": name for name in KNOWN}
    parsed = {}
    for variable, value in environment.items():
        if not variable.startswith(PREFIX) or _is_of_kubernetes(variable, value):
            continue
        if variable not in variables:
            raise SettingsError(f"There is no setting {variable}. {_nearest(variable, [*variables], PREFIX)}")
        if value:
            parsed[variables[variable]] = _parse(KNOWN[variables[variable]], variable, value)
    parsed |= {name: _parse(KNOWN[name], _flag(name), value) for name, value in flags.items() if value is not None}
    if "threads" in parsed:
        parsed.setdefault("processes", usual_processes(parsed["threads"]))
    return Settings(**parsed)


def _is_of_kubernetes(variable: str, value: str) -> bool:
    is_address = variable.endswith("_PORT") and "://" in value
    return is_address or KUBERNETES.fullmatch(variable) is not None


def _parse(setting: Setting, source: str, value: str) -> Any:
    try:
        return setting.parse(value)
    except ValueError as error:
        given = "has a value that is not shown here" if setting.parse is secret else f"is {value!r}"
        raise SettingsError(f"{source} {given}; it must be {error}.") from None


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _nearest(given: str, known: list[str], prefix: str) -> str:
    """A guess at what was meant, ignoring the prefix that all names share."""
    names = {name.removeprefix(prefix).lower(): name for name in known}
    close = difflib.get_close_matches(given.removeprefix(prefix).lower(), names, n=1)
    return f"Did you mean {names[close[0]]}?" if close else f"There are {', '.join(known)}."


class _Parser(argparse.ArgumentParser):
    """Raises an error with our own sentence instead of printing the usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"The command line was not understood: {message}. See `python -m app --help`.")


def _read_flags(arguments: Sequence[str]) -> dict[str, str | None]:
    parser = _Parser(
        prog="python -m app",
        description="Serve the classifier over HTTP.",
        epilog=f"Each flag is also an environment variable: --max-batch 8 is {PREFIX}MAX_BATCH=8. The flag wins.",
        allow_abbrev=False,
    )
    for field in dataclasses.fields(Settings):
        default = "on" if field.default is True else field.default
        shown = "" if default in (None, dataclasses.MISSING) else f" (default: {default})"
        parser.add_argument(_flag(field.name), metavar="VALUE", help=KNOWN[field.name].help + shown)
    flags, unknown = parser.parse_known_args(arguments)
    if unknown:
        given = unknown[0].partition("=")[0]
        if not given.startswith("-"):
            raise SettingsError(f"There is no argument {given!r}; there are only flags. See `python -m app --help`.")
        raise SettingsError(f"There is no flag {given}. {_nearest(given, [_flag(name) for name in KNOWN], '--')}")
    return vars(flags)
