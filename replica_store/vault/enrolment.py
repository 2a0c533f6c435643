"""One-time tokens, what becomes of one, and its end: a machine with a certificate and keys, until they are revoked.

A machine that enrols again, with a new token, gets a new certificate; the old one is good no longer, the keys and the
history stay. The order is: description object, and what the store says that it comes from (`arrivals.py`), then one
catalog transaction that uses the token up and makes the machine. If that transaction does not come about, nothing but
an unused description is left, and the next enrolment takes its keys from there. Revoking goes the same way, so that a
rebuilt catalog does not forget it.
"""

from __future__ import annotations

import base64
import os
import secrets
from dataclasses import replace
from hashlib import sha256

from asrfs.errors import AuthenticationError, BadInputError, IntegrityError, RefusedError
from asrfs.format.log_object import KEY_BYTES
from asrfs.model.clock import Clock
from asrfs.model.names import check_name, is_id
from asrfs.model.quantities import NS_PER_SECOND
from asrfs.transport.enrolment import (
    SECRET_BYTES,
    EnrolReply,
    EnrolRequest,
    Token,
    decode_base64url,
    encode_token,
)
from asrfs.transport.tls import sign_request
from replica_store.vault.arrivals import note_arrival
from replica_store.vault.groups import read_groups
from replica_store.vault.keys import MachineDescription, MachineKeys
from replica_store.vault.objects import ObjectMissingError
from replica_store.vault.rows import MachineRow, description_prefix
from replica_store.vault.vault import Vault

TOKEN_LIFETIME_S = 24 * 3600.0
TOKEN_LIFETIME_S_MAX = 366 * 24 * 3600.0
FIRST_EPOCH = 1


def make_token(vault: Vault, machine_name: str, clock: Clock, lifetime_s: float = TOKEN_LIFETIME_S) -> str:
    """A token for the machine of that name, whether it exists or not. Raises BadInputError, RefusedError."""
    check_name(machine_name, "machine")
    _check_no_group(vault, machine_name)
    if not 0 < lifetime_s <= TOKEN_LIFETIME_S_MAX:
        raise BadInputError("a token is good for more than nothing and at most 366 days")
    token = Token(
        machine=machine_name, secret=secrets.token_bytes(SECRET_BYTES), fingerprint=vault.keys.server_fingerprint()
    )
    now_ns = clock.time_ns()
    with vault.catalog.transaction():
        vault.catalog.change(
            "INSERT INTO tokens VALUES (?, ?, ?, ?, NULL)",
            (_digest(token.secret), machine_name, now_ns, now_ns + int(lifetime_s * NS_PER_SECOND)),
        )
    return encode_token(token)


def enrol(vault: Vault, request: EnrolRequest, clock: Clock, data_port: int) -> EnrolReply:
    """Use a token up. Raises BadInputError, AuthenticationError for the token, RefusedError for the name."""
    check_name(request.machine, "machine")
    if not is_id(request.machine_id):
        raise BadInputError("the machine's id is not 32 hexadecimal digits")
    try:
        secret_digest = _digest(decode_base64url(request.secret))
    except ValueError:
        raise BadInputError("the token's secret is not base64url") from None
    now_ns = clock.time_ns()
    authority = vault.keys.authority()
    with vault.catalog.transaction():
        _check_token(vault, secret_digest, request.machine, now_ns)
        _check_name_is_free(vault, request)
        certificate, identity = sign_request(
            authority, request.csr.encode(), request.machine, request.machine_id, now_ns
        )
        row, keys = _next_generation(vault, request, identity.serial, now_ns)
        if request.arrival is not None:
            note_arrival(vault, row, request.arrival)
        put_description(vault, row)
        vault.catalog.put_machine(row)
        vault.catalog.change("UPDATE tokens SET used_ns = ? WHERE secret_digest = ?", (now_ns, secret_digest))
    return EnrolReply(
        certificate=certificate.decode(),
        ca=authority.certificate.decode(),
        store_id=vault.id,
        server_name=vault.server_name,
        data_port=data_port,
        payload_key=base64.b64encode(keys.payload_key).decode(),
        index_key=base64.b64encode(keys.index_key).decode(),
    )


def revoke(vault: Vault, machine_name: str, clock: Clock) -> MachineRow:
    """From now on no certificate and no unused token of the machine is good. Its history and its keys stay.

    Whoever serves the vault looks every 5 s and then ends the machine's connection. The caller holds
    `lock_descriptions`. Raises NotFoundError.
    """
    now_ns = clock.time_ns()
    with vault.catalog.transaction():
        row = vault.machine(machine_name)
        known = newest_description(vault, row.id)
        row = replace(row, revoked=True, generation=max(row.generation, known.generation if known else 0) + 1)
        put_description(vault, row)
        vault.catalog.put_machine(row)
        vault.catalog.change(
            "UPDATE tokens SET expires_ns = ? WHERE machine_name = ? AND used_ns IS NULL AND expires_ns > ?",
            (now_ns, row.name, now_ns),
        )
    return row


def newest_description(vault: Vault, machine_id: str) -> MachineDescription | None:
    """What the vault's objects say of a machine, whether the catalog knows it or not. Raises IntegrityError."""
    found = []
    for name in vault.objects.list(description_prefix(machine_id)):
        try:
            sealed = vault.objects.read(name)
        except ObjectMissingError:
            continue
        found.append(vault.sealer.open_description(machine_id, sealed, vault.objects.where(name)))
    return max(found, key=lambda description: description.generation, default=None)


def _digest(secret: bytes) -> bytes:
    return sha256(secret).digest()


def _check_token(vault: Vault, secret_digest: bytes, machine_name: str, now_ns: int) -> None:
    rows = vault.catalog.select(
        "SELECT machine_name, expires_ns, used_ns FROM tokens WHERE secret_digest = ?", (secret_digest,)
    )
    if not rows:
        raise AuthenticationError("the token is not one of this store: make one here with `replica-store token`")
    ((name, expires_ns, used_ns),) = rows
    if name != machine_name:
        raise AuthenticationError(f"the token is for machine {name}, not for {machine_name}")
    if used_ns is not None:
        raise AuthenticationError("the token has been used: make a new one with `replica-store token`")
    if not isinstance(expires_ns, int):
        raise IntegrityError(
            f"{vault.catalog.path}: a token's row is damaged: make a new one with `replica-store token`"
        )
    if now_ns >= expires_ns:
        raise AuthenticationError("the token has expired: make a new one with `replica-store token`")


def _check_no_group(vault: Vault, machine_name: str) -> None:
    """A policy is given to a machine or a group by its name: no two of them have the same."""
    if any(group.name == machine_name for group in read_groups(vault.catalog).groups):
        raise RefusedError(f"there is a group {machine_name}: a machine needs another name")


def _check_name_is_free(vault: Vault, request: EnrolRequest) -> None:
    """One name, one machine: the history under a name is never continued by another machine."""
    _check_no_group(vault, request.machine)
    for machine in vault.catalog.machines():
        if machine.name == request.machine and machine.id != request.machine_id:
            raise RefusedError(
                f"the store has another machine named {machine.name} (id {machine.id}, yours is {request.machine_id}): "
                "enrol from its own state directory, or make yours under another name with `asrfs init`"
            )
        if machine.id == request.machine_id and machine.name != request.machine:
            raise RefusedError(
                f"the store knows this machine as {machine.name}, not as {request.machine}: "
                f"make a token with `replica-store token {machine.name}`"
            )


def _next_generation(vault: Vault, request: EnrolRequest, serial: str, now_ns: int) -> tuple[MachineRow, MachineKeys]:
    known = newest_description(vault, request.machine_id)
    if known is None:
        keys = MachineKeys(os.urandom(KEY_BYTES), os.urandom(KEY_BYTES))
        sealed_keys = vault.sealer.seal_keys(request.machine_id, keys)
    else:
        sealed_keys = known.sealed_keys
        keys = vault.sealer.open_keys(request.machine_id, sealed_keys)
    row = vault.catalog.machine_by_id(request.machine_id)
    return (
        MachineRow(
            id=request.machine_id,
            name=request.machine,
            epoch=max(row.epoch if row else FIRST_EPOCH, known.epoch if known else FIRST_EPOCH),
            serial=serial,
            revoked=False,
            enrolled_ns=now_ns,
            generation=(known.generation if known else 0) + 1,
            sealed_keys=sealed_keys,
        ),
        keys,
    )


def put_description(vault: Vault, row: MachineRow) -> None:
    """Have an object say what the row does. Inside the transaction that puts the row."""
    description = MachineDescription(
        id=row.id,
        name=row.name,
        epoch=row.epoch,
        serial=row.serial,
        revoked=row.revoked,
        enrolled_ns=row.enrolled_ns,
        generation=row.generation,
        sealed_keys=row.sealed_keys,
    )
    name = f"{description_prefix(row.id)}{secrets.token_hex(8)}.obj"
    vault.objects.put(name, [vault.sealer.seal_description(description)])
