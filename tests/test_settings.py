"""Where values come from, and the sentence for each bad one."""

import math
import re
from pathlib import Path

import pytest
from running import ROOT

from app.errors import SettingsError
from app.settings import KNOWN, Settings, parse_settings

GIVEN = {
    "weights": ("/weights/other.pth", Path("/weights/other.pth")),
    "data": ("/pictures", Path("/pictures")),
    "host": ("0.0.0.0", "0.0.0.0"),
    "port": ("0", 0),
    "device": ("cuda:1", "cuda:1"),
    "engine": ("openvino", "openvino"),
    "threads": ("1000", 1000),
    "processes": ("64", 64),
    "max_body_bytes": ("1", 1),
    "max_pixels": ("1024", 1024),
    "max_pictures": ("2", 2),
    "max_batch": ("3", 3),
    "max_waiting": ("4", 4),
    "max_waiting_bytes": ("5", 5),
    "deadline_seconds": ("0.001", 0.001),
    "drain_seconds": ("0", 0.0),
    "access_log": ("off", False),
    "admin_key": ("sixteen-letters!", "sixteen-letters!"),
}
"""A value for each field that is not its default."""


@pytest.mark.parametrize("name", KNOWN)
def test_every_field_can_be_set_and_has_a_help_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.settings.SHARES_ADDRESS", True)
    text, value = GIVEN[name]
    assert getattr(parse_settings([], {}), name) != value
    assert getattr(parse_settings([f"--{name.replace('_', '-')}", text], {}), name) == value
    assert getattr(parse_settings([], {f"CIFAR_{name.upper()}": text}), name) == value
    assert KNOWN[name].help


def test_defaults_when_nothing_is_given() -> None:
    assert parse_settings([], {}) == Settings()
    assert Settings().weights.parts[-2:] == ("weights", "cifar_net.pth")
    assert Settings().host == "127.0.0.1"


def test_the_readme_names_the_defaults() -> None:
    rows = re.findall(r"^\| (`CIFAR_[^|]*`) \| ([^|]*) \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    stated = {name: default for names, default in rows for name in re.findall(r"CIFAR_(\w+)", names)}
    settings = Settings()
    assert stated["MAX_BODY_BYTES"] == f"{settings.max_body_bytes // 2**20} MiB"
    assert stated["MAX_PIXELS"] == f"{settings.max_pixels // 10**6} million"
    assert settings.max_pictures == 1024
    assert stated["DEADLINE_SECONDS"] == f"{settings.deadline_seconds:g}"
    assert stated["DRAIN_SECONDS"] == f"{settings.drain_seconds:g}"
    assert stated["ENGINE"] == f"`{settings.engine}`"
    assert (stated["HOST"], stated["PORT"]) == (f"`{settings.host}`, `{settings.port}`",) * 2
    assert stated["WEIGHTS"] == f"`{settings.weights.relative_to(ROOT)}`"
    assert (stated["DATA"], settings.data) == ("none", None)


def test_the_environment_beats_the_default_and_a_flag_beats_the_environment() -> None:
    environment = {"CIFAR_PORT": "9000", "CIFAR_MAX_BATCH": "3", "HOME": "/"}
    settings = parse_settings(["--port", "9001", "--data=/pictures"], environment)
    assert (settings.port, settings.max_batch, settings.data) == (9001, 3, Path("/pictures"))


def test_an_empty_variable_counts_as_unset() -> None:
    """As `docker run -e CIFAR_DATA=` and compose's ${CIFAR_DATA:-} leave it."""
    assert parse_settings([], {f"CIFAR_{name.upper()}": "" for name in KNOWN}) == parse_settings([], {})


@pytest.mark.parametrize(
    ("arguments", "environment", "sentence"),
    [
        (["--port", "x"], {}, "--port is 'x'; it must be a whole number from 0 to 65,535."),
        ([], {"CIFAR_PORT": "65536"}, "CIFAR_PORT is '65536'; it must be a whole number from 0 to 65,535."),
        ([], {"CIFAR_Port": "1"}, "There is no setting CIFAR_Port. Did you mean CIFAR_PORT?"),
        (["--port", ""], {}, "--port is ''; it must be a whole number from 0 to 65,535."),
        ([], {"CIFAR_DEADLINE_SECONDS": "nan"}, "it must be a number of seconds from 0.001 to 3600."),
        ([], {"CIFAR_DRAIN_SECONDS": "-1"}, "CIFAR_DRAIN_SECONDS is '-1'; it must be a number of seconds from 0"),
        ([], {"CIFAR_DEVICE": "gpu"}, "CIFAR_DEVICE is 'gpu'; it must be cuda, cuda:0, cuda:1, ..., mps or cpu."),
        ([], {"CIFAR_ENGINE": "onnx"}, "CIFAR_ENGINE is 'onnx'; it must be auto, torch or openvino."),
        ([], {"CIFAR_DEVICE": "cpu:1"}, "CIFAR_DEVICE is 'cpu:1'"),
        ([], {"CIFAR_DEVICE": "cuda:"}, "CIFAR_DEVICE is 'cuda:'"),
        ([], {"CIFAR_DEVICE": "cuda:²"}, "CIFAR_DEVICE is 'cuda:²'"),
        ([], {"CIFAR_WEIGHTS": " "}, "CIFAR_WEIGHTS is ' '; it must be a path."),
        ([], {"CIFAR_WEIGHTS": "~nobody-of-that-name/w"}, "it must be a path; there is no user with that home."),
        (
            [],
            {"CIFAR_ADMIN_KEY": "hunter2"},
            "has a value that is not shown here; it must be at least 16",
        ),
        ([], {"CIFAR_HOST": " "}, "CIFAR_HOST is ' '; it must be a host name or an address."),
        (["--port", "1"], {"CIFAR_PORT": "x"}, "CIFAR_PORT is 'x'; it must be a whole number"),
        ([], {"CIFAR_PROT": "1"}, "There is no setting CIFAR_PROT. Did you mean CIFAR_PORT?"),
        ([], {"CIFAR_TIMEOUT": "1"}, "There is no setting CIFAR_TIMEOUT. There are CIFAR_WEIGHTS, CIFAR_DATA, "),
        ([], {"CIFAR_QQQQQQQQ": "1"}, "There is no setting CIFAR_QQQQQQQQ. There are CIFAR_WEIGHTS, CIFAR_DATA"),
        (["--prot=1"], {}, "There is no flag --prot. Did you mean --port?"),
        (["--por", "1"], {}, "There is no flag --por. Did you mean --port?"),
        (["extra"], {}, "There is no argument 'extra'; there are only flags."),
        (["--port"], {}, "The command line was not understood: argument --port: expected one argument."),
    ],
)
def test_a_bad_value_is_refused_by_a_sentence(arguments: list[str], environment: dict[str, str], sentence: str) -> None:
    with pytest.raises(SettingsError) as refusal:
        parse_settings(arguments, environment)
    assert sentence in str(refusal.value)


def test_kubernetes_service_variables_are_not_taken_as_settings() -> None:
    said = {
        "CIFAR_PORT": "tcp://10.0.0.1:8000",
        "CIFAR_PORT_8000_TCP": "tcp://10.0.0.1:8000",
        "CIFAR_PORT_8000_TCP_PROTO": "tcp",
        "CIFAR_PORT_8000_TCP_PORT": "8000",
        "CIFAR_PORT_8000_TCP_ADDR": "10.0.0.1",
        "CIFAR_SERVICE_HOST": "10.0.0.1",
        "CIFAR_SERVICE_PORT": "8000",
        "CIFAR_SERVICE_PORT_HTTP": "8000",
    }
    of_another = {name.replace("CIFAR_", "CIFAR_BLUE_GREEN_"): value for name, value in said.items()}
    assert parse_settings([], said | of_another | {"CIFAR_MAX_BATCH": "8"}) == Settings(max_batch=8)


@pytest.mark.parametrize("device", ["cpu", "mps", "cuda", "cuda:3"])
def test_devices_by_name(device: str) -> None:
    assert parse_settings([], {"CIFAR_DEVICE": device}).device == device


@pytest.mark.parametrize(("memory", "processes"), [(2e8, 1), (1.9 * 2**30, 1), (3e9, 2), (1e11, 4)])
def test_available_memory_limits_the_default_number_of_processes(
    memory: float, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel would kill them one after the other."""
    monkeypatch.setattr("app.settings.available_cpus", lambda: 64)
    monkeypatch.setattr("app.settings.available_memory", lambda: memory)
    monkeypatch.setattr("app.settings.SHARES_ADDRESS", True)
    assert Settings().processes == processes
    assert Settings(processes=3).processes == 3


@pytest.mark.parametrize(("cores", "processes"), [(1, 1), (2, 1), (5, 2), (64, 4)])
def test_default_is_one_process_per_two_cores_up_to_four_where_addresses_can_be_shared(
    cores: int, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.settings.available_cpus", lambda: cores)
    monkeypatch.setattr("app.settings.available_memory", lambda: math.inf)
    monkeypatch.setattr("app.settings.SHARES_ADDRESS", True)
    assert Settings().processes == processes
    assert parse_settings([], {"CIFAR_PROCESSES": "16"}).processes == 16
    assert parse_settings([], {"CIFAR_THREADS": "6"}).processes == 3
    assert parse_settings([], {"CIFAR_THREADS": "1", "CIFAR_PROCESSES": "2"}).processes == 2
    monkeypatch.setattr("app.settings.SHARES_ADDRESS", False)
    assert Settings().processes == 1
    assert parse_settings([], {"CIFAR_PROCESSES": "1"}).processes == 1
    with pytest.raises(SettingsError, match="it must be 1 on this system; several processes need Linux"):
        parse_settings([], {"CIFAR_PROCESSES": "2"})
