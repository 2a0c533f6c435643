"""Texts that people, stores and hosts write: sizes, durations, times, selectors, names, addresses, settings, tokens."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from asrfs.daemon.settings import DEFAULT_TEXTS, OBJECT_BYTES_MAX, OBJECT_BYTES_MIN, parse_overrides
from asrfs.model import names, policy, quantities
from asrfs.model.boot import TIMEOUT_S_MAX, decode_boot, encode_boot, read_boot
from asrfs.model.point_filter import parse_moment
from asrfs.transport import enrolment
from asrfs.transport.stream import parse_address
from replica_store.boot.qemu_command import chosen_drives, qemu_command
from replica_store.points.selector import AtLsn, AtPoint, AtTime, parse_selector
from replica_store.vault.rows import parse_log_name
from tests.proof.fuzzing.mutations import Strike, mutate_bytes, mutate_text
from tests.proof.fuzzing.target import Target, Trial, refused

_SIZES = ("512M", "10G", "4096", "1 TiB", "0", "99999999999999999999E")
_DURATIONS = ("90s", "5m", "4h", "250ms", "0.5d", "1")
_TIMES = ("2026-11-21T10:03:07Z", "2026-11-21 10:03:07.250+01:00", "1969-12-31T23:59:59.999999999-12:00")
_SELECTORS = ("latest", "latest-processed", "lsn:4711", "time:2026-11-21T10:03:07Z", "before-update", "a" * 32)
_BOOT = (
    'kind = "qemu"\n[qemu]\nmemory = "512M"\ncpus = 2\ndisks = ["root", "data"]\n[[qemu.networks]]\nbridge = "br0"\n'
    'mac = "52:54:00:12:34:56"\n[health]\nport = 22\nexpect = "SSH"\ntimeout = "90s"\n'
)
_NAMES = ("web1", "A.b_c-9", "a" * 63, "0")
_ADDRESSES = ("127.0.0.1:443", "[::1]:9443", "store.example", "a:65535", "[fe80::1]")
_LOG_NAME = f"machines/{'0' * 32}/log/{1:08x}-{1:016x}-{9:016x}-deadbeef.obj"
_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


def is_label(name: str) -> bool:
    """What may be a name, said once more without the code under test."""
    return 0 < len(name) <= 63 and set(name) <= _LETTERS and name[0] not in "._-"


def try_quantity(rng: random.Random, strike: Strike) -> None:
    size = refused(lambda: quantities.parse_size(mutate_text(rng, rng.choice(_SIZES), strike)))
    assert size is None or size >= 0
    seconds = refused(lambda: quantities.parse_duration(mutate_text(rng, rng.choice(_DURATIONS), strike)))
    assert seconds is None or (seconds >= 0 and math.isfinite(seconds))
    moment = refused(lambda: quantities.parse_time(mutate_text(rng, rng.choice(_TIMES), strike)))
    if moment is not None:
        assert quantities.parse_time(quantities.format_time(moment)) == moment


def try_selector(rng: random.Random, strike: Strike) -> None:
    selector = refused(lambda: parse_selector(mutate_text(rng, rng.choice(_SELECTORS), strike)))
    if isinstance(selector, AtPoint):
        assert is_label(selector.label)
    elif isinstance(selector, AtLsn):
        assert selector.lsn >= 0
    elif isinstance(selector, AtTime):
        quantities.format_time(selector.time_ns)


def try_name(rng: random.Random, strike: Strike) -> None:
    """I: names are labels and never paths."""
    text = mutate_text(rng, rng.choice(_NAMES), strike)
    accepted = refused(lambda: names.check_name(text, "machine"))
    assert (accepted is not None) == is_label(text), f"{text!r} was {'' if accepted else 'not '}taken for a name"
    id_text = mutate_text(rng, "0123456789abcdef" * 2, strike)
    raw = refused(lambda: names.id_bytes(id_text))
    assert raw is None or raw.hex() == id_text
    name = mutate_text(rng, _LOG_NAME, strike)
    parsed = parse_log_name(name)
    assert parsed is None or (is_label(parsed.machine_id) and is_label(parsed.nonce) and ".." not in name)


def try_address(rng: random.Random, strike: Strike) -> None:
    address = refused(lambda: parse_address(mutate_text(rng, rng.choice(_ADDRESSES), strike), 443))
    assert address is None or (address[0] and 0 < address[1] < 65536)


def try_setting(rng: random.Random, strike: Strike) -> None:
    overrides = dict(rng.sample(sorted(DEFAULT_TEXTS.items()), rng.randint(1, 4)))
    key = rng.choice(list(overrides))
    if rng.random() < 0.1:
        overrides[mutate_text(rng, key, strike)] = "1"
    else:
        overrides[key] = mutate_text(rng, rng.choice((overrides[key], "512M", "5s", "10%")), strike)
    settings = refused(lambda: parse_overrides(overrides))
    if settings is not None:
        assert (
            OBJECT_BYTES_MIN <= settings.object_size <= OBJECT_BYTES_MAX
            and settings.policy.bandwidth.limit_at(rng.randrange(1440)) >= 0
        )
        assert 0 < settings.object_age <= 60 and settings.quota_bytes(1 << 30, 1 << 40) > 0


def try_policy(rng: random.Random, strike: Strike) -> None:
    """Whatever a store tells, a host follows something that it can live with; what a person writes is taken or not."""
    texts = dict(rng.sample(sorted(policy.DEFAULT_TEXTS.items()), rng.randint(1, 5)))
    texts |= rng.choice(({}, {"retention": "24h, 7d/1h, 30d/1d"}, {"bandwidth_limit": "08:00-18:00 20M; else 2M"}))
    key = rng.choice(list(texts))
    if rng.random() < 0.1:
        texts[mutate_text(rng, key, strike)] = texts.pop(key)
    else:
        texts[key] = mutate_text(rng, texts[key], strike)
    taken = refused(lambda: policy.parse_policy(texts))
    followed, errors = policy.follow_policy(texts)
    assert bool(errors) == (taken is None) and (taken is None or taken == followed)
    assert 1 <= followed.crash_interval_s <= 86400 and followed.application_interval_s < followed.retention_s
    assert 0 < followed.retention_s <= policy.RETENTION_S_MAX
    assert followed.bandwidth.limit_at(rng.randrange(1440)) >= 0
    assert policy.parse_policy(policy.followed_texts(texts)) == followed
    moment = refused(lambda: parse_moment(mutate_text(rng, rng.choice((*_TIMES, *_DURATIONS)), strike), 1 << 60))
    assert moment is None or isinstance(moment, int)


def try_boot(rng: random.Random, strike: Strike) -> None:
    """What a person writes is taken or not; what a host wrote is used or not. Either can be carried out."""
    text = rng.choice((_BOOT, encode_boot(read_boot(_BOOT, "f")).decode()))
    taken = refused(lambda: read_boot(mutate_text(rng, text, strike), "f"))
    if taken is not None:
        assert decode_boot(encode_boot(taken)) == taken
    document = refused(lambda: decode_boot(mutate_bytes(rng, text.encode(), text.encode(), strike)))
    for settings in filter(None, (taken, document)):
        if settings.qemu is not None:
            chosen = refused(lambda: chosen_drives(settings.qemu, {"root": "/a", "data": "/b"}))  # noqa: B023
            words = qemu_command("m", settings.qemu, chosen or [], is_test=True, accelerator="tcg")
            assert all(type(word) is str and "\0" not in word for word in words)
        assert settings.health is None or 0 < settings.health.timeout_s <= TIMEOUT_S_MAX


def try_token(rng: random.Random, strike: Strike) -> None:
    token = enrolment.Token(machine="web1", secret=rng.randbytes(32), fingerprint=rng.randbytes(32))
    text = enrolment.encode_token(token)
    if rng.random() < 0.5:
        text = mutate_text(rng, text, strike)
    else:
        packed = enrolment.decode_base64url(text.removeprefix("asrfs1."))
        text = "asrfs1." + enrolment.encode_base64url(mutate_bytes(rng, packed, packed, strike))
    said = refused(lambda: enrolment.decode_token(text))
    assert said is None or (is_label(said.machine) and len(said.secret) == len(said.fingerprint) == 32)


def _target(name: str, trial: Trial, weight: int) -> Target:
    @contextmanager
    def open_nothing(_scratch: Path) -> Iterator[Trial]:
        yield trial

    return Target(name, weight, open_nothing)


TARGETS = (
    _target("quantity", try_quantity, 18),
    _target("selector", try_selector, 18),
    _target("name", try_name, 18),
    _target("address", try_address, 12),
    _target("setting", try_setting, 12),
    _target("policy", try_policy, 12),
    _target("token", try_token, 18),
    _target("boot settings", try_boot, 12),
)
