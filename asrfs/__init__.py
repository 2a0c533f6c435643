"""asrfs: disaster recovery for Linux disks. The protected host; the store is the package `replica_store`."""

__version__ = "0.1.0"
