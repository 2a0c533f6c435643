"""Changing policies: in one transaction the book's object, the catalog's rows, the number that hosts are told by.

The caller of what changes holds `lock_descriptions`, which `rebuild` holds, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import msgspec

from asrfs.errors import BadInputError, NotFoundError, RefusedError
from asrfs.model.configuration import POLICY_DEFAULT, TEXT_CHARACTERS_MAX
from asrfs.model.names import check_name
from asrfs.model.policy import DEFAULT_TEXTS, parse_policy, unknown_key
from replica_store.vault.books import Shelf
from replica_store.vault.policies import Assignment, PolicyBook, TargetKind, is_sound, read_book, write_book
from replica_store.vault.vault import Vault

POLICY_BOOKS = Shelf("policies/book-", b"asrfs policies 1", "policies", PolicyBook, is_sound)
_TAKEN_BACK = ("", "default")


def set_policy(vault: Vault, name: str, given: Mapping[str, str], wrong: Sequence[str] = ()) -> PolicyBook:
    """Set these keys of a policy, which is made if there is none; `default` or nothing takes one back.

    Raises BadInputError with all that is wrong, what is `wrong` already first; then nothing has changed.
    """
    check_name(name, "policy")

    def change(book: PolicyBook) -> PolicyBook:
        merged = {
            key: text.strip()
            for key, text in ((book.texts(name) or {}) | dict(given)).items()
            if text.strip().lower() not in _TAKEN_BACK
        }
        _check(merged, [key for key in given if key not in merged], wrong)
        return msgspec.structs.replace(book, policies=book.policies | {name: merged})

    return _change(vault, change)


def _check(texts: Mapping[str, str], taken_back: Sequence[str], wrong: Sequence[str]) -> None:
    """Raise BadInputError with all that is wrong, unknown keys among those that are taken back, too."""
    errors = [*wrong, *(unknown_key(key, DEFAULT_TEXTS) for key in taken_back if key not in DEFAULT_TEXTS)]
    try:
        parse_policy(texts)
    except BadInputError as error:
        errors.append(str(error))
    errors += [f"{key}: more than any value is long" for key, text in texts.items() if len(text) > TEXT_CHARACTERS_MAX]
    if errors:
        raise BadInputError("; ".join(errors))


def delete_policy(vault: Vault, name: str) -> PolicyBook:
    """Forget it; `default` goes back to its defaults. Raises NotFoundError, RefusedError while it is assigned."""

    def change(book: PolicyBook) -> PolicyBook:
        check_exists(book, name)
        if name != POLICY_DEFAULT and any(each.policy == name for each in book.assignments):
            raise RefusedError(f"policy {name} is assigned: see `replica-store policy show {name}`")
        return msgspec.structs.replace(
            book, policies={each: texts for each, texts in book.policies.items() if each != name}
        )

    return _change(vault, change)


def assign(vault: Vault, name: str | None, kind: TargetKind, target_id: str) -> PolicyBook:
    """Give a machine or group a policy, or with None take its own away. Raises NotFoundError."""

    def change(book: PolicyBook) -> PolicyBook:
        rest = [each for each in book.assignments if (each.kind, each.target_id) != (kind, target_id)]
        if name is not None:
            check_exists(book, name)
            rest.append(Assignment(kind, target_id, name))
        return msgspec.structs.replace(book, assignments=tuple(sorted(rest, key=lambda each: each.target_id)))

    return _change(vault, change)


def check_exists(book: PolicyBook, name: str) -> dict[str, str]:
    """What the policy sets. Raises NotFoundError."""
    check_name(name, "policy")
    texts = book.texts(name)
    if texts is None:
        raise NotFoundError(f"there is no policy {name!r}: see `replica-store policy show`")
    return texts


def _change(vault: Vault, change: Callable[[PolicyBook], PolicyBook]) -> PolicyBook:
    with vault.catalog.transaction():
        after = change_book(vault, change)
    POLICY_BOOKS.remove_old(vault.objects, vault.sealer)
    return after


def change_book(vault: Vault, change: Callable[[PolicyBook], PolicyBook]) -> PolicyBook:
    """What any change comes to: nothing if it leaves the book as it is. Inside a transaction."""
    before = read_book(vault.catalog)
    after = change(before)
    if after == before:
        return before
    newest, _ = POLICY_BOOKS.newest(vault.objects, vault.sealer)
    generation = vault.catalog.raise_configuration_generation(least=newest.generation if newest else 0)
    after = msgspec.structs.replace(after, generation=generation)
    POLICY_BOOKS.put(vault.objects, vault.sealer, after)
    write_book(vault.catalog, after)
    return after
