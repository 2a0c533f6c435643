"""What a recovered machine is started with: the words of QEMU, and the order of mounts; nothing of a test gets out."""

from __future__ import annotations

import pytest

from asrfs.errors import NotFoundError
from asrfs.model.boot import BootSettings, Filesystem, MountBoot, Network, QemuBoot, check_boot
from replica_store.boot.mount_steps import Step, mount_steps
from replica_store.boot.qemu_command import Drive, Forward, chosen_drives, qemu_command, takes_forward

DISKS = {"root": "/mnt/a,b/root.img", "data": "nbd://127.0.0.1:10809/data"}


def command(
    boot: QemuBoot, *, is_test: bool = False, forward: Forward | None = None, firmware: str | None = None
) -> str:
    words = qemu_command(
        "web1,x",
        boot,
        chosen_drives(boot, DISKS),
        is_test=is_test,
        accelerator="tcg",
        firmware=firmware,
        forward=forward,
    )
    assert words[0] == "qemu-system-x86_64"
    return " ".join(words)


def test_disks_come_in_the_order_that_was_set_and_start_from_the_first() -> None:
    assert chosen_drives(QemuBoot(), DISKS) == [Drive(*each) for each in DISKS.items()]
    said = command(QemuBoot(disks=("data", "root"), memory="512M", cpus=3))
    first, second = said.index("file.export=data"), said.index("file.filename=/mnt/a,,b/root.img")
    assert first < said.index("bootindex=1") < second < said.index("bootindex=2")
    assert "file.server.host=127.0.0.1,file.server.port=10809" in said
    assert "-smp 3 -m 512M" in said and "guest=web1,,x" in said and "accel=tcg" in said
    with pytest.raises(NotFoundError, match="gone"):
        chosen_drives(QemuBoot(disks=("gone",)), DISKS)


def test_a_device_is_opened_as_one() -> None:
    words = qemu_command("m", QemuBoot(), [Drive("root", "/dev/loop3")], is_test=False, accelerator="kvm")
    assert "driver=host_device,file.filename=/dev/loop3" in " ".join(words)


def test_nothing_that_was_not_asked_for_is_there() -> None:
    said = command(QemuBoot())
    assert "-nodefaults" in said and "-nic none" in said and "netdev" not in said and "spawn=deny" in said


def test_networks_of_production_and_of_a_test() -> None:
    boot = QemuBoot(
        networks=(
            Network(bridge="br0", test_bridge="br-test", mac="52:54:00:00:00:01"),
            Network(bridge="br1"),
            Network(),
        )
    )
    live, test = command(boot), command(boot, is_test=True)
    assert "br=br0" in live and "br=br1" in live and "br-test" not in live and "restrict" not in live
    assert "br=br-test" in test and "br=br0" not in test and "br=br1" not in test
    assert test.count("restrict=on") == 2, "what has no network for tests reaches nothing"
    assert "mac=52:54:00:00:00:01" in test and "spawn=allow" in test


def test_a_port_is_forwarded_once_and_only_from_this_machine() -> None:
    boot = QemuBoot(networks=(Network(bridge="br0"), Network(), Network()))
    for is_test in (False, True):
        said = command(boot, is_test=is_test, forward=Forward(4000, 22))
        assert said.count("hostfwd=tcp:127.0.0.1:4000-:22") == 1
    assert takes_forward(boot, is_test=False)
    bridged = QemuBoot(networks=(Network(bridge="br0", test_bridge="br1"),))
    assert not takes_forward(bridged, is_test=True) and "hostfwd" not in command(bridged, forward=Forward(1, 2))
    assert not takes_forward(QemuBoot(), is_test=True)


def test_firmware_is_read_only_and_its_variables_are_the_machines_own() -> None:
    said = command(QemuBoot(firmware="uefi"), firmware="/usr/share/OVMF/OVMF_CODE.fd")
    assert "readonly=on,file=/usr/share/OVMF/OVMF_CODE.fd" in said and "unit=1,format=raw,file=firmware.vars" in said


def test_mounts_in_order_then_commands_then_services_and_in_a_test_no_services() -> None:
    boot = MountBoot(
        filesystems=(
            Filesystem(disk="data", path="/srv/", partition=2, type="ext4", options="noatime"),
            Filesystem(disk="root", path="/srv/root"),
            Filesystem(disk="data", path="/opt", partition=3),
        ),
        start=(("/bin/begin", "now"),),
        services=("nginx",),
    )
    check_boot(BootSettings(kind="mount", mount=boot))
    disks = {"root": "/m/root.img", "data": "/m/data.img"}
    steps = mount_steps(boot, disks, "", is_test=False)
    assert [(step.kind, step.subject) for step in steps] == [
        *(("attach", "data"), ("mount", "/srv"), ("attach", "root"), ("mount", "/srv/root")),
        *(("attach", "data"), ("mount", "/opt")),
        *(("start", "/bin/begin"), ("service", "nginx")),
    ]
    assert steps[1] == Step(
        kind="mount", subject="/srv", source="/m/data.img", partition=2, type="ext4", options="noatime"
    )
    below = mount_steps(boot, disks, "/run/test/", is_test=True)
    assert [step.subject for step in below if step.kind == "mount"] == [
        *("/run/test/srv", "/run/test/srv/root", "/run/test/opt"),
    ]
    assert not any(step.kind == "service" for step in below)
    with pytest.raises(NotFoundError, match="data"):
        mount_steps(boot, {"root": "/m/root.img"}, "", is_test=False)
