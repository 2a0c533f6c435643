"""What one host is told, put together from the catalog."""

from __future__ import annotations

from asrfs.errors import FormatError, IntegrityError
from asrfs.model.configuration import HostConfiguration, check_configuration
from replica_store.vault.catalog import Catalog
from replica_store.vault.groups import orders_of, read_groups
from replica_store.vault.policies import Assigned, PolicyBook, assigned, read_book


def configuration_of(catalog: Catalog, machine_id: str) -> HostConfiguration:
    """Blocks. Raises IntegrityError for rows that no host should be told."""
    book = read_book(catalog)
    policy = policy_of(catalog, book, machine_id).policy
    configuration = HostConfiguration(
        generation=book.generation,
        policy=policy,
        keys=book.texts(policy) or {},
        groups=orders_of(catalog, book, machine_id),
    )
    try:
        return check_configuration(configuration)
    except FormatError as error:
        raise IntegrityError(f"{catalog.path}: {error}") from None


def policy_of(catalog: Catalog, book: PolicyBook, machine_id: str) -> Assigned:
    """The policy that holds for a machine, and by what it has it. Blocks."""
    groups = {group.name: group.id for group in read_groups(catalog).of(machine_id)}
    return assigned(book, machine_id, groups)
