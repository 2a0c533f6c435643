"""`replica-store nbd` with the programs people use: nbdinfo, nbdcopy, qemu-img, with and without TLS."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from replica_store.cli.main import run
from tests.fakes.filled_vault import fill_vault
from tests.fakes.memory_history import MemoryHistory, random_history

ROOT_BYTES = 2000 * 4096 + 1536
LARGE_BYTES = 1 << 36
TOOL_S_MAX = 60


@pytest.fixture
def history(rng: random.Random) -> MemoryHistory:
    return random_history(rng.randrange(1 << 30), records=300, disks={"root": ROOT_BYTES, "large": 8 << 20})


@pytest.fixture
def vault(history: MemoryHistory, scratch: Path) -> Path:
    fill_vault(scratch / "vault", history)
    return scratch / "vault"


@contextmanager
def exporting(vault: Path, *arguments: str | Path, complaint: str = "") -> Iterator[str]:
    """`replica-store nbd web1 …` on a free port; where it listens. It must end well on SIGTERM, and complain of nothing
    or of what is expected."""
    command = [
        sys.executable,
        "-m",
        "replica_store.cli.main",
        "--vault",
        vault,
        "nbd",
        "web1",
        "--port",
        "0",
        *arguments,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    try:
        said = process.stdout.readline()
        assert said.startswith("ready "), f"{said}{process.stderr.read()}"
        yield said.split()[1]
        process.send_signal(signal.SIGTERM)
        _, complaints = process.communicate(timeout=20)
        assert process.returncode == 0 and bool(complaints) == bool(complaint) and complaint in complaints, complaints
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def tool(*words: str | Path) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=TOOL_S_MAX, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    return done.stdout


def test_i9_nbdcopy_and_qemu_img_get_what_export_writes(vault: Path, history: MemoryHistory, scratch: Path) -> None:
    for disk in ("root", "large"):
        assert (
            run(["--vault", str(vault), "export", "web1", disk, "--point", "latest", "--output", f"{scratch}/{disk}"])
            == 0
        )
    with exporting(vault, "--point", "latest") as address:
        listed = json.loads(tool("nbdinfo", "--json", "--list", f"nbd://{address}"))["exports"]
        sizes = {each["export-name"]: (each["export-size"], each["is_read_only"]) for each in listed}
        assert sizes == {"root": (ROOT_BYTES, True), "large": (8 << 20, True)}
        for disk in sizes:
            uri = f"nbd://{address}/{disk}"
            assert (scratch / disk).stat().st_size == sizes[disk][0]
            tool("nbdcopy", "--connections=4", uri, scratch / "copy")
            assert (scratch / "copy").read_bytes() == (scratch / disk).read_bytes()
            (scratch / "copy").unlink()
            tool("qemu-img", "compare", "-f", "raw", "-F", "raw", uri, scratch / disk)
            tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri, scratch / "copy.qcow2")
            tool("qemu-img", "compare", "-F", "raw", scratch / "copy.qcow2", scratch / disk)
            mapped = json.loads(tool("nbdinfo", "--json", "--map", uri))
            assert sum(part["length"] for part in mapped) == sizes[disk][0]
            assert {part["type"] for part in mapped} == {0, 3}
    assert (scratch / "root").read_bytes() == history.state_at(history.lsn)[0]


def test_an_older_point_and_one_disk_alone(vault: Path, history: MemoryHistory, scratch: Path) -> None:
    with exporting(vault, "--point", "lsn:150", "--disk", "root") as address:
        tool("nbdcopy", f"nbd://{address}", scratch / "copy")
    assert (scratch / "copy").read_bytes() == history.state_at(150)[0]


def test_disks_of_a_recovered_machine_are_written(vault: Path, scratch: Path, rng: random.Random) -> None:
    mount, content = scratch / "mnt", rng.randbytes(3 << 20)
    mount.mkdir()
    (scratch / "source").write_bytes(content)
    for name in ("root", "large"):
        (mount / f"{name}.img").write_bytes(b"")
    os.truncate(mount / "root.img", len(content))
    os.truncate(mount / "large.img", LARGE_BYTES)
    with exporting(vault, "--mount", mount) as address:
        tool("nbdcopy", "--flush", scratch / "source", f"nbd://{address}/root")
        assert (mount / "root.img").read_bytes() == content
        tool("qemu-io", "-f", "raw", f"nbd://{address}/root", "-c", "write -z 4096 8192", "-c", "discard 65536 4096")
        (part,) = json.loads(tool("nbdinfo", "--json", "--map", f"nbd://{address}/large"))
        assert part["type"] == 3 and part["length"] == LARGE_BYTES
    zeroed = bytearray(content)
    zeroed[4096:12288] = bytes(8192)
    zeroed[65536:69632] = bytes(4096)
    assert (mount / "root.img").read_bytes() == zeroed
    with exporting(vault, "--mount", mount, "--read-only", "--disk", "root") as address:
        refused = subprocess.run(
            ["qemu-io", "-f", "raw", f"nbd://{address}/root", "-c", "write 0 512"], capture_output=True
        )
        assert refused.returncode != 0
    assert (mount / "root.img").read_bytes() == zeroed


def test_tls_with_credentials_as_qemu_and_libnbd_want_them(vault: Path, history: MemoryHistory, scratch: Path) -> None:
    keys, content = scratch / "keys", history.state_at(history.lsn)[0]
    with exporting(vault, "--point", "latest", "--tls", "--credentials", keys) as address:
        port = address.rpartition(":")[2]
        assert {path.name for path in keys.iterdir()} == {"ca-cert.pem", "client-cert.pem", "client-key.pem"}
        assert keys.stat().st_mode & 0o777 == 0o700
        tool("nbdcopy", f"nbds://localhost:{port}/root?tls-certificates={keys}", scratch / "copy")
        assert (scratch / "copy").read_bytes() == content
        credentials = f"tls-creds-x509,id=tls,dir={keys},endpoint=client"
        source = f"driver=nbd,host=localhost,port={port},export=root,tls-creds=tls"
        tool("qemu-img", "convert", "--object", credentials, "--image-opts", source, "-O", "raw", scratch / "raw")
        assert (scratch / "raw").read_bytes()[: len(content)] == content


def test_who_has_no_certificate_gets_nothing(vault: Path, scratch: Path) -> None:
    keys = scratch / "keys"
    with exporting(
        vault, "--point", "latest", "--tls", "--credentials", keys, complaint="peer did not return a certificate"
    ) as address:
        port = address.rpartition(":")[2]
        for name in ("client-cert.pem", "client-key.pem"):
            (keys / name).unlink()
        for uri in (f"nbd://localhost:{port}/root", f"nbds://localhost:{port}/root?tls-certificates={keys}"):
            refused = subprocess.run(["nbdinfo", uri], capture_output=True, timeout=TOOL_S_MAX)
            assert refused.returncode != 0 and b"export-size" not in refused.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 2, "either --point"),
        (("--point", "latest", "--mount", "/tmp"), 2, "either --point"),
        (("--point", "latest", "--read-only"), 2, "--read-only"),
        (("--point", "latest", "--credentials", "keys"), 2, "--tls"),
        (("--point", "latest", "--host", "0.0.0.0"), 2, "--tls"),
        (("--point", "lsn:9999"), 3, "no record 9999"),
        (("--point", "no such point"), 2, "not a selector"),
        (("--point", "latest", "--disk", "other"), 3, "no disk 'other'"),
        (("--mount", "nowhere"), 3, "no directory"),
        (("--mount", "."), 3, "DISK.img"),
    ],
)
def test_bad_input_is_one_line(
    vault: Path,
    scratch: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    code: int,
    words: str,
) -> None:
    (scratch / "empty").mkdir()
    monkeypatch.chdir(scratch / "empty")
    assert run(["--vault", str(vault), "nbd", "web1", *arguments]) == code
    error = capsys.readouterr().err
    assert error.startswith("asrfs: error: ") and error.count("\n") == 1 and words in error


def test_a_port_in_use_is_said(vault: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with exporting(vault, "--point", "latest") as address:
        port = address.rpartition(":")[2]
        assert run(["--vault", str(vault), "nbd", "web1", "--point", "latest", "--port", port]) == 1
    assert "cannot be listened on" in capsys.readouterr().err
